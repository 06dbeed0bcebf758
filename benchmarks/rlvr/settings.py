"""What decides the course of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what comes out, besides library versions and the machine.

    `stored_steps` are those of which the store is built, as `relex_stream.build_store` takes them.
    """

    task: str = "addition"
    seed: int = 0
    hidden_size: int = 96
    intermediate_size: int = 192
    layers: int = 3
    heads: int = 4
    key_value_heads: int = 2
    initial_deviation: float = 0.125
    supervised_target: float = 0.5
    supervised_steps_limit: int = 1000
    supervised_batch: int = 128
    supervised_learning_rate: float = 3e-3
    steps: int = 120
    stored_steps: str = "2:120:2"
    problems_per_step: int = 256
    samples_per_problem: int = 16
    learning_rate: float = 8e-6
    adam_betas: tuple[float, float] = (0.9, 0.999)
    gradient_norm_limit: float = 1.0
    evaluation_problems: int = 2000
    threads: int = 1
