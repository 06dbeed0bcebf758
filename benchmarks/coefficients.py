"""Coefficients of all stored steps in the subspace of the first ones, from exact Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from relex_stream.grams import GramReader
from relex_stream.graph import Threads
from relex_stream.sketch import subspace_of_deltas
from relex_stream.specs import NoProgress
from relex_stream.store import Store

Float64 = NDArray[np.float64]


def exact_grams(store: Path) -> tuple[tuple[int, ...], dict[str, Float64]]:
    """Return the stored steps, and by name the Gram matrix of each tensor that changed.

    Parameters
    ----------
    store : Path
        With its base.
    """
    opened = Store(store)
    reader = GramReader(
        opened, exact=True, base=None, executor=Threads(), progress=NoProgress(), errors=False
    )
    workers = reader.plan(groups=0).workers
    return opened.steps, {found.tensor.name: found.gram for found in reader.grams(workers)}


def coefficients(gram: Float64, rows: int, rank: int) -> Float64:
    """Return the coefficients (N, r) of all N steps in the subspace of the first `rows`.

    Parameters
    ----------
    gram : ndarray of float64, shape (N, N)
        ``M M^T``.
    rows : int
    rank : int
        r is less where M has no more.

    Notes
    -----
    ``M V`` with ``V = M_h^T U / S`` from the history's ``M_h = U S V^T``. The sign of each
    component is the one with which it ends its history above 0.

    Examples
    --------
    A step twice as far, and one that turned aside altogether:

    >>> deltas = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0]])
    >>> coefficients(deltas @ deltas.T, rows=2, rank=1).ravel().round(9).tolist()
    [1.0, 2.0, 0.0]
    """
    subspace = subspace_of_deltas(gram[:rows, :rows], rank)
    found: Float64 = gram[:, :rows] @ subspace.vectors / subspace.singular_values
    return found * np.where(found[rows - 1] < 0, -1.0, 1.0)


@dataclass(frozen=True)
class Kept:
    """What a projection into a subspace leaves of a delta, in squared weight units."""

    kept: float
    whole: float

    @property
    def share(self) -> float:
        """Share of the squared norm."""
        return self.kept / self.whole


def kept_of(grams: dict[str, Float64], row: int, rank: int) -> Kept:
    """Return what the subspaces of all steps, one for each tensor, keep of a step's delta."""
    kept = sum(
        float((coefficients(gram, len(gram), rank)[row] ** 2).sum()) for gram in grams.values()
    )
    return Kept(kept, sum(float(gram[row, row]) for gram in grams.values()))
