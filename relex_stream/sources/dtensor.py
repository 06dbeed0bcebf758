"""torch's DTensor as pickles have it: which box of the whole tensor a rank holds.

Of torch 2.4 to 2.13, whose pickles differ in the names of modules and in how a mesh is described.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..specs import Box
from .pickles import Known, Made
from .strict_json import shown
from .torch_file import StoredView, are_sizes

# Far more than any mesh has: what is small in a pickle may be met in it very often.
_MOST_DIMENSIONS = 8
_MOST_NESTED = 2
_MOST_RANKS = 1 << 17
_MOST_MESHES = 10_000


class DTensor(NamedTuple):
    """A tensor that is spread over ranks, as one of them saved it.

    ``spec`` is what torch calls so: a mesh of ranks, and how the tensor is placed on it.
    """

    shape: tuple[int, ...]
    local: StoredView
    spec: Made


class Meshes:
    """Where a rank is in the meshes of one file, each looked at once.

    Parameters
    ----------
    rank : int
        Whose file it is.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._found: dict[Made, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def find(self, mesh: Made) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return a mesh's shape, and the rank's coordinate in it.

        Raises
        ------
        ValueError
            If it is of a form that is not known, or the rank is not in it, with a clause.
        """
        if mesh not in self._found:
            if len(self._found) == _MOST_MESHES:
                raise ValueError(f"it is on one of more than {_MOST_MESHES} meshes; {_MERGE}")
            self._found[mesh] = _coordinate(mesh, self.rank)
        return self._found[mesh]


def local_box(tensor: DTensor, meshes: Meshes) -> Box:
    """Return the part of the whole tensor that a rank holds.

    Each dimension of the mesh in turn cuts what those before it left: into parts of equal size,
    rounded up, so that the last ones may be smaller or empty.

    Parameters
    ----------
    tensor : DTensor
        As the rank's file has it.
    meshes : Meshes
        Of that rank.

    Raises
    ------
    ValueError
        If it is placed in a way that is not read, or the local tensor has another shape, with a
        clause that says so and what to do.
    """
    mesh, placements = tensor.spec.get("mesh"), tensor.spec.get("placements")
    if type(mesh) is not Made or mesh.by is not _MESH or type(placements) is not tuple:
        raise ValueError("its spec has no mesh and placements")
    sizes, coordinate = meshes.find(mesh)
    if len(placements) != len(sizes):
        raise ValueError(f"it has {len(placements)} placements on a mesh of shape {list(sizes)}")
    _check_order(tensor.spec.get("shard_order"))
    start, shape = [0] * len(tensor.shape), list(tensor.shape)
    for placement, ranks, position in zip(placements, sizes, coordinate, strict=True):
        dimension = _sharded_dimension(placement)
        if dimension is None:
            continue
        if not 0 <= dimension < len(shape):
            raise ValueError(f"it is cut along dimension {dimension} of {len(shape)}")
        chunk = -(-shape[dimension] // ranks)
        begin = min(chunk * position, shape[dimension])
        start[dimension] += begin
        shape[dimension] = min(chunk, shape[dimension] - begin)
    if tensor.local.shape != tuple(shape):
        raise ValueError(
            f"it is {list(tensor.local.shape)} where {shape} of {list(tensor.shape)} belongs"
        )
    return Box(tuple(start), tuple(shape))


def _sharded_dimension(placement: object) -> int | None:
    by = placement.by if type(placement) is Made else None
    if type(placement) is Made and by is _SHARD:
        dimension = placement.get("dim")
        if type(dimension) is int:
            return dimension
    if by is _REPLICATE:
        return None
    kind = by.name if by is not None else shown(placement)
    raise ValueError(f"it is placed as {kind}, which is not read; {_MERGE}")


def _check_order(order: object) -> None:
    """Check that mesh dimensions cut the tensor in their own order (torch 2.10 and later)."""
    if order is None:
        return
    if type(order) is not tuple or len(order) > _MOST_DIMENSIONS:
        raise ValueError(f"its shard order is {shown(order)}")
    for entry in order:
        dimensions = entry.args[1] if type(entry) is Made and len(entry.args) == 2 else None
        if not are_sizes(dimensions) or list(dimensions) != sorted(dimensions):
            raise ValueError(f"mesh dimensions cut it in an order that is not read; {_MERGE}")


def _coordinate(mesh: Made, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    layout = mesh.get("_layout")
    if layout is not None:  # since torch 2.10
        ranks, axes = mesh.get("_flatten_rank_map"), _axes(layout)
    else:
        whole, ranks = mesh.get("mesh"), mesh.get("_flatten_mesh_list")
        shape = whole.shape if isinstance(whole, StoredView) else ()
        if len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"its mesh has {len(shape)} dimensions")
        axes = [[(size, math.prod(shape[index + 1 :]))] for index, size in enumerate(shape)]
    if type(ranks) is not tuple or len(ranks) > _MOST_RANKS or rank not in ranks:
        raise ValueError(f"rank {rank} is not in its mesh of ranks {shown(ranks)}")
    if not all(type(member) is int for member in ranks) or list(ranks) != sorted(set(ranks)):
        # Process groups sort their ranks, and torch takes the place in the group for that in the
        # mesh at some places and not at others.
        raise ValueError(f"its mesh lists ranks out of order, {shown(ranks)}; {_MERGE}")
    _check_strides([part for axis in axes for part in axis], len(ranks))
    position = ranks.index(rank)
    coordinate = tuple(_index(axis, position) for axis in axes)
    noted = mesh.get("_coordinate_on_dim")
    if isinstance(noted, list | tuple) and (*noted[:_MOST_DIMENSIONS],) != coordinate:
        raise ValueError(
            f"it was saved by the rank at {shown(noted)} of its mesh, where rank {rank} is at "
            f"{list(coordinate)}; give the file its own name back"
        )
    return tuple(math.prod(size for size, _ in axis) for axis in axes), coordinate


_Axis = list[tuple[int, int]]
"""A dimension of a mesh: sizes and strides of what it is made of, the outermost first."""


def _index(axis: _Axis, position: int) -> int:
    index = 0
    for size, stride in axis:
        index = index * size + position // stride % size
    return index


def _check_strides(parts: _Axis, ranks: int) -> None:
    """Check that a position has one digit per part: each stride a multiple of what is below."""
    reached = 1
    for size, stride in sorted(parts, key=lambda part: part[1]):
        if size < 1 or stride < 1 or stride % reached:
            raise ValueError(f"its mesh has a form that is not read; {_MERGE}")
        reached = size * stride
    if ranks % reached:
        raise ValueError(f"its mesh of {ranks} ranks has a form that is not read; {_MERGE}")


def _axes(layout: object) -> list[_Axis]:
    """Return the dimensions of a mesh from torch's layout of it."""
    if type(layout) is not Made:
        raise ValueError("its mesh has no layout")
    axes = layout.get("axes")
    if type(axes) is tuple and len(axes) <= _MOST_DIMENSIONS:  # since torch 2.13
        pairs = [
            (axis.get("shape"), axis.get("stride")) if type(axis) is Made else (None, None)
            for axis in axes
        ]
    else:
        shape, stride = layout.get("shape"), layout.get("stride")
        if (
            type(shape) is tuple
            and type(stride) is tuple
            and len(shape) == len(stride) <= _MOST_DIMENSIONS
        ):
            pairs = list(zip(shape, stride, strict=True))
        else:
            pairs = [(shape, stride)]
    return [_flattened(shape, stride) for shape, stride in pairs]


def _flattened(shape: object, stride: object, depth: int = 0) -> _Axis:
    if type(shape) is int and type(stride) is int:
        return [(shape, stride)] if shape != 1 else []  # of one rank, whatever the stride
    if (
        type(shape) is tuple
        and type(stride) is tuple
        and len(shape) == len(stride) <= _MOST_DIMENSIONS
        and depth < _MOST_NESTED
    ):
        return [
            part
            for sizes, strides in zip(shape, stride, strict=True)
            for part in _flattened(sizes, strides, depth + 1)
        ]
    raise ValueError("its mesh has a layout that is not read")


def _rebuild_from_type(args: tuple[object, ...]) -> object:
    """Stand in for ``_rebuild_from_type_v2``: a subclass of Tensor, and how to rebuild it."""
    if len(args) != 4:
        raise ValueError("it has a tensor of a form that is not known")
    rebuild, kind, arguments, state = args
    if type(rebuild) is not Known or type(arguments) is not tuple:
        raise ValueError("it has a tensor of a form that is not known")
    if kind is not _DTENSOR:
        return rebuild.make(arguments) if rebuild.make is not None else None
    attributes = state[1] if type(state) is tuple and len(state) == 2 else state
    shape = arguments[2] if len(arguments) > 2 else None
    if type(attributes) is not dict or not are_sizes(shape):
        raise ValueError("it has a DTensor of a form that is not known")
    local, spec = attributes.get("_local_tensor"), attributes.get("_spec")
    if not isinstance(local, StoredView) or type(spec) is not Made or spec.by is not _SPEC:
        raise ValueError("it has a DTensor without a local tensor or a spec")
    return DTensor(shape, local, spec)


_MERGE = "merge the ranks' files with the trainer's own model merger first"

_DTENSOR = Known("DTensor")
_SPEC = Known("DTensorSpec")
_MESH = Known("DeviceMesh")
_SHARD = Known("Shard")
_REPLICATE = Known("Replicate")

_MODULES = "torch.distributed.tensor"
_MODULES_2_4 = "torch.distributed._tensor"
_PLACEMENTS = (f"{_MODULES}.placement_types", f"{_MODULES_2_4}.placement_types")
_SPECS = (f"{_MODULES}._dtensor_spec", f"{_MODULES_2_4}.placement_types")
_FSDP = "torch.distributed.fsdp"
_SHARDED = "torch.distributed._shard.sharded_tensor"

_SHARDED_TENSOR = Known(
    "ShardedTensor",
    refusal="holds ShardedTensors, which FSDP 1 writes without a device mesh and which are not "
    f"read; {_MERGE}",
)
_FLAT_PARAMETER = Known(
    "FlatParameter",
    refusal="holds flat parameters of FSDP 1, which are not read; save with SHARDED_STATE_DICT",
)

DTENSORS = {
    "torch._tensor._rebuild_from_type_v2": Known("subclass", make=_rebuild_from_type),
    "torch._utils._rebuild_wrapper_subclass": Known("wrapper subclass"),
    "torch.Tensor": Known("Tensor"),  # with attributes of its own
    "torch._tensor.Tensor": Known("Tensor"),
    "torch.serialization._get_layout": Known("layout"),
    "torch.strided": Known("torch.strided"),
    f"{_MODULES}.DTensor": _DTENSOR,
    f"{_MODULES_2_4}.api.DTensor": _DTENSOR,
    "torch.distributed.device_mesh.DeviceMesh": _MESH,
    "torch.distributed._mesh_layout._MeshLayout": Known("_MeshLayout"),
    "torch.distributed._mesh_layout._FlatLayout": Known("_FlatLayout"),
    **{f"{module}.DTensorSpec": _SPEC for module in _SPECS},
    **{f"{module}.TensorMeta": Known("TensorMeta") for module in _SPECS},
    f"{_MODULES}._dtensor_spec.ShardOrderEntry": Known("ShardOrderEntry"),
    **{f"{module}.Shard": _SHARD for module in _PLACEMENTS},
    **{f"{module}.Replicate": _REPLICATE for module in _PLACEMENTS},
    **{
        f"{module}.{name}": Known(name)  # refused where they are met, with the tensor's name
        for module in _PLACEMENTS
        for name in ("_StridedShard", "Partial", "_MaskPartial", "MaskPartial")
    },
    f"{_SHARDED}.api.ShardedTensor": _SHARDED_TENSOR,
    f"{_SHARDED}.shard.Shard": _SHARDED_TENSOR,
    f"{_FSDP}._flat_param.FlatParameter": _FLAT_PARAMETER,
    f"{_FSDP}.flat_param.FlatParameter": _FLAT_PARAMETER,
}
"""What pickles of DTensors name besides plain tensors."""
