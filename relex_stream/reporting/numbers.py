"""What a report says, as plain values: everything that is drawn, written and tabulated."""

from __future__ import annotations

from dataclasses import dataclass

from relex_stream.summaries import AnalyzeSummary, BacktestSummary, Plan, StoreInfo


@dataclass(frozen=True)
class ForecastPoint:
    """A coefficient as it is predicted for a step.

    ``half_width`` is that of the band, NaN where no past forecast reached as far.
    """

    step: int
    value: float
    half_width: float


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one component of a group of weights, and the curve through them.

    Attributes
    ----------
    name : str
        ``"model"`` or a tensor's.
    component : int
        From 1.
    steps : tuple of int
        All that are stored.
    values : tuple of float
        At those steps, in weight units; of later steps than the history, those of their deltas in
        the history's subspace.
    history : int
        The first so many steps are the history.
    places : tuple of float
        Where the curve is drawn; empty if the history is too short for the fit.
    fitted : tuple of float
        The curve there.
    half_widths : tuple of float
        Of the band around it, NaN where there is none; see `coefficients.past_errors`.
    past_histories : int
        From how many earlier histories forecasts were made for the band.
    forecasts : tuple of ForecastPoint
        At the target steps.
    """

    name: str
    component: int
    steps: tuple[int, ...]
    values: tuple[float, ...]
    history: int
    places: tuple[float, ...]
    fitted: tuple[float, ...]
    half_widths: tuple[float, ...]
    past_histories: int
    forecasts: tuple[ForecastPoint, ...]


@dataclass(frozen=True)
class Cell:
    """The tensors of one module in one layer, or one tensor outside of all layers.

    ``explained_variance`` and ``r2`` are of the first component: for several tensors their means,
    weighted by ``movement``, the squared norm of the deltas.
    """

    explained_variance: float
    r2: float
    movement: float
    tensors: int


@dataclass(frozen=True)
class ModuleGrid:
    """Tensors by module and layer.

    Attributes
    ----------
    layers : tuple of int
    modules : tuple of str
        What remains of names without the layer; experts and the like share a ``*``.
    cells : dict of (str, int) to Cell
        By module and layer.
    outside : dict of str to Cell
        Tensors outside of layers, by name.
    stack : str
        What the names of layers begin with, if that is the same for all.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    cells: dict[tuple[str, int], Cell]
    outside: dict[str, Cell]
    stack: str

    @property
    def averaged(self) -> bool:
        """Whether any cell has several tensors."""
        return any(cell.tensors > 1 for cell in self.cells.values())


@dataclass(frozen=True)
class ReportNumbers:
    """All numbers of a report.

    Attributes
    ----------
    title : str
    info : StoreInfo
    analysis : AnalyzeSummary
    backtest : BacktestSummary, optional
        None where no stored step can be forecast from those before it.
    backtest_reason : str
        Why there is none.
    coefficients : tuple of Coefficients
        Of the model, then of the tensors that moved most.
    grid : ModuleGrid
    memory : Plan
        What `extrapolate` is projected to hold, for a process of `NOMINAL_PROCESS_BYTES`.
    memory_fits : bool
        Whether that is under the limit.
    least_points : int
        Checkpoints that the fit takes.
    asked_fit : str
    """

    title: str
    info: StoreInfo
    analysis: AnalyzeSummary
    backtest: BacktestSummary | None
    backtest_reason: str
    coefficients: tuple[Coefficients, ...]
    grid: ModuleGrid
    memory: Plan
    memory_fits: bool
    least_points: int
    asked_fit: str

    @property
    def history(self) -> tuple[int, ...]:
        """Steps of the history."""
        return self.analysis.history

    @property
    def has_fit(self) -> bool:
        """Whether the history is long enough for the fit."""
        return self.analysis.fit is not None

    @property
    def fit_has_misses(self) -> bool:
        """Whether there are more checkpoints than the fit can go through: else R2 says nothing."""
        points = self.analysis.window or len(self.history)
        return self.has_fit and points > self.least_points

    @property
    def stored_bytes(self) -> tuple[int, ...]:
        """Bytes of the store with the first step, the first two, and so on; without the base."""
        info = self.info
        own = [step.frame_bytes + step.record_bytes for step in info.steps]
        # What no step alone accounts for: array metadata, side files, the manifest.
        total = max(0, info.store_bytes - info.base_bytes_stored - sum(own))
        found = []
        for each in own:
            total += each
            found.append(total)
        return tuple(found)

    @property
    def checkpoint_bytes(self) -> tuple[int, ...]:
        """Bytes of the first checkpoint, the first two, and so on."""
        total, found = 0, []
        for step in self.info.steps:
            total += step.source_bytes
            found.append(total)
        return tuple(found)
