"""Pictures for the documentation, from stores.

Run it as ``python -m benchmarks.pictures STORE OUT.png``: what the checkpoints took on the disk and
what the store takes, step by step.
"""

from __future__ import annotations

from pathlib import Path

import click
import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

import relex_stream as rs


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(store: Path, out: Path) -> None:
    """Draw the bytes of checkpoints and of STORE against the number of checkpoints."""
    info = rs.info(store)
    count = np.arange(1, len(info.steps) + 1)
    checkpoints = np.cumsum([step.source_bytes for step in info.steps]) / 2**20
    per_step = [step.frame_bytes + step.record_bytes for step in info.steps]
    # What no step alone accounts for: array metadata, side files, the manifest.
    common = info.store_bytes - info.base_bytes_stored - sum(per_step)
    stored = (common + np.cumsum(per_step)) / 2**20
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot(count, checkpoints, color="#b04a3a", label="checkpoints")
    axes.plot(count, stored, color="#2a6f8f", label="delta store")
    for values, color in ((checkpoints, "#b04a3a"), (stored, "#2a6f8f")):
        axes.annotate(
            f"{values[-1]:,.0f} MiB" if values[-1] >= 100 else f"{values[-1]:.1f} MiB",
            (count[-1], values[-1]),
            xytext=(-4, -14),
            textcoords="offset points",
            ha="right",
            color=color,
        )
    axes.set_yscale("log")
    axes.set_xlabel("checkpoints kept")
    axes.set_ylabel("MiB on disk")
    axes.set_title(
        f"{info.weights / 1e6:.1f} M bf16 weights: {checkpoints[-1] / stored[-1]:.0f} times "
        "smaller, every step bit for bit",
        fontsize=11,
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
