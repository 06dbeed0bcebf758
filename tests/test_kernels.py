"""Kernels that are loaded from a cache must be those of the sources as they are."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import relex_stream
from relex_stream.kernels import SOURCES

PACKAGE = Path(relex_stream.__file__).parent


def test_every_module_with_compiled_code_counts():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                decorators = {ast.unparse(d).partition("(")[0] for d in node.decorator_list}
                if decorators & {"kernel", "njit", "intrinsic"}:
                    found.add(path.relative_to(PACKAGE).with_suffix("").as_posix())
    # pages has one function that scan compiles itself; kernels says how.
    assert found | {"pages", "kernels"} == set(SOURCES)


def test_a_change_in_one_module_reaches_kernels_of_another(tmp_path):
    copy = tmp_path / "relex_stream"
    copy.mkdir()
    for name in (*SOURCES, "errors"):
        shutil.copy(PACKAGE / f"{name}.py", copy)
    (copy / "__init__.py").touch()
    code = (
        "import numpy as np\n"
        "from relex_stream.ulp import find_changes\n"
        "a, b = np.zeros(3, np.uint16), np.array([0, 5, 0], np.uint16)\n"
        "masks, positions = np.zeros((2, 1), np.uint64), np.zeros(3, np.uint32)\n"
        "found = find_changes(a, b, masks, positions, np.zeros(3, np.uint16))\n"
        "print(found, sum(find_changes.stats.cache_hits.values()))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NUMBA_CACHE_DIR", None)

    def run() -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return [int(word) for word in done.stdout.split()]

    assert run() == [1, 0]
    assert run() == [1, 1]  # from the cache
    # What find_changes is compiled from lies in intrinsics.py; ulp.py stays as it is.
    path = copy / "intrinsics.py"
    text = path.read_text()
    assert '"!=",' in text
    path.write_text(text.replace('"!=",', '"==",'))
    # The masked comparison is for 64 elements; so few are compared one by one: the answer stays,
    # but the old machine code must not be what gave it.
    assert run() == [1, 0]
