"""What is taken as given: the extrapolation that is asked for, and speeds measured elsewhere."""

from __future__ import annotations

from relex_stream.sketch import OVERSAMPLING

RANK = 1
BASIS = RANK + OVERSAMPLING

# From docs/benchmarks.md: whole builds and extrapolations of one worker, fitted to many sizes.
BUILD_NS = {"byte": 0.33, "change": 39.0, "tensor": 36e3}
"""Of one core, per byte read, changed weight, tensor and step."""

EXTRAPOLATE_NS = {"byte": 2.0, "change": 33.0, "tensor": 32e3}
"""The same for both stages together, per byte of the model and per change in the history."""

STORED_BITS = 12.7
"""Of the whole store, per changed weight."""

RESIDENT_BYTES = 150 << 20
"""Of a worker process before the work."""


MEMORY_LIMIT_BYTES = 8 << 30
"""That each process may hold; it decides how many steps a commit has where tensors are many."""


def element_ns(stage: str, steps: int, share: float) -> float:
    """Return what a weight takes of one core in a stage, in nanoseconds."""
    if stage == "build":
        return steps * (2 * BUILD_NS["byte"] + share * BUILD_NS["change"])
    both = 2 * EXTRAPOLATE_NS["byte"] + steps * share * EXTRAPOLATE_NS["change"]
    return both / 2
