"""The module map: who may import whom, read off the source with ast.

A room is a module or a package directly under ``relex_stream``. The table is the map; a change of
it is a change of the design and belongs in the same commit as its reason.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import relex_stream

PACKAGE = Path(relex_stream.__file__).parent


@dataclass(frozen=True)
class Room:
    """What a room may import: other rooms (besides the floor, below) and third-party packages."""

    rooms: set[str] = field(default_factory=set)
    packages: set[str] = field(default_factory=set)
    pure: bool = False
    """Opens no file: imports nothing that could."""


FLOOR = {"errors", "specs", "summaries", "locations"}
"""Every room may import these; they import nothing but each other."""

KERNELS = {"numpy", "numba"}
CHECKSUM = {"google_crc32c"}

BELOW_STAGES = {
    *("paths", "ulp", "codec", "sketch", "fit", "planner", "sources", "writer", "store"),
    *("listing", "transfers"),
    *(
        "machine",
        "graph",
        "blocks",
        "base_weights",
        "block_reader",
        "pages",
        "pieces",
        "checksum",
        "block_sweep",
        "_version",
    ),
}
"""What the rooms that put everything together may use."""

ROOMS = {
    # name: rooms it may import; third-party packages it may import
    "_version": Room(pure=True),
    "errors": Room(pure=True),
    "specs": Room(pure=True),
    "summaries": Room(pure=True),
    # Arithmetic: no file, no store, no scheduler.
    "kernels": Room(set(), {"numba"}, pure=True),
    "intrinsics": Room(set(), {"numba", "llvmlite"}, pure=True),
    "checksum": Room({"kernels", "intrinsics"}, KERNELS | {"llvmlite"} | CHECKSUM, pure=True),
    "zstd": Room(set(), KERNELS | {"llvmlite", "numcodecs"}, pure=True),
    "ulp": Room({"kernels", "intrinsics"}, KERNELS, pure=True),
    "codec": Room(
        {"kernels", "intrinsics", "checksum", "zstd", "ulp"}, KERNELS | CHECKSUM, pure=True
    ),
    "sketch": Room({"kernels", "intrinsics", "ulp"}, KERNELS, pure=True),
    # Reads at the descriptors it is given; which files they are, and opening them, is not its.
    "scan": Room(
        {"kernels", "intrinsics", "pages", "checksum", "ulp", "codec", "sketch"},
        KERNELS,
        pure=True,
    ),
    "block_sweep": Room({"kernels", "intrinsics", "ulp", "sketch"}, KERNELS, pure=True),
    "fit": Room(set(), {"numpy", "scipy"}, pure=True),
    "planner": Room({"costs"}, pure=True),
    "costs": Room(pure=True),
    "dense": Room({"planner", "ulp"}, {"numpy", "torch"}, pure=True),
    "pages": Room(pure=True),
    "pieces": Room(set(), {"numpy"}, pure=True),
    "locations": Room(),
    "paths": Room(),
    # Object storage: fsspec is imported where a URL is used, and nowhere else.
    "objects": Room(set(), {"fsspec"}),
    "transfers": Room(pure=True),
    "listing": Room({"objects"}),
    "urls": Room({"paths"}),
    "pagecache": Room(),
    # Files: no mathematics, and these three do not know each other.
    "sources": Room(
        {"paths", "pagecache", "pieces", "listing", "objects", "transfers"},
        {"numpy", "safetensors"} | CHECKSUM,
    ),
    "writer": Room({"pagecache", "paths"}, {"numpy"} | CHECKSUM),
    "store": Room(
        {"paths", "pagecache", "objects", "transfers", "ulp", "codec"},
        {"numpy", "numcodecs", "safetensors", "zarr"} | CHECKSUM,
    ),
    # The zarr shim takes the codec's name from the store's layout.
    "zarr_codec": Room({"codec", "ulp", "store"}, {"numpy", "zarr"}),
    "machine": Room(set(), {"psutil"}),
    "versions": Room({"_version"}),
    # The only room that knows dask.
    "graph": Room(
        {"machine", "planner", "costs", "versions"},
        {"dask", "dask_cuda", "distributed", "numpy", "threadpoolctl"},
    ),
    # What several stages share: a block across its steps, a file put together from blocks.
    "blocks": Room({"pages", "ulp", "codec", "planner", "store"}, {"numpy"}),
    "base_weights": Room(
        {"blocks", "checksum", "listing", "ulp", "sources", "store", "transfers"},
        {"numpy"} | CHECKSUM,
    ),
    "block_reader": Room(
        {"blocks", "base_weights", "ulp", "codec", "sketch", "block_sweep", "planner", "store"},
        {"numpy"},
    ),
    # Both of torch's imports there are deferred: the CPU's path does without.
    "devices": Room({"planner", "costs"}, {"torch"}),
    "device_blocks": Room(
        {"dense", "devices", "planner", "blocks", "block_reader", "ulp"}, {"numpy", "torch"}
    ),
    # What a stage asks: whether devices work on a block, wherever it runs.
    "offload": Room(
        {"block_reader", "blocks", "device_blocks", "devices", "planner", "costs", "ulp"}, {"numpy"}
    ),
    "warmup": Room(
        {"checksum", "ulp", "codec", "sketch", "scan", "block_sweep", "store"}, {"numpy"}
    ),
    # Deltas of feeds: what they pack, unpacked and put upon the weights before.
    "zstd_stream": Room(set(), {"numcodecs", "numpy"}, pure=True),
    "chains": Room(pure=True),
    "patches": Room({"blocks", "store", "ulp"}, {"numpy"}),
    "unpacking": Room({"matching", "patches", "sources", "store", "zstd_stream"}, {"numpy"}),
    "digests": Room(
        {"base_weights", "block_reader", "blocks", "graph", "matching", "source_blocks", "store"}
        | {"ulp"},
        {"numpy"},
    ),
    "matching": Room({"pieces", "sources", "ulp", "store", "listing"}, {"numpy"}),
    "source_blocks": Room(
        {"blocks", "matching", "patches", "pieces", "scan", "sources", "store", "ulp"}, {"numpy"}
    ),
    "ingest": Room(
        BELOW_STAGES | {"matching", "patches", "scan", "source_blocks"}, {"numpy"} | CHECKSUM
    ),
    "assemble": Room(BELOW_STAGES, {"numpy"} | CHECKSUM),
    "subspaces": Room(BELOW_STAGES | {"grouping", "offload"}, {"numpy"}),
    "analysis": Room({"fit", "sketch"}, {"numpy"}, pure=True),
    "skill": Room({"analysis", "fit", "sketch"}, {"numpy"}, pure=True),
    "grams": Room(BELOW_STAGES | {"analysis", "subspaces", "warmup"}, {"numpy"}),
    # What is asked for, as arithmetic and in words.
    "grouping": Room(pure=True),
    "wording": Room(),
    "recipes": Room(pure=True),
    "methods": Room({"fit", "recipes"}, {"numpy"}, pure=True),
    "request": Room({"fit", "grouping", "methods", "recipes", "store", "subspaces"}),
    "cards": Room({"_version", "methods", "store"}, {"numpy"}),
    "documents": Room({"cards", "mixing", "request", "store", "writer"}),
    "mixing": Room({"fit", "model_writes", "request", "sketch", "store", "subspaces"}, {"numpy"}),
    "grid": Room({"request", "store"}, {"yaml"}),
    "cast_savings": Room(
        {"blocks", "matching", "source_blocks", "sources", "store", "ulp"}, {"numpy"}
    ),
    "forks": Room(
        {"base_weights", "block_reader", "blocks", "matching", "source_blocks", "sources"}
        | {"store", "ulp", "unpacking"},
        {"numpy"} | CHECKSUM,
    ),
    # The stages.
    "additions": Room({"chains", "forks", "matching", "sources", "store"}),
    "batches": Room(
        BELOW_STAGES | {"digests", "ingest", "matching", "patches", "source_blocks", "unpacking"},
        {"numpy"},
    ),
    "build": Room(
        BELOW_STAGES | {"additions", "batches", "cast_savings", "chains", "matching", "warmup"},
        {"numpy"},
    ),
    "hf_files": Room({"sources", "store"}),
    "exporting": Room(BELOW_STAGES | {"assemble", "hf_files", "warmup"}, {"numpy"} | CHECKSUM),
    "analyzing": Room(
        BELOW_STAGES | {"analysis", "grams", "grouping", "request", "subspaces"}, {"numpy"}
    ),
    "backtesting": Room(
        BELOW_STAGES | {"analysis", "grams", "grouping", "methods", "skill", "subspaces"}, {"numpy"}
    ),
    "nested": Room(
        BELOW_STAGES | {"grams", "grouping", "methods", "request", "skill", "subspaces"}, {"numpy"}
    ),
    "model_writes": Room(
        BELOW_STAGES | {"assemble", "grouping", "offload", "subspaces"}, {"numpy"}
    ),
    "outline": Room(
        BELOW_STAGES | {"assemble", "costs", "offload", "request", "subspaces"}, {"numpy"}
    ),
    "models": Room(
        BELOW_STAGES
        | {"assemble", "devices", "documents", "offload", "outline", "subspaces", "warmup"}
        | {"methods", "mixing", "model_writes", "nested", "request"},
    ),
    "verification": Room(BELOW_STAGES, {"numpy"} | CHECKSUM),
    "comparing": Room(
        BELOW_STAGES | {"matching", "pagecache", "patches", "source_blocks", "unpacking", "warmup"},
        {"numpy"},
    ),
    "repairing": Room(
        BELOW_STAGES | {"matching", "source_blocks", "verification"}, {"numpy"} | CHECKSUM
    ),
    "verifying": Room(
        {"base_weights", "comparing", "listing", "matching", "repairing", "sources", "store"}
        | {"verification"}
    ),
    # Following a run.
    "arrivals": Room({"sources"}),
    "watch_ledger": Room({"paths"}),
    "freeing": Room({"watch_ledger"}),
    "hooks": Room(),
    "watch_options": Room(pure=True),
    "watch_telling": Room(pure=True),
    "watching": Room(
        {
            "arrivals",
            "base_weights",
            "build",
            "comparing",
            "freeing",
            "hooks",
            "matching",
            "sources",
        }
        | {"store", "watch_ledger", "watch_options", "watch_telling"},
        {"numpy"},
    ),
    "store_info": Room({"store"}, {"numpy"}),
    # The only room that draws.
    "reporting": Room(
        BELOW_STAGES
        | {"analyzing", "assemble", "backtesting", "grams", "grouping", "outline", "request"}
        | {"skill", "store_info", "subspaces", "wording"},
        {"matplotlib", "numpy"},
    ),
    # Checkpoints that come one by one and may go; those of the Hub.
    "feeds": Room({"build", "store"}),
    "hub": Room(
        {"_version", "additions", "feeds", "paths", "sources", "store", "urls", "wording"},
        {"huggingface_hub"},
    ),
    # For Python callers.
    "opened": Room(BELOW_STAGES, {"numpy", "torch"}),
    "api": Room(
        BELOW_STAGES
        | {
            "analyzing",
            "backtesting",
            "build",
            "exporting",
            "grid",
            "hub",
            "models",
            "reporting",
            "request",
            "store_info",
            "urls",
            "verifying",
            "watch_options",
            "watching",
            "opened",
        },
        {"numpy"},
    ),
    "demo": Room(
        {"_version", "api"}, {"numpy", "torch", "transformers", "tokenizers", "safetensors"}
    ),
    # For trainers, which bring their packages; what they need of us runs in another process.
    "integrations": Room({"store"}, {"transformers"}),
    # The only room that prints.
    "cli": Room({"_version", "api", "demo", "urls", "wording"}, {"click", "rich"}),
    "__init__": Room({"_version", "api"}),
    "__main__": Room({"cli"}),
}

OPENERS = {"fcntl", "io", "mmap", "os", "pathlib", "shutil", "subprocess", "tempfile"}
"""Modules of the standard library that a pure room has no business with."""

HEAVY = ("relex_stream.api", "relex_stream.demo", "rich")
"""What a command file may import inside functions only, so that ``--help`` stays quick."""

FILES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def room_of(path: Path) -> str:
    """Return the room a source file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the absolute dotted names that a file imports, with line numbers.

    Imports inside functions and under TYPE_CHECKING count: they are knowledge all the same.
    """
    package = ["relex_stream", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "relex_stream":
                # `from relex_stream import api` imports a room, not the package's front door.
                for alias in node.names:
                    yield f"{module}.{alias.name}", node.lineno
            else:
                yield module, node.lineno


def violations(path: Path) -> Iterator[str]:
    """Yield a line for each import that the table does not allow."""
    name = room_of(path)
    room = ROOMS[name]
    floor = FLOOR if name != "_version" else set()
    for module, line in imported(path, ast.parse(path.read_text())):
        top, _, rest = module.partition(".")
        place = f"{path.relative_to(PACKAGE)}:{line}"
        if top == "relex_stream":
            target = rest.partition(".")[0]
            if target not in room.rooms | floor | {name}:
                yield f"{place}: {name} may not import {target or 'the package itself'}"
        elif top in sys.stdlib_module_names:
            if room.pure and top in OPENERS:
                yield f"{place}: {name} opens no file, so it does not import {top}"
        elif top not in room.packages:
            yield f"{place}: {name} may not import {top}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_map(path: Path) -> None:
    assert room_of(path) in ROOMS, "add the new room to the table, with what it may import"
    assert not list(violations(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_pure_rooms_call_no_open(path: Path) -> None:
    if room_of(path) not in ROOMS or not ROOMS[room_of(path)].pure:
        return
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open"
    ]
    assert not calls


def test_the_map_has_no_cycle() -> None:
    left = {name: room.rooms for name, room in ROOMS.items()}
    while left:
        free = {name for name, below in left.items() if not below & set(left)}
        assert free, f"these rooms import each other in a circle: {sorted(left)}"
        left = {name: below for name, below in left.items() if name not in free}


def test_the_store_the_sources_and_the_writer_do_not_know_each_other() -> None:
    rooms = {"store", "sources", "writer"}
    for name in rooms:
        assert not ROOMS[name].rooms & (rooms | {"graph"})


def test_one_room_knows_dask_one_prints_and_one_draws() -> None:
    assert [name for name, room in ROOMS.items() if "dask" in room.packages] == ["graph"]
    assert [name for name, room in ROOMS.items() if "click" in room.packages] == ["cli"]
    assert [name for name, room in ROOMS.items() if "matplotlib" in room.packages] == ["reporting"]


def test_one_room_knows_object_storage() -> None:
    assert [name for name, room in ROOMS.items() if "fsspec" in room.packages] == ["objects"]


def test_few_rooms_go_below_python() -> None:
    # No exception guards what they reach there.
    below = {name for name, room in ROOMS.items() if "llvmlite" in room.packages}
    assert below == {"intrinsics", "checksum", "zstd"}


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) == "cli"])
def test_commands_import_the_library_inside_the_function(path: Path) -> None:
    body = [node for node in ast.parse(path.read_text()).body if not _deferred(node)]
    names = {name for name, _ in imported(path, ast.Module(body, []))}
    assert not {name for name in names if name.startswith(HEAVY)}


def _deferred(node: ast.stmt) -> bool:
    type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return type_checking or isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_no_module_is_named_like_a_public_function() -> None:
    # Importing a module relex_stream.extrapolate would bind its name in the package, and
    # relex_stream.extrapolate(...) would then call the module.
    modules = {room_of(path) for path in FILES}
    clashes = modules & set(relex_stream.__all__)
    assert not clashes, f"rename these modules: {sorted(clashes)}"


def test_the_check_sees_what_it_should() -> None:
    tree = ast.parse("def f():\n    from ..store import read\n    import dask.array\n")
    assert list(imported(PACKAGE / "sources" / "x.py", tree)) == [
        ("relex_stream.store", 2),
        ("dask.array", 3),
    ]
    assert list(imported(PACKAGE / "x.py", ast.parse("from . import graph"))) == [
        ("relex_stream.graph", 1)
    ]
