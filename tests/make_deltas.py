"""Feeds of changes for tests, written from the descriptions of their formats.

Nothing here uses the code under test. Each writer takes a run of whole checkpoints and publishes
the same bits.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from tests.make_checkpoints import Bits, Trajectory, raw, write_model, write_safetensors

Bytes = NDArray[np.uint8]


def as_bytes(bits: Bits) -> Bytes:
    """Return the bytes of a tensor."""
    return np.frombuffer(bits.tobytes(), np.uint8)


def xor_of(before: Bits, after: Bits) -> bytes:
    """Return the bytes that turn one tensor into another by exclusive or."""
    return (as_bytes(before) ^ as_bytes(after)).tobytes()


def overwrite_of(before: Bits, after: Bits) -> bytes:
    """Return how many bytes change, where, and to what."""
    old, new = as_bytes(before), as_bytes(after)
    changed = np.flatnonzero(old != new)
    count = np.array([changed.size], "<u4").tobytes()
    return count + changed.astype("<u4").tobytes() + new[changed].tobytes()


PACKERS: dict[str, Callable[[Bits, Bits], bytes]] = {"xor": xor_of, "overwrite": overwrite_of}


def publish_slime(
    directory: Path,
    version: int,
    before: Mapping[str, Bits],
    after: Mapping[str, Bits],
    *,
    encoding: str = "xor",
    files: int = 2,
    base_version: int | None = None,
    digest: Callable[[bytes], str] = lambda data: f"{zlib.adler32(data):08x}",
    digest_kind: str = "adler32",
    pack: Callable[[Bits, Bits], bytes] | None = None,
) -> Path:
    """Write ``weight_vNNNNNN``: each changed tensor's bytes, packed, and the checksum of the new.

    Returns
    -------
    Path
        Its directory.
    """
    own = directory / f"weight_v{version:06d}"
    own.mkdir(parents=True)
    pack = pack or PACKERS[encoding]
    changed = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    weight_map = {}
    for number in range(min(files, len(changed))):
        names = changed[number::files]
        name = f"model-{number:05d}-of-{min(files, len(changed)):05d}.safetensors"
        packed = {each: zstd.compress(pack(before[each], after[each]), 1) for each in names}
        write_safetensors(
            own / name,
            {each: ("U8", [len(data)], data) for each, data in packed.items()},
            {each: digest(after[each].tobytes()) for each in names},
        )
        weight_map |= dict.fromkeys(names, name)
    metadata = {
        "version": f"{version:06d}",
        "base_version": f"{version - 1 if base_version is None else base_version:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": digest_kind,
    }
    index = json.dumps({"metadata": metadata, "weight_map": weight_map})
    (own / "model.safetensors.index.json").write_text(index)
    return own


def slime_run(run: Trajectory, directory: Path, **options: Any) -> Path:
    """Publish all steps of a run, which are 1, 2, ..., as versions of slime's."""
    for step in run.steps:
        publish_slime(directory, step, run.bits[step - 1], run.bits[step], **options)
    return directory


def sparse_file(
    before: Mapping[str, Bits],
    after: Mapping[str, Bits],
    codec: str = "v3.1",
    edit: Callable[[dict[str, Any]], None] = lambda _: None,
    steps_of: Callable[[NDArray[Any]], NDArray[Any]] = lambda rows: np.diff(rows, prepend=0),
) -> bytes:
    """Return grail's file of changes, before it is compressed.

    Parameters
    ----------
    edit : callable
        Changes the header before it is written.
    steps_of : callable
        Each row (or position) less the one before.
    """
    tensors, data = [], b""
    for name in sorted(before):
        old, new = before[name].reshape(-1), after[name].reshape(-1)
        shape = after[name].shape
        changed = np.flatnonzero(old != new)
        if not changed.size:
            continue
        width = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        rows, columns = changed // width, changed % width
        entry: dict[str, Any] = {
            "name": name,
            "shape": list(shape),
            "num_nonzero": int(changed.size),
            "value_dtype": "bfloat16" if new.itemsize == 2 else "float32",
            "indices_offset": len(data),
        }
        if codec == "v2":
            indices = steps_of(changed).astype("<i4").tobytes()
        else:
            row_steps = steps_of(rows)
            same = np.append(False, row_steps[1:] == 0)
            column_steps = np.where(same, np.diff(columns, prepend=0), columns)
            row_type, column_type = "int32", "int32"
            if codec == "v3.1":
                row_type = next(t for t in ("uint8", "uint16", "int32") if _fits(row_steps, t))
                column_type = next(t for t in ("uint16", "int32") if _fits(column_steps, t))
                entry |= {"row_dtype": row_type, "col_dtype": column_type}
            row_bytes = row_steps.astype(row_type).tobytes()
            column_bytes = column_steps.astype(column_type).tobytes()
            entry |= {"rows_size": len(row_bytes), "cols_size": len(column_bytes)}
            indices = row_bytes + column_bytes
        values = new[changed].tobytes()
        entry |= {"indices_size": len(indices), "values_size": len(values)}
        entry |= {"values_offset": len(data) + len(indices)}
        data += indices + values
        tensors.append(entry)
    header: dict[str, Any] = {"version": {"v2": 2, "v3": 3, "v3.1": 31}[codec], "tensors": tensors}
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(4, "little") + text + data


