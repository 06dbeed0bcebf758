from __future__ import annotations

import math
import re
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_stream import planner
from relex_stream.errors import MemoryLimitError
from relex_stream.planner import (
    Capacity,
    ModelShape,
    commit_batch,
    gram_columns,
    make_plan,
)
from relex_stream.specs import STEP_GROUP
from relex_stream.summaries import DevicePlan, Plan, StagePlan

MIB = 1 << 20

# Distinct primes, so that no two terms of a formula can stand for each other.
PRIMES = ModelShape(
    tensors=311,
    sketched=101,
    blocks=1_009,
    largest_block=1_048_583,
    largest_block_bytes=2_097_169,
    sketch_width=257,
)
FORMULAS = {
    "codec": planner.codec_bytes,
    "ingest worker": lambda shape: planner.ingest_worker_bytes(shape, 13),
    "ingest shared": lambda shape: planner.ingest_shared_bytes(shape, 13, 7, 5, 331),
    "sweep": lambda shape: planner.sweep_worker_bytes(shape, 11),
    "power": lambda shape: planner.power_worker_bytes(shape, 11, 50, 9),
    "gram": lambda shape: planner.gram_worker_bytes(shape, 11, 50),
    "write": lambda shape: planner.write_worker_bytes(shape, 11, 3),
    "copy": planner.copy_worker_bytes,
    "extrapolate shared": lambda shape: planner.extrapolate_shared_bytes(shape, 50, 2, 9, 3, 17),
}
BY_BLOCK = {"largest_block", "largest_block_bytes"}
DEPENDS_ON = {
    "codec": BY_BLOCK,
    "ingest worker": BY_BLOCK | {"sketch_width"},
    "ingest shared": {"tensors", "sketched", "blocks", "sketch_width"},
    "sweep": BY_BLOCK,
    "power": BY_BLOCK,
    "gram": BY_BLOCK | {"tensors"},
    "write": BY_BLOCK,
    "copy": BY_BLOCK,
    "extrapolate shared": {"tensors", "blocks"},
}


# --- the formulas ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
def test_projections_grow_with_what_they_depend_on_and_nothing_else(name):
    formula = FORMULAS[name]
    before = formula(PRIMES)
    assert isinstance(before, int)
    assert before > 0
    growing = set()
    for field in fields(ModelShape):
        larger = replace(PRIMES, **{field.name: 2 * getattr(PRIMES, field.name)})
        assert formula(larger) >= before
        if formula(larger) > before:
            growing.add(field.name)
    assert growing == DEPENDS_ON[name]


@pytest.mark.parametrize(
    ("formula", "arguments"),
    [
        (planner.ingest_worker_bytes, (13,)),
        (planner.ingest_shared_bytes, (13, 7, 5, 331, 3)),
        (planner.sweep_worker_bytes, (2_000_003,)),
        (planner.power_worker_bytes, (2_000_003, 50, 9)),
        (planner.gram_worker_bytes, (2_000_003, 50)),
        (planner.write_worker_bytes, (2_000_003, 3)),
        (planner.extrapolate_shared_bytes, (50, 2, 9, 3, 17)),
        (planner.export_shared_bytes, (50,)),
    ],
)
def test_projections_grow_with_every_argument(formula, arguments):
    before = formula(PRIMES, *arguments)
    for place, argument in enumerate(arguments):
        larger = list(arguments)
        larger[place] = 2 * argument
        if (formula, place) == (planner.extrapolate_shared_bytes, 4):
            # Gram matrices are summed one tensor after the other: any or none.
            assert formula(PRIMES, *larger) == before
            larger[place] = 0
            assert formula(PRIMES, *larger) < before
        else:
            assert formula(PRIMES, *larger) > before


