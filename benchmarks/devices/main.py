"""The ``devices`` command: its options, and in which order what they ask for is measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.commands import ModelSize, work_directory
from benchmarks.devices.cases import Settings, block_cases, full_sizes, prepare, pretend_sizes
from benchmarks.devices.clock import Clock
from benchmarks.devices.command_runs import CommandRuns, default_limit_note
from benchmarks.devices.constants import add_projections, constant_rows, suggested_constants
from benchmarks.devices.on_cpu import cpu_rows
from benchmarks.devices.on_device import (
    bit_rows,
    measure_peaks,
    memory_rows,
    stage_rows,
    stream_rows,
)
from benchmarks.devices.one_block import OneBlock
from benchmarks.devices.pretend import PRETEND, PRETEND_NOTE
from benchmarks.devices.rounds import Deadline
from benchmarks.devices.tables import Publisher
from benchmarks.processes import BenchmarkError
from benchmarks.report import Report, machine, report_options
from benchmarks.trajectory import Preset
from relex_stream import devices
from relex_stream.devices import Device
from relex_stream.errors import DeviceError
from relex_stream.machine import usable_cores
from relex_stream.sources import CheckpointReader

PARTS = ("prepare", "blocks", "commands")


@click.command("devices", context_settings={"show_default": True, "default_map": {"runs": 3}})
@click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep trajectories and stores there, and use those that are there.",
)
@click.option(
    "--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only this part; repeatable."
)
@click.option("--quick", is_flag=True, help="Half the steps, fewer layers, two runs.")
@click.option("--pretend", is_flag=True, help="On the CPU and tiny, to test this command itself.")
@click.option(
    "--steps", type=click.IntRange(min=2), default=32, help="Of bf16; half for the slice."
)
@click.option(
    "--layers", type=click.IntRange(min=1), default=2, help="Of the slice of the 8B model."
)
@click.option("--fp32-size", type=ModelSize(), default="40m", help="Weights, or a preset.")
@click.option("--fp32-steps", type=click.IntRange(min=2), default=32)
@click.option(
    "--workers",
    "workers_text",
    default="1,2,4,8,16",
    help="Of the CPU, with commas; those above the cores are left out.",
)
@click.option("--cluster/--no-cluster", default=True, help="Also two processes on the GPU.")
@click.option("--budget-s", type=click.FloatRange(min=1), default=540.0, help="For all of it.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to work, if not in the system's temporary directory.",
)
@report_options
def command(
    *,
    run_dir: Path | None,
    parts: tuple[str, ...],
    quick: bool,
    pretend: bool,
    steps: int,
    layers: int,
    fp32_size: Preset,
    fp32_steps: int,
    workers_text: str,
    cluster: bool,
    budget_s: float,
    directory: Path | None,
    runs: int,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Measure extrapolation on a GPU: a block's stages, whole commands, the cost model."""
    device = find_device(pretend=pretend)
    deadline = Deadline(time.monotonic() + budget_s)
    parts = parts or PARTS
    if quick:
        steps, fp32_steps, layers, runs = steps // 2, fp32_steps // 2, 1, min(runs, 2)
    sizes = full_sizes(steps=steps, layers=layers, fp32=fp32_size, fp32_steps=fp32_steps)
    cores = usable_cores()
    settings = Settings(
        sizes=pretend_sizes() if pretend else sizes,
        device=device,
        workers=_worker_counts(workers_text, cores),
        runs=runs,
        cluster=cluster,
        pretend=pretend,
    )
    with work_directory(directory) as work:
        root = (run_dir or work / "runs").absolute()
        title = "extrapolation on a device and on the CPU"
        report = Report(
            f"PRETEND DEVICES, figures mean nothing: {title}" if pretend else title,
            "devices",
            {
                "pretend": pretend,
                "parts": list(parts),
                "workers": list(settings.workers),
                "runs": runs,
                "budget_s": budget_s,
                "cases": {
                    case.name: {
                        "preset": case.preset.name,
                        "weights": case.preset.weights,
                        "dtype": case.dtype,
                        "steps": case.steps,
                    }
                    for case in settings.sizes.cases
                },
                "block_elements": dict(settings.sizes.block_elements),
                "block_rows": settings.sizes.rows,
            },
            machine=machine(root) | {"device": describe_device(device)},
        )
        if pretend:
            report.note(PRETEND_NOTE)
            click.echo(PRETEND_NOTE, err=True)
        publisher = Publisher(report, json_path, markdown=markdown)
        if parts == ("prepare",):
            for case in settings.sizes.cases:
                _say(f"{case.name}: trajectory and store")
                prepare(case, root, workers=max(settings.workers))
        if "blocks" in parts:
            _measure_blocks(settings, root, publisher, deadline)
        if "commands" in parts:
            outputs = work / "outputs"
            outputs.mkdir()
            _measure_commands(settings, root, outputs, publisher, deadline)
        constants = suggested_constants(report.rows)
        add_projections(report.rows, constants)
        publisher.show("commands")
        publisher.add(constant_rows(constants))
        publisher.show("constants")
    for note in report.notes:
        click.echo(note)
    publisher.save()


