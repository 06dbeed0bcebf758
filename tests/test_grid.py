"""Grids: what their entries come to, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import relex_stream as rs
from relex_stream.grid import jobs_of, read_grid
from relex_stream.methods import product_paths
from relex_stream.request import batches_of
from relex_stream.store import Store
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.test_extrapolate import read_weights
from tests.test_models import assert_same_model

STEPS = (1, 2, 3, 4, 6, 8, 11, 16)
LAST = STEPS[-1]
SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    "model.layers.0.mlp.up_proj.weight": (60, 24),
    "model.layers.1.mlp.up_proj.weight": (60, 24),
    "model.layers.1.input_layernorm.weight": (24,),
    "model.layers.1.ln_2.weight": (24,),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return make_trajectory(
        tmp_path_factory.mktemp("grid"), steps=STEPS, tensors=SHAPES, change_share=0.3
    )


@pytest.fixture(scope="module")
def store(run: Trajectory) -> Path:
    path = run.base.parent / "store"
    rs.build_store(run.base, run.checkpoints, path)
    return path


def paths_of(store: Path, *entries: dict[str, Any]) -> list[str]:
    jobs = jobs_of(Store(store), entries)
    return product_paths([product for job in jobs for product in job.products])


# --- what a grid comes to ------------------------------------------------------------------------


def test_every_combination_is_a_model_and_levels_of_one_value_are_left_out(store: Path) -> None:
    found = paths_of(
        store,
        {"target_step": [20, 30], "fit": ["linear", "polynomial:2"], "window": ["all", 4]},
    )
    assert found == [
        f"fit_{fit}/window_{window}/step_{step}"
        for fit in ("linear", "polynomial-2")
        for window in ("all", 4)
        for step in (20, 30)
    ]


def test_entries_of_several_methods_lie_beside_each_other(store: Path) -> None:
    found = paths_of(
        store,
        {"target-step": 20, "history-steps": [8, "all"], "damping": [0.5, 1]},
        {"method": "reconstruct", "step": 8, "rank": [1, 2]},
        {"method": "combine", "recipe": ["lawa:last=2"]},
    )
    assert found == [
        "method_extrapolate/history_steps_8/damping_0.5",
        "method_extrapolate/history_steps_8/damping_1",
        f"method_extrapolate/history_steps_{LAST}/damping_0.5",
        f"method_extrapolate/history_steps_{LAST}/damping_1",
        "method_reconstruct/rank_1",
        "method_reconstruct/rank_2",
        "method_combine",
    ]


def test_a_name_tells_entries_apart(store: Path) -> None:
    entries = [
        {"target_step": 20, "name": "all"},
        {"target_step": 20, "name": "no-norms", "exclude": ["*norm*"]},
    ]
    assert paths_of(store, *entries) == ["name_all", "name_no-norms"]
    for entry in entries:
        del entry["name"]
    with pytest.raises(rs.OptionError, match="two outputs are the same"):
        paths_of(store, *entries)


def test_jobs_with_the_same_statistics_are_one_batch(store: Path) -> None:
    jobs = jobs_of(
        Store(store),
        [
            {"target_step": 20, "fit": ["linear", "linear-origin"], "history_steps": [8, 16]},
            {"method": "reconstruct", "step": 8, "rank": 3},
            {"method": "combine", "recipe": "lawa:last=2"},
            {"target_step": 20, "svd": "exact"},
        ],
    )
    batches = batches_of(jobs)
    # By history; the reconstruction takes part in the second, with its higher rank.
    assert [len(batch.jobs) for batch in batches] == [2, 3, 1, 1]
    assert batches[1].subspaces is not None
    assert [batches[0].rows, batches[1].rows, batches[1].subspaces.rank] == [6, 8, 3]
    assert batches[2].subspaces is None


# --- what is written -----------------------------------------------------------------------------

GRID = """
# A comment.
- target-step: [20, 30]
  fit: [linear, linear-origin]
  history-steps: [8, all]
  anchor: latest
  damping: [0.5, 1]
- method: reconstruct
  step: 8
  rank: [1, 2]
  fitted: [false, true]
- method: combine
  recipe: lawa:last=2
