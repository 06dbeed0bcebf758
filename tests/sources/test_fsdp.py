import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import relex_stream as rs
from relex_stream.errors import SourceError
from relex_stream.sources import find_checkpoints
from relex_stream.sources.fsdp import holds_shards, open_shards
from relex_stream.sources.naming import Naming
from relex_stream.specs import Box
from tests.make_checkpoints import SIDE_FILES
from tests.torch_writers.by_hand import Call, Name, tensor, write_archive

ROOT = Path(__file__).parents[2]
AS_THEY_ARE = Naming()

STEPS = {
    # name: how many ranks, and by how many of them each element is held
    "plain": (1, 1),
    "fsdp2_1": (1, 1),
    "fsdp2_2": (2, 1),
    "fsdp2_3": (3, 1),
    "fsdp2_4": (4, 1),
    "fsdp1_2": (2, 1),
    "fsdp1_3": (3, 1),
    "hsdp": (4, 2),
    "hsdp1": (4, 2),
    "rows": (4, 2),
    "columns": (4, 2),
    "bf16": (2, 1),
}


@pytest.fixture(scope="session")
def written(verl_checkpoints):
    return verl_checkpoints


def open_step(directory):
    return open_shards(directory, 1, AS_THEY_ARE)


def refused(directory):
    with pytest.raises(SourceError) as caught:
        open_step(directory)
    return str(caught.value)


def read(path, offset, nbytes):
    with open(path, "rb") as file:
        return os.pread(file.fileno(), nbytes, offset)


def boxed(box):
    return tuple(
        slice(first, first + count) for first, count in zip(box.start, box.shape, strict=True)
    )


def elements(spec, path, offset, shape):
    count = int(np.prod(shape, dtype=int))
    data = read(path, offset, count * spec.dtype.itemsize)
    return np.frombuffer(data, f"V{spec.dtype.itemsize}").reshape(shape)


def assembled(place):
    """The whole tensor as raw elements, each of which one piece gives."""
    if not place.pieces:
        return elements(place.spec, place.path, place.offset, place.spec.shape)
    whole = np.zeros(place.spec.shape, f"V{place.spec.dtype.itemsize}")
    given = np.zeros(place.spec.shape, int)
    for piece in place.pieces:
        whole[boxed(piece.box)] = elements(place.spec, piece.path, piece.offset, piece.box.shape)
        given[boxed(piece.box)] += 1
    assert (given == 1).all()
    return whole


def rebuilt(checkpoint, file):
    """A weights file from its parts and the tensors alone."""
    pieces = []
    for part in file.parts:
        if part.tensor is None:
            pieces.append(part.literal)
        else:
            whole = assembled(checkpoint.tensors[part.tensor])
            pieces.append((whole if part.box is None else whole[boxed(part.box)]).tobytes())
    return b"".join(pieces)


@pytest.mark.parametrize("name", STEPS)
def test_tensors_are_those_of_the_whole_model(written, name):
    actor = written / name / "global_step_1" / "actor"
    checkpoint = open_step(actor)
    kind = "bf16" if name == "bf16" else "fp32"
    whole = load_whole(written / f"whole_{kind}/model.safetensors")
    assert checkpoint.tensors.keys() == whole.keys()
    for key, (code, shape, data) in whole.items():
        place = checkpoint.tensors[key]
        assert (place.spec.name, place.spec.dtype.code, place.spec.shape) == (key, code, shape)
        assert assembled(place).tobytes() == data, key


