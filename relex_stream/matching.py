"""Do these checkpoints belong to this base? Decided from headers alone, before weights are read.

A store tracks BF16, F16 and F32 tensors and requires all others to be constant. An output head that
only the base or only the checkpoints hold is taken as tied to the embedding; that the bits agree is
checked when they are read.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import SourceError, TrajectoryError
from relex_stream.listing import file_status
from relex_stream.locations import location
from relex_stream.pieces import PieceTable, Span, spans_of
from relex_stream.sources.checkpoint import INDEX_FILE
from relex_stream.sources.dcp_metadata import METADATA
from relex_stream.specs import Patch, Piece, SourceCheckpoint, TensorPlace, WeightsFile
from relex_stream.store.arrays import array_name
from relex_stream.store.records import StoredTensor
from relex_stream.ulp import FORMATS, can_widen

_CAST = ("F32", "BF16")
"""What ``--as bf16`` casts from and to."""

_HEAD_SUFFIXES = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDING_SUFFIXES = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
)


def describe_tensors(
    base: SourceCheckpoint,
    first: SourceCheckpoint,
    sketch_min_elements: int,
    *,
    cast: bool = False,
) -> list[dict[str, Any]]:
    """Decide what the store keeps of each tensor, from the headers of base and first checkpoint.

    With `cast`, tensors that are BF16 in the base and F32 in the checkpoints are kept in BF16.

    Raises
    ------
    TrajectoryError
        If the two do not have the same tensors, up to a tied output head; or if there is nothing
        in the base to cast to.
    """
    if cast and not any(place.spec.dtype.code == "BF16" for place in base.tensors.values()):
        raise TrajectoryError(
            f"--as bf16 casts to BF16 what the base has in BF16, and {base.directory} has nothing "
            "in it; give the base in BF16"
        )
    if first.patch is not None:
        # All that it does not tell of is as in the base.
        first = replace(first, tensors=base.tensors | first.tensors)
    described: dict[str, dict[str, Any]] = {}
    tied: dict[str, str] = {}
    unmatched = []
    for name in sorted(base.tensors.keys() | first.tensors.keys()):
        if name in base.tensors and name in first.tensors:
            described[name] = _describe(name, base, first, cast=cast)
            continue
        holder, other = (base, first) if name in base.tensors else (first, base)
        target = _tied_target(name, holder, other)
        if target is None:
            unmatched.append(name)
        else:
            tied[name] = target
    missing = [name for name in unmatched if name in base.tensors]
    if missing:
        raise TrajectoryError(_lacks(first, missing, base.tensors))
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


def _describe(
    name: str, base: SourceCheckpoint, first: SourceCheckpoint, *, cast: bool
) -> dict[str, Any]:
    spec = base.tensors[name].spec
    return {
        "name": name,
        "kind": "tracked" if spec.dtype.tracked else "constant",
        "base_dtype": spec.dtype.code,
        "dtype": _checkpoint_dtype(name, base, first, cast=cast),
        "shape": list(spec.shape),
        "tied_to": None,
        "sketch_row": -1,
    }


def _checkpoint_dtype(
    name: str, base: SourceCheckpoint, checkpoint: SourceCheckpoint, *, cast: bool
) -> str:
    ours, theirs = base.tensors[name].spec, checkpoint.tensors[name].spec
    if ours.shape != theirs.shape:
        raise TrajectoryError(
            f"step {checkpoint.step}: tensor {name} has shape {list(theirs.shape)} in "
            f"{checkpoint.tensors[name].path}, {list(ours.shape)} in the base; "
            "is it a checkpoint of another model?"
        )
    if cast and (theirs.dtype.code, ours.dtype.code) == _CAST:
        return ours.dtype.code
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


def _lacks(checkpoint: SourceCheckpoint, names: Sequence[str], base_names: Collection[str]) -> str:
    lacks = (
        f"step {checkpoint.step}: {checkpoint.directory} lacks tensor {_first_of(names)} of the "
        "base"
    )
    others = sorted(name for name in checkpoint.tensors if name not in base_names)
    if others:
        return (
            f"{lacks} and has {_first_of(others)} that the base does not have; if the names "
            "differ, say how with --strip-prefix or --map; if it is of another model, leave it out "
            "with --steps"
        )
    return (
        f"{lacks}; is it a checkpoint of another model, or half-written? Leave it out with --steps"
    )


def _has_extra(checkpoint: SourceCheckpoint, names: Sequence[str]) -> str:
    return (
        f"step {checkpoint.step}: {checkpoint.directory} has tensor {_first_of(names)}, which the "
        "base does not have; is it a checkpoint of another model? Leave it out with --steps"
    )


def _first_of(names: Sequence[str]) -> str:
    return f"{names[0]} (and {len(names) - 1} more)" if len(names) > 1 else names[0]


@dataclass(frozen=True)
class CheckpointPlaces:
    """Where one checkpoint's tensors are, kept small: there may be 500 of 30,000 tensors.

    Attributes
    ----------
    step : int
    name : str
        Its directory relative to that of all checkpoints.
    directory : str
    files : tuple of str
        Paths of the weights files, which tables number.
    table : PieceTable
        Of the store's tensors, in its order; elements of constants are their bytes. Nothing where
        the checkpoint does not hold one (a tied head).
    is_cast : ndarray of bool, shape (tensors,)
        Which lie there in F32 and are kept in BF16.
    copies : PieceTable or None
        Pieces that are there once more, of the same tensors.
    nbytes : int
        Bytes of all files that are taken in.
    skipped_files : tuple of str
    patch : PatchPlaces or None
        What makes it of the checkpoint before, where it holds only what changed.
    """

    step: int
    name: str
    directory: str
    files: tuple[str, ...]
    table: PieceTable
    is_cast: NDArray[np.bool_]
    copies: PieceTable | None
    nbytes: int
    skipped_files: tuple[str, ...]
    patch: PatchPlaces | None = None


@dataclass(frozen=True)
class PatchPlaces:
    """Where the changes of a checkpoint lie packed, kept small as `CheckpointPlaces` is.

    Attributes
    ----------
    encoding : str
        As in `Patch`.
    tensor : ndarray of int32, shape (n,)
        Number of the store's tensor that each entry changes; -1 of one that is of many tensors.
    file : ndarray of int32, shape (n,)
    offset, nbytes : ndarray of int64, shape (n,)
    digest : list of bytes
        Of what each comes to, as in `PackedChange`.
    names : dict of str to int
        What the entry of many calls its tensors, and their numbers.
    digest_kind : str
    weights_digest : bytes
        As in `Patch`.
    """

    encoding: str
    tensor: NDArray[np.int32]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    digest: list[bytes]
    names: dict[str, int]
    digest_kind: str
    weights_digest: bytes

    @classmethod
    def of(cls, patch: Patch, numbers: Mapping[str, int], files: Mapping[str, int]) -> PatchPlaces:
        """Return a patch by the numbers of tensors and files."""
        entries = [(numbers[name], change) for name, change in patch.changes.items()]
        if patch.together is not None:
            entries.append((-1, patch.together))
        return cls(
            encoding=patch.encoding,
            tensor=np.array([tensor for tensor, _ in entries], np.int32),
            file=np.array([files[change.path] for _, change in entries], np.int32),
            offset=np.array([change.offset for _, change in entries], np.int64),
            nbytes=np.array([change.nbytes for _, change in entries], np.int64),
            digest=[change.digest for _, change in entries],
            names={own: numbers[name] for own, name in patch.names.items()},
            digest_kind=patch.digest_kind,
            weights_digest=patch.weights_digest,
        )


def kept_files(
    checkpoint: SourceCheckpoint, *, is_cast: bool
) -> tuple[tuple[WeightsFile, ...], tuple[str, ...]]:
    """Return the files of a checkpoint that can be had from the store: of weights, and others.

    Without those that also hold what is not kept, and those of weights that are cast, with what
    says where they lie.
    """
    if is_cast:
        of_weights = (INDEX_FILE, METADATA)
        return (), tuple(
            name for name in checkpoint.side_files if posixpath.basename(name) not in of_weights
        )
    whole = tuple(file for file in checkpoint.weights_files if file.parts is not None)
    return whole, checkpoint.side_files


def match_checkpoint(
    checkpoint: SourceCheckpoint,
    tensors: Sequence[StoredTensor],
    name: str,
    before: CheckpointPlaces | None = None,
    *,
    cast: bool = False,
) -> CheckpointPlaces:
    """Check a checkpoint's headers against the store's tensors and keep where they are.

    Tables that are those of the one `before` are shared with it: usually all checkpoints have
    the same layout, and there may be 500 of 30,000 tensors, to be sent to many processes.

    Raises
    ------
    TrajectoryError
        If a tensor is missing, extra, or has another shape or dtype (but one that `cast` allows).
    SourceError
        If a side file is gone since the checkpoint was opened.
    """
    _refuse_other_tensors(checkpoint, tensors)
    places = [checkpoint.tensors.get(tensor.name) for tensor in tensors]
    is_cast = np.zeros(len(tensors), np.bool_)
    for tensor, place in zip(tensors, places, strict=True):
        if place is not None and (place.spec.shape, place.spec.dtype) != (
            tensor.shape,
            tensor.dtype,
        ):
            is_cast[tensor.index] = _is_cast(checkpoint, tensor, place, cast=cast)
    number = {path: i for i, path in enumerate(sorted(checkpoint.weights_paths))}
    table = _table(tensors, places, number, before.table if before else None)
    copies = None
    if checkpoint.copies and not is_cast.any():
        copies = PieceTable.of(
            _spans(tensor, checkpoint.copies.get(tensor.name, ()), number, tensor.dtype.itemsize)
            for tensor in tensors
        )
    if before is not None:
        table = table.sharing(before.table)
        if np.array_equal(is_cast, before.is_cast):
            is_cast = before.is_cast
        if copies is not None and before.copies is not None:
            copies = copies.sharing(before.copies)
    try:
        side_bytes = sum(
            file_status(location(checkpoint.directory) / name).size
            for name in checkpoint.side_files
        )
    except OSError as error:
        raise SourceError(
            f"{error.filename}: cannot be read: {error.strerror}; check that it is still there"
        ) from error
    patch = None
    if checkpoint.patch is not None:
        numbers = {tensor.name: tensor.index for tensor in tensors}
        patch = PatchPlaces.of(checkpoint.patch, numbers, number)
    return CheckpointPlaces(
        step=checkpoint.step,
        name=name,
        directory=checkpoint.directory,
        files=tuple(number),
        table=table,
        is_cast=is_cast,
        copies=copies,
        nbytes=checkpoint.nbytes + side_bytes,
        skipped_files=checkpoint.skipped_files,
        patch=patch,
    )


def _refuse_other_tensors(checkpoint: SourceCheckpoint, tensors: Sequence[StoredTensor]) -> None:
    names = {tensor.name for tensor in tensors}
    missing = [
        tensor.name
        for tensor in tensors
        if tensor.kind != "tied" and tensor.name not in checkpoint.tensors
    ]
    if missing and checkpoint.patch is None:
        raise TrajectoryError(_lacks(checkpoint, missing, names))
    _refuse_extra(checkpoint, names)
    if checkpoint.patch is not None:
        _refuse_unchangeable(checkpoint, checkpoint.patch, tensors)


def _refuse_unchangeable(
    checkpoint: SourceCheckpoint, patch: Patch, tensors: Sequence[StoredTensor]
) -> None:
    changed = {*patch.changes, *patch.names.values()}
    for tensor in tensors:
        if tensor.name in changed and tensor.kind != "tracked":
            why = (
                f"which is kept as one with {tensor.tied_to}"
                if tensor.tied_to is not None
                else f"which is {tensor.dtype.code}, and only BF16, F16 and F32 tensors may change"
            )
            raise TrajectoryError(
                f"step {checkpoint.step}: {checkpoint.directory} changes tensor {tensor.name}, "
                f"{why}. Leave that step and those after it out with --steps"
            )


def _refuse_extra(checkpoint: SourceCheckpoint, names: Collection[str]) -> None:
    extra = [name for name in _told_of(checkpoint) if name not in names]
    if extra:
        raise TrajectoryError(_has_extra(checkpoint, extra))


def _told_of(checkpoint: SourceCheckpoint) -> Iterable[str]:
    """Return the names of all tensors that a checkpoint holds, or holds changes of."""
    patch = checkpoint.patch
    changed = () if patch is None else (*patch.changes, *patch.names.values())
    return (*checkpoint.tensors, *changed)


def _is_cast(
    checkpoint: SourceCheckpoint, tensor: StoredTensor, place: TensorPlace, *, cast: bool
) -> bool:
    """Return True for a tensor that is to be cast; refuse any other difference."""
    found = f"tensor {tensor.name} in {place.path} is {place.spec.dtype.code} "
    found += f"{list(place.spec.shape)}, expected {tensor.dtype.code} {list(tensor.shape)}"
    castable = (place.spec.dtype.code, tensor.dtype.code) == _CAST
    if not castable or place.spec.shape != tensor.shape:
        raise TrajectoryError(
            f"step {checkpoint.step}: {found}; is it a checkpoint of another model? "
            "Leave it out with --steps"
        )
    if not cast:
        raise TrajectoryError(
            f"step {checkpoint.step}: {found}; give --as bf16, as the store was begun"
        )
    return True


def _table(
    tensors: Sequence[StoredTensor],
    places: Sequence[TensorPlace | None],
    number: Mapping[str, int],
    before: PieceTable | None,
) -> PieceTable:
    if any(place is not None and place.pieces for place in places):
        return PieceTable.of(
            []
            if place is None
            else _spans(tensor, place.pieces, number, place.spec.dtype.itemsize)
            if place.pieces
            else [(number[place.path], place.offset, _whole(tensor))]
            for tensor, place in zip(tensors, places, strict=True)
        )
    # One piece for each tensor: in columns, since tensors may be very many.
    held = [place for place in places if place is not None]
    bounds = np.cumsum([0, *(place is not None for place in places)], dtype=np.int64)
    if before is not None and np.array_equal(bounds, before.bounds):
        spans = before.spans
    else:
        spans = np.array(
            [_whole(t) for t, place in zip(tensors, places, strict=True) if place is not None],
            np.int64,
        ).reshape(-1, 4)
    return PieceTable(
        bounds,
        np.array([number[place.path] for place in held], np.int32),
        np.array([place.offset for place in held], np.int64),
        spans,
    )


def _whole(tensor: StoredTensor) -> Span:
    return Span(0, 1, tensor.elements, max(1, tensor.elements))


def _spans(
    tensor: StoredTensor, pieces: Sequence[Piece], number: Mapping[str, int], itemsize: int
) -> list[tuple[int, int, Span]]:
    """Return file, offset and span of pieces whose elements have `itemsize` bytes."""
    # Of a constant the elements are its bytes.
    scale = itemsize if tensor.kind == "constant" else 1
    spans = []
    for piece in pieces:
        offset = piece.offset
        for span in spans_of(piece.box, tensor.shape):
            spans.append((number[piece.path], offset, span.scaled(scale)))
            offset += span.elements * itemsize
    return spans
