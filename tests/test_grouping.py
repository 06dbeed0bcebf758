"""What shares a subspace, and what is left out, by name."""

from __future__ import annotations

import pytest

from relex_stream.errors import OptionError
from relex_stream.grouping import GROUPINGS, RUN_ELEMENTS, Selection, group_name, run_blocks


@pytest.mark.parametrize(
    ("tensor", "layer", "module"),
    [
        (
            "model.layers.12.self_attn.q_proj.weight",
            "model.layers.12",
            "model.layers.*.self_attn.q_proj",
        ),
        (
            "model.layers.12.self_attn.q_proj.bias",
            "model.layers.12",
            "model.layers.*.self_attn.q_proj",
        ),
        (
            "model.layers.3.mlp.experts.17.gate_proj.weight",
            "model.layers.3",
            "model.layers.*.mlp.experts.*.gate_proj",
        ),
        ("transformer.h.0.ln_1.weight", "transformer.h.0", "transformer.h.*.ln_1"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head.weight", "lm_head"),
        ("weight", "weight", "weight"),
        ("model.layers.1.scale", "model.layers.1", "model.layers.*.scale"),
        ("conv1d.weight", "conv1d.weight", "conv1d"),
        ("block.2", "block.2", "block.2"),
    ],
)
def test_groups_of_names(tensor: str, layer: str, module: str) -> None:
    assert group_name(tensor, "layer") == layer
    assert group_name(tensor, "module") == module
    assert group_name(tensor, "model") == "model"
    assert group_name(tensor, "tensor") == group_name(tensor, "run") == tensor


def test_layers_with_the_same_beginning_are_not_mixed_up() -> None:
    names = [f"model.layers.{layer}.mlp.weight" for layer in range(25)]
    for grouping in GROUPINGS:
        groups = {group_name(name, grouping) for name in names}
        assert len(groups) == (1 if grouping in ("module", "model") else 25)


@pytest.mark.parametrize("elements", [1, 7, 1 << 19, 1 << 20, 1 << 21])
def test_runs_are_whole_blocks_of_at_most_a_mebi(elements: int) -> None:
    blocks = run_blocks(elements)
    assert blocks >= 1
    assert blocks == 1 or blocks * elements <= RUN_ELEMENTS < (blocks + 1) * elements


def test_patterns() -> None:
    names = ["embed.weight", "layers.0.mlp.weight", "layers.0.norm.weight", "layers.1.mlp.weight"]

    def taken(**patterns: tuple[str, ...]) -> list[int]:
        selection = Selection(**patterns)
        selection.check(names)
        return [number for number, name in enumerate(names) if selection.takes(name)]

    assert taken() == [0, 1, 2, 3]
    assert taken(include=("*.mlp.*",)) == [1, 3]
    assert taken(exclude=("*norm*", "embed*")) == [1, 3]
    assert taken(include=("layers.0.*", "embed.weight"), exclude=("*.norm.*",)) == [0, 1]
    assert taken(include=("layers.[01].mlp.weight",)) == [1, 3]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"include": ("*.mlp",)}, r"--include \*.mlp is no tensor's name; the first is 'a.weight'"),
        ({"exclude": ("A.*",)}, r"--exclude A.\* is no tensor's name"),
        ({"exclude": ("*",)}, "leave no tensor"),
        ({"include": ("head*",)}, "--include head.*: head.weight has the weights of a.weight"),
        ({"excluded_from": "x"}, "--excluded-from must be base or latest, not 'x'"),
    ],
)
def test_a_selection_that_cannot_be_meant_is_refused(
    patterns: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        Selection(**patterns).check(["a.weight", "b.weight"], [("head.weight", "a.weight")])
