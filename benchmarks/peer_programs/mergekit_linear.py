"""How mergekit is called for its nearest job: a linear merge of the same checkpoints.

The weights are those of a line through every single weight, evaluated at the target: what RELEX is
without its subspace. They are the same for all tensors, so that one pass over the checkpoints and
no statistics are needed; mergekit has the easier job. It is LGPL, and not part of this project:
whoever compares says where its program is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Everything is on the disk; without these, time goes to asking the network."""


def line_weights(steps: Sequence[int], target_step: int) -> list[float]:
    """Return what each step weighs in the line's value at the target; they add up to 1.

    >>> line_weights([1, 2, 3], 4)
    [-0.6666666666666667, 0.3333333333333333, 1.3333333333333333]
    """
    mean = sum(steps) / len(steps)
    spread = sum((step - mean) ** 2 for step in steps)
    return [1 / len(steps) + (target_step - mean) * (step - mean) / spread for step in steps]


def config_text(
    checkpoints: Sequence[tuple[int, Path]], *, target_step: int, dtype: str = "bfloat16"
) -> str:
    """Return the merge as mergekit's YAML (of which JSON is a part)."""
    weights = line_weights([step for step, _ in checkpoints], target_step)
    models = [
        {"model": str(path.resolve()), "parameters": {"weight": weight}}
        for (_, path), weight in zip(checkpoints, weights, strict=True)
    ]
    config = {
        "merge_method": "linear",
        "dtype": dtype,
        "parameters": {"normalize": False},
        "models": models,
    }
    return json.dumps(config, indent=1) + "\n"


def command(mergekit_yaml: Path, config: Path, out: Path) -> list[str]:
    """Return the command; tokenizers are left out, since synthetic models have none."""
    return [str(mergekit_yaml), str(config), str(out), "--no-copy-tokenizer", "--quiet"]
