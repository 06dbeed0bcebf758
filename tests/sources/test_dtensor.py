"""DTensors as each version of torch pickles them.

What torch 2.13 writes is in test_fsdp, by torch itself. The shapes of pickles of earlier versions
are put together here by hand, after the sources of 2.4.1, 2.5.1 to 2.9.1, and 2.10.0 to 2.12.0.
"""

import pytest

from relex_stream.errors import SourceError
from relex_stream.sources.dtensor import DTENSORS, DTensor, Meshes, local_box
from relex_stream.sources.pickles import Made
from relex_stream.sources.torch_file import read_torch_file
from relex_stream.specs import Box
from tests.torch_writers.by_hand import Call, Name, tensor, write_archive

VERSIONS = ("2.4", "2.9", "2.12", "2.13")


def modules(version):
    """Where a version has its classes."""
    if version == "2.4":
        old = "torch.distributed._tensor"
        return f"{old}.api", f"{old}.placement_types", f"{old}.placement_types"
    new = "torch.distributed.tensor"
    return new, f"{new}._dtensor_spec", f"{new}.placement_types"


def ranks_of(shape):
    count = 1
    for size in shape:
        count *= size
    return tuple(range(count))


def flat_layout(shape, stride):
    name = Name("torch.distributed._mesh_layout", "_FlatLayout")
    return Call(name, (), {"shape": shape, "stride": stride}, new=True)


def mesh_of(version, shape, coordinate, ranks=None, names=("ddp", "fsdp")):
    ranks = ranks_of(shape) if ranks is None else ranks
    numbers = tensor("mesh", shape, "IntStorage", count=len(ranks))
    strides = tuple(len(ranks_of(shape[index + 1 :])) for index in range(len(shape)))
    names = names[-len(shape) :]
    if version in ("2.4", "2.9"):
        state = {
            "device_type": "cuda",
            "mesh": numbers,
            "mesh_dim_names": names,
            "_flatten_mesh_list": ranks,
            "_coordinate_on_dim": list(coordinate),
        }
        groups = [("", list(ranks), "0")] if version == "2.4" else ["0"]
        state["_dim_group_infos" if version == "2.4" else "_dim_group_names"] = groups
        state |= {"_parent_mesh": None} if version == "2.4" else {}
    else:
        layout = (
            {"shape": shape, "stride": strides}
            if version == "2.12"
            else {
                "axes": tuple(
                    flat_layout((size,), (stride,))
                    for size, stride in zip(shape, strides, strict=True)
                )
            }
        )
        flat = tensor("mesh", (len(ranks),), "IntStorage", count=len(ranks))
        state = {
            "_device_type": "cuda",
            "_layout": Call(
                Name("torch.distributed._mesh_layout", "_MeshLayout"), (), layout, new=True
            ),
            "_rank_map": flat,
            "_mesh_dim_names": names,
            "_root_mesh": None,
            "_flatten_rank_map": ranks,
            "_flatten_mapping": {},
            "_dim_group_names": ["0", "1"],
            "_coordinate_on_dim": tuple(coordinate),
        }
    return Call(Name("torch.distributed.device_mesh", "DeviceMesh"), (), state, new=True)


def placement(version, name, **state):
    return Call(Name(modules(version)[2], name), (), state, new=True)


def dtensor_of(version, whole, local, mesh, placements, order=None):
    api, specs, _ = modules(version)
    count = len(ranks_of(local))
    float32, size = Name("torch", "float32"), Call(Name("torch", "Size"), (whole,))
    strides = tuple(len(ranks_of(whole[index + 1 :])) for index in range(len(whole)))
    meta = Call(Name(specs, "TensorMeta"), (size, strides, float32), new=True)
    state = {"mesh": mesh, "placements": placements, "tensor_meta": meta}
    if order is not None:
        entry = Name(specs, "ShardOrderEntry")
        state["shard_order"] = tuple(Call(entry, pair, new=True) for pair in order)
    spec = Call(Name(specs, "DTensorSpec"), (), state, new=True)
    layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    device = Call(Name("torch", "device"), ("cpu",))
    kind = Name(api, "DTensor")
    arguments = (kind, float32, whole, strides, 0, layout, device, False)
    own = {"_local_tensor": tensor("0", local, count=count), "_spec": spec}
    wrapper = Name("torch._utils", "_rebuild_wrapper_subclass")
    rebuild = Name("torch._tensor", "_rebuild_from_type_v2")
    return Call(rebuild, (wrapper, kind, arguments, (None, own)))


