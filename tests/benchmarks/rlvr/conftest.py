"""A run that ends in seconds."""

from __future__ import annotations

import pytest

from benchmarks.rlvr.settings import Settings

TINY = Settings(
    task="product",
    seed=3,
    hidden_size=32,
    intermediate_size=32,
    layers=1,
    supervised_target=0.1,
    steps=10,
    stored_steps="2:10:2",
    problems_per_step=32,
    samples_per_problem=16,
    # At a usual rate so few steps would change nothing.
    learning_rate=1e-3,
    evaluation_problems=50,
)


@pytest.fixture(scope="session")
def tiny() -> Settings:
    return TINY
