"""Quantised weights: recognised by their tensors, and refused.

Training does not move what such files hold, and differences of packed numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..errors import SourceError
from ..listing import file_status, read_file
from ..locations import Location
from ..specs import TensorSpec
from .strict_json import parse_object, shown

_PACKED = {"F8_E4M3", "F8_E5M2", "I8", "U8", "I32"}
"""Dtypes that quantised weights are stored in."""

_KINDS = (
    # what the name of a packed tensor ends with, what its companion's ends with instead, the kind
    ("", "_scale_inv", "FP8 with a scale per block"),
    ("", "_scale", "FP8 or integers with scales"),
    ("", ".absmax", "4-bit weights of bitsandbytes"),
    (".weight", ".SCB", "8-bit weights of bitsandbytes"),
    ("_blocks", "_scales", "MXFP4"),
    (".qweight", ".qweight", "packed integers of GPTQ or AWQ"),
    (".weight_packed", ".weight_packed", "packed integers of compressed-tensors"),
)

_LONGEST_CONFIG = 16 << 20


def refuse_quantised(directory: Location, specs: Iterable[TensorSpec]) -> None:
    """Refuse a model whose weights are quantised.

    A tensor of 8-bit floats or integers alone does not make it one: it may be a buffer, which no
    step changes. It is taken for packed weights if another tensor holds their scales, by its name,
    or if ``config.json`` announces a quantisation.

    Parameters
    ----------
    directory : Location
        The model's, which may hold its ``config.json``.
    specs : iterable of TensorSpec
        All its tensors.

    Raises
    ------
    SourceError
        If they are.
    """
    names: dict[str, str] = {spec.name: spec.dtype.code for spec in specs}
    packed = [name for name, code in names.items() if code in _PACKED]
    for name in packed:
        kind = _kind(name, names)
        if kind is not None:
            raise _refused(directory, name, names[name], kind)
    if packed and (method := _announced(directory / "config.json")) is not None:
        kind = f"{shown(method)}, says config.json"
        raise _refused(directory, packed[0], names[packed[0]], kind)


def _kind(name: str, names: Collection[str]) -> str | None:
    for end, companion, kind in _KINDS:
        if name.endswith(end) and name.removesuffix(end) + companion in names:
            return kind
    return None


def _refused(directory: Location, name: str, code: str, kind: str) -> SourceError:
    return SourceError(
        f"{directory}: the weights are quantised: tensor {shown(name)} is {code} ({kind}); "
        "dequantise the model to BF16 first, or give the one that training started from"
    )


def _announced(config: Location) -> str | None:
    """Return the method of quantisation that a model's configuration names."""
    try:
        if file_status(config).size > _LONGEST_CONFIG:
            return None
        entry = parse_object(read_file(config)).get("quantization_config")
    except (OSError, ValueError):
        return None  # whether it is right is for others to say
    return str(entry.get("quant_method", "a quantisation")) if isinstance(entry, dict) else None