def load_whole(path):
    """Code, shape and bytes of each tensor: numpy has no bfloat16."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    return {
        key: (
            entry["dtype"],
            tuple(entry["shape"]),
            data[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]],
        )
        for key, entry in header.items()
    }


@pytest.mark.parametrize("name", STEPS)
def test_files_are_put_together_from_tensors_byte_for_byte(written, name):
    actor = written / name / "global_step_1" / "actor"
    checkpoint = open_step(actor)
    world, _ = STEPS[name]
    expected = [f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world)]
    assert [file.relative_path for file in checkpoint.weights_files] == expected
    for file in checkpoint.weights_files:
        path = actor / file.relative_path
        assert (file.size, file.modified_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
        assert rebuilt(checkpoint, file) == path.read_bytes()


@pytest.mark.parametrize("name", STEPS)
def test_copies_hold_what_the_tensors_hold(written, name):
    checkpoint = open_step(written / name / "global_step_1" / "actor")
    world, held = STEPS[name]
    for key, place in checkpoint.tensors.items():
        copies = checkpoint.copies.get(key, ())
        whole = assembled(place)
        for copy in copies:
            again = elements(place.spec, copy.path, copy.offset, copy.box.shape)
            assert again.tobytes() == whole[boxed(copy.box)].tobytes()
        copied = sum(int(np.prod(copy.box.shape, dtype=int)) for copy in copies)
        is_buffer = key in ("model.scale", "model.ids")
        assert copied == place.spec.numel * ((world if is_buffer else held) - 1)


def test_what_torch_itself_makes_of_the_files(written):
    """The oracle of verl's merger: local tensors of all ranks, one after another."""
    import torch.distributed.tensor  # so that the files load

    actor = written / "fsdp2_3/global_step_1/actor"
    ranks = [
        torch.load(actor / f"model_world_size_3_rank_{rank}.pt", weights_only=False)
        for rank in range(3)
    ]
    checkpoint = open_step(actor)
    for key, first in ranks[0].items():
        local = [getattr(rank[key], "_local_tensor", rank[key]) for rank in ranks]
        whole = torch.cat(local) if hasattr(first, "_local_tensor") else local[0]
        assert assembled(checkpoint.tensors[key]).tobytes() == whole.numpy().tobytes()


def test_every_way_of_placing_on_two_dimensions(written):
    checkpoint = open_step(written / "placed")
    whole = load_whole(written / "whole_bf16/model.safetensors")
    assert len(checkpoint.tensors) == 6 * 4
    for key, place in checkpoint.tensors.items():
        _, shape, data = whole[key.rpartition(".")[0]]
        assert place.spec.shape == shape
        assert assembled(place).tobytes() == data, key
    for file in checkpoint.weights_files:
        assert rebuilt(checkpoint, file) == (written / "placed" / file.relative_path).read_bytes()
    assert [len(checkpoint.tensors[f"lm_head.weight.{way}"].pieces) for way in range(6)] == [
        *(4, 4, 4, 2, 2, 0)
    ]
    assert {len(checkpoint.copies[f"lm_head.weight.{way}"]) for way in (3, 4)} == {2}
    assert len(checkpoint.copies["lm_head.weight.5"]) == 3


def test_pieces_are_boxes_in_their_order_and_empty_ones_are_left_out(written):
    checkpoint = open_step(written / "fsdp2_4/global_step_1/actor")
    assert [piece.box for piece in checkpoint.tensors["lm_head.weight"].pieces] == [
        Box((0, 0), (4, 6)),
        Box((4, 0), (4, 6)),
        Box((8, 0), (4, 6)),
        Box((12, 0), (1, 6)),
    ]
    norm = checkpoint.tensors["model.norm.weight"]  # of one row
    assert (norm.spec.shape, norm.pieces) == ((1,), ())


