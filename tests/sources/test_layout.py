import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.errors import OptionError, RelexStreamWarning, SourceError
from relex_stream.sources import (
    StepSelection,
    find_checkpoints,
    open_checkpoint,
    parse_steps,
)
from tests.make_checkpoints import make_trajectory, write_model, write_safetensors

TENSORS = {"a": ("U8", (1,), b"x")}


def make(root, *paths):
    for path in paths:
        write_model(root / path, TENSORS, config=False)
    return root


def names(found, root):
    return [(step, path.relative_to(root).as_posix()) for step, path in found.checkpoints]


@pytest.mark.parametrize(
    ("path", "layout"),
    [
        ("global_step_{}", "global_step_N"),
        ("global_step_{}/huggingface", "global_step_N/huggingface"),
        ("global_step_{}/actor/huggingface", "global_step_N/actor/huggingface"),
        ("checkpoint-{}", "checkpoint-N"),
        ("step_{}", "step_N"),
        ("iter_{:07d}", "iter_N"),
    ],
)
def test_known_layouts(tmp_path, path, layout):
    make(tmp_path, *(path.format(step) for step in (10, 9, 100)))
    found = find_checkpoints(tmp_path)
    assert (found.layout, found.format.name, found.unfinished) == (layout, "safetensors", {})
    assert found.checkpoints == tuple((step, tmp_path / path.format(step)) for step in (9, 10, 100))


def test_trajectory(tmp_path):
    run = make_trajectory(tmp_path, steps=(2, 3))
    found = find_checkpoints(run.checkpoints)
    assert found.layout == "global_step_N/huggingface"
    assert [open_checkpoint(path, step).step for step, path in found.checkpoints] == [2, 3]


def test_other_entries_are_passed_over(tmp_path):
    others = [
        "tmp_step_5",
        "step_5.tmp",
        "step_",
        "step_x",
        "step.7",
        "STEP_7",
        "step_7 ",
        "step_٣",
    ]
    make(tmp_path, "step_3", *others)
    (tmp_path / "step_4").write_text("a file")
    (tmp_path / "latest").symlink_to("step_3")
    assert names(find_checkpoints(tmp_path), tmp_path) == [(3, "step_3")]


def test_links_to_checkpoints(tmp_path):
    make(tmp_path, "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/step_1").symlink_to(tmp_path / "elsewhere")
    assert names(find_checkpoints(tmp_path / "run"), tmp_path) == [(1, "run/step_1")]


def test_first_weights_directory_common_to_all(tmp_path):
    make(tmp_path, "step_1", "step_1/huggingface", "step_2/huggingface")
    assert find_checkpoints(tmp_path).layout == "step_N/huggingface"


def test_weights_in_different_places(tmp_path):
    make(tmp_path, "step_1", "step_2/huggingface")
    with pytest.raises(
        SourceError, match=r"weights lie in .*step_1 \(safetensors\) but in .*step_2/hugg"
    ):
        find_checkpoints(tmp_path)
    assert find_checkpoints(tmp_path, steps=parse_steps("2")).layout == "step_N/huggingface"


def test_no_weights(tmp_path):
    make(tmp_path, "global_step_1/actor/huggingface")
    actor = tmp_path / "global_step_2/actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface/config.json").write_text("{}")
    with pytest.raises(
        SourceError,
        match=r"global_step_2: no weights: found actor; save .* \(looked for model.safetensors or "
        r"model.safetensors.index.json; shard-\*.*; \.metadata with \*\.distcp; DELTA/.*; "
        r"there and where",
    ):
        find_checkpoints(tmp_path)
    (actor / "model.pt").write_bytes(b"")
    with pytest.raises(SourceError, match=r"found PyTorch files \(.*\) in actor; merge to safet"):
        find_checkpoints(tmp_path)
    assert len(find_checkpoints(tmp_path, steps=parse_steps("1")).checkpoints) == 1


def test_several_families(tmp_path):
    make(tmp_path, "step_1", "global_step_2")
    with pytest.raises(
        SourceError,
        match=r"global_step_{step} \(global_step_2\) and step_{step} \(step_1\); .*--pattern",
    ):
        find_checkpoints(tmp_path)
    assert names(find_checkpoints(tmp_path, "step_{step}"), tmp_path) == [(1, "step_1")]


def test_same_step_twice(tmp_path):
    make(tmp_path, "step_1", "step_001")
    with pytest.raises(SourceError, match="both step_001 and step_1 are step 1"):
        find_checkpoints(tmp_path)