def find_device(*, pretend: bool) -> Device:
    """Return the first GPU, or a pretend one.

    Raises
    ------
    BenchmarkError
        If there is none; in one line.
    """
    if pretend:
        return PRETEND
    try:
        return devices.find_devices(devices.parse_devices("cuda:0"))[0]
    except DeviceError as error:
        raise BenchmarkError(f"{error}; --pretend runs this on the CPU, to test it") from error


def describe_device(device: Device) -> dict[str, Any]:
    """Return what is to be known of a device beside its figures."""
    if device is PRETEND:
        return {"name": device.name}
    properties = torch.cuda.get_device_properties(device.torch_device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "limit_bytes": device.memory_limit_bytes,
    }


def _worker_counts(text: str, cores: int) -> tuple[int, ...]:
    try:
        wanted = sorted({int(each) for each in text.split(",")})
    except ValueError:
        wanted = [0]
    if wanted[0] < 1:
        raise click.BadParameter(f"{text!r}: whole numbers with commas, such as 1,4,16")
    return tuple(each for each in wanted if each <= cores) or (1,)


def _measure_blocks(
    settings: Settings, root: Path, publisher: Publisher, deadline: Deadline
) -> None:
    most = max(settings.workers)
    clock = Clock(settings.device, 2 * settings.runs)
    with _blocks(settings, root, most) as blocks:
        peaks = measure_peaks(clock, settings.sizes)
        publisher.add(peaks.rows())
        publisher.show("peaks")
        sections: dict[str, Callable[[OneBlock], list[dict[str, Any]]]] = {
            "memory": lambda block: memory_rows(block, clock),
            "stages": lambda block: stage_rows(block, clock, peaks),
            "bits": lambda block: bit_rows(block, settings.device),
            "streams": lambda block: stream_rows(
                block, settings.device, clock, most, count=2 if settings.pretend else 8
            ),
            "cpu": lambda block: cpu_rows(block, settings.runs),
        }
        for section, measured in sections.items():
            if deadline.left_s < 0:
                publisher.report.note(f"{section}: left out, no time was left.")
                continue
            for block in blocks:
                facts = {"itemsize": block.itemsize, "dense": block.elements * block.rows}
                publisher.add([row | facts for row in measured(block)])
            publisher.show(section)


@contextlib.contextmanager
def _blocks(settings: Settings, root: Path, workers: int) -> Iterator[list[OneBlock]]:
    """Give the two blocks that are taken apart."""
    found = []
    with CheckpointReader() as checkpoints:
        for case in block_cases(settings.sizes):
            base, store = prepare(case, root, workers=workers)
            found.append(OneBlock(case.name, base, store, case.steps, checkpoints))
        yield found


def _measure_commands(
    settings: Settings, root: Path, work: Path, publisher: Publisher, deadline: Deadline
) -> None:
    cases = [(case, route) for case in settings.sizes.cases for route in case.routes]
    for number, (case, route) in enumerate(cases):
        if number and deadline.left_s < 0:
            publisher.report.note(f"{case.name}, {route}: left out, no time was left.")
            continue
        ends = deadline.share(len(cases) - number)
        _say(f"{case.name}: trajectory and store")
        prepare(case, root, workers=max(settings.workers))
        if number == 0:
            publisher.report.note(default_limit_note(settings, root, work))
        _say(f"{case.name}, {route}: extrapolations")
        rows, notes = CommandRuns(settings, case, route, root, work).rows(ends)
        for note in notes:
            publisher.report.note(note)
        publisher.add(rows)


def _say(text: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)
