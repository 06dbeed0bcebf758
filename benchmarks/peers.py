"""The ``peers`` command: relex-stream and other programs on the same checkpoints, in turn.

Every figure is of a whole process. Rows "in process" count only the seconds that a program says its
work took after start-up and imports; they come from runs of their own where the ordinary program
does not tell them.

All programs of a part run in one rotation: build, then extrapolate, then those that go from
checkpoints to a model without anything kept in between; then again from the start. Before each, its
last output is deleted and the disk comes to rest (`os.sync`), or relex-stream, which syncs what it
writes, would wait for what another one left unwritten. Unless cold runs are asked for, its inputs
are then read once: what the program before it pushed out of the page cache is no affair of its.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.commands import document, relex, set_aside, work_directory
from benchmarks.peer_programs import mergekit_linear, relex_scripts
from benchmarks.peer_programs.two_pass import FLOATS, Model, find_checkpoints, read
from benchmarks.processes import (
    SAMPLE_S,
    BenchmarkError,
    Measurement,
    Program,
    alternate,
    directory_bytes,
    measure,
)
from benchmarks.report import Report, process_row, publish, report_options, spread
from relex_stream.machine import usable_cores

WHOLE = "whole process"
IN_PROCESS = "in process"

OURS = "relex-stream"
AUTHORS = "authors' scripts"
TWO_PASS = "two plain passes"
MERGEKIT = "mergekit, linear"
LIMIT = "limit"

BUILD = "build"
EXTRAPOLATE = "extrapolate"
BOTH = "checkpoints to model"
JOBS = {"build": BUILD, "extrapolate": EXTRAPOLATE, "both": BOTH}
"""What is measured, by the word that asks for it."""

_ORDER = ((BUILD, EXTRAPOLATE, BOTH), (OURS, AUTHORS, TWO_PASS, MERGEKIT, LIMIT))
"""Of jobs and programs in the table."""

SEVERAL_TARGETS = 8

_PROGRAMS = Path(__file__).parent / "peer_programs"
_ROOT = Path(__file__).parents[1]
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Run:
    """The trajectory that all programs get."""

    base: Path
    checkpoints: Path
    steps: tuple[int, ...]
    target: int

    @classmethod
    def of(cls, directory: Path, target: int | None) -> Run:
        """Look into a directory that `trajectory` wrote.

        Raises
        ------
        BenchmarkError
            If it is none.
        """
        base, checkpoints = (directory.resolve() / name for name in ("base", "checkpoints"))
        for path in (base, checkpoints):
            if not path.is_dir():
                raise BenchmarkError(
                    f"{directory} holds no {path.name}/; `python -m benchmarks trajectory` makes "
                    "such a directory"
                )
        try:
            steps = tuple(step for step, _ in find_checkpoints(checkpoints))
        except SystemExit as error:
            raise BenchmarkError(str(error)) from error
        return cls(base, checkpoints, steps, 2 * steps[-1] if target is None else target)

    @property
    def several_targets(self) -> list[int]:
        return [self.target + 10 * number for number in range(SEVERAL_TARGETS)]

    @property
    def consecutive(self) -> bool:
        return all(b - a == 1 for a, b in zip(self.steps, self.steps[1:], strict=False))


@dataclass(frozen=True)
class Tools:
    """Peers that are not part of this project, as far as the caller names them."""

    relex: Path | None = None
    relex_python: Path | None = None
    mergekit: Path | None = None

    def missing(self) -> list[str]:
        """Say what is left out."""
        lines = []
        if self.relex is None:
            lines.append(
                f"{AUTHORS}: left out; name a checkout of github.com/weizhepei/RELEX at "
                f"{relex_scripts.COMMIT} with --relex, and a Python that has what it imports with "
                "--relex-python"
            )
        if self.mergekit is None:
            lines.append(f"{MERGEKIT}: left out; name its program with --mergekit")
        return lines


@dataclass(frozen=True)
class Entry:
    """A program and the row it fills.

    Attributes
    ----------
    output : Path
        What it leaves, out of the way before each run and measured after the last.
    label : str
        Sets apart rows of one program, such as one worker and two.
    seconds_of : callable, optional
        Takes the seconds from a measurement; those of the whole process if not given.
    """

    job: str
    program: str
    argv: Sequence[str | Path]
    output: Path | None = None
    label: str = ""
    reads: tuple[Path, ...] = ()
    env: Mapping[str, str] | None = None
    seconds_of: Callable[[Measurement], float] | None = None

    @property
    def name(self) -> str:
        """Return what tells it from all others of its rotation."""
        return ", ".join(word for word in (self.job, self.program, self.label) if word)

    def as_program(self, *, cold: bool = False) -> Program:
        """Return it as `alternate` wants it."""
        return Program(
            self.name,
            self.argv,
            partial(self.prepare, cold=cold),
            self.reads,
            cwd=_ROOT,
            env=None if self.env is None else {**os.environ, **self.env},
            timeout_s=6 * 3600,
            # Where only the call's own seconds count, nobody looks at the memory, and looking takes
            # some percent from the workers, who have all cores.
            sample_s=SAMPLE_S if self.seconds_of is None else 0.25,
        )

    def prepare(self, *, cold: bool) -> None:
        """Make ready for a run; `alternate` takes care of cold inputs."""
        click.echo(f"{self.name} ...", err=True)
        if self.output is not None:
            set_aside(self.output)
        os.sync()
        if not cold:
            warm(self.reads)


def warm(paths: Iterable[Path]) -> None:
    """Bring files, and all files below directories, into the page cache."""
    buffer = memoryview(mmap.mmap(-1, _PIECE_BYTES))
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb", buffering=0) as opened:
                    while opened.readinto(buffer):
                        pass


def call_s(measurement: Measurement) -> float:
    """Return the seconds of the work itself, which our programs print as their last line."""
    try:
        seconds: float = json.loads(measurement.stdout.splitlines()[-1])["call_s"]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{measurement.name}: printed no time of its own") from error
    return seconds


class Programs:
    """Command lines of everything that is compared, with their outputs under one directory."""

    def __init__(self, run: Run, tools: Tools, work: Path, threads: int) -> None:
        self._run = run
        self._tools = tools
        self._threads = threads
        self._work = work
        self.store = work / "store"
        self.deltas = work / "authors-deltas"
        self.ours = work / "ours"
        self.authors = work / "authors"
        self.two_pass = work / "two-pass"
        self._linked_base = work / "authors-base"
        if tools.relex is not None:
            for name in (relex_scripts.DELTAS_SCRIPT, relex_scripts.EXTRAPOLATION_SCRIPT):
                relex_scripts.script_in(tools.relex, name)
            relex_scripts.link_base(run.base, self._linked_base)

    def whole(self, jobs: Iterable[str]) -> list[Entry]:
        """Return what a user would call, in the order of a rotation."""
        run = self._run
        entries = {
            BUILD: [self._our_build(), *self._authors_build(), self._read_limit(BUILD)],
            EXTRAPOLATE: [
                self._our_extrapolation(),
                *self._authors_extrapolation(),
                self._write_limit(EXTRAPOLATE, 1),
            ],
            BOTH: [
                Entry(
                    BOTH,
                    TWO_PASS,
                    (
                        *(sys.executable, _PROGRAMS / "two_pass.py", run.base, run.checkpoints),
                        *(self.two_pass, "--target-step", str(run.target)),
                        *("--threads", str(self._threads)),
                    ),
                    self.two_pass,
                    reads=(run.base, run.checkpoints),
                ),
                *self._mergekit(),
                self._read_limit(BOTH, copies=1),
            ],
        }
        return [entry for job, made in entries.items() if job in jobs for entry in made]

    def in_process(self, jobs: Iterable[str]) -> list[Entry]:
        """Return the same work, timed by itself; besides, one worker and several targets."""
        entries = {
            BUILD: [
                self._our_call(BUILD),
                self._our_call(BUILD, workers=1),
                *map(self._without_start_up, self._authors_build()),
                self._read_limit(BUILD, in_process=True),
            ],
            EXTRAPOLATE: [
                self._our_call(EXTRAPOLATE),
                self._our_call(EXTRAPOLATE, workers=1),
                self._our_call(EXTRAPOLATE, targets=SEVERAL_TARGETS),
                *map(self._without_start_up, self._authors_extrapolation()),
                self._write_limit(EXTRAPOLATE, 1, in_process=True),
                self._write_limit(EXTRAPOLATE, SEVERAL_TARGETS, in_process=True),
            ],
        }
        return [entry for job, made in entries.items() if job in jobs for entry in made]

    def make_inputs(self) -> None:
        """Build the store and the deltas, for a rotation that builds neither."""
        for entry in (self._our_build(), *self._authors_build()):
            program = entry.as_program()
            program.prepare()
            measure(program.name, program.argv, cwd=program.cwd, env=program.env)

    # --- relex-stream

    def _our_build(self) -> Entry:
        run = self._run
        return Entry(
            BUILD,
            OURS,
            relex("build-store", run.base, run.checkpoints, self.store),
            self.store,
            reads=(run.base, run.checkpoints),
        )

    def _our_extrapolation(self) -> Entry:
        return Entry(
            EXTRAPOLATE,
            OURS,
            relex("extrapolate", self.store, self.ours, "--target-step", self._run.target),
            self.ours,
            reads=(self._run.base, self.store),
        )

    def _our_call(self, job: str, *, workers: int | None = None, targets: int = 1) -> Entry:
        run = self._run
        words: list[str | Path] = [
            *(sys.executable, "-m", "benchmarks.peer_programs.relex_stream_call")
        ]
        if job == BUILD:
            # The extrapolations of this rotation read the store that all workers made.
            output = self.store if workers is None else self._work / "store-of-one-worker"
            words += ["build", run.base, run.checkpoints, output]
            reads: tuple[Path, ...] = (run.base, run.checkpoints)
        else:
            output = self.ours if targets == 1 else self._work / "ours-several"
            words += ["extrapolate", self.store, output]
            for step in run.several_targets[:targets]:
                words += ["--target-step", str(step)]
            reads = (run.base, self.store)
        if workers is not None:
            words += ["--workers", str(workers)]
        label = [] if workers is None else [f"{workers} worker{'s' * (workers > 1)}"]
        label += [] if targets == 1 else [f"{targets} targets"]
        return Entry(job, OURS, words, output, ", ".join(label), reads, env=None, seconds_of=call_s)

    # --- the authors' scripts

    def _authors_build(self) -> list[Entry]:
        tools, run = self._tools, self._run
        if tools.relex is None:
            return []
        command = relex_scripts.deltas_command(
            tools.relex_python or sys.executable,
            tools.relex,
            base=self._linked_base,
            checkpoints=run.checkpoints,
            deltas=self.deltas,
        )
        return [
            Entry(
                BUILD,
                AUTHORS,
                command,
                self.deltas,
                reads=(run.base, run.checkpoints),
                env=relex_scripts.ENVIRONMENT,
            )
        ]

    def _authors_extrapolation(self) -> list[Entry]:
        tools, run = self._tools, self._run
        if tools.relex is None:
            return []
        command = relex_scripts.extrapolation_command(
            tools.relex_python or sys.executable,
            tools.relex,
            base=self._linked_base,
            deltas=self.deltas,
            out=self.authors,
            history_steps=run.steps[-1],
            target_steps=[run.target],
        )
        return [
            Entry(
                EXTRAPOLATE,
                AUTHORS,
                command,
                self.authors,
                reads=(run.base, self.deltas),
                env=relex_scripts.ENVIRONMENT,
            )
        ]

    @staticmethod
    def _without_start_up(entry: Entry) -> Entry:
        words = [str(word) for word in entry.argv]
        argv = relex_scripts.without_start_up(words)
        return replace(entry, argv=argv, seconds_of=call_s)

    # --- mergekit

    def _mergekit(self) -> list[Entry]:
        program = self._tools.mergekit
        if program is None:
            return []
        run, config, output = self._run, self._work / "mergekit.yaml", self._work / "mergekit"
        text = mergekit_linear.config_text(
            find_checkpoints(run.checkpoints),
            target_step=run.target,
            dtype=_mergekit_dtype(run.base),
        )
        config.write_text(text, encoding="utf-8")
        return [
            Entry(
                BOTH,
                MERGEKIT,
                mergekit_linear.command(program, config, output),
                output,
                reads=(run.base, run.checkpoints),
                env=mergekit_linear.ENVIRONMENT,
            )
        ]

    # --- limits

    def _limit(
        self,
        job: str,
        label: str,
        words: Sequence[str | Path],
        *,
        reads: tuple[Path, ...],
        output: Path | None = None,
        in_process: bool = False,
    ) -> Entry:
        argv = (sys.executable, _PROGRAMS / "read_write.py", *words)
        return Entry(
            job,
            LIMIT,
            (*argv, "--threads", str(self._threads)),
            output,
            label,
            reads,
            seconds_of=call_s if in_process else None,
        )

    def _read_limit(self, job: str, *, copies: int = 0, in_process: bool = False) -> Entry:
        run, output = self._run, self._work / "copies"
        words: list[str | Path] = ["--read", run.checkpoints]
        if copies:
            label = "only read all, write one model"
            words += ["--copy", run.base, output]
        else:
            label = "only read all"
            words += ["--read", run.base]
        return self._limit(
            job,
            label,
            words,
            reads=(run.base, run.checkpoints),
            output=output if copies else None,
            in_process=in_process,
        )

    def _write_limit(self, job: str, copies: int, *, in_process: bool = False) -> Entry:
        output = self._work / "copies"
        words: list[str | Path] = []
        for number in range(copies):
            words += ["--copy", self._run.base, output / str(number)]
        models = "one model" if copies == 1 else f"{copies} models"
        return self._limit(
            job,
            f"only read the base, write {models}",
            words,
            reads=(self._run.base,),
            output=output,
            in_process=in_process,
        )


def _mergekit_dtype(base: Path) -> str:
    model = Model(base)
    codes = {place.dtype for place in model.tensors.values()}
    model.close()
    return {"BF16": "bfloat16", "F16": "float16"}.get(next(iter(codes)), "float32")


# --- Rows.


def seconds_of(entry: Entry, measurements: Sequence[Measurement]) -> list[float]:
    """Return what counts as the time of each run."""
    if entry.seconds_of is None:
        return [one.wall_s for one in measurements]
    return [entry.seconds_of(one) for one in measurements]


def row_of(part: str, entry: Entry, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return the row of one program, without its ratio to relex-stream."""
    figures = process_row(measurements)
    if entry.seconds_of is not None:
        seconds = seconds_of(entry, measurements)
        figures["wall_s"], figures["wall_min_s"], figures["wall_max_s"] = spread(seconds)
        # These are of the whole process, warm-up and all, and say nothing about the call.
        figures["cpu_s"] = figures["peak_rss_bytes"] = None
    elif entry.output is not None:
        figures["disk_bytes"] = directory_bytes(entry.output)
    names = {"part": part, "job": entry.job, "program": entry.program, "variant": entry.label}
    return names | figures