def test_a_worker_that_sweeps_is_part_of_every_stage_that_does():
    sweep = planner.sweep_worker_bytes(PRIMES, 11)
    assert planner.power_worker_bytes(PRIMES, 11, 50, 9) == (
        sweep + 4 * 9 * PRIMES.largest_block + (2 + planner.PARTIALS_AT_HAND) * 8 * 50 * 9
    )
    assert planner.write_worker_bytes(PRIMES, 11, 3) == (
        sweep + 8 * 3 * PRIMES.largest_block + 3 * PRIMES.largest_block_bytes
    )
    assert planner.gram_worker_bytes(PRIMES, 11, 50) > sweep + 3 * 8 * 50 * 50


def test_a_worker_of_build_store_does_not_grow_with_the_steps_beyond_a_group():
    # But for the statistics: 8 bytes for every column of the sketch, of each sum begun.
    per_step = (2 + planner.PARTIALS_AT_HAND) * (8 * PRIMES.sketch_width + 40)
    sizes = [planner.ingest_worker_bytes(PRIMES, steps) for steps in (16, 17, 116)]
    assert sizes[1] - sizes[0] == per_step
    assert sizes[2] - sizes[1] == 99 * per_step


@given(rows=st.integers(0, 10_000))
def test_the_columns_of_a_gram_matrix_stay_in_their_room(rows):
    columns = gram_columns(rows)
    assert columns >= 64
    if columns > 64:
        assert 8 * max(1, rows) * columns <= planner.GRAM_COLUMNS_BYTES
        assert 8 * max(1, rows) * (columns + 1) > planner.GRAM_COLUMNS_BYTES


STATISTICS = 96 << 20

# --- commits -----------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    tensors=st.integers(1, 50_000),
    blocks=st.integers(1, 1_000_000),
    checkpoint_bytes=st.integers(0, 1 << 42),
    rows=st.integers(0, 1_000),
    left=st.integers(1, 1_000),
)
def test_a_commit_takes_whole_groups(tensors, blocks, checkpoint_bytes, rows, left):
    shape = replace(PRIMES, tensors=tensors, sketched=tensors, blocks=blocks)
    taken = commit_batch(shape, checkpoint_bytes, rows, left, STATISTICS)
    assert 1 <= taken <= left
    statistics = 2 * tensors * (2 * PRIMES.sketch_width + 4) + 24 * blocks
    if taken > 1:
        assert taken * statistics <= STATISTICS
    if (taken + 1) * (statistics + 1) <= STATISTICS and taken < left:
        # Neither the statistics nor the steps cut it short: it ends with a group ...
        assert (rows + taken) % STEP_GROUP == 0
        # ... and has as many as the target holds, but the one begun or the first in any case.
        within_target = planner.COMMIT_TARGET_BYTES // max(1, checkpoint_bytes)
        assert taken <= max(STEP_GROUP, within_target)
        assert taken + STEP_GROUP > within_target - rows % STEP_GROUP


def test_the_first_commit_fills_the_group_begun():
    shape = replace(PRIMES, tensors=1, sketched=1, blocks=1)
    huge = 1 << 40
    assert commit_batch(shape, huge, rows=0, left=100, most_statistics=STATISTICS) == 16
    assert commit_batch(shape, huge, rows=5, left=100, most_statistics=STATISTICS) == 11
    assert commit_batch(shape, huge, rows=15, left=100, most_statistics=STATISTICS) == 1
    assert commit_batch(shape, huge, rows=5, left=4, most_statistics=STATISTICS) == 4
    # 8 GiB: two groups in the target.
    assert commit_batch(shape, 8 << 30, rows=0, left=100, most_statistics=STATISTICS) == 32
    assert commit_batch(shape, 8 << 30, rows=3, left=100, most_statistics=STATISTICS) == 29


