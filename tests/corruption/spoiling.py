"""Stores spoilt on purpose, file by file and bit by bit, and every way of reading them.

`run` damages one thing at a time, lets one job read the store, and puts the damage right again.
What a job may do is: refuse, saying what is damaged and leaving nothing behind, or give exactly
what it gives of the intact store. Anything else is counted as lost, and told.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr

import relex_stream
from relex_stream.errors import RelexStreamError
from relex_stream.store import Store
from tests.crash.replay import unsynced
from tests.crash.runs import build, in_order
from tests.make_checkpoints import Trajectory, make_trajectory

STEPS = range(1, 18)  # one more than a group of rows
LATER = 18  # appended by a job
TENSORS = {"embed.weight": (30, 24), "norm.weight": (24,), "scale": ()}
CONSTANTS = {"position_ids": ("I64", (6,), bytes(range(48)))}

_TIMES = {"elapsed_s", "peak_memory_bytes", "bytes_read", "plan", "out", "store"}
"""What differs from call to call."""

Job = Callable[["Case", Path, Path], Any]


@dataclass(frozen=True)
class Case:
    """A run, and two stores of all its steps but the last: one holds the base, one does not."""

    run: Trajectory
    with_base: Path
    without_base: Path

    @property
    def stores(self) -> tuple[Path, Path]:
        return self.with_base, self.without_base


@dataclass
class Counts:
    """What was tried, by the kind of what was damaged, and what came of it.

    Attributes
    ----------
    tried : Counter of (what, how)
    refused, harmless : Counter of what
    jobs : Counter of str
        How often each job read a damaged store.
    lost : list of str
        What went wrong: wrong weights, other errors, something left behind, damage not named.
    """

    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    harmless: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)


def make_case(root: Path) -> Case:
    """Write the checkpoints and the stores below `root`."""
    run = make_trajectory(
        root,
        steps=(*STEPS, LATER),
        tensors=TENSORS,
        constants=CONSTANTS,
        change_share=0.02,
        checkpoint_shards=1,
    )
    case = Case(run, root / "with-base", root / "without-base")
    for store, include_base in ((case.with_base, True), (case.without_base, False)):
        build(
            run.base,
            run.checkpoints,
            store,
            steps=f"1:{STEPS[-1]}",
            include_base=include_base,
            commit_steps=None,
        )
    return case


# --- jobs ----------------------------------------------------------------------------------------


class _FoundError(Exception):
    """`verify` named problems."""


def _files(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.suffix == ".safetensors" or path.name == "config.json"
    }


def _said(summary: Any) -> str:
    """Return all that a summary says, as text: a NaN is not equal to itself."""
    said = dataclasses.asdict(summary).items()
    return repr({name: value for name, value in said if name not in _TIMES})


def _bits(store: Path, base: Path | None = None) -> dict[tuple[int, str], bytes]:
    opened = relex_stream.open_store(store, base=base)
    return {
        (step, name): opened.checkpoint_bits(name, step).tobytes()
        for step in (0, *opened.steps)
        for name in opened.tensors
    }


def _export(_: Case, store: Path, out: Path) -> Any:
    relex_stream.export(store, out, step=STEPS[-1], workers=1)
    return _files(out)


def _export_steps(_: Case, store: Path, out: Path) -> Any:
    relex_stream.export_steps(store, out, steps="2:5", workers=1)
    return _files(out)


def _reconstruct(_: Case, store: Path, out: Path) -> Any:
    relex_stream.reconstruct(store, out, steps=[STEPS[-1]], workers=1)
    return _files(out)


def _extrapolate(_: Case, store: Path, out: Path) -> Any:
    relex_stream.extrapolate(store, out, target_steps=[40], workers=1)
    return _files(out)


def _combine(_: Case, store: Path, out: Path) -> Any:
    relex_stream.combine(store, out, recipes=["ema:decay=0.5"], workers=1)
    return _files(out)


def _analyze(_: Case, store: Path, out: Path) -> Any:
    return _said(relex_stream.analyze(store, workers=1))


def _analyze_exactly(_: Case, store: Path, out: Path) -> Any:
    return _said(relex_stream.analyze(store, exact=True, workers=1))


def _backtest(_: Case, store: Path, out: Path) -> Any:
    return _said(relex_stream.backtest(store, workers=1))


def _info(_: Case, store: Path, out: Path) -> Any:
    # Sizes of files are what they are; what is said of the steps is what is stored.
    return [(step.step, step.changed_weights) for step in relex_stream.info(store).steps]


def _open(_: Case, store: Path, out: Path) -> Any:
    return _bits(store)


def _verify(case: Case, store: Path, out: Path) -> Any:
    problems = relex_stream.verify(store, base=case.run.base, workers=1).problems
    if problems:
        raise _FoundError("; ".join(problems))
    return None


def _append(case: Case, store: Path, out: Path) -> Any:
    """Append the last step to a copy, and read all of that."""
    copy = Path(shutil.copytree(store, out))
    try:
        build(case.run.base, case.run.checkpoints, copy, include_base=False, commit_steps=None)
        return _bits(copy, case.run.base)
    finally:
        shutil.rmtree(copy)


def _drop(case: Case, store: Path, out: Path) -> Any:
    """Take steps of a copy back, and read what is left."""
    copy = Path(shutil.copytree(store, out))
    try:
        relex_stream.drop(copy, after=9)
        return _bits(copy, case.run.base)
    finally:
        shutil.rmtree(copy)


def _zarr(_: Case, store: Path, out: Path) -> Any:
    """Read differences with plain zarr, which knows nothing of records."""
    return {
        name: np.asarray(array[:]).tobytes()
        for name, array in zarr.open_group(store / "deltas", mode="r").arrays()
    }


JOBS: dict[str, Job] = {
    "export": _export,
    "export --steps": _export_steps,
    "reconstruct": _reconstruct,
    "extrapolate": _extrapolate,
    "combine": _combine,
    "analyze": _analyze,
    "analyze --exact": _analyze_exactly,
    "backtest": _backtest,
    "info": _info,
    "open_store": _open,
    "verify": _verify,
    "append": _append,
    "drop": _drop,
    "zarr": _zarr,
}


# --- damage --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Bytes of one kind in a file: where damage is done.

    Attributes
    ----------
    what : str
        Their kind.
    path : Path
    low, high : int
        First byte, and the one behind the last.
    tensor : str or None
        That must be named where the damage is met.
    """

    what: str
    path: Path
    low: int
    high: int
    tensor: str | None = None


