"""What is prepared for the `devices` benchmark, and what is there already."""

from __future__ import annotations

import relex_stream as rs
from benchmarks.devices.cases import Case, prepare
from benchmarks.trajectory import PRESETS, write_steps


def test_checkpoints_of_others_stay_and_a_store_is_carried_on(in_process, tmp_path):
    case = Case("case", PRESETS["tiny"], "bf16", 2)
    write_steps(tmp_path / "case", case.preset, [0, 1])
    base, store = prepare(case, tmp_path, workers=1)
    assert rs.open_store(store).steps == (1, 2)
    checkpoints = tmp_path / "case" / "checkpoints"
    assert [each.name for each in checkpoints.iterdir()] == ["global_step_1"]
    longer = Case("case", PRESETS["tiny"], "bf16", 3)
    assert prepare(longer, tmp_path, workers=1) == (base, store)
    assert rs.open_store(store).steps == (1, 2, 3)
    assert len(in_process) == 2
    prepare(longer, tmp_path, workers=1)
    assert len(in_process) == 2
