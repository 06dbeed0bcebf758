"""The zarr v3 side of a store: names of arrays and chunks, and their metadata documents.

The documents are written here rather than through zarr: making 30,000 arrays through it takes
half a minute, and opening a store for the fast path must not need it.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from relex_stream.specs import STEP_GROUP
from relex_stream.store.records import StoredTensor

DELTAS = "deltas"
"""Group of the arrays of differences, one per tracked tensor."""

BASE = "base"
"""Group of the base's weights, one array per tensor, when they are included."""

CODEC_NAME = "relex_stream.delta"

_MAX_NAME_BYTES = 180


@lru_cache(maxsize=1 << 17)
def array_name(tensor_name: str) -> str:
    """Return the directory name of a tensor's array: its own name where a file may have it.

    Examples
    --------
    >>> array_name("model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> array_name("../x")
    '%2E%2E%2Fx'
    """
    name = quote(tensor_name, safe="-_.+=@ ()[]{},!$&'")
    # quote never escapes it, but it marks shortened names here.
    name = name.replace("~", "%7E")
    # zarr keeps names that begin with two underscores for itself; dots alone are no file's name.
    if name.startswith(("__", ".")) or name == "zarr.json":
        name = "".join(f"%{ord(c):02X}" if c in "_." else c for c in name)
    if len(name) > _MAX_NAME_BYTES:
        digest = hashlib.sha256(tensor_name.encode()).hexdigest()
        name = f"{name[: _MAX_NAME_BYTES - 33].rstrip('%')}~{digest[:32]}"
    return name


def chunk_key(group: str, tensor: StoredTensor, chunk_row: int, block: int) -> str:
    """Return the key of a chunk within the store."""
    return f"{group}/{array_name(tensor.name)}/c.{chunk_row}.{block}"


def group_document(attributes: dict[str, Any] | None = None) -> bytes:
    """Return the ``zarr.json`` of a group."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}
    return _json_bytes(document)


def root_document() -> bytes:
    """Return the ``zarr.json`` of the store itself."""
    # Of the tree of arrays; HEAD says what a reader of the store must know.
    return group_document({"relex_stream": {"format": 1}})


def array_document(tensor: StoredTensor, group: str, rows: int) -> bytes:
    """Return the ``zarr.json`` of a tensor's array with `rows` steps (whole groups for deltas)."""
    itemsize = tensor.itemsize if group == DELTAS else tensor.base_itemsize
    dtype = tensor.dtype if group == DELTAS else tensor.base_dtype
    columns = max(1, min(tensor.elements, tensor.block_elements))
    meaning = (
        "row t: ordered bit pattern of step t minus that of the step before, modulo 2^bits"
        if group == DELTAS
        else "row 0: ordered bit patterns of the base"
    )
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, tensor.elements],
        "data_type": f"uint{8 * itemsize}",
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [STEP_GROUP, columns]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [{"name": CODEC_NAME, "configuration": {}}],
        "dimension_names": ["step", "element"],
        "attributes": {
            "relex_stream": {
                "tensor": tensor.name,
                "dtype": dtype.code,
                "shape": list(tensor.shape),
                "meaning": meaning,
            }
        },
    }
    return _json_bytes(document)


def allocated_rows(rows: int) -> int:
    """Return the rows a delta array is given when `rows` are committed: whole groups."""
    return -(-rows // STEP_GROUP) * STEP_GROUP


def _json_bytes(document: dict[str, Any]) -> bytes:
    # Without indentation: json's fast encoder knows none, and there may be 30,000 of them.
    return (json.dumps(document) + "\n").encode()
