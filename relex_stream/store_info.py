"""What a store holds, from its records."""

from __future__ import annotations

import numpy as np

from relex_stream.locations import Location
from relex_stream.store import Store
from relex_stream.summaries import StepInfo, StoreInfo


def info_of(store: Location) -> StoreInfo:
    """Say what a store holds; `relex_stream.api.info` says more."""
    opened = Store(store)
    manifest = opened.manifest
    tracked = [tensor for tensor in manifest.tensors if tensor.kind == "tracked"]
    weights = sum(tensor.elements for tensor in tracked)
    steps = []
    for row, step in enumerate(opened.steps):
        commit = opened.commit(row)
        changed = int(commit.changed.sum(dtype=np.int64))
        steps.append(
            StepInfo(
                step=step,
                changed_weights=changed,
                changed_share=changed / weights if weights else 0.0,
                frame_bytes=int(commit.frame_bytes.sum(dtype=np.int64)),
                record_bytes=opened.record_bytes(row),
                source_bytes=commit.source_bytes,
            )
        )
    dtypes: dict[str, tuple[int, int]] = {}
    for tensor in tracked:
        count, size = dtypes.get(tensor.dtype.code, (0, 0))
        dtypes[tensor.dtype.code] = (count + 1, size + tensor.elements)
    bytes_in = sum(step.source_bytes for step in steps)
    store_bytes = opened.stored_bytes()
    base_bytes = int(manifest.base_frame_bytes.sum(dtype=np.int64))
    stored = store_bytes - base_bytes
    changed_total = sum(step.changed_weights for step in steps)
    return StoreInfo(
        store=str(store),
        format_version=opened.head.format,
        steps=tuple(steps),
        tensors=len(manifest.tensors),
        weights=weights,
        dtypes=dtypes,
        constant_tensors=sum(tensor.kind == "constant" for tensor in manifest.tensors),
        seed=manifest.seed,
        base=manifest.base_hint,
        base_included=manifest.base_included,
        bytes_in=bytes_in,
        store_bytes=store_bytes,
        base_bytes_stored=base_bytes,
        ratio=bytes_in / stored if steps else 0.0,
        bits_per_changed_weight=(
            8 * sum(step.frame_bytes for step in steps) / changed_total if changed_total else 0.0
        ),
    )
