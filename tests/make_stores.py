"""Stores with options that the public function does not have: small blocks, sketches of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relex_stream import build
from relex_stream.summaries import BuildSummary


def build_store(base: Path, checkpoints: Path, store: Path, **options: Any) -> BuildSummary:
    """Build or append; all that `options` does not name is as by default."""
    settings: dict[str, Any] = {
        "pattern": None,
        "steps": None,
        "memory_limit": None,
        "workers": None,
        "include_base": False,
        "allow_nonfinite": False,
        "seed": 0,
        "progress": None,
    }
    return build.build(base, checkpoints, store, **settings | options)
