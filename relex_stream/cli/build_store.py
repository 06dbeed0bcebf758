"""``relex-stream build-store``: compress a trajectory, or append to one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from relex_stream import wording
from relex_stream.cli import options
from relex_stream.cli.plan import describe_plan
from relex_stream.cli.session import Session
from relex_stream.locations import Location

if TYPE_CHECKING:
    from relex_stream.summaries import BuildSummary


@click.command("build-store")
@click.argument("base", type=options.PATH_OR_URL)
@click.argument("checkpoints", type=options.PATH_OR_URL)
@options.store_argument
@options.pattern
@options.steps
@options.source
@options.strip_prefix
@options.map_names
@options.memory_limit
@options.workers
@options.include_base
@options.allow_nonfinite
@options.seed
@options.cast("Round F32 weights to BF16 on the way in, where the base has BF16.")
@click.option(
    "--replace-from",
    type=click.IntRange(min=1),
    metavar="N",
    help="Take back the stored steps from N on and store those of CHECKPOINTS instead, where a run "
    "was taken up again.",
)
@options.step_offset
@options.then
@click.option(
    "--download-dir",
    type=options.PATH,
    metavar="DIRECTORY",
    help="Where checkpoints of the Hub are until they are in the store, two at most.  [default: "
    "STORE.download]",
)
@options.cluster
@options.common
@click.pass_obj
def command(
    session: Session,
    base: Location | str,
    checkpoints: Location | str,
    store: Location,
    *,
    pattern: str | None,
    steps: str | None,
    source: str,
    strip_prefix: str | None,
    map_names: tuple[tuple[str, str], ...],
    memory_limit: int | None,
    workers: int | None,
    include_base: bool,
    allow_nonfinite: bool,
    seed: int,
    cast: str | None,
    replace_from: int | None,
    step_offset: int,
    then: tuple[tuple[Location, int], ...],
    download_dir: Path | None,
    scheduler: str | None,
    local_cluster: int | None,
) -> None:
    """Compress a base model and its checkpoints into STORE, without loss.

    BASE is the directory of the model at step 0, CHECKPOINTS the directory that holds one
    directory per checkpoint. If STORE exists, steps it does not hold yet are appended to it.
    Steps are committed in groups of 16 or more: what an interrupted run has committed stays.

    Each of the three may be a URL of object storage, like s3://bucket/run.store. BASE and
    CHECKPOINTS may be on the Hugging Face Hub: hf://org/name, perhaps with @revision and
    /directory. Checkpoints there are branches, tags or directories; they are fetched one by one,
    committed one by one, and deleted when they are in the store.
    """
    from relex_stream.api import build_store

    with session.progress() as progress:
        summary = build_store(
            base,
            checkpoints,
            store,
            pattern=pattern,
            steps=steps,
            source=source,
            strip_prefix=strip_prefix,
            map_names=map_names,
            memory_limit=memory_limit,
            workers=workers,
            include_base=include_base,
            allow_nonfinite=allow_nonfinite,
            seed=seed,
            cast=cast,
            replace_from=replace_from,
            step_offset=step_offset,
            then=then,
            scheduler=scheduler,
            local_cluster=local_cluster,
            download_dir=download_dir,
            progress=progress,
        )
    session.finish(summary, describe(summary, verbose=session.verbose))


def describe(summary: BuildSummary, *, verbose: bool) -> list[str]:
    """Return the closing summary."""
    added, skipped = summary.steps_added, summary.steps_skipped
    rows = {
        "store": summary.store,
        "layout": summary.layout,
        "steps added": wording.format_steps(added, full=verbose),
        "steps skipped": wording.format_steps(skipped, full=verbose)
        + (", in the store already" if skipped else ""),
        "steps in all": f"{summary.steps_total:,}",
        "read": wording.format_bytes(summary.bytes_in),
        "stored": wording.format_bytes(summary.bytes_stored),
    }
    if summary.base_bytes_stored:
        rows["base weights"] = wording.format_bytes(summary.base_bytes_stored)
    rows["store on disk"] = wording.format_bytes(summary.store_bytes)
    if added:
        rows["ratio"] = wording.format_ratio(summary.ratio)
        rows["changed weights"] = f"{summary.changed_weights:,}"
        rows["bits per changed weight"] = wording.format_figure(summary.bits_per_changed_weight, 2)
    if summary.cast_savings is not None:
        wide, narrow = summary.cast_savings.f32_step_bytes, summary.cast_savings.bf16_step_bytes
        rows["F32 weights"] = (
            f"{wording.format_bytes(wide)} a step; in BF16 (--as bf16) about "
            f"{wording.format_bytes(narrow)}"
        )
    rows["peak memory"] = wording.format_bytes(summary.peak_memory_bytes)
    rows["elapsed"] = wording.format_duration(summary.elapsed_s)
    lines = wording.pairs(rows)
    if summary.skipped_files:
        lines.append(f"{wording.format_count(len(summary.skipped_files), 'file')} left out:")
        lines += wording.listing(summary.skipped_files, full=verbose)
    if verbose:
        lines += ["", *describe_plan(summary.plan)]
    return lines
