"""Files from recipes: literal bytes, tensors and boxes of them, wherever blocks end."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relex_stream.assemble import Assembly
from relex_stream.blocks import BlockOf, Strip
from relex_stream.errors import CorruptionError
from relex_stream.specs import Box
from relex_stream.store.records import FileEntry, RecipePart, place_tensors
from relex_stream.writer import OutputDirectory

BLOCK_BYTES = 16
SHAPES = {"a": ("F32", (3, 4, 5)), "b": ("F32", (7,)), "ids": ("I64", (4, 3))}


class FakeStore:
    """What an assembly asks of a store: tensors, recipes by the entry's path, and blobs."""

    def __init__(self, recipes: dict[str, list[RecipePart]], blobs: dict[str, bytes]) -> None:
        described = [
            {
                "name": name,
                "kind": "constant" if dtype == "I64" else "tracked",
                "base_dtype": "BF16" if dtype == "F32" else dtype,
                "dtype": dtype,
                "shape": shape,
                "tied_to": None,
                "sketch_row": -1,
            }
            for name, (dtype, shape) in SHAPES.items()
        ]
        described.append(described[0] | {"name": "head", "kind": "tied", "tied_to": "a"})
        placed, _ = place_tensors(described, BLOCK_BYTES)
        self.tensors = {tensor.name: tensor for tensor in placed}
        self.manifest = self
        self._recipes = recipes
        self._blobs = blobs

    def recipe(self, entry: FileEntry) -> list[RecipePart]:
        return list(self._recipes[entry.path])

    def blob(self, name: str) -> bytes:
        return self._blobs[name]

    def blob_size(self, name: str) -> int:
        return len(self._blobs[name])

    def literals(self, entry: FileEntry) -> bytes:
        assert entry.blob is not None
        return self._blobs[entry.blob]