"""


@pytest.fixture(scope="module")
def made(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, rs.ModelsSummary]:
    root = tmp_path_factory.mktemp("made")
    (root / "grid.yaml").write_text(GRID)
    return root / "out", rs.sweep(store, root / "out", grid=root / "grid.yaml")


def test_models_are_those_of_the_commands(
    store: Path, made: tuple[Path, rs.ModelsSummary], tmp_path: Path
) -> None:
    out, summary = made
    assert len(summary.outputs) == 2 * 2 * 2 * 2 + 4 + 1
    for history in (8, LAST):
        for fit in ("linear", "linear-origin"):
            alone = rs.extrapolate(
                store,
                tmp_path / f"{history}{fit}",
                target_steps=[20, 30],
                history_steps=history,
                rank=[1, 2],  # as many components are looked for as in the sweep
                fit=fit,
                anchor="latest",
                damping=[0.5, 1.0],
            )
            for output in alone.outputs:
                what = output.what
                if what["rank"] == 2:
                    continue
                there = (
                    f"method_extrapolate/history_steps_{history}/fit_{fit}/"
                    f"step_{what['target_step']}/damping_{what['damping']:g}"
                )
                assert_close_models(out / there, Path(output.path))
    alone = rs.reconstruct(store, tmp_path / "r", steps=[8], rank=[1, 2], fitted=True)
    for output in alone.outputs:
        rank = output.what["rank"]
        there = f"method_reconstruct/fitted_True/rank_{rank}"
        assert_close_models(out / there, Path(output.path))
    rs.combine(store, tmp_path / "c", recipes=["lawa:last=2"])
    assert_same_model(read_weights(out / "method_combine"), read_weights(tmp_path / "c"))


def test_recipes_that_copy_norms_do_so_beside_others(
    store: Path, tmp_path: Path, run: Trajectory
) -> None:
    recipes = ["lawa:last=3", "two-point:target=40"]
    grid = [{"method": "combine", "recipe": each} for each in recipes]
    made = rs.sweep(store, tmp_path / "both", grid=grid)
    norms = "model.layers.1.ln_2.weight"
    assert (run.bits[LAST][norms] != run.bits[0][norms]).any()
    for number, recipe in enumerate(recipes):
        rs.combine(store, tmp_path / str(number), recipes=[recipe])
        found = read_weights(Path(made.outputs[number].path))
        assert_same_model(found, read_weights(tmp_path / str(number)))
    assert (found[norms] == run.bits[LAST][norms]).all()  # two-point keeps those of the last


def assert_close_models(found: Path, expected: Path) -> None:
    """Models whose subspaces were found with other ranks: they differ by rounding at most."""
    one, other = read_weights(found), read_weights(expected)
    assert one.keys() == other.keys()
    for name, bits in one.items():
        differing = (bits != other[name]).sum()
        assert differing <= 0.001 * bits.size, name


def test_the_index_says_what_each_is(made: tuple[Path, rs.ModelsSummary]) -> None:
    out, summary = made
    index = json.loads((out / "relex_stream.json").read_text())
    by_path = {entry["path"]: entry for entry in index["outputs"]}
    assert len(by_path) == len(summary.outputs)
    for path, entry in by_path.items():
        assert (out / path / "model.safetensors").exists() or list(
            (out / path).glob("*.safetensors")
        )
        own = json.loads((out / path / "relex_stream.json").read_text())
        assert own["history"][-1] == entry.get("history_steps", LAST)
        for key in ("fit", "fitted", "target_step", "rank", "damping", "step", "recipe", "method"):
            assert own.get(key) == entry.get(key, index.get(key)), (path, key)
    assert set(index["files"]) == {
        str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()
    }
    whats = [Path(output.path).relative_to(out).as_posix() for output in summary.outputs]
    assert whats == list(by_path)


def test_a_dry_run_writes_nothing_and_has_the_stages_of_all(store: Path, tmp_path: Path) -> None:
    grid = [{"target_step": 20, "history_steps": [8, "all"]}]
    summary = rs.sweep(store, tmp_path / "out", grid=grid, dry_run=True)
    assert not (tmp_path / "out").exists()
    names = [stage.name for stage in summary.plan.stages]
    assert names == [
        "1: statistics, pass 1",
        "1: write outputs",
        "2: statistics, pass 1",
        "2: write outputs",
    ]
    assert summary.settings["fit"] == "linear"
    assert not {"history", "history_steps", "name"} & set(summary.settings)
    assert [output.what["history_steps"] for output in summary.outputs] == [8, LAST]


def test_what_all_have_is_said_once_and_figures_of_many_are_not_kept(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relex_stream import models

    seen: list[Any] = []
    write = models.write_index

    def look(made: Any, output: Any) -> None:
        seen.extend(made)
        write(made, output)

    monkeypatch.setattr(models, "write_index", look)
    grid = [{"target_step": 20, "fit": ["linear", "linear-origin"]}]
    rs.sweep(store, tmp_path / "out", grid=grid)
    assert [each.figures for each in seen] == [(), ()]
    index = json.loads((tmp_path / "out" / "relex_stream.json").read_text())
    assert index["history"] == list(STEPS)
    assert not {"history_steps", "name"} & set(index)
    assert [set(entry) & {"history_steps", "name", "svd"} for entry in index["outputs"]] == [
        set(),
        set(),
    ]
    # The record of each has its figures all the same.
    own = json.loads((tmp_path / "out" / "fit_linear" / "relex_stream.json").read_text())
    assert own["subspaces"]


def test_an_error_in_the_middle_leaves_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relex_stream import models

    before, calls = models.solve_subspaces, []

    def fails_the_second_time(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise rs.CorruptionError("a frame is damaged")
        return before(*args, **options)

    monkeypatch.setattr(models, "solve_subspaces", fails_the_second_time)
    with pytest.raises(rs.CorruptionError):
        rs.sweep(store, tmp_path / "out", grid=[{"target_step": 20, "history_steps": [8, "all"]}])
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "the grid has no entry"),
        ([{"method": "guess"}], "method must be one of extrapolate, reconstruct, combine"),
        (
            [{"target_step": 20, "fits": "linear"}],
            "extrapolate has no setting 'fits'; it has anchor",
        ),
        ([{"method": "combine", "rank": 1}], "combine has no setting 'rank'"),
        ([{"target_step": "far"}], "target_step must be a step, not 'far'"),
        ([{"target_step": True}], "target_step must be a step, not True"),
        ([{"target_step": 20, "window": "some"}], "window must be a whole number, or all"),
        ([{"target_step": 20, "damping": "much"}], "damping must be a number or auto"),
        ([{"target_step": 20, "fit": []}], "fit has no value"),
        ([{"target_step": 20, "fit": ["linear", "linear"]}], "fit has 'linear' twice"),
        ([{"target_step": 20, "name": "../x"}], "name must be letters"),
        ([{"target_step": 20, "anchor": "last"}], "--anchor must be one of base, latest"),
        ([{"rank": 1}], "name at least one --target-step"),
        ([{"target_step": 20}, {"target_step": 30, "rank": 99}], "entry 2 of the grid: --rank"),
    ],
)
def test_what_a_grid_may_not_have(
    entries: list[dict[str, Any]], message: str, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(rs.OptionError) as refused:
        rs.sweep(store, tmp_path / "out", grid=entries)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_too_short_a_history_is_refused_as_by_the_command(store: Path, tmp_path: Path) -> None:
    entries = [{"target_step": 20}, {"target_step": 20, "history_steps": 2, "fit": "polynomial:3"}]
    with pytest.raises(rs.FitError, match=r"entry 2 of the grid: .*at least 4 checkpoints"):
        rs.sweep(store, tmp_path / "out", grid=entries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a: 1\n- b: [1,\n", r"line 3 is not YAML"),
        ("- a: 1\n  b: 2\n  a: 3\n", r"line 3 is not YAML: 'a' is there twice"),
        ("- !!python/object/apply:os.system ['true']", "is not YAML: could not determine"),
        ("just words", "has to be a list of entries"),
        ("- 3", "has to be a list of entries"),
        ("", "has to be a list of entries"),
    ],
)
def test_files_that_are_no_grid(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(rs.OptionError, match=message) as refused:
        read_grid(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(rs.OptionError, match="cannot be read: No such file"):
        read_grid(tmp_path / "grid.yaml")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(rs.OptionError, match="is not UTF-8 text"):
        read_grid(tmp_path / "bytes")


def test_one_entry_needs_no_list(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("target-step: 20\n")
    assert read_grid(tmp_path / "grid.yaml") == [{"target-step": 20}]
