from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from relex_stream.codec import Changes, FrameCodec, split_frames
from relex_stream.errors import CorruptionError
from relex_stream.zarr_codec import DeltaCodec, decode_chunk, encode_chunk


def differences(rng, rows, elements, itemsize, share):
    raw = rng.bytes(rows * elements * itemsize)
    dense = np.frombuffer(raw, f"u{itemsize}").reshape(rows, elements).copy()
    dense[rng.random(dense.shape) >= share] = 0
    return dense


def make_array(store, shape, chunks, dtype):
    return zarr.create_array(
        store,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        serializer=DeltaCodec(),
        compressors=None,
        filters=None,
        fill_value=0,
    )


def put(store, key, data):
    sync(store.set(key, default_buffer_prototype().buffer.from_bytes(data)))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 16),
    elements=st.integers(1, 200),
    itemsize=st.sampled_from([1, 2, 4]),
    share=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_chunks_give_their_differences_back(rows, elements, itemsize, share, seed):
    dense = differences(np.random.default_rng(seed), rows, elements, itemsize, share)
    chunk = encode_chunk(dense)
    back = decode_chunk(chunk, rows, elements, dense.dtype)
    assert back.dtype == dense.dtype
    assert np.array_equal(back, dense)
    frames = list(split_frames(memoryview(chunk), elements, itemsize))
    assert [frame[0] for frame in frames] == np.flatnonzero(dense.any(axis=1)).tolist()


@pytest.mark.parametrize("itemsize", [1, 2])
def test_every_difference_comes_back(itemsize):
    values = np.arange(1 << (8 * itemsize), dtype=f"u{itemsize}")[None, :]
    assert np.array_equal(decode_chunk(encode_chunk(values), 1, values.size, values.dtype), values)


def test_a_chunk_holds_what_the_frames_of_our_own_paths_mean():
    # A difference of -1 is 0xFFFF in the array, zigzag 1 in a frame; +1 is zigzag 2.
    changes = Changes(4, 2)
    changes.count = 2
    changes.positions[:2], changes.zigzags[:2] = (1, 3), (1, 2)
    frame = FrameCodec(4, 2).encode(2, changes, 4)
    dense = decode_chunk(frame, 3, 4, np.dtype("u2"))
    assert dense.tolist() == [[0] * 4, [0] * 4, [0, 0xFFFF, 0, 1]]
    assert encode_chunk(dense) == frame


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_a_last_block_may_be_shorter_than_the_chunk(share):
    # Our own paths encode blocks as long as they are; zarr decodes whole chunks.
    block = differences(np.random.default_rng(0), 16, 70, 2, share)
    chunk = encode_chunk(block)
    assert {frame[1] for frame in split_frames(memoryview(chunk), 70, 2)} == (
        {2} if share == 1 else {1}
    )
    dense = decode_chunk(chunk, 16, 100, block.dtype)
    assert np.array_equal(dense[:, :70], block)
    assert not dense[:, 70:].any()


def test_damaged_chunks_are_refused():
    dense = differences(np.random.default_rng(1), 3, 50, 2, 0.3)
    chunk = encode_chunk(dense)
    with pytest.raises(CorruptionError, match="cut off"):
        decode_chunk(chunk[:-1], 3, 50, dense.dtype)
    with pytest.raises(CorruptionError):
        decode_chunk(chunk + b"\0", 3, 50, dense.dtype)
    with pytest.raises(CorruptionError, match="checksum"):
        decode_chunk(chunk[:-1] + bytes([chunk[-1] ^ 1]), 3, 50, dense.dtype)
    with pytest.raises(CorruptionError, match="row 2 in a chunk of 2 rows"):
        decode_chunk(chunk, 2, 50, dense.dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((17, 5), "u2"),  # no frame can name row 16
        ((4, 5), "i2"),
        ((4, 5), "u8"),
        ((4, 5), "f4"),
        ((5,), "u2"),
        ((2, 3, 4), "u2"),
    ],
)
def test_arrays_the_frames_cannot_hold_are_refused(shape, dtype):
    with pytest.raises(ValueError, match="takes chunks of"):
        encode_chunk(np.ones(shape, dtype))
    if len(shape) == 2:
        with pytest.raises(ValueError, match="takes chunks of"):
            decode_chunk(b"", *shape, np.dtype(dtype))


# --- through zarr ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_a_zarr_array_gives_its_rows_back(dtype):
    itemsize = np.dtype(dtype).itemsize
    dense = differences(np.random.default_rng(2), 40, 250, itemsize, 0.1)
    dense[3] = differences(np.random.default_rng(3), 1, 250, itemsize, 1.0)
    dense[16:32] = 0
    store = MemoryStore()
    array = make_array(store, dense.shape, (16, 100), dtype)
    array[:] = dense
    again = zarr.open_array(store, mode="r")
    assert np.array_equal(again[:], dense)
    assert np.array_equal(again[5], dense[5])
    assert np.array_equal(again[10:35, 95:105], dense[10:35, 95:105])
    # All-zero chunks are not written.
    assert not [key for key in store._store_dict if key.startswith("c/1/")]


def test_rewriting_a_part_of_a_chunk_keeps_the_rest():
    dense = differences(np.random.default_rng(4), 16, 60, 2, 0.2)
    array = make_array(MemoryStore(), dense.shape, (16, 50), "uint16")
    array[:] = dense
    array[7, 10:55] = dense[7, 10:55] = 9
    array[8] = dense[8] = 0
    assert np.array_equal(array[:], dense)


def test_zarr_reads_an_edge_block_our_own_paths_wrote():
    block = differences(np.random.default_rng(5), 16, 30, 2, 1.0)
    store = MemoryStore()
    array = make_array(store, (16, 130), (16, 100), "uint16")
    put(store, "c/0/1", encode_chunk(block))
    assert np.array_equal(array[:, 100:], block)
    assert not array[:, :100].any()


def test_damage_reaches_the_reader_of_an_array():
    store = MemoryStore()
    array = make_array(store, (16, 100), (16, 100), "uint16")
    put(store, "c/0/0", encode_chunk(np.ones((16, 100), np.uint16))[:-1])
    with pytest.raises(CorruptionError, match="cut off"):
        array[:]


def test_the_codec_survives_its_metadata():
    assert DeltaCodec.from_dict(DeltaCodec().to_dict()) == DeltaCodec()
    store = MemoryStore()
    make_array(store, (16, 10), (16, 10), "uint16")
    document = json.loads(sync(store.get("zarr.json", default_buffer_prototype())).to_bytes())
    assert [codec["name"] for codec in document["codecs"]] == ["relex_stream.delta"]
    with pytest.raises(ValueError, match=r"relex_stream\.delta"):
        DeltaCodec.from_dict({"name": "bytes"})


def test_the_encoded_size_is_not_fixed():
    assert DeltaCodec.is_fixed_size is False
    with pytest.raises(NotImplementedError):
        DeltaCodec().compute_encoded_size(100, None)


READER = """
import sys, zarr
assert "relex_stream" not in sys.modules
print(zarr.open_array(sys.argv[1], mode="r")[1].tolist())
"""


@pytest.mark.skipif(
    "relex_stream.delta" not in entry_points(group="zarr.codecs").names,
    reason="the package is not installed, so zarr cannot find its entry point",
)
def test_zarr_finds_the_codec_without_an_import(tmp_path):
    array = make_array(LocalStore(tmp_path / "array"), (16, 6), (16, 4), "uint16")
    array[1] = [0, 1, 65535, 0, 7, 0]
    # From another directory, so that the package is found only as it is installed.
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "array")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0, 1, 65535, 0, 7, 0]"
