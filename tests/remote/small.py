"""The smallest store there can be: two tensors, frames of a few bytes, no kernel run for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relex_stream.codec import Changes, FrameCodec
from relex_stream.codec import frame_crc as crc_of
from relex_stream.store import StoreWriter, arrays
from relex_stream.store.records import Commit, Manifest, place_tensors
from relex_stream.store.write import write_frames

ELEMENTS = 4
BLOCK_BYTES = 8

TENSORS, BLOCKS = place_tensors(
    [
        {
            "name": name,
            "kind": "tracked",
            "base_dtype": "BF16",
            "dtype": "BF16",
            "shape": [elements],
            "tied_to": None,
            "sketch_row": -1,
        }
        for name, elements in (("a", 2 * ELEMENTS), ("b", ELEMENTS))
    ],
    BLOCK_BYTES,
)


def frame_of(row: int, value: int) -> bytes:
    """Return a frame in which one weight becomes a value."""
    before, after = np.zeros(ELEMENTS, np.uint16), np.zeros(ELEMENTS, np.uint16)
    after[value % ELEMENTS] = 1 + value
    changes = Changes(ELEMENTS, itemsize=2)
    changes.find(before, after)
    return bytes(FrameCodec(elements=ELEMENTS, itemsize=2).encode(row % 16, changes, ELEMENTS))


def append(writer: StoreWriter, values: Sequence[int]) -> None:
    """Append a step for each value; what is written follows from values and rows alone."""
    store = writer.store
    rows = len(store.steps) if store else 0
    first = store.steps[-1] + 1 if rows else 1
    writer.allocate(TENSORS, rows + len(values), include_base=False)
    file = writer.put_side_file("config.json", f"{values}".encode())
    commits = []
    for index, value in enumerate(values):
        row = rows + index
        frame_bytes, frame_crc = np.zeros(BLOCKS, np.uint32), np.zeros(BLOCKS, np.uint32)
        for tensor in TENSORS:
            for block in range(tensor.blocks):
                column = tensor.first_block + block
                if (value + column) % 3 == 0:
                    continue  # a block that does not change has no frame
                frame = frame_of(row, value + column)
                frame_bytes[column], frame_crc[column] = len(frame), crc_of(memoryview(frame))
                group = row // 16
                start = store.committed_bytes(tensor, block, group) if store else 0
                here = [commit for commit in commits if commit.row // 16 == group]
                start += sum(int(commit.frame_bytes[column]) for commit in here)
                write_frames(writer.path, arrays.DELTAS, tensor, group, block, start, frame)
        commits.append(
            Commit(
                step=first + index,
                row=row,
                previous="",
                source=f"step_{first + index}",
                source_bytes=1,
                files=(file,),
                nonfinite=False,
                frame_bytes=frame_bytes,
                frame_crc=frame_crc,
                changed=(frame_bytes > 0).astype(np.uint32),
                source_crc=np.full(BLOCKS, value, np.uint32),
                change_sq=np.zeros(len(TENSORS)),
                delta_sq=np.zeros(len(TENSORS)),
                sketch=np.zeros((0, 256), np.float16),
                sketch_scale=np.zeros(0, np.float32),
            )
        )
    manifest = Manifest(
        tensors=TENSORS,
        block_bytes=BLOCK_BYTES,
        seed=0,
        sketch_width=256,
        base_hint="../base",
        base_files=(),
        base_crc=np.zeros(BLOCKS, np.uint32),
        base_included=False,
        base_frame_bytes=np.zeros(BLOCKS, np.uint32),
    )
    writer.commit(store.manifest if store else manifest, commits)
