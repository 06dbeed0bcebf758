"""The two documents that go with an extrapolated model: its model card and its record."""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from relex_stream._version import __version__
from relex_stream.methods import AUTO
from relex_stream.store import Store
from relex_stream.store.read import describe_steps
from relex_stream.summaries import SubspaceFigures


def base_model_name(store: Store) -> str:
    """Return what the base calls itself: a hub name in its config, else its directory's name."""
    for entry in store.manifest.base_files:
        if entry.path == "config.json" and entry.blob is not None:
            try:
                name = json.loads(store.blob(entry.blob)).get("_name_or_path", "")
            except (ValueError, AttributeError):
                break
            if isinstance(name, str) and name.count("/") == 1 and not name.startswith(("/", ".")):
                return name
    return store.manifest.base_hint.rstrip("/").rsplit("/", 1)[-1]


def record(
    store: Store,
    *,
    settings: dict[str, Any],
    facts: dict[str, Any],
    figures: Sequence[SubspaceFigures],
    files: Sequence[str],
) -> bytes:
    """Return ``relex_stream.json``: every parameter, the figures of every subspace, all `files`.

    With the store it names (by the checksums of its records) it is enough to repeat the output.
    """
    rows = len(settings["history"])
    document = {
        "relex_stream": __version__,
        **facts,
        **settings,
        "store": {
            "manifest_crc32c": store.head.manifest.crc32c,
            "last_record_crc32c": store.head.commits[rows - 1].crc32c,
            "seed": store.manifest.seed,
        },
        "base_model": base_model_name(store),
        "files": list(files),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    if figures:
        document["subspaces"] = {
            figure.name: {
                "singular_values": figure.singular_values,
                "explained_variance": figure.explained_variance,
                "r2": figure.r2,
            }
            for figure in figures
        }
    return (json.dumps(document, indent=1) + "\n").encode()


def model_card(
    store: Store,
    *,
    settings: dict[str, Any],
    facts: dict[str, Any],
    median_explained_variance: float | None,
    median_r2: float | None,
) -> bytes:
    """Return the README.md of a model.

    Parameters
    ----------
    store : Store
    settings, facts : dict
        What it has in common with others of its job, and what it is (`methods.Product.facts`).
    median_explained_variance, median_r2 : float, optional
    """
    base = base_model_name(store)
    title, text = _description(settings, facts)
    text = _wrapped(f"These weights were not trained. They are {text}")
    measured = ""
    if median_explained_variance is not None:
        measured = (
            f"Median over {_GROUP_NAMES[settings['group_by']]}: rank {facts['rank']} explains "
            f"{median_explained_variance:.1%} of the squared weight change in the history"
        )
        if median_r2 is not None:
            measured += f"; R2 of the fit {median_r2:.4f}"
        measured += (
            ". Neither says that the model is any good: evaluate it beside the last observed "
            "checkpoint."
        )
        measured = "\n" + _wrapped(measured) + "\n"
    if settings.get("include") or settings.get("exclude"):
        source = "base" if settings["excluded_from"] == "base" else "last checkpoint"
        measured += f"\nTensors that were left out are those of the {source}.\n"
    return f"""---
base_model: {json.dumps(base)}
library_name: transformers
tags:
- relex
- extrapolated-weights
---

# {base}, {title}

{text}
{measured}
Made with relex-stream {__version__}; `relex_stream.json` beside this file has every parameter.
""".encode()


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


_GROUP_NAMES = {
    "tensor": "tensors",
    "run": "runs of tensors",
    "layer": "layers",
    "module": "modules",
    "model": "the model",
}


def _description(settings: dict[str, Any], facts: dict[str, Any]) -> tuple[str, str]:
    """Return what a model is, as a title and as a paragraph."""
    steps = describe_steps(tuple(settings["history"]))
    if "recipe" in facts:
        weights = ", ".join(
            f"{'base' if step == 'base' else f'step {step}'} {weight:.6g}"
            for step, weight in facts["weights"].items()
        )
        text = f"a weighted sum of checkpoints of a training run ({facts['source']}): {weights}."
        return f"checkpoints combined by {facts['recipe']}", text
    subspace = f"the rank-{facts['rank']} subspace of the weight deltas of " + (
        "the model" if settings["group_by"] == "model" else f"each {settings['group_by']}"
    )
    if "step" in facts:
        what = f"a {settings['fit']} fit of its coefficients" if settings["fitted"] else "that step"
        text = (
            f"step {facts['step']} of a training run, {what} in {subspace}, from {steps} of it "
            "(RELEX, arXiv 2605.21468)."
        )
        return f"step {facts['step']} in a subspace of rank {facts['rank']}", text
    damping = facts.get("damping_chosen", facts["damping"])
    times = "" if damping == 1 else f", times {damping:.4g},"
    if facts["damping"] == AUTO:
        times = f", times {damping:.4g} (chosen by forecasts of the end of the history),"
    onto = (
        f"the predicted delta{times} is added to the base model"
        if facts["anchor"] == "base"
        else f"the predicted change since then{times} is added to the last checkpoint"
    )
    text = (
        f"a prediction of the checkpoint at step {facts['target_step']} of a training run, from "
        f"{steps} of it: {subspace}, and a {settings['fit']} fit of its "
        f"coefficients over the steps (RELEX, arXiv 2605.21468); {onto}."
    )
    return f"extrapolated to step {facts['target_step']}", text
