"""The two documents that go with an extrapolated model: its model card and its record."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from relex_stream._version import __version__
from relex_stream.store import Store
from relex_stream.store.read import describe_steps
from relex_stream.summaries import TensorFigures


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
    target_step: int,
    figures: Sequence[TensorFigures],
    files: Sequence[str],
) -> bytes:
    """Return ``relex_stream.json``: every parameter, the figures of every tensor, all `files`.

    With the store it names (by the checksums of its records) it is enough to repeat the output.
    """
    rows = len(settings["history"])
    document = {
        "relex_stream": __version__,
        "method": "RELEX (arXiv 2605.21468)",
        "target_step": target_step,
        **settings,
        "store": {
            "manifest_crc32c": store.head.manifest.crc32c,
            "last_record_crc32c": store.head.commits[rows - 1].crc32c,
            "seed": store.manifest.seed,
        },
        "base_model": base_model_name(store),
        "files": list(files),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "tensors": {
            figure.name: {
                "singular_values": figure.singular_values,
                "explained_variance": figure.explained_variance,
                "r2": figure.r2,
            }
            for figure in figures
        },
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def model_card(
    store: Store,
    *,
    settings: dict[str, Any],
    target_step: int,
    median_explained_variance: float | None,
    median_r2: float | None,
) -> bytes:
    """Return the README.md of an extrapolated model."""
    history = tuple(settings["history"])
    base = base_model_name(store)
    measured = ""
    if median_explained_variance is not None and median_r2 is not None:
        measured = (
            f"\nMedian over tensors: rank {settings['rank']} explains "
            f"{median_explained_variance:.1%} of the squared weight change in the history; "
            f"R2 of the line {median_r2:.4f}. Neither says that the extrapolation helps: "
            "evaluate it beside the last observed checkpoint.\n"
        )
    return f"""---
base_model: {json.dumps(base)}
library_name: transformers
tags:
- relex
- extrapolated-weights
---

# {base}, extrapolated to step {target_step}

These weights were not trained. They are a prediction of the checkpoint at step {target_step} of a
training run, from {describe_steps(history)} of it: per tensor, the rank-{settings["rank"]}
subspace of the weight deltas and a {settings["fit"]} fit of its coefficients over the steps
(RELEX, arXiv 2605.21468), added to the base model `{base}`.
{measured}
Made with relex-stream {__version__}; `relex_stream.json` beside this file has every parameter.
""".encode()
