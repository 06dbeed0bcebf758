"""The ``compat`` command: outputs of ``--compat relex`` beside those of the authors' own scripts.

Both predict from the first steps of the trajectory that comes with the package, with the same
settings, and what they write is compared weight by weight, as bits. Beside it, as many weights as
the same extrapolation without ``--compat`` has the same: how much the authors' way differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import safetensors.torch
import torch

from benchmarks.commands import run, work_directory
from benchmarks.peer_programs import relex_scripts
from benchmarks.processes import measure
from benchmarks.report import Report, output_options, publish
from relex_stream.demo.run import HISTORY_STEPS, prepare
from relex_stream.specs import NoProgress

TARGET = 60


@dataclass(frozen=True)
class Case:
    """The same settings in their words and in ours."""

    name: str
    theirs: Mapping[str, object] = field(default_factory=dict)
    ours: tuple[object, ...] = ()
    only_compat: tuple[object, ...] = ()


CASES = (
    Case("rank 1, line"),
    Case("rank 5, line", {"rank": 5}, ("--rank", 5)),
    Case("last 10 checkpoints", {"window": 10}, ("--window", 10)),
    Case("parabola", {"fit_method": "polynomial", "degree": 2}, ("--fit", "polynomial:2")),
    Case("sinusoid", {"fit_method": "sin_fft"}, ("--fit", "sinusoid")),
    Case(
        "fitted again every 5 steps",
        {"window": 20, "future_extrapolation_window": 5},
        ("--window", 20, "--refit-every", 5),
    ),
    Case(
        "steps doubled",
        {"target_step_scaling_factor": 2},
        only_compat=("--step-scale", 2),
    ),
)


def equal_weights(ours: Path, theirs: Path) -> tuple[int, int]:
    """Return how many weights of two models have the same bits, and how many there are.

    Raises
    ------
    ValueError
        If they do not have the same tensors, but for those tied to another.
    """
    models = [_load(path) for path in (ours, theirs)]
    if (models[0].keys() ^ models[1].keys()) - {"lm_head.weight"}:
        raise ValueError(f"{ours} and {theirs} have other tensors")
    equal = total = 0
    for name in models[0].keys() & models[1].keys():
        one, other = (model[name] for model in models)
        equal += int((one == other).sum())
        total += one.size
    return equal, total


def _load(directory: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(file).items():
            found[name] = tensor.to(torch.bfloat16).view(torch.int16).numpy()
    return found


@click.command("compat")
@click.option(
    "--relex",
    "relex_path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help=f"Checkout of github.com/weizhepei/RELEX at {relex_scripts.COMMIT}.",
)
@click.option(
    "--relex-python",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="Python that has what its scripts import.",
)
@click.option("--svd", type=click.Choice(["exact", "randomized"]), default="exact")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to put checkpoints and outputs meanwhile.",
)
@output_options
def command(
    relex_path: Path,
    relex_python: Path,
    svd: str,
    work: Path | None,
    json_path: Path | None,
    *,
    markdown: bool,
) -> None:
    """Compare --compat relex with the authors' scripts, on the trajectory that is shipped."""
    report = Report(
        "Weights with the same bits as in the outputs of RELEX's scripts",
        "compat",
        {"svd": svd, "history": HISTORY_STEPS, "target": TARGET, "scripts": relex_scripts.COMMIT},
    )
    with work_directory(work) as place:
        prepare(place, workers=None, progress=NoProgress())
        deltas = place / "deltas"
        script = relex_scripts.deltas_command(
            relex_python.absolute(),
            relex_path,
            base=place / "base",
            checkpoints=place / "checkpoints",
            deltas=deltas,
        )
        measure("deltas", script, env=relex_scripts.ENVIRONMENT)
        for number, case in enumerate(CASES):
            theirs = place / f"theirs-{number}"
            script = relex_scripts.extrapolation_command(
                relex_python.absolute(),
                relex_path,
                base=place / "base",
                deltas=deltas,
                out=theirs,
                history_steps=HISTORY_STEPS,
                target_steps=[TARGET],
                options=case.theirs,
            )
            measure(case.name, script, env=relex_scripts.ENVIRONMENT)
            (model,) = (path for path in theirs.rglob("*") if re.fullmatch(r"step_?\d+", path.name))
            row: dict[str, object] = {"case": case.name}
            compat = ("--compat", "relex", *case.only_compat)
            for name, options in (("with_compat", compat), ("without", ())):
                out = place / f"{name}-{number}"
                asked = ("--target-step", TARGET, "--svd", svd, *case.ours, *options)
                run(name, "extrapolate", place / "store", out, *asked)
                equal, total = equal_weights(out, model)
                row[f"{name}_differing"] = total - equal
            still, total = equal_weights(model, place / "base")
            report.add({**row, "predicted_to_move": total - still})
    report.note(f"Of {total} weights; steps 1 to {HISTORY_STEPS}, extrapolated to {TARGET}.")
    publish(report, json_path=json_path, markdown=markdown)