def test_a_command_that_others_work_for_has_to_fit_as_well():
    here = Capacity(2, 8, False, 200 * MIB, 1000 * MIB, 300 * MIB, 768 * MIB)
    slack = planner.SLACK_BYTES
    plan = make_plan([stage("a", 10 * MIB)], here, shared_bytes=60 * MIB)
    assert plan.projected_bytes == max(200 * MIB + 80 * MIB, 300 * MIB) + slack + 60 * MIB
    least = make_plan([stage("a", 10 * MIB)], here, shared_bytes=468 * MIB - slack)
    assert least.projected_bytes == 768 * MIB
    with pytest.raises(MemoryLimitError) as caught:
        make_plan([stage("a", 10 * MIB)], here, shared_bytes=469 * MIB - slack)
    assert str(caught.value) == (
        "this command, which puts results together, needs 769 MiB (340 for the process, 429 for "
        "tables and results), the memory limit is 768 MiB; raise --memory-limit"
    )


def test_more_processes_commit_as_often():
    shape = replace(PRIMES, tensors=1, sketched=1, blocks=1)
    steps = [commit_batch(shape, 16 << 30, 0, 1000, STATISTICS, n) for n in (1, 2, 3, 64)]
    assert steps == [16, 32, 48, 1000]
    assert commit_batch(shape, 1 << 40, 0, 1000, STATISTICS, 64) == 16


def test_commits_of_very_many_tensors_take_fewer_steps():
    shape = replace(PRIMES, tensors=30_000, sketched=30_000, blocks=60_000)
    statistics = 2 * 30_000 * (2 * 257 + 4) + 24 * 60_000
    expected = STATISTICS // statistics
    assert 1 < expected < 16
    assert commit_batch(shape, 1, rows=0, left=100, most_statistics=STATISTICS) == expected
    # More memory, more steps.
    assert commit_batch(shape, 1, rows=0, left=100, most_statistics=2 * STATISTICS) >= 2 * expected
    assert (
        commit_batch(
            replace(shape, sketched=10**9), 1, rows=0, left=100, most_statistics=STATISTICS
        )
        == 1
    )


# --- the plan ----------------------------------------------------------------------------------


def stage(name, worker_bytes):
    return StagePlan(name=name, tasks=1, read_bytes=2, write_bytes=3, worker_bytes=worker_bytes)


def plan_for(*stages, limit=1000 * MIB, workers=8, fixed=False):
    here = Capacity(
        processes=1,
        workers=workers,
        workers_fixed=fixed,
        reserved_bytes=200 * MIB,
        memory_limit_bytes=limit,
    )
    return make_plan(stages, here, shared_bytes=60 * MIB)


def test_workers_are_lowered_until_the_projection_fits():
    # 1000 - 200 - 40 - 60 = 700 MiB are left for workers.
    small, large = stage("a", 10 * MIB), stage("b", 140 * MIB)
    assert plan_for(small, large).workers == 5
    assert plan_for(large, small).workers == 5
    assert plan_for(small, large, workers=3).workers == 3
    assert plan_for(small).workers == 8
    assert plan_for(stage("c", 700 * MIB)).workers == 1


def test_the_projection_is_the_sum_of_its_parts():
    plan = plan_for(stage("a", 10 * MIB), stage("b", 140 * MIB))
    assert plan.reserved_bytes == 200 * MIB + planner.SLACK_BYTES
    assert plan.shared_bytes == 60 * MIB
    assert plan.projected_bytes == (
        plan.reserved_bytes + plan.shared_bytes + plan.workers * 140 * MIB
    )
    assert plan.memory_limit_bytes == 1000 * MIB
    assert [s.name for s in plan.stages] == ["a", "b"]


def test_a_stage_without_buffers_takes_all_workers():
    assert plan_for(stage("nothing", 0)).workers == 8