def parts_of(store: Path, base: Path) -> list[Part]:
    """Return every byte of a store, in parts of one kind; and the base's, if it reads them."""
    opened = Store(store)
    parts = [*_records(opened, store), *_frames(opened, store)]
    known = {part.path for part in parts}
    others = (path for path in sorted(store.rglob("*")) if path.is_file())
    parts += [_other(store, path) for path in others if path not in known]
    if not opened.manifest.base_included:
        weights = next(base.glob("*.safetensors"))
        start = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
        parts.append(Part("base directory: header", weights, 0, start))
        parts.append(Part("base directory: weights", weights, start, weights.stat().st_size))
    return [part for part in parts if part.high > part.low]


def _records(opened: Store, store: Path) -> Iterator[Part]:
    for row, record in enumerate(opened.head.commits):
        path = store / record.path
        starts = sorted(opened._column_starts_of(record.path).items(), key=lambda item: item[1])
        ends = [start for _, start in starts[1:]] + [path.stat().st_size]
        yield Part("commit: header", path, 0, starts[0][1])
        for (column, start), end in zip(starts, ends, strict=True):
            yield Part(f"commit: {column}", path, start, end)
        for entry in opened.commit(row).files:
            what = "blob: recipe" if entry.recipe else "blob: side file"
            blob = store / f"blobs/{entry.recipe or entry.blob}"
            yield Part(what, blob, 0, blob.stat().st_size)


def _frames(opened: Store, store: Path) -> Iterator[Part]:
    for tensor in opened.manifest.tensors:
        for block in range(tensor.blocks):
            sizes = opened.frame_bytes[:, tensor.first_block + block].tolist()
            for group in range(0, len(sizes), 16):
                path = store / f"deltas/{tensor.name}/c.{group // 16}.{block}"
                at = 0
                for size in filter(None, sizes[group : group + 16]):
                    yield Part("frame: header", path, at, at + 24, tensor.name)
                    yield Part("frame: body", path, at + 24, at + size, tensor.name)
                    at += size


def _other(store: Path, path: Path) -> Part:
    top = path.relative_to(store).parts[0]
    of_base = top == "base" and path.name != "zarr.json"
    what = {"blobs": "blob: header of weights", "commits": "manifest"}.get(top, path.name)
    return Part(
        "base weights" if of_base else what,
        path,
        0,
        path.stat().st_size,
        path.parent.name if of_base else None,
    )


HOW = ("bit", "byte", "zeros", "cut", "removed", "swapped")
"""One bit; one byte; a run of up to 64 bytes set to zero; cut there; removed; with its like."""


@contextmanager
def spoilt(part: Part, how: str, others: list[Part], rng: random.Random) -> Iterator[bool]:
    """Damage a part; say whether its file is another now; put all right afterwards."""
    paths = [part.path]
    if how == "swapped":
        like = sorted({one.path for one in others if one.what == part.what} - {part.path})
        paths += [rng.choice(like)] if like else []
    before = [path.read_bytes() for path in paths]
    data = bytearray(before[0])
    at = rng.randrange(part.low, part.high)
    if how == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "byte":
        data[at] = rng.randrange(256)
    elif how == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif how == "cut":
        del data[at:]
    try:
        if how == "removed":
            part.path.unlink()
        elif how == "swapped":
            for path, content in zip(paths, reversed(before), strict=True):
                path.write_bytes(content)
        else:
            part.path.write_bytes(data)
        yield how == "removed" or part.path.read_bytes() != before[0]
    finally:
        for path, content in zip(paths, before, strict=True):
            path.write_bytes(content)


