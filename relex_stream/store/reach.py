"""What HEAD reaches, and what of a key is to be kept; nothing here touches a disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from relex_stream.specs import STEP_GROUP
from relex_stream.store import arrays
from relex_stream.store.read import Store

_RECORD = re.compile(r"commits/(manifest|[0-9]+)-[0-9a-f]{8}\.safetensors")
_BLOB = re.compile(r"blobs/[0-9a-f]{64}")
_PARTIAL = re.compile(
    rf"(HEAD|((deltas|base)/([^/]+/)?)?zarr\.json|(deltas|base)/[^/]+/c\.[0-9.]+|{_BLOB.pattern})"
    r"\.partial"
)
"""What files that are replaced as a whole are called until they are."""


@dataclass(frozen=True)
class Reach:
    """What HEAD reaches of a store; of one without a HEAD, nothing.

    Attributes
    ----------
    named : set of str
        Keys of records and blobs.
    chunks : dict of str to int
        Committed bytes of each chunk, by key.
    arrays : dict of str to set of str
        Directories of arrays, by group.
    """

    named: set[str] = field(default_factory=set)
    chunks: dict[str, int] = field(default_factory=dict)
    arrays: dict[str, set[str]] = field(
        default_factory=lambda: {arrays.DELTAS: set(), arrays.BASE: set()}
    )

    @classmethod
    def of(cls, store: Store) -> Reach:
        """Follow a store's HEAD."""
        names = (store.head.manifest, *store.head.commits)
        blobs = store.blobs_of(store.manifest.base_files)
        for row in range(len(store.steps)):
            blobs |= store.blobs_of(store.commit(row).files)
        return cls(
            {name.path for name in names} | {f"blobs/{name}" for name in blobs},
            dict(_committed_chunks(store)),
            {group: _array_directories(store, group) for group in (arrays.DELTAS, arrays.BASE)},
        )

    def kept_bytes(self, key: str) -> int | None:
        """Return how many bytes of a key are to be kept; None for all of them.

        Only keys of the kinds a store makes are ever given up.
        """
        if _RECORD.fullmatch(key) or _BLOB.fullmatch(key):
            return None if key in self.named else 0
        if _PARTIAL.fullmatch(key):
            return 0
        *directory, name = key.split("/")
        group = directory[0] if directory else ""
        if group not in self.arrays or len(directory) > 2:
            return None
        if len(directory) == 1:
            return (
                0
                if name == "zarr.json" and group == arrays.BASE and not self.arrays[group]
                else None
            )
        if name.startswith("c."):
            return self.chunks.get(key, 0)
        stale = name == "zarr.json" and directory[1] not in self.arrays[group]
        return 0 if stale else None


def _array_directories(store: Store, group: str) -> set[str]:
    manifest = store.manifest
    return {
        arrays.array_name(tensor.name)
        for tensor in manifest.tensors
        if (tensor.kind == "tracked" if group == arrays.DELTAS else tensor.kind != "tied")
        and (group == arrays.DELTAS or manifest.base_included)
    }


def _committed_chunks(store: Store) -> Iterator[tuple[str, int]]:
    groups = -(-len(store.steps) // STEP_GROUP)
    for tensor in store.manifest.tensors:
        for block in range(tensor.blocks):
            base_bytes = int(store.manifest.base_frame_bytes[tensor.first_block + block])
            if base_bytes:
                yield arrays.chunk_key(arrays.BASE, tensor, 0, block), base_bytes
            for chunk_row in range(groups):
                size = store.committed_bytes(tensor, block, chunk_row)
                if size:
                    yield arrays.chunk_key(arrays.DELTAS, tensor, chunk_row, block), size
