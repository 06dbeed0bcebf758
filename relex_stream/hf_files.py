"""The base's files around weights of another dtype: headers and index of a model of any step.

What is exported for those who load models has the names, shards and side files of the base,
whatever the checkpoints were. Where weights have the base's dtypes its headers serve as they are.
"""

from __future__ import annotations

import json
from typing import Any

from relex_stream.errors import CorruptionError
from relex_stream.sources.checkpoint import INDEX_FILE
from relex_stream.store import Store
from relex_stream.store.records import FileEntry, StoredTensor

_LENGTH_BYTES = 8


def headers_for_steps(store: Store) -> dict[str, bytes]:
    """Return what the base's weights files begin with, with the checkpoints' dtypes in it.

    Returns
    -------
    dict of str to bytes
        Length field and header by path, of those files that differ from the base's in it.

    Raises
    ------
    CorruptionError
        If a file of the base is recorded in a form that no base has.
    """
    headers = {}
    for entry in store.manifest.base_files:
        if entry.recipe is None:
            continue
        first, *rest = store.recipe(entry)
        if first.blob is None or any(part.tensor is None or part.box for part in rest):
            raise CorruptionError(
                f"{store.path}: {entry.path} of the base is no header and tensors"
            )
        tensors = [store.tensors[part.tensor] for part in rest if part.tensor is not None]
        if all(tensor.dtype == tensor.base_dtype for tensor in tensors):
            continue
        header = json.loads(store.blob(first.blob)[_LENGTH_BYTES:])
        headers[entry.path] = _encode(_with_dtypes(header, tensors))
    return headers


def _with_dtypes(header: dict[str, Any], tensors: list[StoredTensor]) -> dict[str, Any]:
    """Return a header with the dtypes of checkpoints; `tensors` are in the order of their bytes."""
    changed = dict(header)
    offset = 0
    for tensor in tensors:
        nbytes = tensor.elements * tensor.itemsize
        changed[tensor.name] = {
            "dtype": tensor.dtype.code,
            "shape": header[tensor.name]["shape"],
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    return changed


def _encode(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # As the library has it: data begins at a multiple of 8.
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def index_for_steps(store: Store, entry: FileEntry) -> bytes:
    """Return the base's index with the bytes of the checkpoints' weights in it.

    Parameters
    ----------
    store : Store
    entry : FileEntry
        `INDEX_FILE` of the base.
    """
    assert entry.blob is not None
    index = json.loads(store.blob(entry.blob))
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        named = [store.tensors[name] for name in index["weight_map"]]
        metadata["total_size"] = sum(t.elements * t.itemsize for t in named)
    return (json.dumps(index, indent=2) + "\n").encode()


def side_files_for_steps(store: Store) -> dict[str, bytes]:
    """Return the side files of the base that are not the same for a step: its index, if any."""
    if all(tensor.dtype == tensor.base_dtype for tensor in store.manifest.tensors):
        return {}
    return {
        entry.path: index_for_steps(store, entry)
        for entry in store.manifest.base_files
        if entry.path == INDEX_FILE and entry.blob is not None
    }