def test_step_0_is_the_base(tmp_path):
    make(tmp_path, "step_0", "step_1")
    with pytest.warns(RelexStreamWarning, match="step_0 is left out") as caught:
        found = find_checkpoints(tmp_path)
    assert caught[0].filename == __file__
    assert names(found, tmp_path) == [(1, "step_1")]


def test_only_step_0(tmp_path):
    make(tmp_path, "step_0")
    with (
        pytest.warns(RelexStreamWarning, match="left out"),
        pytest.raises(SourceError, match="no step is selected; steps there: none"),
    ):
        find_checkpoints(tmp_path)


def test_unusable_directories(tmp_path):
    with pytest.raises(SourceError, match="no such directory"):
        find_checkpoints(tmp_path / "none")
    with pytest.raises(SourceError, match=r"no checkpoints: .*step_N.*there are: nothing"):
        find_checkpoints(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="a file where a directory belongs"):
        find_checkpoints(tmp_path / "file")
    with pytest.raises(SourceError, match=r"there are: file; .*--pattern"):
        find_checkpoints(tmp_path)
    with pytest.raises(SourceError, match="this is one model"):
        find_checkpoints(make(tmp_path, "model") / "model")


@pytest.mark.parametrize(
    ("pattern", "layout", "expected"),
    [
        ("epoch-{step}", "epoch-N", [(1, "epoch-1"), (2, "epoch-2")]),
        ("epoch-{step}/", "epoch-N", [(1, "epoch-1"), (2, "epoch-2")]),
        ("run_{step}/model", "run_N/model", [(5, "run_5/model")]),
        ("run_{step}", "run_N/huggingface", [(6, "run_6/huggingface")]),
        ("*/at{step}", "*/atN", [(8, "x/at8"), (9, "y/at9")]),
        ("a.c{step}", "a.cN", [(3, "a.c3")]),
        ("[x]{step}", "[x]N", [(4, "[x]4")]),
        ("v{step}-*", "vN-*", [(1, "v1-abc"), (2, "v2-def")]),
        ("v**{step}-d*", "v**N-d*", [(2, "v2-def")]),
    ],
)
def test_patterns(tmp_path, pattern, layout, expected):
    make(
        tmp_path,
        *("epoch-1", "epoch-2", "epoch-3x", "run_5/model", "run_6/huggingface", "x/at8", "y/at9"),
        *(".z/at10", "a.c3", "abc4", "[x]4", "x5", "v1-abc", "v2-def"),
    )
    steps = StepSelection(explicit=tuple(step for step, _ in expected))
    found = find_checkpoints(tmp_path, pattern, steps)
    assert found.layout == layout
    assert names(found, tmp_path) == [(step, path.removesuffix("/.")) for step, path in expected]


def test_pattern_with_the_same_step_twice(tmp_path):
    make(tmp_path, "x/at1", "y/at1")
    with pytest.raises(SourceError, match="both x/at1 and y/at1 are step 1"):
        find_checkpoints(tmp_path, "*/at{step}")


def test_pattern_without_match(tmp_path):
    make(tmp_path, *(f"d{index}" for index in range(8)))
    with pytest.raises(
        SourceError, match=r"epoch-{step}; there are: d0, d1, d2, d3, d4 and 3 more"
    ):
        find_checkpoints(tmp_path, "epoch-{step}")


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "epoch",
        "{step}{step}",
        "a/{step}/b{step}",
        "/a{step}",
        "../{step}",
        "a//{step}",
        "\\{step}",
    ],
)
def test_bad_patterns(tmp_path, pattern):
    with pytest.raises(OptionError, match="--pattern"):
        find_checkpoints(tmp_path, pattern)


def test_selection(tmp_path):
    make(tmp_path, *(f"step_{step}" for step in range(1, 21)))

    def selected(text):
        return [step for step, _ in find_checkpoints(tmp_path, steps=parse_steps(text)).checkpoints]

    assert selected("1:75") == list(range(1, 21))
    assert selected("18:") == [18, 19, 20]
    assert selected(":2,7,5") == [1, 2, 5, 7]
    assert selected("5:100:10") == [5, 15]
    with pytest.raises(
        SourceError, match=r"no checkpoint of step 21; steps there: 1, 2, 3, 4, 5, ..., 20 \(20 in"
    ):
        selected("1:10,21")
    with pytest.raises(SourceError, match="no checkpoint of steps 21, 22;"):
        selected("22,21")
    with pytest.raises(SourceError, match="no step is selected; steps there: 1, "):
        selected("30:40")


