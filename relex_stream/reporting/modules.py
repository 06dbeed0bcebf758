"""Tensors by module and layer, from their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from relex_stream.grouping import group_name
from relex_stream.reporting.numbers import Cell, ModuleGrid
from relex_stream.summaries import GroupAnalysis

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")


def place_of(tensor: str) -> tuple[str, int, str] | None:
    """Return the stack of layers that a tensor is in, its layer and its module; None outside.

    Examples
    --------
    >>> place_of("model.layers.12.mlp.experts.7.up_proj.weight")
    ('model.layers', 12, 'mlp.experts.*.up_proj')
    >>> place_of("model.embed_tokens.weight")
    """
    layer = group_name(tensor, "layer")
    if layer == tensor:
        return None
    stack, _, number = layer.rpartition(".")
    module = _NUMBER.sub("*", tensor[len(layer) + 1 :])
    return stack, int(number), module.removesuffix(".weight")


def short_name(tensor: str) -> str:
    """Return a tensor's name for a small title.

    Examples
    --------
    >>> short_name("model.layers.12.self_attn.q_proj.weight"), short_name("lm_head.weight")
    ('layer 12, self_attn.q_proj', 'lm_head')
    """
    layer = group_name(tensor, "layer")
    rest = tensor if layer == tensor else tensor[len(layer) + 1 :]
    rest = rest.removesuffix(".weight")
    return rest if layer == tensor else f"layer {layer.rpartition('.')[2]}, {rest}"


def module_grid(tensors: Iterable[GroupAnalysis]) -> ModuleGrid:
    """Arrange the analyses of tensors by module and layer, in the order they come in."""
    placed: dict[tuple[str, str], dict[int, list[GroupAnalysis]]] = {}
    outside: dict[str, Cell] = {}
    for tensor in tensors:
        place = place_of(tensor.name)
        if place is None:
            outside[tensor.name.removesuffix(".weight")] = _cell([tensor])
        else:
            stack, layer, module = place
            placed.setdefault((stack, module), {}).setdefault(layer, []).append(tensor)
    stacks = list(dict.fromkeys(stack for stack, _ in placed))
    cells: dict[tuple[str, int], Cell] = {}
    modules: dict[str, None] = {}
    for (stack, module), by_layer in placed.items():
        label = module if len(stacks) == 1 else f"{stack}.*.{module}"
        modules[label] = None
        for layer, found in by_layer.items():
            cells[label, layer] = _cell(found)
    return ModuleGrid(
        layers=tuple(sorted({layer for _, layer in cells})),
        modules=tuple(modules),
        cells=cells,
        outside=outside,
        stack=stacks[0] if len(stacks) == 1 else "",
    )


def movement_of(tensor: GroupAnalysis) -> float:
    """Return ``|M|^2`` of a tensor's history; 0 where nothing moved."""
    share = tensor.explained_variance[0]
    # Not true of NaN either.
    return tensor.singular_values[0] ** 2 / share if share > 0 else 0.0


def _cell(tensors: list[GroupAnalysis]) -> Cell:
    weights = [movement_of(tensor) for tensor in tensors]
    total = sum(weights)

    def mean(figures: list[float]) -> float:
        if not total > 0:
            return float("nan")
        return sum(w * each for w, each in zip(weights, figures, strict=True) if w > 0) / total

    return Cell(
        explained_variance=mean([tensor.explained_variance[0] for tensor in tensors]),
        r2=mean([tensor.r2[0] for tensor in tensors]),
        movement=total,
        tensors=len(tensors),
    )
