"""From a store to what its trajectory looks like: Gram matrices, their sums, their figures."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from relex_stream import machine
from relex_stream.analysis import REPLICATES, Described, Describer, suspicious_steps
from relex_stream.errors import OptionError
from relex_stream.fit import Fit
from relex_stream.grams import GramReader, GramSum, TensorGram, is_estimated
from relex_stream.graph import Threads, one_blas_thread
from relex_stream.grouping import group_name
from relex_stream.locations import Location
from relex_stream.request import history_of
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import Store
from relex_stream.subspaces import changed_tensors
from relex_stream.summaries import AnalyzeSummary, GroupAnalysis, Plan, StepAnalysis

Float64 = NDArray[np.float64]


class Analysis:
    """What is found of a store as Gram matrices come in, tensor by tensor.

    Parameters
    ----------
    store : Store
    history : sequence of int
        Steps of the subspace, as `request.history_of` returns them.
    rank : int
        Components to tell of.
    fit : Fit, optional
        None: nothing is said of a fit.

    Raises
    ------
    OptionError, FitError
        If the history does not allow for that.
    """

    def __init__(self, store: Store, history: Sequence[int], *, rank: int, fit: Fit | None) -> None:
        if not 1 <= rank <= len(history):
            raise OptionError(
                f"--rank must be from 1 to the number of checkpoints in the history "
                f"({len(history)}), not {rank}"
            )
        self._store = store
        self._history = tuple(history)
        self._rank = rank
        self._fit = fit
        self._describer = Describer(store.steps, len(history), rank, fit)
        self._sums = _Sums({})
        self._tensors: list[GroupAnalysis] = []

    @property
    def groups(self) -> int:
        """Sums of Gram matrices that are kept: room for `GramReader.plan`."""
        return sum(_group_counts(self._store).values())

    @property
    def model(self) -> GramSum:
        """The sum over all tensors so far."""
        return self._sums.groups["model"]["model"]

    def begin(self, plan: Plan) -> None:
        """Make ready for the tensors that were planned."""
        self._sums = _Sums(_room_for_errors(self._store, plan))

    def add(self, found: TensorGram) -> None:
        """Take a tensor in."""
        described = self._describer.describe(found.gram, found.replicates)
        alone = GramSum(
            with_errors=False, tensors=1, weights=found.tensor.elements, gram=found.gram
        )
        self._tensors.append(_group(found.tensor.name, alone, described, len(self._history)))
        self._sums.add(found)

    def summary(
        self, *, exact: bool, reader: GramReader, plan: Plan, started: float
    ) -> AnalyzeSummary:
        """Return all that was found.

        Parameters
        ----------
        exact : bool
            What was asked of the reader.
        reader : GramReader
            That all tensors came from.
        plan : Plan
        started : float
            By the monotonic clock.

        Raises
        ------
        OptionError
            If there was no tensor.
        """
        store, rows = self._store, len(self._history)
        described = {
            grouping: tuple(
                _group(name, each, self._describer.describe(each.gram, each.replicates), rows)
                for name, each in groups.items()
            )
            for grouping, groups in self._sums.groups.items()
        }
        if not described["model"]:
            reader.refuse_nothing("analyze")
        changed = changed_tensors(store, len(store.steps))
        tracked = sum(tensor.kind == "tracked" for tensor in store.manifest.tensors)
        places = {tensor.name: tensor.index for tensor in store.manifest.tensors}
        return AnalyzeSummary(
            store=str(store.path),
            history=self._history,
            rank=self._rank,
            fit=None if self._fit is None else self._fit.curve,
            window=None if self._fit is None else self._fit.window,
            exact=not any(is_estimated(tensor, exact=exact) for tensor in changed),
            steps=tuple(_steps(store, self.model.gram)),
            model=described["model"][0],
            layers=described["layer"],
            modules=described["module"],
            tensors=tuple(sorted(self._tensors, key=lambda each: places[each.name])),
            unchanged_tensors=tracked - len(changed),
            left_out_tensors=reader.left_out,
            bytes_read=plan.stages[0].read_bytes,
            peak_memory_bytes=machine.peak_bytes(),
            elapsed_s=time.monotonic() - started,
        )


def analyze_store(
    store_path: Location,
    *,
    history_steps: int | None,
    rank: int,
    fit: str,
    window: int | None,
    exact: bool,
    base: Location | None,
    memory_limit: int | None,
    workers: int | None,
    progress: Progress | None,
) -> AnalyzeSummary:
    """Analyze; `relex_stream.api.analyze` says what the arguments are."""
    started = time.monotonic()
    executor = Threads(workers, memory_limit)
    store = Store(store_path)
    history = history_of(store, history_steps)
    analysis = Analysis(store, history, rank=rank, fit=Fit(fit, window))
    reader = GramReader(
        store, exact=exact, base=base, executor=executor, progress=progress or NoProgress()
    )
    plan = reader.plan(groups=analysis.groups)
    analysis.begin(plan)
    with one_blas_thread():
        for found in reader.grams(plan.workers):
            analysis.add(found)
        return analysis.summary(exact=exact, reader=reader, plan=plan, started=started)


class _Sums:
    """Gram matrices summed by layer, by module and over the model."""

    def __init__(self, with_errors: Mapping[str, bool]) -> None:
        self._with_errors = with_errors
        self.groups: dict[str, dict[str, GramSum]] = {name: {} for name in with_errors}

    def add(self, found: TensorGram) -> None:
        for grouping, groups in self.groups.items():
            name = group_name(found.tensor.name, grouping)
            groups.setdefault(name, GramSum(self._with_errors[grouping])).add(found)


def _room_for_errors(store: Store, plan: Plan) -> dict[str, bool]:
    """Return for each grouping whether there is memory for the replicates of its sums."""
    room = plan.memory_limit_bytes - plan.projected_bytes
    found = {}
    for grouping, count in _group_counts(store).items():
        needed = REPLICATES * 8 * len(store.steps) ** 2 * count
        found[grouping] = needed <= room
        room -= needed if needed <= room else 0
    return found


def _group_counts(store: Store) -> dict[str, int]:
    changed = changed_tensors(store, len(store.steps))
    return {
        grouping: len({group_name(tensor.name, grouping) for tensor in changed})
        for grouping in ("model", "layer", "module")
    }


def _group(name: str, summed: GramSum, described: Described, rows: int) -> GroupAnalysis:
    figures, errors = described.figures, described.errors

    def numbers(of: Float64 | None) -> tuple[float, ...]:
        return () if of is None else tuple(of.tolist())

    return GroupAnalysis(
        name=name,
        tensors=summed.tensors,
        weights=summed.weights,
        delta_norm=math.sqrt(max(0.0, float(summed.gram[rows - 1, rows - 1]))),
        singular_values=numbers(figures.singular_values),
        singular_values_error=None if errors is None else numbers(errors.singular_values),
        explained_variance=numbers(figures.explained_variance),
        explained_variance_error=None if errors is None else numbers(errors.explained_variance),
        r2=numbers(figures.r2),
        r2_error=None if errors is None else numbers(errors.r2),
        r2_elsewhere=numbers(figures.r2_elsewhere),
        r2_elsewhere_error=None if errors is None else numbers(errors.r2_elsewhere),
        bend=figures.bend,
        bend_error=None if errors is None else errors.bend,
    )


def _steps(store: Store, gram: Float64) -> Iterator[StepAnalysis]:
    tracked = [tensor for tensor in store.manifest.tensors if tensor.kind == "tracked"]
    weights = sum(tensor.elements for tensor in tracked)
    changed = store.changed.sum(axis=1, dtype=np.int64)
    deltas = store.delta_sq.sum(axis=1)
    changes = np.array([float(store.commit(row).change_sq.sum()) for row in range(len(changed))])
    notes = suspicious_steps(store.steps, changes, gram)
    for row, step in enumerate(store.steps):
        yield StepAnalysis(
            step=step,
            changed_share=int(changed[row]) / max(1, weights),
            change_norm=math.sqrt(changes[row]),
            delta_norm=math.sqrt(deltas[row]),
            note=notes.get(step, ""),
        )
