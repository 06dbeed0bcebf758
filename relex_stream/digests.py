"""What changes come to, against the checksums that feeds tell of it.

Changes that are put upon other weights than they were made from come to weights, too: of the wrong
model. A checksum is that of a whole tensor, or of all tensors one behind the other, so blocks are
taken in their order, each through all steps.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np

from relex_stream.base_weights import BaseWeights
from relex_stream.block_reader import BlockReader
from relex_stream.blocks import BlockOf, Workspace
from relex_stream.errors import MissingDependencyError, RelexStreamWarning, TrajectoryError
from relex_stream.graph import Executor, Group, Stage
from relex_stream.matching import CheckpointPlaces
from relex_stream.source_blocks import SourceBlocks
from relex_stream.specs import Progress
from relex_stream.store import Store
from relex_stream.store.records import StoredTensor
from relex_stream.ulp import Bits, widen


class Hasher(Protocol):
    """As those of hashlib."""

    def update(self, data: Any, /) -> object:
        """Take more bytes."""

    def digest(self) -> bytes:
        """Return the checksum of all of them."""


class _Adler32:
    def __init__(self) -> None:
        self._value = 1

    def update(self, data: Any, /) -> None:
        self._value = zlib.adler32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


_PACKAGES = {"xxh3-128": ("xxhash", "xxh3_128"), "blake3": ("blake3", "blake3")}


def hasher_of(kind: str) -> Callable[[], Hasher]:
    """Return what makes hashers of a kind.

    Raises
    ------
    MissingDependencyError
        If it is of a package that is not installed, or not known.

    Examples
    --------
    >>> hasher = hasher_of("adler32")()
    >>> hasher.update(b"weights")
    >>> hasher.digest().hex()
    '0be202fc'
    """
    if kind == "adler32":
        return _Adler32
    if kind not in _PACKAGES:
        raise MissingDependencyError(f"checksums of kind {kind} are not known")
    package, name = _PACKAGES[kind]
    try:
        made: Callable[[], Hasher] = getattr(import_module(package), name)
    except ImportError:
        raise MissingDependencyError(
            f"checksums of kind {kind} need the package {package}: "
            "pip install 'relex-stream[deltas]'"
        ) from None
    return made


class Chain(NamedTuple):
    """Tensors one behind the other, and what they must come to.

    ``digests`` are those of some checkpoints, by their number in the batch.
    """

    tensors: tuple[StoredTensor, ...]
    digests: dict[int, bytes]


def chains_of(
    checkpoints: Sequence[CheckpointPlaces], tensors: Sequence[StoredTensor], kind: str
) -> list[Chain]:
    """Return what checkpoints tell of what they come to, in checksums of a kind."""
    each: dict[int, dict[int, bytes]] = {}
    together: dict[int, bytes] = {}
    for index, places in enumerate(checkpoints):
        patch = places.patch
        if patch is None or patch.digest_kind != kind:
            continue
        if patch.weights_digest:
            together[index] = patch.weights_digest
            continue
        for tensor, digest in zip(patch.tensor.tolist(), patch.digest, strict=True):
            each.setdefault(tensor, {})[index] = digest
    chains = [Chain((tensors[tensor],), digests) for tensor, digests in sorted(each.items())]
    if together:
        own = sorted((t for t in tensors if t.kind != "tied"), key=lambda tensor: tensor.name)
        chains.append(Chain(tuple(own), together))
    return chains


def check_digests(
    executor: Executor,
    checkpoints: Sequence[CheckpointPlaces],
    tensors: Sequence[StoredTensor],
    source: SourceBlocks,
    *,
    store: Store | None,
    base: BaseWeights,
    workers: int,
    progress: Progress,
) -> None:
    """Check what a batch of checkpoints comes to, where they tell it.

    Parameters
    ----------
    executor : Executor
        Of this process.
    checkpoints : sequence of CheckpointPlaces
    tensors : sequence of StoredTensor
    source : SourceBlocks
        Of the checkpoints.
    store : Store, optional
        With the steps before them; None for a new one.
    base : BaseWeights
    workers : int
    progress : Progress

    Raises
    ------
    TrajectoryError
        If something does not come to its checksum.

    Warns
    -----
    RelexStreamWarning
        If checksums are of a kind that nothing is installed for.
    """
    kinds = {places.patch.digest_kind for places in checkpoints if places.patch is not None}
    for kind in sorted(kinds - {""}):
        chains = chains_of(checkpoints, tensors, kind)
        try:
            stage = DigestCheck(
                kind, store=store, base=base, source=source, checkpoints=checkpoints
            )
        except MissingDependencyError as error:
            warnings.warn(
                f"what changes come to is not checked: {error}", RelexStreamWarning, stacklevel=2
            )
            continue
        first, last = checkpoints[0].step, checkpoints[-1].step
        executor.run(
            stage,
            DigestCheck.groups(chains, len(checkpoints)),
            workers=workers,
            name=f"check steps {first} to {last}" if first < last else f"check step {first}",
            progress=progress,
        )


class DigestCheck(Stage[tuple[Chain, ...], None, None]):
    """Makes the weights of a batch of checkpoints of changes, and checks their checksums."""

    def __init__(
        self,
        kind: str,
        *,
        store: Store | None,
        base: BaseWeights,
        source: SourceBlocks,
        checkpoints: Sequence[CheckpointPlaces],
    ) -> None:
        super().__init__()
        self._hasher = hasher_of(kind)
        self._kind = kind
        self._store = store
        self._base = base
        self._source = source
        self._checkpoints = checkpoints

    @staticmethod
    def groups(chains: Iterable[Chain], steps: int) -> list[Group[tuple[Chain, ...], None]]:
        """Return a group for each chain, of one task: it goes from front to back."""
        return [
            Group(
                number,
                ((chain,),),
                (steps * sum(tensor.elements * tensor.itemsize for tensor in chain.tensors),),
            )
            for number, chain in enumerate(chains)
        ]

    def work(self, tasks: Sequence[tuple[Chain, ...]], values: Sequence[None]) -> list[None]:
        """Check chains.

        Raises
        ------
        TrajectoryError
            If one does not come to what it must.
        """
        for task in tasks:
            for chain in task:
                self._check(chain)
        return [None] * len(tasks)

    def combine(self, partials: list[None]) -> None:
        """Return nothing: there is nothing to tell."""

    def finish(self, key: Hashable, value: None, total: None, *, last: bool) -> None:
        """Return nothing."""

    def _check(self, chain: Chain) -> None:
        hashers = {index: self._hasher() for index in chain.digests}
        workspace = self.of_thread(Workspace)
        for at in (BlockOf(t, block) for t in chain.tensors for block in range(t.blocks)):
            state = self._state(at, workspace)
            for index in range(len(self._checkpoints)):
                now = workspace.array("now", state.shape, state.dtype)
                self._source.read(at, index, now, workspace, at.tensor, state)
                state[:] = now
                if index in hashers:
                    hashers[index].update(state.view(np.uint8))
        for index, hasher in hashers.items():
            if hasher.digest() != chain.digests[index]:
                places = self._checkpoints[index]
                names = chain.tensors[0].name if len(chain.tensors) == 1 else "the model"
                raise TrajectoryError(
                    f"step {places.step}: {places.directory}: {names} does not come to its "
                    f"checksum ({self._kind}): the changes were made from other weights than those "
                    "of the step before; give the model that the trainer started from as BASE, and "
                    "all of its steps"
                )

    def _state(self, at: BlockOf, workspace: Workspace) -> Bits:
        """Return a block's bits before the batch; they may be changed."""
        bits, _ = self._base.read(at, workspace)
        if at.tensor.kind == "constant":
            return bits
        if self._store is not None and self._store.steps:
            reader = BlockReader(self._store, self._base, workspace)
            return reader.bits_at(at, bits, len(self._store.steps))
        state: Bits = workspace.array("state", at.elements, at.format.bits_dtype)
        widen(bits, at.base_format, at.format, state)
        return state