def load(path, value, local, ranks=4):
    storages = {"0": bytes(4 * len(ranks_of(local))), "mesh": bytes(4 * ranks)}
    write_archive(path, {"w": value}, storages)
    (loaded,) = read_torch_file(path, DTENSORS)[0].value.values()
    assert isinstance(loaded, DTensor)
    return loaded


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model_world_size_4_rank_0.pt"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_line_of_ranks(path, version):
    expected = {0: (0, 2), 1: (2, 2), 2: (4, 1), 3: (5, 0)}  # 5 rows by two
    for rank, (first, rows) in expected.items():
        shards = (placement(version, "Shard", dim=0),)
        mesh = mesh_of(version, (4,), (rank,), names=("fsdp",))
        order = ((0, (0,)),) if version == "2.13" else None
        value = dtensor_of(version, (5, 3), (rows, 3), mesh, shards, order)
        loaded = load(path, value, (rows, 3))
        assert loaded.shape == (5, 3)
        assert local_box(loaded, Meshes(rank)) == Box((first, 0), (rows, 3))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("kinds", "boxes"),
    [
        ((None, 0), [((0, 0), (3, 4)), ((3, 0), (2, 4))] * 2),
        ((0, None), [((0, 0), (3, 4))] * 2 + [((3, 0), (2, 4))] * 2),
        ((None, None), [((0, 0), (5, 4))] * 4),
        ((1, 0), [((y, x), (3 - y // 3, 2)) for x in (0, 2) for y in (0, 3)]),
        ((0, 0), [((0, 0), (2, 4)), ((2, 0), (1, 4)), ((3, 0), (1, 4)), ((4, 0), (1, 4))]),
    ],
)
def test_a_grid_of_ranks(path, version, kinds, boxes):
    placements = tuple(
        placement(version, "Replicate") if kind is None else placement(version, "Shard", dim=kind)
        for kind in kinds
    )
    for rank, (start, shape) in enumerate(boxes):
        mesh = mesh_of(version, (2, 2), divmod(rank, 2))
        loaded = load(path, dtensor_of(version, (5, 4), shape, mesh, placements), shape)
        assert local_box(loaded, Meshes(rank)) == Box(start, shape)


@pytest.mark.parametrize(
    "layout",
    [
        {"shape": 2, "stride": 2},
        {"shape": (2,), "stride": (2,)},
        {"shape": ((1, 2),), "stride": ((7, 2),)},
        {"axes": (flat_layout((2,), (2,)),)},
    ],
)
def test_a_part_of_a_mesh(path, layout):
    """A column of a grid, as a mesh: the ranks of the whole grid, and a stride."""
    for rank in range(4):
        mesh = mesh_of("2.12", (2, 2), (rank // 2,))
        mesh.state["_layout"] = Call(
            Name("torch.distributed._mesh_layout", "_MeshLayout"), (), layout, new=True
        )
        value = dtensor_of("2.12", (4,), (2,), mesh, (placement("2.12", "Shard", dim=0),))
        loaded = load(path, value, (2,))
        assert local_box(loaded, Meshes(rank)) == Box((2 * (rank // 2),), (2,))


def test_dimensions_joined_into_one(path):
    """A mesh of (2, 2) flattened to 4 ranks, whose layout still has both parts."""
    for rank in range(4):
        mesh = mesh_of("2.12", (2, 2), (rank,))
        mesh.state["_layout"].state.update(shape=((2, 2),), stride=((2, 1),))
        value = dtensor_of("2.12", (4,), (1,), mesh, (placement("2.12", "Shard", dim=0),))
        assert local_box(load(path, value, (1,)), Meshes(rank)) == Box((rank,), (1,))


def refused(path, value, local, rank=0):
    with pytest.raises((SourceError, ValueError)) as caught:
        local_box(load(path, value, local), Meshes(rank))
    return str(caught.value)


def shard(dim=0):
    return (placement("2.13", "Shard", dim=dim),)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"_coordinate_on_dim": (1,)},
            "it was saved by the rank at (1,) of its mesh, where rank 0",
        ),
        ({"_flatten_rank_map": (1, 2, 3, 4)}, "rank 0 is not in its mesh of ranks (1, 2, 3, 4)"),
        ({"_flatten_rank_map": (0, 2, 1, 3)}, "its mesh lists ranks out of order"),
        ({"_flatten_rank_map": (0, 0, 1, 2)}, "its mesh lists ranks out of order"),
        ({"_flatten_rank_map": (0, "1", 2, 3)}, "its mesh lists ranks out of order"),
        ({"_flatten_rank_map": (0, 1, 2)}, "its mesh of 3 ranks has a form that is not read"),
        ({"_flatten_rank_map": None}, "rank 0 is not in its mesh of ranks None"),
        ({"_layout": 3}, "its mesh has no layout"),
        ({"_flatten_rank_map": tuple(range(1 << 17 | 1))}, "rank 0 is not in its mesh of ranks"),
        ({"_coordinate_on_dim": (0,) * 9}, "it was saved by the rank at (0, 0"),
    ],
)
def test_meshes_that_lie(path, change, problem):
    mesh = mesh_of("2.13", (4,), (0,))
    mesh.state.update(change)
    assert problem in refused(path, dtensor_of("2.13", (4,), (1,), mesh, shard()), (1,))


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((2, 2), (1, 1)), ((2, 2), (1, 3)), ((2, 2), (0, 1)), ((-2,), (1,)), ((0,), (1,))],
)
def test_layouts_in_which_a_rank_has_no_place(path, shape, stride):
    mesh = mesh_of("2.12", (2, 2), (0, 0))
    mesh.state["_layout"].state.update(shape=shape, stride=stride)
    value = dtensor_of("2.12", (4,), (4,), mesh, (placement("2.12", "Replicate"),) * len(shape))
    assert "has a form that is not read" in refused(path, value, (4,))


@pytest.mark.parametrize(
    "layout",
    [
        {"shape": "2", "stride": 1},
        {"axes": (3,)},
        {},
        {"shape": (1,) * 9, "stride": (1,) * 9},
        {"axes": (flat_layout((2,), (2,)),) * 9},
        {"shape": ((((2,),),),), "stride": ((((1,),),),)},
    ],
)
def test_layouts_that_are_none(path, layout):
    mesh = mesh_of("2.12", (4,), (0,))
    mesh.state["_layout"].state.clear()
    mesh.state["_layout"].state.update(layout)
    value = dtensor_of("2.12", (4,), (1,), mesh, shard())
    assert "its mesh has a layout that is not read" in refused(path, value, (1,))


def test_more_dimensions_or_meshes_than_any_model_has(path):
    replicate = (placement("2.4", "Replicate"),) * 9
    value = dtensor_of("2.4", (4,), (4,), mesh_of("2.4", (4, *(1,) * 8), (0,) * 9), replicate)
    assert "its mesh has 9 dimensions" in refused(path, value, (4,))
    loaded = load(path, dtensor_of("2.13", (4,), (1,), mesh_of("2.13", (4,), (0,)), shard()), (1,))
    meshes = Meshes(0)
    for _ in range(10_000):
        mesh = Made(loaded.spec.get("mesh").by, ())
        mesh.state = loaded.spec.get("mesh").state
        meshes.find(mesh)
    with pytest.raises(ValueError, match="one of more than 10000 meshes; merge"):
        meshes.find(loaded.spec.get("mesh"))


@pytest.mark.parametrize(
    ("placements", "problem"),
    [
        ((placement("2.13", "Partial", reduce_op="sum"),), "placed as Partial, which is not read"),
        ((placement("2.13", "_StridedShard", dim=0, split_factor=2),), "placed as _StridedShard"),
        (shard(3), "it is cut along dimension 3 of 1"),
        (shard("0"), "it is placed as Shard"),
        (shard() * 2, "it has 2 placements on a mesh of shape [4]"),
        ((3,), "it is placed as 3"),
        ("all", "its spec has no mesh and placements"),
    ],
)
def test_placements_that_are_not_read(path, placements, problem):
    value = dtensor_of("2.13", (4,), (1,), mesh_of("2.13", (4,), (0,)), placements)
    assert problem in refused(path, value, (1,))


def test_a_local_tensor_of_another_shape(path):
    value = dtensor_of("2.13", (8,), (1,), mesh_of("2.13", (4,), (0,)), shard())
    assert refused(path, value, (1,)) == "it is [1] where [2] of [8] belongs"


def test_an_order_of_cuts_that_is_not_that_of_the_mesh(path):
    both = shard() * 2
    mesh = mesh_of("2.13", (2, 2), (0, 0))
    value = dtensor_of("2.13", (4,), (1,), mesh, both, order=((0, (0, 1)),))
    assert local_box(load(path, value, (1,)), Meshes(0)) == Box((0,), (1,))
    value = dtensor_of("2.13", (4,), (1,), mesh, both, order=((0, (1, 0)),))
    assert "in an order that is not read" in refused(path, value, (1,))


@pytest.mark.parametrize(
    ("position", "other", "problem"),
    [
        (0, 3, "it has a tensor of a form that is not known"),
        (2, 3, "it has a tensor of a form that is not known"),
        (2, (), "it has a DTensor of a form that is not known"),
        (
            2,
            (Name("torch", "float32"),) * 2 + ([4],),
            "it has a DTensor of a form that is not known",
        ),
        (3, None, "it has a DTensor of a form that is not known"),
        (3, (None, {}), "it has a DTensor without a local tensor or a spec"),
        (3, {"_local_tensor": 3, "_spec": 3}, "it has a DTensor without a local tensor or a spec"),
    ],
)
def test_dtensors_of_no_form_that_is_known(path, position, other, problem):
    value = dtensor_of("2.13", (4,), (1,), mesh_of("2.13", (4,), (0,)), shard())
    arguments = [*value.args[:position], other, *value.args[position + 1 :]]
    with pytest.raises(SourceError, match=problem):
        load(path, Call(value.called, tuple(arguments)), (1,))
    with pytest.raises(SourceError, match="it has a tensor of a form that is not known"):
        load(path, Call(value.called, tuple(arguments[:position])), (1,))