@pytest.mark.parametrize(
    ("text", "explicit", "ranges"),
    [
        ("7", (7,), ()),
        ("10,5, 1,5", (1, 5, 10), ()),
        ("1:75", (), ((1, 75, 1),)),
        ("1:75:5", (), ((1, 75, 5),)),
        (":75", (), ((1, 75, 1),)),
        ("10:", (), ((10, None, 1),)),
        ("10::5", (), ((10, None, 5),)),
        (":", (), ((1, None, 1),)),
        ("3:3", (), ((3, 3, 1),)),
        ("1:10,20,30:50:10", (20,), ((1, 10, 1), (30, 50, 10))),
    ],
)
def test_parse_steps(text, explicit, ranges):
    assert parse_steps(text) == StepSelection(explicit, ranges)


@pytest.mark.parametrize(
    ("text", "part", "problem"),
    [
        ("", "''", "not a step"),
        ("1,", "''", "not a step"),
        ("a", "'a'", "not a step"),
        ("-1", "'-1'", "not a step"),
        ("1.5", "'1.5'", "not a step"),
        ("1:2:3:4", "'1:2:3:4'", "not a step"),
        ("1-5", "'1-5'", "not a step"),
        ("1 5", "'1 5'", "not a step"),
        ("٣", "'٣'", "not a step"),
        ("9" * 5000, "'999", "not a step"),
        ("0", "'0'", "step 0 is the base"),
        ("0:5", "'0:5'", "step 0 is the base"),
        (":0", "':0'", "step 0 is the base"),
        ("1:5:0", "'1:5:0'", "stride is 0"),
        ("5,7:3", "'7:3'", "ends before it starts"),
    ],
)
def test_parse_steps_refuses(text, part, problem):
    with pytest.raises(OptionError, match=problem) as caught:
        parse_steps(text)
    assert part in str(caught.value)
    assert "1:75" in str(caught.value)
    assert len(str(caught.value)) < 300


@given(
    st.lists(
        st.integers(1, 40) | st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(1, 9)),
        min_size=1,
        max_size=4,
    )
)
def test_selects_what_range_gives(items):
    parts, expected = [], set()
    for item in items:
        if isinstance(item, int):
            parts.append(str(item))
            expected.add(item)
        else:
            first, length, stride = item
            parts.append(f"{first}:{first + length}:{stride}")
            expected |= set(range(first, first + length + 1, stride))
    selection = parse_steps(",".join(parts))
    assert {step for step in range(100) if selection.selects(step)} == expected


@given(st.text(alphabet="0123456789:, x", max_size=12))
def test_parse_steps_raises_nothing_else(text):
    with contextlib.suppress(OptionError):
        parse_steps(text)


@pytest.mark.parametrize(
    ("path", "layout"),
    [
        # what trainers write, and how it is named
        ("global_step{}_hf", "global_step{}_hf"),
        ("step-{}", "step-{}"),
        ("step_{}/weight", "step_{}/weight"),
        ("step_{}/policy/weights/model/consolidated",) * 2,
        ("global_step_{}/actor/model/huggingface",) * 2,
    ],
)
def test_layouts_of_trainers(tmp_path, path, layout):
    make(tmp_path, path.format(1), path.format(2))
    assert find_checkpoints(tmp_path).layout == layout.format("N")


@pytest.mark.parametrize("inside", ["weights", "checkpoints", "checkpoint", "broadcasts"])
def test_the_runs_directory_does_as_well(tmp_path, inside):
    make(tmp_path, f"{inside}/step_1")
    (tmp_path / inside / "step_1/STABLE").touch()
    (tmp_path / "logs").mkdir()
    found = find_checkpoints(tmp_path)
    assert found.layout == f"{inside}/step_N"
    assert found.checkpoints == ((1, tmp_path / inside / "step_1"),)
    assert find_checkpoints(tmp_path / inside).layout == "step_N"


def test_of_several_directories_of_a_run_the_first_counts(tmp_path):
    make(tmp_path, "checkpoints/step_1", "weights/step_1", "broadcasts/step_2")
    (tmp_path / "weights/step_1/STABLE").touch()
    assert find_checkpoints(tmp_path).layout == "weights/step_N"


def test_a_family_without_weights_does_not_count_beside_one_with(tmp_path):
    # OpenRLHF's supervised training: DeepSpeed's state beside the models.
    make(tmp_path, "global_step5_hf", "global_step10_hf")
    for step in (5, 10):
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}/zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    found = find_checkpoints(tmp_path)
    assert found.layout == "global_stepN_hf"
    assert [step for step, _ in found.checkpoints] == [5, 10]