def _fits(steps: NDArray[Any], dtype: str) -> bool:
    return int(steps.max(initial=0)) <= np.iinfo(dtype).max


def publish_grail(
    directory: Path,
    window: int,
    previous: int,
    before: Mapping[str, Bits],
    after: Mapping[str, Bits],
    *,
    codec: str = "v3.1",
    packed: bytes | None = None,
    told: Mapping[str, Any] | None = None,
    weights_hash: str | None = None,
) -> Path:
    """Write ``checkpoint-N/DELTA`` as grail does, and the mark of completion.

    Returns
    -------
    Path
        ``checkpoint-N``.
    """
    own = directory / f"checkpoint-{window}"
    delta = own / "DELTA"
    delta.mkdir(parents=True)
    if packed is None:
        packed = zstd.compress(sparse_file(before, after, codec), 1)
    (delta / "delta_sparse.bin.zst").write_bytes(packed)
    shapes = {
        name: list(after[name].shape) for name in after if (before[name] != after[name]).any()
    }
    delta_metadata = {
        "format": f"sparse_codec_{codec}",
        "threshold": 0.0,
        "prev_window": previous,
        "shapes": shapes,
    } | dict(told or {})
    (delta / "delta_metadata.json").write_text(json.dumps(delta_metadata))
    manifest = {
        name: sha256((delta / name).read_bytes()).hexdigest()
        for name in ("delta_sparse.bin.zst", "delta_metadata.json")
    }
    metadata = {
        "window": window,
        "prev_window": previous,
        "checkpoint_type": "DELTA",
        "weights_hash": weights_hash,
        "file_manifest": manifest,
    }
    (delta / "metadata.json").write_text(json.dumps(metadata))
    (delta / "manifest.sig").write_text("00")
    (delta / "DELTA").touch()
    (own / f"READY-{window + 30}").touch()
    return own


def publish_grail_full(directory: Path, window: int, bits: Mapping[str, Bits], dtype: str) -> Path:
    """Write ``checkpoint-N/FULL``: a model and what lists its files."""
    own = directory / f"checkpoint-{window}"
    full = write_model(own / "FULL", {name: raw(each, dtype) for name, each in bits.items()})
    manifest = {path.name: sha256(path.read_bytes()).hexdigest() for path in full.iterdir()}
    (full / "metadata.json").write_text(json.dumps({"window": window, "file_manifest": manifest}))
    (own / f"READY-{window + 30}").touch()
    return own


def grail_run(run: Trajectory, directory: Path, full: Sequence[int] = (), **options: Any) -> Path:
    """Publish all steps of a run; those of `full` as models, too."""
    before = 0
    for step in run.steps:
        publish_grail(directory, step, before, run.bits[before], run.bits[step], **options)
        if step in full:
            publish_grail_full(directory, step, run.bits[step], run.dtype)
        before = step
    return directory


def changed_run(run: Trajectory, directory: Path) -> Path:
    """Write of each step the tensors that changed, as a model directory."""
    before = 0
    for step in run.steps:
        changed = {
            name: raw(bits, run.dtype)
            for name, bits in run.bits[step].items()
            if bits.tobytes() != run.bits[before][name].tobytes()
        }
        write_model(directory / f"step-{step}", changed, shards=2)
        before = step
    return directory
