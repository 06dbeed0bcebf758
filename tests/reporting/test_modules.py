"""Tensors by module and layer."""

from __future__ import annotations

import math

import pytest

from relex_stream.reporting.modules import module_grid, movement_of, place_of
from relex_stream.summaries import GroupAnalysis


def tensor(name: str, explained: float = 0.5, r2: float = 0.9, first: float = 1.0) -> GroupAnalysis:
    return GroupAnalysis(
        name=name,
        tensors=1,
        weights=10,
        delta_norm=1.0,
        singular_values=(first,),
        singular_values_error=None,
        explained_variance=(explained,),
        explained_variance_error=None,
        r2=(r2,),
        r2_error=None,
        r2_elsewhere=(math.nan,),
        r2_elsewhere_error=None,
        bend=math.nan,
        bend_error=None,
    )


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3, "mlp.up_proj")),
        ("model.layers.3.mlp.up_proj.bias", ("model.layers", 3, "mlp.up_proj.bias")),
        ("h.0.1.w", ("h", 0, "*.w")),
        ("0.weight", None),
        ("w", None),
        ("", None),
    ],
)
def test_places(name: str, place: tuple[str, int, str] | None) -> None:
    assert place_of(name) == place


def test_experts_share_a_cell_by_their_movement() -> None:
    grid = module_grid(
        [
            tensor("m.layers.0.experts.0.up.weight", 0.5, 1.0, first=1.0),
            tensor("m.layers.0.experts.1.up.weight", 0.9, 0.0, first=3.0),
            tensor("m.layers.2.experts.0.up.weight", math.nan, math.nan, math.nan),
            tensor("m.embed.weight"),
        ]
    )
    assert grid.layers == (0, 2)
    assert grid.modules == ("experts.*.up",)
    assert grid.stack == "m.layers"
    assert list(grid.outside) == ["m.embed"]
    assert grid.averaged
    cell = grid.cells["experts.*.up", 0]
    # |M|^2 is 1 / 0.5 and 9 / 0.9.
    assert cell.movement == pytest.approx(12)
    assert cell.explained_variance == pytest.approx((2 * 0.5 + 10 * 0.9) / 12)
    assert cell.r2 == pytest.approx(2 / 12)
    assert cell.tensors == 2
    assert math.isnan(grid.cells["experts.*.up", 2].r2)


def test_several_stacks_are_told_apart() -> None:
    grid = module_grid([tensor("vision.blocks.0.a.weight"), tensor("text.layers.0.a.weight")])
    assert grid.modules == ("vision.blocks.*.a", "text.layers.*.a")
    assert grid.stack == ""
    assert not grid.averaged


def test_movement_of_nothing_is_none() -> None:
    assert movement_of(tensor("w", math.nan, math.nan, math.nan)) == 0