def test_steps_without_their_mark_are_left_out(tmp_path):
    make(tmp_path, *(f"weights/step_{step}" for step in (1, 2, 3)))
    (tmp_path / "weights/step_2/STABLE").touch()
    with pytest.warns(RelexStreamWarning, match=r"left out, because not complete: step_1 \(no S"):
        found = find_checkpoints(tmp_path)
    assert [step for step, _ in found.checkpoints] == [2]
    assert found.unfinished == {1: "no STABLE", 3: "no STABLE"}
    assert find_checkpoints(tmp_path, steps=parse_steps("2")).unfinished == {}
    with pytest.raises(SourceError, match=r"not complete: step_1 \(no STABLE\).*; wait for the tr"):
        find_checkpoints(tmp_path, steps=parse_steps("1,2"))
    with pytest.raises(SourceError, match=r"no checkpoint is complete; .*step_3 .*--pattern"):
        find_checkpoints(tmp_path, steps=parse_steps("3:"))
    assert len(find_checkpoints(tmp_path, "weights/step_{step}").checkpoints) == 3


@pytest.mark.parametrize(
    ("family", "mark"), [("step_{}", "STABLE"), ("checkpoint-{}", "trainer_state.json")]
)
def test_elsewhere_a_mark_is_asked_for_only_where_another_step_has_it(tmp_path, family, mark):
    make(tmp_path, *(family.format(step) for step in (1, 2, 3)))
    assert len(find_checkpoints(tmp_path).checkpoints) == 3
    for step in (1, 2):
        (tmp_path / family.format(step) / mark).touch()
    with pytest.warns(RelexStreamWarning, match=rf"\(no {mark}\)"):
        assert [step for step, _ in find_checkpoints(tmp_path).checkpoints] == [1, 2]


@pytest.mark.parametrize("name", ["weights", "broadcasts"])
def test_prime_rls_directories_always_have_the_mark(tmp_path, name):
    make(tmp_path, f"{name}/step_1")
    with pytest.raises(SourceError, match=r"no checkpoint is complete; .*step_1 \(no STABLE\)"):
        find_checkpoints(tmp_path / name)


@pytest.mark.parametrize("family", ["global_step_{}", "iter_{:07d}"])
def test_steps_behind_the_last_complete_one_are_left_out(tmp_path, family):
    make(tmp_path, *(family.format(step) for step in (5, 10, 15)))
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("10\n")
    with pytest.warns(RelexStreamWarning, match=r"15 \(latest_checkpointed_iteration.txt says 10"):
        assert [step for step, _ in find_checkpoints(tmp_path).checkpoints] == [5, 10]
    for text in ("15", "release", "", "9" * 30, "ten"):
        tracker.write_text(text)
        assert len(find_checkpoints(tmp_path).checkpoints) == 3
    tracker.write_bytes(b"\xff")
    assert len(find_checkpoints(tmp_path).checkpoints) == 3


def test_a_step_that_is_not_selected_need_not_be_complete(tmp_path):
    make(tmp_path, "step_1", "step_2")
    (tmp_path / "step_1/STABLE").touch()
    assert find_checkpoints(tmp_path, steps=parse_steps("1:1")).unfinished == {}


def test_the_source_may_be_named(tmp_path):
    make(tmp_path, "step_1")
    write_safetensors(tmp_path / "step_1/shard-00001-model-00001-of-00001.safetensors", TENSORS)
    assert find_checkpoints(tmp_path).format.name == "safetensors"
    found = find_checkpoints(tmp_path, source="split-safetensors")
    assert (found.format.name, found.layout) == ("split-safetensors", "step_N, split safetensors")
    with pytest.raises(
        SourceError,
        match=r"no weights: found safetensors in \.; choose --source safetensors or auto "
        r"\(looked for \.metadata with \*\.distc",
    ):
        find_checkpoints(tmp_path, source="dcp")
    with pytest.raises(
        OptionError, match="--source zip: there is no such format; choose auto, saf"
    ):
        find_checkpoints(tmp_path, source="zip")


def test_steps_in_different_formats(tmp_path):
    make(tmp_path, "step_1")
    write_safetensors(tmp_path / "step_2/shard-00001-model-00001-of-00001.safetensors", TENSORS)
    with pytest.raises(
        SourceError,
        match=r"step_1 \(safetensors\) but in .*step_2 \(split safetensors\): .*--source",
    ):
        find_checkpoints(tmp_path)