def test_tied_tensors_share_bytes(written):
    checkpoint = open_step(written / "tied")
    head, embedding = (
        checkpoint.tensors[key] for key in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert head.pieces == embedding.pieces
    assert "lm_head.weight" not in checkpoint.copies
    for file in checkpoint.weights_files:
        assert rebuilt(checkpoint, file) == (written / "tied" / file.relative_path).read_bytes()


def test_side_files_and_what_is_skipped(written, tmp_path):
    actor = tmp_path / "actor"
    shutil.copytree(written / "fsdp2_2/global_step_1/actor", actor)
    model = actor / "huggingface"
    (model / "code").mkdir()
    (model / "code" / "modeling.py").write_text("pass")
    (model / "code" / "tmp.lock").write_text("")
    (model / "model.safetensors").write_bytes(b"x")
    (model / "model.safetensors.index.json").write_text("{}")
    (actor / "critic").mkdir()
    (actor / "critic" / "note.txt").write_text("of another model")
    (actor / "critic" / "model.pt").write_text("of another model")
    (actor / "rewards").mkdir()
    (actor / "rewards" / "note.txt").write_text("kept")
    checkpoint = open_step(actor)
    assert sorted(checkpoint.side_files) == sorted(
        [
            "fsdp_config.json",
            "huggingface/code/modeling.py",
            "rewards/note.txt",
            *(f"huggingface/{name}" for name in SIDE_FILES),
        ]
    )
    assert sorted(checkpoint.skipped_files) == [
        "critic/",
        *(f"extra_state_world_size_2_rank_{rank}.pt" for rank in range(2)),
        "huggingface/code/tmp.lock",
        "huggingface/model.safetensors",
        "huggingface/model.safetensors.index.json",
        *(f"optim_world_size_2_rank_{rank}.pt" for rank in range(2)),
    ]
    assert (checkpoint.step, checkpoint.directory) == (1, str(actor))


def test_found_among_layouts(written, tmp_path):
    run = tmp_path / "run"
    for step in (10, 20):
        shutil.copytree(written / "fsdp2_2/global_step_1", run / f"global_step_{step}")
        (run / f"global_step_{step}" / "data.pt").write_bytes(b"state of the data loader")
    (run / "latest_checkpointed_iteration.txt").write_text("20")
    found = find_checkpoints(run)
    assert found.format.name == "fsdp"
    assert found.layout == "global_step_N/actor, verl FSDP shards"
    assert found.checkpoints == tuple(
        (step, run / f"global_step_{step}/actor") for step in (10, 20)
    )
    assert holds_shards(run / "global_step_10" / "actor")
    assert not holds_shards(run / "global_step_10")
    assert not holds_shards(run / "nowhere")


@pytest.mark.parametrize("name", ["plain", "fsdp2_3", "hsdp"])
def test_a_store_gives_the_files_back(written, tmp_path, name):
    out = tmp_path / "out"
    rs.build_store(written / "base", written / name, tmp_path / "run.store")
    rs.export(tmp_path / "run.store", out, step=1)
    actor = written / name / "global_step_1/actor"
    kept = [
        path.relative_to(actor)
        for path in actor.rglob("*")
        if path.is_file() and not path.name.startswith(("optim_", "extra_state_"))
    ]
    given = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert sorted(given) == sorted(kept)
    for path in kept:
        assert (out / path).read_bytes() == (actor / path).read_bytes()


def test_names_of_the_base(written):
    wanted = frozenset(load_file(written / "whole_fp32/model.safetensors"))
    naming = Naming(wanted)
    checkpoint = open_shards(written / "fsdp2_2/global_step_1/actor", 1, naming)
    assert checkpoint.tensors.keys() == wanted
    renamed = Naming(frozenset({"embed_tokens.weight", "norm.weight"}), strip_prefix="model.")
    checkpoint = open_shards(written / "fsdp2_2/global_step_1/actor", 1, renamed)
    assert checkpoint.tensors["embed_tokens.weight"].spec.name == "embed_tokens.weight"
    assert "lm_head.weight" not in checkpoint.tensors  # nor can its files be had back
    assert all(file.parts is None for file in checkpoint.weights_files)
    replaced = Naming(frozenset({"embed_tokens.weight"}), replacements=((r"^model\.", ""),))
    checkpoint = open_shards(written / "fsdp2_2/global_step_1/actor", 1, replaced)
    assert checkpoint.tensors["embed_tokens.weight"].spec.name == "embed_tokens.weight"
    assert "lm_head.weight" in checkpoint.tensors  # to be complained of where bases are compared
    assert "scale" in checkpoint.copies
    for file in checkpoint.weights_files:
        path = written / "fsdp2_2/global_step_1/actor" / file.relative_path
        assert rebuilt(checkpoint, file) == path.read_bytes()


# What is refused.


@pytest.fixture
def actor(written, tmp_path):
    path = tmp_path / "actor"
    shutil.copytree(written / "fsdp2_2/global_step_1/actor", path)
    return path


def test_ranks_that_are_missing_or_too_many(actor):
    one = actor / "model_world_size_2_rank_1.pt"
    data = one.read_bytes()
    one.unlink()
    assert "the shards of ranks 1 of 2 are missing; wait until all are written" in refused(actor)
    one.write_bytes(data)
    (actor / "model_world_size_2_rank_2.pt").write_bytes(data)
    assert "shards of rank 2 where there are 2 ranks; remove" in refused(actor)
    (actor / "model_world_size_2_rank_2.pt").unlink()
    # Another run's, which the trainer's own note tells apart.
    (actor / "model_world_size_4_rank_0.pt").write_bytes(data)
    assert "model_world_size_4_rank_0.pt" in open_step(actor).skipped_files
    config = actor / "fsdp_config.json"
    config.unlink()
    assert "shards of 2, 4 ranks beside each other, and no fsdp_config.json" in refused(actor)
    (actor / "model_world_size_4_rank_0.pt").unlink()
    assert len(open_step(actor).weights_files) == 2
    config.write_text('{"world_size": 8}')
    assert "fsdp_config.json says 8 ranks, and there are shards of 2; copy" in refused(actor)
    for text in ('{"world_size": "2"}', '{"world_size": true}', "{}"):
        config.write_text(text)
        assert "it has world_size" in refused(actor)
    config.write_text("{")
    assert "fsdp_config.json: it is not JSON" in refused(actor)


def test_no_directory_and_no_shards(tmp_path):
    assert "no such directory" in refused(tmp_path / "gone")
    (tmp_path / "model_world_size_02_rank_0.pt").touch()
    assert "no FSDP shards: looked for model_world_size_W_rank_R.pt" in refused(tmp_path)


def test_files_whose_ranks_were_swapped(actor):
    zero, one = (actor / f"model_world_size_2_rank_{rank}.pt" for rank in range(2))
    zero.rename(actor / "x")
    one.rename(zero)
    (actor / "x").rename(one)
    message = refused(actor)
    assert "it was saved by the rank at (1,) of its mesh, where rank 0 is at [0]" in message


def test_a_rank_of_another_step_has_other_tensors(actor):
    path = actor / "model_world_size_2_rank_1.pt"
    torch.save({"model.norm.weight": torch.zeros(1)}, path)
    assert "is in model_world_size_2_rank_0.pt and not in model_world_size_2_rank_1.pt" in (
        refused(actor)
    )
    torch.save({}, actor / "model_world_size_2_rank_0.pt")
    assert "model_world_size_2_rank_0.pt: holds no tensors" in refused(actor)
    torch.save([torch.zeros(1)], actor / "model_world_size_2_rank_0.pt")
    assert "model_world_size_2_rank_0.pt: holds no dict of tensors" in refused(actor)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("partial", "it is placed as Partial, which is not read; merge"),
        ("strided", "it is placed as _StridedShard, which is not read; merge"),
        ("columns", "it lies in the file transposed or with gaps; save it anew after .contiguous"),
        (
            "unlike",
            "it is F32 [2, 3] in model_world_size_2_rank_0.pt and F32 [3, 3] in model_world",
        ),
        ("shuffled", "its mesh lists ranks out of order, (2, 3, 0, 1); merge"),
        ("shorter", "it is [1, 3] where [2, 3] of [4, 3] belongs"),
    ],
)
def test_tensors_spread_in_other_ways(written, name, problem):
    message = refused(written / "refused" / name)
    assert problem in message
    assert "tensor 'model.norm'" in message