@settings(max_examples=100)
@given(
    worker_bytes=st.lists(st.integers(0, 300 * MIB), min_size=1, max_size=4),
    limit=st.integers(0, 2000 * MIB),
    workers=st.integers(1, 64),
    fixed=st.booleans(),
)
def test_a_plan_fits_uses_the_room_and_is_refused_only_when_it_must(
    worker_bytes, limit, workers, fixed
):
    stages = [stage(str(number), size) for number, size in enumerate(worker_bytes)]
    widest = max(worker_bytes)
    room = limit - 300 * MIB
    try:
        plan = plan_for(*stages, limit=limit, workers=workers, fixed=fixed)
    except MemoryLimitError:
        assert room < max(1, widest) * (workers if fixed else 1)
        return
    assert plan.projected_bytes <= limit
    assert plan.workers == workers or (
        not fixed and 1 <= plan.workers < workers and room < (plan.workers + 1) * max(1, widest)
    )


def test_the_refusal_has_all_quantities():
    with pytest.raises(MemoryLimitError) as caught:
        plan_for(stage("small", MIB), stage("power pass 1", 701 * MIB))
    assert str(caught.value) == (
        "stage 'power pass 1' with 1 worker(s) needs 1001 MiB (240 for the process, 60 shared, "
        "701 per worker), the memory limit is 1000 MiB; raise --memory-limit"
    )


def test_a_number_of_workers_that_was_asked_for_is_not_lowered():
    assert plan_for(stage("a", 140 * MIB), workers=5, fixed=True).workers == 5
    with pytest.raises(MemoryLimitError, match=re.escape("with 6 worker(s) needs 1140 MiB")) as six:
        plan_for(stage("a", 140 * MIB), workers=6, fixed=True)
    assert str(six.value).endswith("raise --memory-limit or lower --workers")
    # Where not even one fits, fewer workers are no remedy.
    with pytest.raises(MemoryLimitError) as caught:
        plan_for(stage("a", 701 * MIB), workers=6, fixed=True)
    assert str(caught.value).endswith("raise --memory-limit")


def test_the_limit_named_in_the_refusal_would_be_enough():
    sizes = stage("a", 701 * MIB + 1)
    with pytest.raises(MemoryLimitError) as caught:
        plan_for(sizes)
    needed = int(re.search(r"needs (\d+) MiB", str(caught.value))[1])
    assert needed == math.ceil((300 * MIB + sizes.worker_bytes) / MIB)
    assert plan_for(sizes, limit=needed * MIB).workers == 1


def test_a_plan_for_a_cluster_is_that_of_each_process():
    here = Capacity(1, 8, False, 200 * MIB, 1000 * MIB)
    one = make_plan([stage("a", 140 * MIB)], here, shared_bytes=60 * MIB)
    many = make_plan([stage("a", 140 * MIB)], replace(here, processes=12), shared_bytes=60 * MIB)
    assert (one.processes, many.processes) == (1, 12)
    assert replace(many, processes=1) == one
    with pytest.raises(MemoryLimitError, match="1000 MiB in each process of the cluster; raise"):
        make_plan([stage("a", 999 * MIB)], replace(here, processes=2), shared_bytes=0)


def test_what_is_done_one_after_the_other_takes_as_much_as_the_part_that_takes_most() -> None:
    def plan(name: str, worker_mib: int, workers: int) -> Plan:
        stage = StagePlan(name, 10, 5, 7, worker_mib << 20)
        here = planner.Capacity(1, workers, True, 200 << 20, 2000 << 20)
        return planner.make_plan([stage], here, shared_bytes=1 << 20)

    first, second = plan("write", 100, 4), plan("read", 300, 2)
    assert planner.joint_plan([first]) is first
    joint = planner.joint_plan([first, second])
    assert joint.workers == 2
    assert joint.projected_bytes == second.projected_bytes > first.projected_bytes
    assert [stage.name for stage in joint.stages] == ["1: write", "2: read"]
    other = planner.joint_plan([second, first])
    assert (other.workers, other.projected_bytes) == (2, second.projected_bytes)
    devices = DevicePlan(("a",), 100, 10, 2, 20), DevicePlan(("a",), 100, 30, 2, 60)
    some = [replace(first, devices=devices[0]), second, replace(first, devices=devices[1])]
    assert planner.joint_plan(some).devices == devices[1]
    assert planner.joint_plan([first, second]).devices is None