def summed_row(
    part: str,
    build: tuple[Entry, Sequence[Measurement]],
    extrapolate: tuple[Entry, Sequence[Measurement]],
) -> dict[str, Any]:
    """Return the row of a program that goes from checkpoints to a model in two processes."""
    rows = [row_of(part, entry, measurements) for entry, measurements in (build, extrapolate)]
    seconds = [
        sum(pair)
        for pair in zip(*(seconds_of(*measured) for measured in (build, extrapolate)), strict=True)
    ]
    wall_s, least_s, most_s = spread(seconds)
    row = rows[0] | {
        "job": BOTH,
        "variant": "build + extrapolate",
        "wall_s": wall_s,
        "wall_min_s": least_s,
        "wall_max_s": most_s,
    }
    if part == WHOLE:
        row["cpu_s"] = rows[0]["cpu_s"] + rows[1]["cpu_s"]
        row["peak_rss_bytes"] = max(one["peak_rss_bytes"] for one in rows)
        row["disk_bytes"] = sum(one["disk_bytes"] for one in rows)
    return row


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows job by job, each with its time as a multiple of relex-stream's.

    That is relex-stream at the same job, with its defaults, one target.
    """
    ours = {
        (row["part"], row["job"]): row["wall_s"]
        for row in rows
        if row["program"] == OURS and row["variant"] in ("", "build + extrapolate")
    }
    jobs, programs = _ORDER
    done = []
    for row in sorted(
        rows,
        key=lambda row: (
            row["part"] == IN_PROCESS,
            jobs.index(row["job"]),
            programs.index(row["program"]),
        ),
    ):
        reference = ours.get((row["part"], row["job"]))
        done.append(row | {"times_relex_stream": row["wall_s"] / reference if reference else None})
    return done


def same_share(first: Path, second: Path) -> float:
    """Return the share of weights that two model directories have bit for bit in common.

    Raises
    ------
    BenchmarkError
        If they hold other tensors.
    """
    models = [Model(first), Model(second)]
    try:
        shapes = [
            {name: (place.dtype, place.shape) for name, place in model.tensors.items()}
            for model in models
        ]
        if shapes[0] != shapes[1]:
            names = sorted(shapes[0].keys() ^ shapes[1].keys()) or ["(dtypes or shapes differ)"]
            raise BenchmarkError(
                f"{first.name} and {second.name} hold other tensors: {', '.join(names[:5])}"
            )
        buffers = [np.empty(_PIECE_BYTES + (1 << 16), np.uint8) for _ in models]
        same = total = 0
        for name, (dtype, _) in shapes[0].items():
            if dtype not in FLOATS:
                continue
            places = [model.tensors[name] for model in models]
            step = _PIECE_BYTES // 4
            for start in range(0, places[0].elements, step):
                stop = min(start + step, places[0].elements)
                one, two = (
                    read(place, start, stop, buffer)
                    for place, buffer in zip(places, buffers, strict=True)
                )
                # As bits: the sign of a zero counts.
                width = np.dtype(f"u{one.itemsize}")
                same += int(np.count_nonzero(one.view(width) == two.view(width)))
                total += stop - start
    finally:
        for model in models:
            model.close()
    return same / max(1, total)


# --- The command.


class Names(click.ParamType[tuple[str, ...]]):
    """Words out of a few, with commas between."""

    name = "names"

    def __init__(self, choices: Iterable[str]) -> None:
        self._choices = tuple(choices)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(word for word in re.split(r"[,\s]+", value) if word)
        unknown = [word for word in words if word not in self._choices]
        if unknown or not words:
            self.fail(
                f"{', '.join(unknown) or 'nothing'}: choose from {', '.join(self._choices)}",
                param,
                ctx,
            )
        return words


class _Rotations:
    """Runs the parts that are asked for, and makes the rows."""

    def __init__(
        self, programs: Programs, report: Report, *, runs: int, warmup: int, cold: bool
    ) -> None:
        self._programs = programs
        self._report = report
        self._runs = runs
        self._warmup = warmup
        self._cold = cold
        self.rows: list[dict[str, Any]] = []

    def _measure(self, part: str, entries: Sequence[Entry]) -> dict[str, list[Measurement]]:
        measured = alternate(
            [entry.as_program(cold=self._cold) for entry in entries],
            runs=self._runs,
            warmup=self._warmup,
            cold=self._cold,
        )
        self.rows += [row_of(part, entry, measured[entry.name]) for entry in entries]
        plain = {
            (entry.program, entry.job): (entry, measured[entry.name])
            for entry in entries
            if not entry.label
        }
        for program in (OURS, AUTHORS):
            if (program, BUILD) in plain and (program, EXTRAPOLATE) in plain:
                both = (plain[program, job] for job in (BUILD, EXTRAPOLATE))
                self.rows.append(summed_row(part, *both))
        return measured

    def whole(self, jobs: Sequence[str]) -> None:
        """Measure whole processes."""
        entries = self._programs.whole(jobs)
        measured = self._measure(WHOLE, entries)
        for entry in entries:
            last = measured[entry.name][-1]
            if entry.program == OURS and entry.job == BUILD:
                [row] = [one for one in self.rows if (one["program"], one["job"]) == (OURS, BUILD)]
                changed = document(last)["changed_weights"]
                row["bits_per_changed_weight"] = 8 * row["disk_bytes"] / max(1, changed)
            if entry.program == TWO_PASS:
                # It prints its own time in any case: no other runs are needed.
                timed = replace(entry, seconds_of=call_s)
                self.rows.append(row_of(IN_PROCESS, timed, measured[entry.name]))

    def in_process(self, jobs: Sequence[str]) -> None:
        """Measure what is left without imports and start-up."""
        self._measure(IN_PROCESS, self._programs.in_process(jobs))

    def agreement(self, target: int) -> None:
        """Note how many weights of the outputs are the same."""
        programs = self._programs
        for name, output in (
            (AUTHORS, programs.authors / f"step{target}"),
            (TWO_PASS, programs.two_pass),
        ):
            if output.is_dir() and programs.ours.is_dir():
                try:
                    share = same_share(programs.ours, output)
                except BenchmarkError as error:
                    self._report.note(f"{name}: not comparable with {OURS}: {error}")
                    continue
                for row in self.rows:
                    if row["program"] == name and row["job"] in (EXTRAPOLATE, BOTH):
                        # Not a column: too many figures of it count.
                        row["agreement"] = {"same_weights_share": share}
                self._report.note(
                    f"{name}: {100 * share:.4f} % of the weights written are those of {OURS}, "
                    "bit for bit"
                )


@click.command("peers", context_settings={"show_default": True})
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--relex",
    "relex_path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help=f"Checkout of github.com/weizhepei/RELEX at {relex_scripts.COMMIT}.",
)
@click.option(
    "--relex-python",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Python that runs it.  [default: this one]",
)
@click.option(
    "--mergekit",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The program mergekit-yaml.",
)
@click.option(
    "--what",
    "words",
    type=Names(JOBS),
    default=",".join(JOBS),
    help="Jobs, with commas: both is from checkpoints to a model with nothing kept.",
)
@click.option(
    "--part",
    "parts",
    type=Names(["whole", "in-process"]),
    default="whole,in-process",
    help="Whole processes, the work without start-up and imports, or both.",
)
@click.option(
    "--target-step", type=click.IntRange(min=1), help="Step to predict.  [default: twice the last]"
)
@click.option("--cold", is_flag=True, help="Take the inputs out of the page cache before each run.")
@click.option("--warmup", type=click.IntRange(min=0), default=1, help="Rounds that do not count.")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where outputs go, and are deleted.  [default: beside the checkpoints]",
)
@report_options
def command(
    run_dir: Path,
    *,
    relex_path: Path | None,
    relex_python: Path | None,
    mergekit: Path | None,
    words: tuple[str, ...],
    parts: tuple[str, ...],
    target_step: int | None,
    cold: bool,
    warmup: int,
    work: Path | None,
    runs: int,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Time relex-stream beside other programs on RUN_DIR, which holds base/ and checkpoints/.

    The authors' scripts and mergekit are not part of this project. Name where they are, or they are
    left out.
    """
    run = Run.of(run_dir, target_step)
    # Not resolved: the Python of a virtual environment is a link, and knows its packages by it.
    tools = Tools(
        None if relex_path is None else relex_path.absolute(),
        None if relex_python is None else relex_python.absolute(),
        None if mergekit is None else mergekit.absolute(),
    )
    jobs = [JOBS[word] for word in JOBS if word in words]
    threads = usable_cores()
    report = Report(
        f"Programs on {len(run.steps)} checkpoints of {run_dir.resolve().name}, "
        f"page cache {'cold' if cold else 'warm'}",
        "peers",
        {
            "run": run_dir.resolve().name,
            "weights": sum(_weights(run.base)),
            "steps": len(run.steps),
            "target_step": run.target,
            "cold": cold,
            "runs": runs,
            "warmup": warmup,
            "threads": threads,
        },
    )
    for line in tools.missing():
        report.note(line)
    with work_directory(work or run_dir.resolve()) as directory:
        try:
            programs = Programs(run, tools, directory, threads)
        except FileNotFoundError as error:
            raise BenchmarkError(str(error)) from error
        rotations = _Rotations(programs, report, runs=runs, warmup=warmup, cold=cold)
        if BUILD not in jobs and EXTRAPOLATE in jobs:
            programs.make_inputs()
        if "whole" in parts:
            rotations.whole(jobs)
            rotations.agreement(run.target)
        if "in-process" in parts:
            rotations.in_process(jobs)
    for row in with_ratios(rotations.rows):
        report.add(row)
    _explain(report, run, cold=cold)
    publish(report, json_path=json_path, markdown=markdown)


def _weights(base: Path) -> list[int]:
    model = Model(base)
    model.close()
    return [place.elements for place in model.tensors.values()]


def _explain(report: Report, run: Run, *, cold: bool) -> None:
    """Note what a reader of the table has to know."""
    measured = {row["program"] for row in report.rows}
    report.note(
        f"Programs run in turn; times are medians of {report.settings['runs']} runs, memory is the "
        "largest of all runs, of the whole process tree. In process: without imports, start-up "
        "and the loading of kernels."
    )
    if cold:
        report.note(
            "Cold: each program's inputs are taken out of the page cache before each run, file by "
            "file (fsync, posix_fadvise)."
        )
    if AUTHORS in measured and not run.consecutive:
        report.note(
            f"{AUTHORS} fit over row numbers, {OURS} over steps; the steps here have gaps, so "
            "their outputs differ by more than rounding."
        )
    if MERGEKIT in measured:
        report.note(
            f"{MERGEKIT}: a line through each weight, no subspace; an easier job, another result."
        )