def alone(directory, state):
    directory.mkdir()
    torch.save(state, directory / "model_world_size_1_rank_0.pt")
    return directory


def test_adapters(tmp_path):
    weight = torch.zeros(2, 2)
    only = {"base_model.model.layers.0.q.lora_A.default.weight": weight}
    assert "lora_A.default.weight' belongs to an adapter (LoRA); merge it into its base" in (
        refused(alone(tmp_path / "only", only))
    )
    wrapped = {"base_model.model.layers.0.q.base_layer.weight": weight}
    assert "base_layer.weight' belongs to an adapter" in (
        refused(alone(tmp_path / "wrapped", wrapped))
    )
    beside = alone(tmp_path / "beside", {"layers.0.q.weight": weight})
    open_step(beside)
    (beside / "lora_adapter").mkdir()
    assert "an adapter beside the weights (lora_adapter)" in refused(beside)


def test_flat_parameters_and_sharded_tensors(tmp_path):
    flat = alone(tmp_path / "flat", {"_fsdp_wrapped_module._flat_param": torch.zeros(4)})
    assert "a flat parameter of FSDP 1, not read; save with SHARDED_STATE_DICT" in refused(flat)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    name = Name("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")
    write_archive(sharded / "model_world_size_1_rank_0.pt", {"w": Call(name, (), {}, new=True)}, {})
    message = refused(sharded)
    assert "holds ShardedTensors, which FSDP 1 writes without a device mesh" in message
    assert "model merger first" in message


