"""Metadata of a distributed checkpoint that is not true: how it is changed, and what is said of it.

The changes are Python with the metadata as ``m`` and its entry of ``lm_head.weight`` as ``w``.
"""

from __future__ import annotations

LIES = {
    "m.storage_data[first].relative_path = '../x'": "unsafe path '../x'",
    "m.storage_data[first].relative_path = '/etc/passwd'": "it is absolute",
    "m.storage_data[first].relative_path = 7": "has no place in a file",
    "m.storage_data[first].offset = -1": "has no place in a file",
    "m.storage_data[first].length = None": "has no place in a file",
    "m.storage_data[first].transform_descriptors = ['zstd']": r"written through \['zstd'\]",
    "del m.storage_data[MetadataIndex('model.lm_head.weight', [5, 0])]": r"at \[5, 0\] is in no f",
    "w.chunks.pop()": r"'model\.lm_head\.weight': its parts hold 60 of its 78 elements",
    "w.chunks[0].sizes = torch.Size([6, 6])": r"is BF16 \[5, 6\] where \.metadata says BF16 \[6",
    "w.properties.dtype = torch.float16": r"BF16 \[5, 6\] where \.metadata says F16",
    "w.properties.dtype = 'bf16'": "its dtype is 'bf16'",
    "w.size = torch.Size([14, 6])": "its parts hold 78 of its 84 elements",
    "w.size = [13, 6]": "is where a size belongs",
    "w.chunks = None": "it has no chunks",
    "w.chunks = [w]": "is where a ChunkStorageMetadata belongs",
    "w.chunks = []": "it has no chunks",
    "m.storage_data = None": "does not say what is stored and where",
    "m = {}": "is where a Metadata belongs",
    "m.planner_data = print": r"holds a pickle of builtins\.print",
    "m.state_dict_metadata[1] = w": "an entry called 1",
    "m.state_dict_metadata = {'optimizer.x': w}; m.storage_data = {MetadataIndex('optimizer.x', "
    "c.offsets): v for c, v in zip(w.chunks, m.storage_data.values())}": "no tensors of a model",
    "m.state_dict_metadata['model.x.lora_A.weight'] = w; m.storage_data.update({MetadataIndex("
    "'model.x.lora_A.weight', c.offsets): v for c, v in zip(w.chunks, "
    "list(m.storage_data.values()))})": r"belongs to an adapter \(LoRA\); merge",
}
