"""The zarr documents of a store as they follow from its records."""

from __future__ import annotations

from relex_stream.store import arrays
from relex_stream.store.read import Store


def delta_documents(store: Store) -> dict[str, bytes]:
    """Return the ``zarr.json`` of the arrays of differences, by key, with the rows of HEAD."""
    rows = arrays.allocated_rows(len(store.steps))
    return {
        _key(arrays.DELTAS, tensor.name): arrays.array_document(tensor, arrays.DELTAS, rows)
        for tensor in store.manifest.tensors
        if tensor.kind == "tracked"
    }


def tree_documents(store: Store) -> dict[str, bytes]:
    """Return all ``zarr.json`` of a store, by key: of itself, its groups and its arrays."""
    groups = [arrays.DELTAS, *([arrays.BASE] if store.manifest.base_included else [])]
    documents = {"zarr.json": arrays.root_document()}
    documents |= {f"{group}/zarr.json": arrays.group_document() for group in groups}
    documents |= delta_documents(store)
    if store.manifest.base_included:
        documents |= {
            _key(arrays.BASE, tensor.name): arrays.array_document(tensor, arrays.BASE, 1)
            for tensor in store.manifest.tensors
            if tensor.kind != "tied"
        }
    return documents


def _key(group: str, name: str) -> str:
    return f"{group}/{arrays.array_name(name)}/zarr.json"
