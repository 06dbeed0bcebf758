"""The same run of checkpoints in relex-stream's store and in other formats, and read from them.

Each format is used the way its own documentation begins: no option that makes it safer, none that
makes it less safe, unless the name says so. What is kept is the same everywhere: every tensor of
the base and of every step, as 16-bit patterns.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.make_checkpoints import Trajectory

Kept = dict[tuple[int, str], NDArray[np.uint16]]
"""Bit patterns by step (0 is the base) and tensor."""


@dataclass(frozen=True)
class Format:
    """How one format is written and read.

    Attributes
    ----------
    write : callable
        Writes a trajectory into a directory that does not exist yet.
    read : callable
        Opens the directory anew and returns all of it.
    """

    name: str
    write: Callable[[Trajectory, Path], None]
    read: Callable[[Path], Kept]


def kept(run: Trajectory) -> Kept:
    """Return what every format has to give back."""
    return {
        (step, name): bits for step, all_of in run.bits.items() for name, bits in all_of.items()
    }


def write_relex_stream(run: Trajectory, directory: Path) -> None:
    import relex_stream

    relex_stream.build_store(run.base, run.checkpoints, directory, include_base=True)


def read_relex_stream(directory: Path) -> Kept:
    import relex_stream

    opened = relex_stream.open_store(directory)
    return {
        (step, name): opened.checkpoint_bits(name, step)
        for step in (0, *opened.steps)
        for name in opened.tensors
    }


def write_sqlite(run: Trajectory, directory: Path) -> None:
    directory.mkdir()
    with sqlite3.connect(directory / "run.sqlite") as database:
        database.execute("CREATE TABLE weights (step INTEGER, name TEXT, bits BLOB)")
        database.executemany(
            "INSERT INTO weights VALUES (?, ?, ?)",
            [(step, name, bits.tobytes()) for (step, name), bits in kept(run).items()],
        )
    database.close()


def read_sqlite(directory: Path) -> Kept:
    database = sqlite3.connect(directory / "run.sqlite")
    try:
        rows = database.execute("SELECT step, name, bits FROM weights").fetchall()
    finally:
        database.close()
    return {(step, name): np.frombuffer(bits, np.uint16) for step, name, bits in rows}


def write_safetensors(run: Trajectory, directory: Path) -> None:
    from safetensors.numpy import save_file

    directory.mkdir()
    for step, tensors in run.bits.items():
        save_file(tensors, directory / f"step_{step}.safetensors")


def read_safetensors(directory: Path) -> Kept:
    from safetensors.numpy import load_file

    return {
        (int(path.stem.removeprefix("step_")), name): bits
        for path in directory.iterdir()
        for name, bits in load_file(path).items()
    }


def _fill(group, run: Trajectory, **options: object) -> None:
    """Write an array per tensor, steps first, a chunk per step."""
    for name in run.bits[0]:
        steps = np.stack([tensors[name].reshape(-1) for tensors in run.bits.values()])
        array = group.create_array(
            name, shape=steps.shape, dtype=steps.dtype, chunks=(1, steps.shape[1]), **options
        )
        array[:] = steps
    group.attrs["steps"] = list(run.bits)


def _taken(group) -> Kept:
    return {
        (step, name): np.asarray(array[row])
        for name, array in group.arrays()
        for row, step in enumerate(group.attrs["steps"])
    }


def write_zarr(run: Trajectory, directory: Path) -> None:
    import zarr

    _fill(zarr.create_group(directory), run)


def write_zarr_crc32c(run: Trajectory, directory: Path) -> None:
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    _fill(zarr.create_group(directory), run, compressors=(ZstdCodec(), Crc32cCodec()))


def read_zarr(directory: Path) -> Kept:
    import zarr

    return _taken(zarr.open_group(directory, mode="r"))


def write_icechunk(run: Trajectory, directory: Path) -> None:
    import icechunk
    import zarr

    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(directory)))
    session = repository.writable_session("main")
    _fill(zarr.create_group(session.store), run)
    session.commit("all steps")


def read_icechunk(directory: Path) -> Kept:
    import icechunk
    import zarr

    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(directory)))
    return _taken(zarr.open_group(repository.readonly_session("main").store, mode="r"))


FORMATS = {
    one.name: one
    for one in (
        Format("relex-stream", write_relex_stream, read_relex_stream),
        Format("safetensors", write_safetensors, read_safetensors),
        Format("zarr", write_zarr, read_zarr),
        Format("zarr, crc32c", write_zarr_crc32c, read_zarr),
        Format("Icechunk", write_icechunk, read_icechunk),
        Format("SQLite", write_sqlite, read_sqlite),
    )
}
"""By the name that tables show."""
