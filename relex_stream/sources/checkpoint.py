"""One checkpoint: a Hugging Face model directory with safetensors weights, opened and checked."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

from ..errors import RelexStreamWarning, RemoteError, SourceError
from ..listing import file_status, is_file, is_link, list_names, read_file
from ..locations import Location
from ..paths import check_relative_path
from ..specs import SourceCheckpoint, TensorPlace, WeightsFile
from .directories import summarise
from .naming import Naming
from .quantised import refuse_quantised
from .recognised import recognise_weights
from .safetensors_file import MAX_HEADER_BYTES, read_weights_file
from .side_files import names_below, sort_files
from .strict_json import parse_object, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DELTA_MARK = "delta_encoding"
"""In the metadata of an index whose files hold changes, and no tensors."""

_AS_THEY_ARE = Naming()


def open_checkpoint(
    directory: Location, step: int, naming: Naming = _AS_THEY_ARE
) -> SourceCheckpoint:
    """Open a model directory: find its weights, read their headers, sort its other files.

    The weights are ``model.safetensors``, or the shards of ``model.safetensors.index.json``. Where
    both are there, the index counts if all of its shards exist, with a warning, since some loaders
    prefer the single file. Links are followed (snapshots in the Hugging Face cache are made of
    them). Of subdirectories only side files are taken, see `side_files.names_below`.

    Parameters
    ----------
    directory : Location
        The model directory.
    step : int
        The step it is from; 0 for the base.
    naming : Naming
        What its tensors are called in the base.

    Returns
    -------
    SourceCheckpoint
        ``weights_files`` in the order of their names; ``tensors`` in that order, then in the order
        of their bytes. ``side_files`` are all other regular files, the index among them, but for
        ``skipped_files``: training state, weights in other formats or not in use, files over
        64 MiB, locks and temporary files, broken links, directories with any of these.

    Raises
    ------
    SourceError
        If there is no such directory, it holds no safetensors weights, the index or a header is
        malformed, index and shards do not agree, or the weights are quantised.

    Warns
    -----
    RelexStreamWarning
        If there are both a complete set of shards and a single file.
    """
    directory = directory.absolute()
    names = list_names(directory)
    names += names_below(directory, names)
    shards = _find_shards(directory, names)
    weights_files: list[WeightsFile] = []
    tensors: dict[str, TensorPlace] = {}
    for shard in sorted(set(shards.values())) if shards is not None else [SINGLE_FILE]:
        weights_file, places = read_weights_file(directory / shard, shard)
        for name, place in places.items():
            if name in tensors:
                raise SourceError(
                    f"{place.path}: tensor {shown(name)} is also in {tensors[name].path}; keep it "
                    "in one shard only"
                )
            tensors[name] = place
        weights_files.append(weights_file)
    if shards is not None:
        check_index(
            directory / INDEX_FILE, shards, {name: place.path for name, place in tensors.items()}
        )
    if not tensors:
        raise SourceError(f"{directory}: the weights files hold no tensors; save the model anew")
    refuse_quantised(directory, (place.spec for place in tensors.values()))
    weights_files, tensors = renamed(weights_files, tensors, naming)
    used = {file.relative_path for file in weights_files}
    side_files, skipped_files = sort_files(directory, [name for name in names if name not in used])
    return SourceCheckpoint(
        step=step,
        directory=str(directory),
        tensors=tensors,
        weights_files=tuple(weights_files),
        side_files=side_files,
        skipped_files=skipped_files,
    )


def renamed(
    weights_files: list[WeightsFile], tensors: dict[str, TensorPlace], naming: Naming
) -> tuple[list[WeightsFile], dict[str, TensorPlace]]:
    """Call tensors as the base does, in files and places.

    Tensors that are not the model's keep their names: a model directory holds nothing else, so
    they are complained of where base and checkpoint are compared. Where a prefix was given they are
    left out; then the files, which are of one directory, cannot be had back.
    """
    names = naming.of_model(tensors)
    if all(names.get(name) == name for name in tensors):
        return weights_files, tensors
    places = {
        name: tensors[own]._replace(spec=replace(tensors[own].spec, name=name))
        for own, name in names.items()
    }
    files = [
        replace(
            file,
            parts=tuple(
                part if part.tensor is None else part._replace(tensor=names[part.tensor])
                for part in file.parts
            )
            if file.parts is not None and len(names) == len(tensors)
            else None,
        )
        for file in weights_files
    ]
    return files, places


def holds_weights(directory: Location) -> bool:
    """Return whether a directory has a file that `open_checkpoint` would start from."""
    return any(is_file(directory / name) for name in (SINGLE_FILE, INDEX_FILE))


def _find_shards(directory: Location, names: list[str]) -> dict[str, str] | None:
    """Return the index's map of tensors to shards, or None where the single file counts."""
    single = SINGLE_FILE in names
    if INDEX_FILE not in names:
        if single:
            return None
        found, remedy = recognise_weights(directory) or (summarise(names), "check the path")
        raise SourceError(
            f"{directory}: no safetensors weights: looked for {SINGLE_FILE} and {INDEX_FILE}, "
            f"found {found}; {remedy}"
        )
    shards = read_index(directory / INDEX_FILE)
    missing = [shard for shard in sorted(set(shards.values())) if not is_file(directory / shard)]
    if missing and single:
        return None
    if missing:
        link = " (a link to a file that is gone)" if is_link(directory / missing[0]) else ""
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(
            f"{directory}: shard {missing[0]}{link}{more}, named by {INDEX_FILE}, is missing; "
            "copy it again"
        )
    if single and SINGLE_FILE not in shards.values():
        warnings.warn(
            f"{directory} holds both {SINGLE_FILE} and the shards of {INDEX_FILE}: the shards are "
            f"read, {SINGLE_FILE} is not; remove one of the two",
            RelexStreamWarning,
            stacklevel=3,
        )
    return shards


