"""A user's command is run, waited for, and cannot do harm by failing."""

from __future__ import annotations

import sys
import time

import pytest

from relex_stream.errors import RelexStreamWarning
from relex_stream.hooks import run_hook

PYTHON = sys.executable
WHAT = "step 5: --on-commit"


def test_it_is_given_its_arguments_and_variables(tmp_path):
    out = tmp_path / "out put; $HOME"
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['STEP'] + os.environ['PATH'])"
    run_hook([PYTHON, "-c", code, str(out)], {"STEP": "5"}, what=WHAT)
    assert out.read_text().startswith("5")
    assert len(out.read_text()) > 1


def test_failure_is_a_warning():
    with pytest.warns(RelexStreamWarning, match=rf"^{WHAT}: .* failed with exit status 3"):
        run_hook([PYTHON, "-c", "raise SystemExit(3)"], {}, what=WHAT)
    with pytest.warns(RelexStreamWarning, match="no-such-program cannot be started: No such file"):
        run_hook(["no-such-program"], {}, what=WHAT)


def test_what_takes_too_long_is_killed_with_its_children(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(0.6); open({str(alive)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.warns(RelexStreamWarning, match=r"was killed: it took longer than 0\.3 s"):
        run_hook([PYTHON, "-c", code], {}, timeout_s=0.3, what=WHAT)
    time.sleep(0.6)
    assert not alive.exists()


def test_its_output_goes_where_messages_go(capfd):
    run_hook([PYTHON, "-c", "print('hello')"], {}, what=WHAT)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "hello\n")
