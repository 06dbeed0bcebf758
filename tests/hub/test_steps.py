"""Which step is where, by names alone."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.errors import OptionError, RelexStreamWarning, SourceError
from relex_stream.hub.client import HubFile, Ref
from relex_stream.hub.steps import HubStep, find_steps, find_weights, needed_files
from relex_stream.sources import parse_steps
from relex_stream.urls import HubUrl, is_hub, parse_hub

MAIN = "f" * 40


class Listings:
    """A client that knows one repository: revisions, and paths of files at each commit."""

    def __init__(self, revisions: dict[str, str], **paths: list[str]) -> None:
        self.revisions = {"main": MAIN} | revisions
        self.paths = {MAIN: paths.pop("main", [])} | paths

    def refs(self, _: str) -> list[Ref]:
        return [Ref("branch", name, commit) for name, commit in self.revisions.items()]

    def commit_of(self, _: str, revision: str) -> str:
        return self.revisions[revision]

    def files(self, _: str, commit: str) -> list[HubFile]:
        return [HubFile(path, 5, None, "0" * 40) for path in self.paths[commit]]


def find(text: str, listings: Listings, pattern: str | None = None, steps: str | None = None):
    selection = parse_steps(steps) if steps else None
    found = find_steps(listings, parse_hub(text), pattern, selection)
    return found.layout, {
        step.step: (step.name, step.commit, step.directory) for step in found.steps
    }


def commits(*names: str) -> dict[str, str]:
    return {name: format(number, "040x") for number, name in enumerate(names)}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("step_10", "step_{step}"),
        ("step-010", "step-{step}"),
        ("step10", "step{step}"),
        ("checkpoint-10", "checkpoint-{step}"),
        ("global_step_10", "global_step_{step}"),
        ("iter_10", "iter_{step}"),
    ],
)
def test_known_names_of_revisions_and_of_directories(name: str, family: str) -> None:
    revisions = Listings(commits("dev", name, "step_x", "v1"))
    assert find("hf://org/name", revisions) == (
        f"hf://org/name@{family}",
        {10: (name, revisions.revisions[name], "")},
    )
    directories = Listings({}, main=["README.md", f"{name}/model.safetensors", "other/x"])
    expected = (f"hf://org/name@main/{family}", {10: (name, MAIN, name)})
    assert find("hf://org/name", directories) == expected
    assert find("hf://org/name@main", directories) == expected


def test_revisions_and_directories_are_told_apart() -> None:
    both = Listings(commits("step_1"), main=["step_2/model.safetensors"])
    with pytest.raises(SourceError, match="both revisions and directories") as error:
        find("hf://org/name", both)
    for choice, step in zip(
        re.findall(r"hf://\S+@\S+(?<!,)", str(error.value)), (1, 2), strict=True
    ):
        assert list(find(choice.rstrip(","), both)[1]) == [step]


def test_a_directory_in_a_revision_and_a_pattern() -> None:
    listings = Listings(
        commits("runs/7"),
        **{"0" * 40: ["a/b/step_1/x", "a/b/step_2/y/z", "a/step_9/x", "step_8/x"]},
    )
    assert find("hf://org/name@runs%2F7/a/b", listings)[1] == {
        1: ("a/b/step_1", "0" * 40, "a/b/step_1"),
        2: ("a/b/step_2", "0" * 40, "a/b/step_2"),
    }
    layout, found = find("hf://org/name@runs%2F7", listings, "*/step_{step}")
    assert layout == "hf://org/name@runs%2F7/*/step_{step}"
    assert found == {9: ("a/step_9", "0" * 40, "a/step_9")}


def test_a_pattern_of_revisions() -> None:
    listings = Listings(commits("stage1-step0010-tokens5B", "stage1-step20-tokens9B", "step_3"))
    pattern = "stage1-step{step}-tokens*B"
    assert list(find("hf://org/name", listings, pattern)[1]) == [10, 20]
    assert list(find(f"hf://org/name@{pattern}", listings)[1]) == [10, 20]
    directory = find(f"hf://org/name@{pattern}/actor", listings)[1][10][2]
    assert directory == "actor"
    with pytest.raises(OptionError, match="leave --pattern out"):
        find(f"hf://org/name@{pattern}", listings, pattern)
    with pytest.raises(OptionError, match="exactly once"):
        find("hf://org/name", listings, "step")


def test_steps_are_selected_and_zero_is_the_base() -> None:
    listings = Listings(commits("step_0", "step_30", "step_4", "step_100"))
    with pytest.warns(RelexStreamWarning, match="step_0 is left out: the base stands for step 0"):
        assert list(find("hf://org/name", listings)[1]) == [4, 30, 100]
    with pytest.warns(RelexStreamWarning):
        assert list(find("hf://org/name", listings, steps="4:30")[1]) == [4, 30]
    with (
        pytest.warns(RelexStreamWarning),
        pytest.raises(SourceError, match="hf://org/name: no checkpoint of step 5; steps there: 4"),
    ):
        find("hf://org/name", listings, steps="5")


def test_one_step_under_two_names() -> None:
    same = Listings({"step_5": "1" * 40, "step_05": "1" * 40})
    assert list(find("hf://org/name", same)[1]) == [5]
    with pytest.raises(SourceError, match="both step_05 and step_5 are step 5"):
        find("hf://org/name", Listings({"step_5": "1" * 40, "step_05": "2" * 40}))


@pytest.mark.parametrize(
    ("text", "listings", "pattern", "message"),
    [
        ("hf://org/name", Listings(commits("a", "b")), None, "branches and tags: main, a, b; say"),
        ("hf://org/name", Listings(commits("step_1", "iter_2")), None, "in several ways: step_"),
        ("hf://org/name", Listings({}), "e{step}", "looked for eN; its branches"),
        ("hf://org/name@main", Listings({}, main=["a/x", "b"]), None, "files and dir.*: a, b; say"),
        (
            "hf://org/name@main",
            Listings({}, main=["model.safetensors"]),
            None,
            "is one model; name",
        ),
        ("hf://org/name@e{step}", Listings({}), None, "looked for eN; its branches and tags: main"),
        ("hf://org/name/none", Listings({}, main=["a/x"]), None, "directories: nothing; say"),
    ],
)
def test_nothing_to_be_found(
    text: str, listings: Listings, pattern: str | None, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        find(text, listings, pattern)


def place_of(*paths: str, directory: str = "", index: str = "model.safetensors.index.json"):
    url, step = HubUrl("org/name"), HubStep(7, "step_7", MAIN, directory)
    files = [HubFile(path, 5, None, "0" * 40) for path in paths]
    return find_weights(url, [step], lambda _: files)[7]


def test_weights_are_found_inside_a_step() -> None:
    place = place_of("actor/huggingface/model.safetensors", "actor/optim.pt", "x.bin")
    assert (place.directory, list(place.files)) == ("actor/huggingface", ["model.safetensors"])
    place = place_of("s/model.safetensors", "s/huggingface/model.safetensors", directory="s")
    assert place.directory == "s"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "pytorch_model.bin",
            r"step 7 \(step_7\) has no model.safetensors .*PyTorch weights \(pyt",
        ),
        ("actor/__0_0.distcp", "found actor/__0_0.distcp; upload it anew"),
        ("huggingface/__0_0.distcp", "checkpoint .__0_0.distcp. in huggingface; fetch the files y"),
        ("huggingface/adapter_model.safetensors", "an adapter without its model .* in huggingface"),
        ("README.md", "found README.md; upload it anew"),
    ],
)
def test_other_formats_are_refused_by_name(path: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        place_of(path)


def test_steps_agree_on_where_weights_are() -> None:
    steps = [HubStep(n, f"step_{n}", str(n), "") for n in (1, 2)]
    paths = {1: ["model.safetensors"], 2: ["huggingface/model.safetensors"]}

    def files_of(step: HubStep) -> list[HubFile]:
        return [HubFile(path, 5, None, "0" * 40) for path in paths[step.step]]

    with pytest.raises(SourceError, match=r"lie in \. at step 1 but in huggingface at step 2"):
        find_weights(HubUrl("org/name"), steps, files_of)
    paths[1].append("huggingface/model.safetensors")
    assert find_weights(HubUrl("org/name"), steps, files_of)[1].directory == "huggingface"


def test_only_what_is_needed_is_fetched() -> None:
    index = "model.safetensors.index.json"
    place = place_of("a.safetensors", "b.safetensors", "consolidated.safetensors", index, "x.json")
    needed, left_out = needed_files(place, {"a.safetensors", "b.safetensors"})
    assert [file.path for file in needed] == ["a.safetensors", "b.safetensors", index, "x.json"]
    assert left_out == ["consolidated.safetensors"]
    with pytest.raises(SourceError, match=r"shard c.safetensors, named by .*, is missing; upload"):
        needed_files(place, {"a.safetensors", "c.safetensors"})
    single = place_of("model.safetensors", index, "optimizer.pt")
    needed, left_out = needed_files(single, {"c.safetensors"})
    assert ([file.path for file in needed], left_out) == (
        ["model.safetensors", index],
        ["optimizer.pt"],
    )


def test_directories_of_a_model_are_fetched_and_those_of_others_are_not() -> None:
    place = place_of(
        *("model.safetensors", "1_Pooling/config.json"),
        *("onnx/model.safetensors", "onnx/config.json", "code/a.py", "code/a.lock"),
    )
    needed, left_out = needed_files(place, None)
    assert ([file.path for file in needed], left_out) == (
        ["model.safetensors", "1_Pooling/config.json", "code/a.py"],
        ["onnx/"],
    )


NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,8}[A-Za-z0-9])?", fullmatch=True)
PATHS = st.lists(NAMES, max_size=3).map("/".join)


@given(
    st.lists(NAMES, min_size=1, max_size=2).filter(
        lambda names: names[0] not in {"models", "datasets", "spaces", "kernels", "buckets"}
    ),
    st.none() | PATHS.filter(lambda path: path and not path.startswith("refs/")),
    PATHS,
)
def test_urls_say_what_they_were_read_from(
    names: list[str], revision: str | None, directory: str
) -> None:
    # Without an organisation there is nothing between the name and a directory.
    url = HubUrl("/".join(names), revision, directory if len(names) == 2 or revision else "")
    assert parse_hub(str(url)) == url
    assert is_hub(str(url))


@pytest.mark.parametrize(
    "text",
    [
        *("hf://", "hf://org/name@", "hf://org/name@/x", "hf://org/name/../x", "hf://org/na me"),
        *("hf://datasets/org/name", "hf://org/name@main//x", "hf://-org/name", "hf://org/name@a/."),
    ],
)
def test_urls_of_other_forms_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=re.escape(text)):
        parse_hub(text)


def test_urls_of_special_forms() -> None:
    assert parse_hub("hf://models/org/name/") == HubUrl("org/name")
    assert parse_hub("hf:/org/name") == HubUrl("org/name")  # what a Path makes of it
    assert parse_hub("hf://org/name@refs/pr/1/x") == HubUrl("org/name", "refs/pr/1", "x")
    assert str(HubUrl("org/name", "refs/pr/1", "x")) == "hf://org/name@refs/pr/1/x"
