"""From subspaces to models: how much each stored change weighs in each of them, and figures."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import RelexStreamWarning
from relex_stream.fit import Forecast
from relex_stream.model_writes import Mix, pieces
from relex_stream.request import Batch, Job
from relex_stream.sketch import Subspace, cumulate_transposed
from relex_stream.store import Store
from relex_stream.subspaces import changed_tensors, predicted_tensors, subspace_name
from relex_stream.summaries import SubspaceFigures

Float64 = NDArray[np.float64]

_GROUPS_AT_ONCE = 1024


def mixes_of(store: Store, batch: Batch, subspaces: Mapping[str, Subspace]) -> dict[int, Mix]:
    """Return how the models of a batch come about, piece by piece.

    Parameters
    ----------
    store : Store
    batch : Batch
    subspaces : dict of str to Subspace
        Of each group; empty where the weights need none.

    Returns
    -------
    dict of int to Mix
        By the column of a piece's first block. A piece that has none is the base's.
    """
    methods = [job.method for job in batch.jobs]

    def cumulated(vectors: Float64) -> Float64:
        weights = np.concatenate([method.weights(vectors) for method in methods], axis=1)
        return cumulate_transposed(weights)

    shared: dict[str, Float64] = {
        name: cumulated(subspace.vectors)
        for name, subspace in subspaces.items()
        if subspace.singular_values.size
    }
    if batch.subspaces is None:
        alike = cumulated(np.zeros((batch.rows, 0)))
    nothing = np.zeros((batch.rows, len(batch.products)))
    mixes: dict[int, Mix] = {}
    for tensor in changed_tensors(store, batch.rows):
        copies = _copies(batch, tensor.name)
        if not batch.selection.takes(tensor.name):
            rows = batch.rows if batch.selection.excluded_from == "latest" else 0
            copies = dict.fromkeys(range(len(batch.products)), rows)
        for blocks in pieces(tensor, batch.group_by):
            if batch.subspaces is None:
                changes: Float64 | None = alike
            else:
                changes = shared.get(subspace_name(blocks[0], batch.group_by))
            if copies:
                changes = nothing.copy() if changes is None else changes.copy()
                changes[:, list(copies)] = 0.0
            if changes is not None:
                mixes[blocks[0].column] = Mix(changes, tuple(copies.items()))
    for method in methods:
        _tell_of_unrefined(method.forecast)
    return mixes


def _copies(batch: Batch, name: str) -> dict[int, int]:
    """Return the products that have a tensor as it is after so many rows."""
    found: dict[int, int] = {}
    first = 0
    for job in batch.jobs:
        row_after = {step: row + 1 for row, step in enumerate(job.method.history)}
        row_after[0] = 0
        for number, step in job.method.copies(name).items():
            found[first + number] = row_after[step]
        first += len(job.products)
    return found


def _tell_of_unrefined(forecast: Forecast | None) -> None:
    if forecast is not None and forecast.unrefined:
        warnings.warn(
            f"the frequency of {forecast.unrefined} sinusoids could not be refined, and is that of "
            "the Fourier transform's peak: those coefficients do not oscillate; --fit linear "
            "describes them as well",
            RelexStreamWarning,
            stacklevel=3,
        )


# --- figures -------------------------------------------------------------------------------------


def figures_of(
    store: Store, job: Job, subspaces: Mapping[str, Subspace]
) -> Iterator[SubspaceFigures]:
    """Yield the figures of each group, by name; none where the weights need no subspace."""
    recorded = _recorded_squares(store, job) if subspaces else {}
    r2 = _r_squared_of_all(job.method.forecast, subspaces.values())
    figures = []
    for name, subspace in subspaces.items():
        total = recorded[name] if subspace.total_sq is None else subspace.total_sq
        singular_values = subspace.singular_values.tolist()
        explained = np.cumsum(subspace.singular_values**2).tolist()
        figures.append(
            SubspaceFigures(
                name=name,
                singular_values=tuple(singular_values),
                explained_variance=tuple(
                    min(1.0, each / total) if total > 0 else 1.0 for each in explained
                ),
                r2=tuple(islice(r2, len(singular_values))),
            )
        )
    yield from sorted(figures, key=lambda figure: figure.name)


def _recorded_squares(store: Store, job: Job) -> dict[str, float]:
    """Return ``|M|^2`` of each group of whole tensors, from the store's records."""
    assert job.subspaces is not None
    by_tensor = store.delta_sq[: job.rows].sum(axis=0).tolist()
    squares: dict[str, list[float]] = {}
    for tensor in predicted_tensors(store, job.subspaces):
        name = subspace_name(pieces(tensor, "tensor")[0][0], job.group_by)
        squares.setdefault(name, []).append(by_tensor[tensor.index])
    return {name: math.fsum(each) for name, each in squares.items()}


def _r_squared_of_all(forecast: Forecast | None, subspaces: Iterable[Subspace]) -> Iterator[float]:
    """Yield the R2 of each column of each group."""
    if forecast is None:
        return
    # Columns of many groups at once, one behind the other: they may be very many.
    left = iter(subspaces)
    while some := list(islice(left, _GROUPS_AT_ONCE)):
        columns = [subspace.vectors * subspace.singular_values for subspace in some]
        yield from forecast.r_squared(np.concatenate(columns, axis=1)).tolist()


def medians(
    figures: Sequence[SubspaceFigures], rank: int | None
) -> tuple[float | None, float | None]:
    """Return the median explained variance of a rank and the median R2; None for none."""
    explained = [figure.explained_of(rank) for figure in figures]
    r2 = [figure.r2[0] for figure in figures if figure.r2]
    return (
        statistics.median(explained) if explained else None,
        statistics.median(r2) if r2 else None,
    )
