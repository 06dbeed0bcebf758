"""A mixture of experts that is small, yet of many blocks and files."""

from __future__ import annotations

from benchmarks.scaling.models import Model, mixture_shapes

SMALL = Model(
    "small",
    mixture_shapes(
        hidden=1024,
        inner=256,
        dense_inner=2048,
        layers=3,
        experts=8,
        heads=4,
        vocabulary=4000,
    ),
    shard_bytes=20_000_000,
)
