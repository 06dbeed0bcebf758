"""The ``scaling`` command: its options, and in which order its parts are made and shown."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click

from benchmarks.commands import work_directory
from benchmarks.report import Report, median, output_options, publish
from benchmarks.scaling.client import measure_client
from benchmarks.scaling.cluster import run_graphs, running_cluster
from benchmarks.scaling.graphs import commit_steps, describe, least_shape
from benchmarks.scaling.limits import memory_rows
from benchmarks.scaling.models import MODELS
from benchmarks.scaling.projection import Site, project, size_rows
from relex_stream import costs


@click.command("scaling")
@click.option(
    "--model",
    "names",
    type=click.Choice(list(MODELS)),
    multiple=True,
    default=("8B", "70B", "405B", "1T"),
    help="Several times for several.",
)
@click.option("--steps", type=click.IntRange(min=2), multiple=True, default=(100, 1000))
@click.option("--nodes", type=click.IntRange(min=1), multiple=True, default=(1, 4, 16, 64))
@click.option("--node-cores", type=click.IntRange(min=1), default=16)
@click.option("--node-gb-s", type=float, default=2.0, help="That a node reads, in 10^9 bytes.")
@click.option("--all-gb-s", type=float, default=50.0, help="That all nodes read together.")
@click.option("--change-share", type=float, default=0.005, help="Weights changed per step.")
@click.option(
    "--most-tasks", type=click.IntRange(min=1), default=40_000, help="Of a graph that is run."
)
@click.option("--processes", type=click.IntRange(min=1), default=2, help="That graphs run on.")
@click.option("--process-threads", type=click.IntRange(min=1), default=8, help="Of each.")
@click.option("--paced", multiple=True, default=("8B",), help="Models also run at their speed.")
@click.option("--quick", is_flag=True, help="A tiny model, few tasks: whether it runs at all.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to write headers and tables.  [default: the system's temporary directory]",
)
@output_options
def command(
    *,
    names: tuple[str, ...],
    steps: tuple[int, ...],
    nodes: tuple[int, ...],
    node_cores: int,
    node_gb_s: float,
    all_gb_s: float,
    change_share: float,
    most_tasks: int,
    processes: int,
    process_threads: int,
    paced: tuple[str, ...],
    quick: bool,
    directory: Path | None,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Count tasks and bytes of models that do not fit here, run their graphs without work, project.

    Graphs, tables and times of the scheduler and the client are made and measured here; what
    larger machines would take is arithmetic with the bandwidths given.
    """
    if quick:
        names, steps, nodes, paced = ("tiny",), (20,), (1, 2), ("tiny",)
        processes, process_threads = 1, 2
    threads = [count * node_cores for count in nodes]
    report = Report(
        "Tasks, bytes and times at scale",
        "scaling",
        {
            "models": list(names),
            "steps": list(steps),
            "nodes": list(nodes),
            "node_cores": node_cores,
            "node_gb_s": node_gb_s,
            "all_gb_s": all_gb_s,
            "change_share": change_share,
        },
    )
    clients, tasks = {}, {}
    with work_directory(directory) as work:
        for name in names:
            # A process of its own: memory is measured, and given back.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(
                    measure_client, name, work, steps, nodes, node_cores, change_share
                ).result()
            clients[name] = found.row
            for row in found.graphs:
                report.add(row)
                tasks[name, row["stage"], row["steps"], row["threads"]] = row["tasks"]
        for name in names:
            report.add(clients[name])
        with running_cluster(work, processes, process_threads) as cluster:
            rows = run_graphs(
                cluster, names, min(steps), change_share, most_tasks=most_tasks, paced=paced
            )
    for row in rows:
        report.add(row)
    measured_ms = [row["scheduler per task, ms"] for row in rows if row["part"] == "no work"]
    site = Site(node_cores, node_gb_s * 1e9, all_gb_s * 1e9, median(measured_ms) / 1e3)
    for row in size_rows((costs.SCHEDULER_SHARE,), threads, site.task_s):
        report.add(row)
    for name in names:
        model = MODELS[name]()
        shape = least_shape(describe(model))
        of_model = {key[1:]: count for key, count in tasks.items() if key[0] == name}
        for count in steps:
            for row in memory_rows(model, count, node_cores):
                report.add(row)
            for number in nodes:
                commit = commit_steps(model, shape, count, number)
                for row in project(
                    model, clients[name], of_model, site, number, count, change_share, commit
                ):
                    report.add(row)
    report.note(
        f"A task costs the scheduler {1e3 * site.task_s:.2f} ms of its processor here (median of "
        "the runs without work, less what it takes without tasks, "
        f"{100 * cluster.idle_share:.1f} % of a processor); `costs` counts "
        f"{1e3 * costs.SCHEDULER_TASK_S:.2f}."
    )
    _publish_parts(report, json_path=json_path, markdown=markdown)


def _publish_parts(report: Report, *, json_path: Path | None, markdown: bool) -> None:
    """Print a table for each part: their columns have little in common."""
    for name in dict.fromkeys(row["part"] for row in report.rows):
        part = Report(name, report.command, report.settings, machine=report.machine)
        for row in report.rows:
            if row["part"] == name:
                part.add({column: value for column, value in row.items() if column != "part"})
        if markdown:
            click.echo(f"\n## {name}\n")
        publish(part, json_path=None, markdown=markdown)
    for note in report.notes:
        click.echo(note)
    if json_path is not None:
        report.write(json_path)