def test_quantised_weights(tmp_path):
    state = {"w": torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "w_scale_inv": torch.zeros(1, 1)}
    assert "FP8" in refused(alone(tmp_path / "fp8", state))


def test_names_that_no_model_has(tmp_path):
    assert "a tensor has the name ''" in refused(alone(tmp_path / "empty", {"": torch.zeros(1)}))
    assert "a tensor has the name 3" in refused(alone(tmp_path / "number", {3: torch.zeros(1)}))


def test_what_is_no_tensor_stays_in_the_file(tmp_path):
    state = {"w": torch.zeros(2), "extra": None, "note": "text", "nested": {"x": torch.ones(3)}}
    directory = alone(tmp_path / "extra", state)
    checkpoint = open_step(directory)
    assert list(checkpoint.tensors) == ["w"]
    (file,) = checkpoint.weights_files
    assert rebuilt(checkpoint, file) == (directory / file.relative_path).read_bytes()


def test_tensors_with_attributes(tmp_path):
    state = {"w": torch.arange(3.0), "p": torch.nn.Parameter(torch.ones(2))}
    for tensor_ in state.values():
        tensor_.note = "of the trainer"
    checkpoint = open_step(alone(tmp_path / "noted", state))
    for name, tensor_ in state.items():
        data = tensor_.detach().numpy().tobytes()
        assert assembled(checkpoint.tensors[name]).tobytes() == data


def test_a_file_that_is_mostly_padding_is_not_kept(tmp_path, monkeypatch):
    directory = alone(tmp_path / "padding", {"w": torch.zeros(3000)[1000:2000], "n": torch.ones(1)})
    (file,) = open_step(directory).weights_files
    assert file.parts is not None
    monkeypatch.setattr("relex_stream.sources.file_parts.MAX_PADDING_BYTES", 7000)
    checkpoint = open_step(directory)
    assert checkpoint.weights_files[0].parts is None
    assert assembled(checkpoint.tensors["w"]).tobytes() == bytes(4000)


def test_a_file_from_elsewhere(tmp_path):
    directory = tmp_path / "here"
    directory.mkdir()
    write_archive(
        directory / "model_world_size_1_rank_0.pt",
        {"w": tensor("0", (2,), count=2), "x": Call(Name("os", "system"), ("true",))},
        {"0": bytes(8)},
    )
    assert "holds a pickle of os.system, which is not loaded" in refused(directory)
