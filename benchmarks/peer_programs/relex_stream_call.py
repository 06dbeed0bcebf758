"""A relex-stream call with imports, start-up and the loading of kernels taken off the time.

A tiny trajectory is built and extrapolated first, through the same functions. The last line it
prints is JSON: the seconds of the call itself.

Run it as ``python -m benchmarks.peer_programs.relex_stream_call build BASE CHECKPOINTS STORE`` or
``... extrapolate STORE OUT --target-step N``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import relex_stream as rs
from benchmarks.trajectory import PRESETS, write_steps


def warm_up() -> None:
    """Build and extrapolate small models of both widths, on both routes."""
    tiny = PRESETS["tiny"]
    # Large enough an embedding for a sketch of its own.
    preset = replace(tiny, config={**tiny.config, "vocab_size": 1024})
    with tempfile.TemporaryDirectory() as name:
        for dtype in ("bf16", "fp32"):
            folder = Path(name, dtype)
            write_steps(folder, preset, [0, 1, 2, 3], dtype=dtype)
            rs.build_store(folder / "base", folder / "checkpoints", folder / "store")
            rs.extrapolate(folder / "store", folder / "out", target_steps=[6, 9])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    calls = parser.add_subparsers(dest="call", required=True)
    build = calls.add_parser("build")
    build.add_argument("base", type=Path)
    build.add_argument("checkpoints", type=Path)
    build.add_argument("store", type=Path)
    extrapolate = calls.add_parser("extrapolate")
    extrapolate.add_argument("store", type=Path)
    extrapolate.add_argument("out", type=Path)
    extrapolate.add_argument("--target-step", type=int, action="append", required=True)
    for one in (build, extrapolate):
        one.add_argument("--workers", type=int)
    options = parser.parse_args()
    warm_up()
    started = time.perf_counter()
    if options.call == "build":
        rs.build_store(options.base, options.checkpoints, options.store, workers=options.workers)
    else:
        rs.extrapolate(
            options.store, options.out, target_steps=options.target_step, workers=options.workers
        )
    print(json.dumps({"call_s": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