# --- the sweep -----------------------------------------------------------------------------------


def run(root: Path, *, times: int, seed: int = 0) -> Counts:
    """Damage stores `times` times, each time letting one job read them.

    Parameters
    ----------
    root : Path
        An empty directory; better in memory.
    times : int
        Damages that change something.
    seed : int

    Returns
    -------
    Counts
    """
    rng = random.Random(seed)
    counts = Counts()
    with in_order(), unsynced(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = make_case(root)
        expected = {
            (store, name): _outcome(job, case, store, root / "out")
            for store in case.stores
            for name, job in JOBS.items()
        }
        for (store, name), (kind, found) in expected.items():
            assert kind == "gave", f"{name} of the intact {store.name}: {found}"
        by_kind: dict[tuple[Path, str], list[Part]] = {}
        for store in case.stores:
            for part in parts_of(store, case.run.base):
                by_kind.setdefault((store, part.what), []).append(part)
        kinds = sorted(by_kind)
        while counts.tried.total() < times:
            store, what = rng.choice(kinds)
            parts = by_kind[store, what]
            part, how, name = rng.choice(parts), rng.choice(HOW), rng.choice(sorted(JOBS))
            if not _is_asked(what, how, name):
                continue
            with spoilt(part, how, parts, rng) as changed:
                if not changed:
                    continue
                counts.tried[what, how] += 1
                counts.jobs[name] += 1
                outcome = _outcome(JOBS[name], case, store, root / "out")
            told = f"{store.name}: {what}, {how}, {part.path.name} read by {name}"
            _judge(counts, part, how, name, outcome, expected[store, name], told)
        for (store, name), before in expected.items():
            after = _outcome(JOBS[name], case, store, root / "out")
            assert after == before, f"{name} of {store.name} changed: damage was not put right"
    return counts


def _is_asked(what: str, how: str, name: str) -> bool:
    """Leave out what plain zarr cannot know: whether a frame or a whole chunk should be there."""
    return name != "zarr" or (what.startswith("frame") and how in ("bit", "byte"))


def _outcome(job: Job, case: Case, store: Path, out: Path) -> tuple[str, Any]:
    """Run a job; return what it gave, how it refused, or how it failed otherwise."""
    try:
        found = "gave", job(case, store, out)
    except (RelexStreamError, _FoundError) as error:
        found = "refused", str(error)
    except Exception as error:  # noqa: BLE001
        # zarr passes on what the codec raises as it likes; our own errors have a base class.
        kind = "refused" if job is _zarr else "failed"
        found = kind, f"{type(error).__name__}: {error}"
    if found[0] != "gave" and out.exists():
        found = found[0], _Refusal(found[1], _files(out))
    shutil.rmtree(out, ignore_errors=True)
    return found


class _Refusal(str):
    """A message, and the files that were there all the same."""

    __slots__ = ("files",)

    def __new__(cls, text: str, files: dict[str, bytes]) -> Self:
        made = super().__new__(cls, text)
        made.files = files
        return made


def _is_whole(files: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Say whether the directories that were written before hold all that they should."""
    directories = {path.split("/")[0] for path in files}
    return files == {
        path: data for path, data in expected.items() if path.split("/")[0] in directories
    }


def _judge(
    counts: Counts,
    part: Part,
    how: str,
    name: str,
    outcome: tuple[str, Any],
    expected: tuple[str, Any],
    told: str,
) -> None:
    kind, found = outcome
    if kind == "gave" and found == expected[1]:
        if name == "verify" and part.what != "LOCK":
            counts.lost.append(f"{told}: not found")
        counts.harmless[part.what] += 1
    elif kind == "refused":
        counts.refused[part.what] += 1
        # Of two that are swapped, either is what does not fit.
        names = TENSORS | CONSTANTS if how == "swapped" else {part.tensor}
        if part.tensor and name != "zarr" and not any(one in found for one in names):
            counts.lost.append(f"{told}: tensor {part.tensor} is not named: {found}")
        elif isinstance(found, _Refusal) and not _is_whole(found.files, expected[1]):
            counts.lost.append(f"{told}: left {sorted(found.files)} behind: {found}")
        elif "\n" in found and name != "zarr":
            counts.lost.append(f"{told}: more than a line: {found}")
    else:
        counts.lost.append(f"{told}: {kind}: {str(found)[:300]}")
