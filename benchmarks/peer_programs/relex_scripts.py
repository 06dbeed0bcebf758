"""How the scripts of the RELEX authors (github.com/weizhepei/RELEX) are called, unchanged.

They are not part of this project: whoever compares says where a checkout is, and which Python has
what the scripts import (torch, transformers, accelerate, scipy, tqdm).

Besides, this file is a program that runs one of them with imports and start-up taken off the time.
``PYTHON relex_scripts.py SCRIPT ARGUMENTS...`` first imports what the script imports, and the
model's classes; then it runs the file as it is. The last line it prints is JSON: the seconds of
that. It runs in their Python, and so needs nothing but the standard library itself.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMIT = "e4548ba"
"""The commit that the arguments below were written for."""

DELTAS_SCRIPT = "precompute_deltas.py"
EXTRAPOLATION_SCRIPT = "svd_extrapolation.py"

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Everything is on the disk; without these, time goes to asking the network."""

_TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}
_TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}


def script_in(relex: Path, name: str) -> Path:
    """Return a script of a checkout.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    """
    script = relex / "scripts" / name
    if not script.is_file():
        raise FileNotFoundError(f"{relex} is no checkout of RELEX: scripts/{name} is not there")
    return script


def deltas_command(
    python: Path | str, relex: Path, *, base: Path, checkpoints: Path, deltas: Path
) -> list[str]:
    """Return the command that turns checkpoints into their files of fp16 deltas."""
    return [
        str(python),
        str(script_in(relex, DELTAS_SCRIPT)),
        f"--base_model={base}",
        f"--checkpoint_dir={checkpoints}",
        f"--output_dir={deltas}",
    ]


def extrapolation_command(
    python: Path | str,
    relex: Path,
    *,
    base: Path,
    deltas: Path,
    out: Path,
    history_steps: int,
    target_steps: Sequence[int],
    options: Mapping[str, object] | None = None,
) -> list[str]:
    """Return the command that predicts from the deltas: rank 1, a line, as in their README.

    Without their cache of decompositions, which costs time in a first run. The outputs are
    ``out/stepN``. `options` are others of theirs, by name.
    """
    chosen: dict[str, object] = {
        "rank": 1,
        "fit_method": "linear",
        # Otherwise it doubles the steps if the base's path has a certain name in it.
        "target_step_scaling_factor": 1,
    }
    chosen |= options or {}
    return [
        str(python),
        str(script_in(relex, EXTRAPOLATION_SCRIPT)),
        f"--base_model={base}",
        f"--delta_dir={deltas}",
        f"--output_dir={out}",
        f"--history_steps={history_steps}",
        "--mode=extrapolate",
        f"--target_steps={','.join(map(str, target_steps))}",
        *(f"--{name}={value}" for name, value in chosen.items()),
    ]


def without_start_up(command: Sequence[str]) -> list[str]:
    """Return the command that runs the same with imports and start-up taken off the time."""
    python, script, *arguments = command
    return [python, __file__, script, *arguments]


def link_base(base: Path, directory: Path) -> Path:
    """Make a directory of links to a base's files, with a tokenizer, which the script wants.

    A base that has one keeps it; a synthetic one gets a stand-in of one word.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file():
            (directory / file.name).symlink_to(file.resolve())
    if not (directory / "tokenizer_config.json").exists():
        for name, content in (
            ("tokenizer.json", _TOKENIZER),
            ("tokenizer_config.json", _TOKENIZER_CONFIG),
        ):
            (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


def preload(base: str) -> None:
    """Import what the scripts import, and what transformers imports for this model."""
    for name in ("accelerate", "safetensors.torch", "scipy.optimize", "tqdm"):
        importlib.import_module(name)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(base)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))


def main() -> None:
    os.environ.update(ENVIRONMENT)
    script, arguments = sys.argv[1], sys.argv[2:]
    [base] = [one.split("=", 1)[1] for one in arguments if one.startswith("--base_model=")]
    preload(base)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    started = time.perf_counter()
    runpy.run_path(script, run_name="__main__")
    call_s = time.perf_counter() - started
    print(json.dumps({"call_s": call_s}))


if __name__ == "__main__":
    main()