def read_index(path: Location) -> dict[str, str]:
    """Return the weight map of an index file: tensor names to names of files, existing or not.

    Raises
    ------
    SourceError
        If it is not a regular file, is malformed, or names a file that is not beside it.
    """
    try:
        status = file_status(path)
        if not status.is_regular or status.size > MAX_HEADER_BYTES:
            raise SourceError(
                f"{path}: not a regular file of at most {MAX_HEADER_BYTES} bytes; save it anew"
            )
        data = read_file(path)
    except (SourceError, RemoteError):
        raise
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    try:
        parsed = parse_object(data)
        metadata = parsed.get("metadata")
        if isinstance(metadata, dict) and DELTA_MARK in metadata:
            raise SourceError(
                f"{path}: these files hold only what changed since another version; give a whole "
                "model here, and checkpoints of changes on this machine"
            )
        return parse_weight_map(parsed)
    except ValueError as error:
        raise SourceError(f"{path}: bad index: {error}; copy it again or save it anew") from None


def parse_weight_map(index: dict[str, Any], *, may_be_empty: bool = False) -> dict[str, str]:
    """Return the weight map of a parsed index; ValueError with a clause if it is malformed."""
    weight_map: Any = index.get("weight_map")
    if not isinstance(weight_map, dict) or not (weight_map or may_be_empty):
        raise ValueError("it has no object 'weight_map' with at least one tensor")
    for name, shard in weight_map.items():
        if not name or "\0" in name:
            raise ValueError(f"tensor name {shown(name)} is empty or holds a NUL")
        if not isinstance(shard, str):
            raise ValueError(f"tensor {shown(name)} has {shown(shard)} where a file belongs")
        if check_relative_path(shard).count("/"):
            raise ValueError(f"shard {shown(shard)} is not in the same directory")
    return weight_map


def check_index(index: Location, shards: dict[str, str], tensors: dict[str, str]) -> None:
    """Check that an index maps exactly the tensors that its shards hold, each to its shard.

    Parameters
    ----------
    index : Path or Url
    shards : dict of str to str
        Its map of tensors to names of shards.
    tensors : dict of str to str
        The path of the shard that does hold each tensor.

    Raises
    ------
    SourceError
    """
    for name, shard in shards.items():
        if name not in tensors:
            raise SourceError(
                f"{index}: tensor {shown(name)} is said to be in {shard}, which does not hold it; "
                "copy the shard again or save the model anew"
            )
        actual = os.path.basename(tensors[name])
        if actual != shard:
            raise SourceError(
                f"{index}: tensor {shown(name)} is said to be in {shard}, but {actual} holds it; "
                "copy the index again or save the model anew"
            )
    for name, path in tensors.items():
        if name not in shards:
            raise SourceError(
                f"{path}: tensor {shown(name)} is not in {index.name}; copy the index again "
                "or save the model anew"
            )
