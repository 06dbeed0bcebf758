"""Do these checkpoints belong to this base? Decided from headers alone, before weights are read.

A store tracks BF16, F16 and F32 tensors and requires all others to be constant. An output head that
only the base or only the checkpoints hold is taken as tied to the embedding; that the bits agree is
checked when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import TrajectoryError
from relex_stream.listing import file_status
from relex_stream.locations import location
from relex_stream.specs import SourceCheckpoint
from relex_stream.store.arrays import array_name
from relex_stream.store.records import StoredTensor
from relex_stream.ulp import FORMATS, can_widen

_HEAD_SUFFIXES = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDING_SUFFIXES = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
)


def describe_tensors(
    base: SourceCheckpoint, first: SourceCheckpoint, sketch_min_elements: int
) -> list[dict[str, Any]]:
    """Decide what the store keeps of each tensor, from the headers of base and first checkpoint.

    Raises
    ------
    TrajectoryError
        If the two do not have the same tensors, up to a tied output head.
    """
    described: dict[str, dict[str, Any]] = {}
    tied: dict[str, str] = {}
    unmatched = []
    for name in sorted(base.tensors.keys() | first.tensors.keys()):
        if name in base.tensors and name in first.tensors:
            described[name] = _describe(name, base, first)
            continue
        holder, other = (base, first) if name in base.tensors else (first, base)
        target = _tied_target(name, holder, other)
        if target is None:
            unmatched.append(name)
        else:
            tied[name] = target
    missing = [name for name in unmatched if name in base.tensors]
    if missing:
        raise TrajectoryError(_lacks(first, missing))
    if unmatched:
        raise TrajectoryError(_has_extra(first, unmatched))
    for name, target in tied.items():
        described[name] = described[target] | {"name": name, "kind": "tied", "tied_to": target}
    entries = [described[name] for name in sorted(described)]
    _refuse_clashes(list(described))
    sketched = 0
    for entry in entries:
        weights = int(np.prod(entry["shape"], dtype=np.int64))
        if entry["kind"] == "tracked" and weights >= max(1, sketch_min_elements):
            entry["sketch_row"] = sketched
            sketched += 1
    return entries


def _refuse_clashes(names: Sequence[str]) -> None:
    taken: dict[str, str] = {}
    for name in names:
        # Some file systems fold case.
        other = taken.setdefault(array_name(name).casefold(), name)
        if other != name:
            raise TrajectoryError(
                f"tensors {other} and {name} would share a directory in the store; rename one"
            )


def _describe(name: str, base: SourceCheckpoint, first: SourceCheckpoint) -> dict[str, Any]:
    spec = base.tensors[name].spec
    return {
        "name": name,
        "kind": "tracked" if spec.dtype.tracked else "constant",
        "base_dtype": spec.dtype.code,
        "dtype": _checkpoint_dtype(name, base, first),
        "shape": list(spec.shape),
        "tied_to": None,
        "sketch_row": -1,
    }


def _checkpoint_dtype(name: str, base: SourceCheckpoint, checkpoint: SourceCheckpoint) -> str:
    ours, theirs = base.tensors[name].spec, checkpoint.tensors[name].spec
    if ours.shape != theirs.shape:
        raise TrajectoryError(
            f"step {checkpoint.step}: tensor {name} has shape {list(theirs.shape)} in "
            f"{checkpoint.tensors[name].path}, {list(ours.shape)} in the base; "
            "is it a checkpoint of another model?"
        )
    same = ours.dtype == theirs.dtype
    both_tracked = ours.dtype.tracked and theirs.dtype.tracked
    if same or (both_tracked and can_widen(FORMATS[ours.dtype.code], FORMATS[theirs.dtype.code])):
        return theirs.dtype.code
    raise TrajectoryError(
        f"step {checkpoint.step}: tensor {name} is {theirs.dtype.code} in "
        f"{checkpoint.tensors[name].path}, {ours.dtype.code} in the base, which does not widen to "
        f"it exactly; give the base cast to {theirs.dtype.code}"
    )


def _tied_target(name: str, holder: SourceCheckpoint, other: SourceCheckpoint) -> str | None:
    """Return the embedding that a head held by one side only may be tied to."""
    if not name.endswith(_HEAD_SUFFIXES):
        return None
    spec = holder.tensors[name].spec
    for target, place in holder.tensors.items():
        if (
            target.endswith(_EMBEDDING_SUFFIXES)
            and target in other.tensors
            and place.spec.shape == spec.shape
            and place.spec.dtype == spec.dtype
            and spec.dtype.tracked
        ):
            return target
    return None


def _lacks(checkpoint: SourceCheckpoint, names: Sequence[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return (
        f"step {checkpoint.step}: {checkpoint.directory} lacks tensor {names[0]}{more} of the "
        "base; is it a checkpoint of another model, or half-written? Leave it out with --steps"
    )


def _has_extra(checkpoint: SourceCheckpoint, names: Sequence[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return (
        f"step {checkpoint.step}: {checkpoint.directory} has tensor {names[0]}{more}, which the "
        "base does not have; is it a checkpoint of another model? Leave it out with --steps"
    )


@dataclass(frozen=True)
class CheckpointPlaces:
    """Where one checkpoint's tensors are, kept small: there may be 500 of 30,000 tensors.

    ``name`` is its directory relative to that of all checkpoints. ``file_of`` is -1 where it
    does not hold the tensor (a tied head).
    """

    step: int
    name: str
    directory: str
    files: tuple[str, ...]
    file_of: NDArray[np.int32]
    offset_of: NDArray[np.int64]
    nbytes: int
    skipped_files: tuple[str, ...]


def match_checkpoint(
    checkpoint: SourceCheckpoint,
    tensors: Sequence[StoredTensor],
    name: str,
    before: CheckpointPlaces | None = None,
) -> CheckpointPlaces:
    """Check a checkpoint's headers against the store's tensors and keep where they are.

    Tables that are those of the one `before` are shared with it: usually all checkpoints have
    the same layout, and there may be 500 of 30,000 tensors, to be sent to many processes.

    Raises
    ------
    TrajectoryError
        If a tensor is missing, extra, or has another shape or dtype.
    """
    names = {tensor.name for tensor in tensors}
    missing = [
        tensor.name
        for tensor in tensors
        if tensor.kind != "tied" and tensor.name not in checkpoint.tensors
    ]
    if missing:
        raise TrajectoryError(_lacks(checkpoint, missing))
    extra = [name for name in checkpoint.tensors if name not in names]
    if extra:
        raise TrajectoryError(_has_extra(checkpoint, extra))
    paths = sorted({place.path for place in checkpoint.tensors.values()})
    number = {path: i for i, path in enumerate(paths)}
    file_of = np.full(len(tensors), -1, np.int32)
    offset_of = np.zeros(len(tensors), np.int64)
    for tensor in tensors:
        place = checkpoint.tensors.get(tensor.name)
        if place is None:
            continue
        if place.spec.shape != tensor.shape or place.spec.dtype != tensor.dtype:
            raise TrajectoryError(
                f"step {checkpoint.step}: tensor {tensor.name} in {place.path} is "
                f"{place.spec.dtype.code} {list(place.spec.shape)}, expected {tensor.dtype.code} "
                f"{list(tensor.shape)}; is it a checkpoint of another model? "
                "Leave it out with --steps"
            )
        file_of[tensor.index] = number[place.path]
        offset_of[tensor.index] = place.offset
    if before is not None:
        if np.array_equal(file_of, before.file_of):
            file_of = before.file_of
        if np.array_equal(offset_of, before.offset_of):
            offset_of = before.offset_of
    side_bytes = sum(
        file_status(location(checkpoint.directory) / name).size for name in checkpoint.side_files
    )
    return CheckpointPlaces(
        step=checkpoint.step,
        name=name,
        directory=checkpoint.directory,
        files=tuple(paths),
        file_of=file_of,
        offset_of=offset_of,
        nbytes=checkpoint.nbytes + side_bytes,
        skipped_files=checkpoint.skipped_files,
    )
