"""What each command reports: frozen dataclasses of plain values, ready for JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Attributes
    ----------
    name : str
        For people: ``"statistics pass 1"``, ``"write outputs"``.
    tasks : int
        Block tasks the stage runs.
    read_bytes, write_bytes : int
        Projected bytes read (store and base) and written.
    worker_bytes : int
        Projected peak bytes of one worker's buffers in this stage.
    """

    name: str
    tasks: int
    read_bytes: int
    write_bytes: int
    worker_bytes: int


@dataclass(frozen=True)
class DevicePlan:
    """What is taken of devices, each of which has so many tasks at a time.

    ``projected_bytes = slots * block_bytes``, of the memory of each.
    """

    names: tuple[str, ...]
    memory_limit_bytes: int
    block_bytes: int
    slots: int
    projected_bytes: int


@dataclass(frozen=True)
class Plan:
    """The projection that is printed before work starts and that memory is held to.

    Numbers are of one process; with a cluster there are several of its kind.
    ``reserved_bytes`` is what the process holds before the work (interpreter, libraries),
    ``shared_bytes`` what all workers share (tables, statistics);
    ``projected_bytes = reserved + shared + workers * max(worker_bytes of the stages)``.
    """

    processes: int
    workers: int
    memory_limit_bytes: int
    reserved_bytes: int
    shared_bytes: int
    projected_bytes: int
    stages: tuple[StagePlan, ...]
    devices: DevicePlan | None = None
    """None where the CPU works on all blocks."""
    devices_reason: str = ""
    """Why these, or why none."""


@dataclass(frozen=True)
class BuildSummary:
    """What `build_store` did. Bytes are bytes; ``ratio`` is bytes in / bytes stored."""

    store: str
    layout: str
    steps_added: tuple[int, ...]
    steps_skipped: tuple[int, ...]
    """Steps that were in the store already."""
    steps_total: int
    bytes_in: int
    """Bytes of the ingested checkpoints (weights and side files)."""
    bytes_stored: int
    """Bytes this run added to the store, everything but the base's weights."""
    base_bytes_stored: int
    """Bytes of the base's weights in the store; 0 without ``include_base``."""
    store_bytes: int
    """Bytes of the whole store on disk."""
    ratio: float
    changed_weights: int
    """Weights that changed from one step to the next, summed over the added steps."""
    bits_per_changed_weight: float
    skipped_files: tuple[str, ...]
    """Files in checkpoint directories that were left out (optimizer state and the like)."""
    cast_savings: CastSavings | None
    """What ``--as bf16`` would save, where checkpoints are F32 over a BF16 base; else None."""
    peak_memory_bytes: int
    elapsed_s: float
    plan: Plan


@dataclass(frozen=True)
class CastSavings:
    """Bytes of one step's changes in F32, as stored, and about what they would be in BF16."""

    f32_step_bytes: int
    bf16_step_bytes: int


@dataclass(frozen=True)
class SubspaceFigures:
    """How well a subspace, and the fit in it, describe a tensor or a group of them.

    ``explained_variance`` is the share of ``|M|^2`` in the first component, the first two, and so
    on; ``r2`` the coefficient of determination of each component's fit (empty without a fit).
    """

    name: str
    singular_values: tuple[float, ...]
    explained_variance: tuple[float, ...]
    r2: tuple[float, ...]

    def explained_of(self, rank: int | None = None) -> float:
        """Return the share in the first `rank` components, by default in all there are."""
        shares = self.explained_variance[:rank]
        return shares[-1] if shares else 1.0


@dataclass(frozen=True)
class Output:
    """One model that was made.

    ``what`` says which: ``target_step``, ``rank``, ``damping`` and ``anchor`` of an extrapolation,
    ``step`` and ``rank`` of a reconstruction, ``recipe`` and ``weights`` of a combination.
    """

    path: str
    what: dict[str, Any]
    inside_history: bool = False
    """Whether its target step lies in the history."""

    @property
    def target_step(self) -> int:
        """The step that an extrapolation predicts."""
        return int(self.what["target_step"])


@dataclass(frozen=True)
class ModelsSummary:
    """What `extrapolate`, `reconstruct` or `combine` did, or would do (``dry_run``)."""

    store: str
    dry_run: bool
    """Nothing was written."""
    outputs: tuple[Output, ...]
    history: tuple[int, ...]
    """Steps that were used."""
    settings: dict[str, Any]
    """What all outputs have in common, as in their records."""
    tensors: int
    unchanged_tensors: int
    """Tensors copied bit for bit from the base, because no step changed them."""
    excluded_tensors: int
    """Tensors copied because they were not to be predicted."""
    median_explained_variance: float | None
    """Of the highest rank; None without a subspace."""
    median_r2: float | None
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    elapsed_s: float
    plan: Plan
    figures: tuple[SubspaceFigures, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class GroupAnalysis:
    """What `analyze` finds of a tensor, a layer, a module or the model.

    Each ``..._error`` is the standard error of what is beside it, None where that is exact. NaN is
    where there is nothing to say.
    """

    name: str
    tensors: int
    """That changed."""
    weights: int
    """Of those tensors."""
    delta_norm: float
    """``|M_t|`` of the last step of the history."""
    singular_values: tuple[float, ...]
    singular_values_error: tuple[float, ...] | None
    explained_variance: tuple[float, ...]
    """Share of ``|M|^2`` in the first component, the first two, and so on."""
    explained_variance_error: tuple[float, ...] | None
    r2: tuple[float, ...]
    """Of each component's fit, over the steps that it is made from."""
    r2_error: tuple[float, ...] | None
    r2_elsewhere: tuple[float, ...]
    """Of the same fit over the stored steps that it is not made from."""
    r2_elsewhere_error: tuple[float, ...] | None
    bend: float
    """How far the middle of the movement lies above a straight line, as a share of its rise: above
    0 where it slows down."""
    bend_error: float | None


@dataclass(frozen=True)
class StepAnalysis:
    """What `analyze` finds of a stored step."""

    step: int
    changed_share: float
    """Of tracked weights, since the step before."""
    change_norm: float
    """``|D_t|``."""
    delta_norm: float
    """``|M_t|``."""
    note: str
    """What is odd about it; empty for most."""


@dataclass(frozen=True)
class AnalyzeSummary:
    """What `analyze` found, from ``model`` down to single tensors."""

    store: str
    history: tuple[int, ...]
    """Steps of the subspace."""
    rank: int
    fit: str | None
    """None in a `report` of a history that is too short for one."""
    window: int | None
    exact: bool
    """Whether all figures come from the weights, none from sketches."""
    steps: tuple[StepAnalysis, ...]
    """All that are stored."""
    model: GroupAnalysis
    layers: tuple[GroupAnalysis, ...]
    modules: tuple[GroupAnalysis, ...]
    tensors: tuple[GroupAnalysis, ...] = field(repr=False)
    unchanged_tensors: int
    left_out_tensors: tuple[str, ...]
    """Small tensors, which have no sketch, where the base is not there to look them up."""
    bytes_read: int
    peak_memory_bytes: int
    elapsed_s: float


@dataclass(frozen=True)
class SkillOfDamping:
    """A forecast with a damping: ``skill`` is ``1 - |predicted - true|^2 / |last - true|^2``.

    ``error`` is the standard error of the skill, None where it is exact; ``missed`` the distance
    from what came, in weight units.
    """

    damping: float
    skill: float
    error: float | None
    missed: float


@dataclass(frozen=True)
class ForecastSkill:
    """A forecast of a stored step from those up to another, over the whole model."""

    history_step: int
    """Last step of the history."""
    target_step: int
    horizon: float
    """Target step by last step of the history."""
    rank: int
    fit: str
    window: int | None
    anchor: str
    moved: float
    """Distance from the last step of the history to what came, in weight units."""
    skills: tuple[SkillOfDamping, ...]
    """With the dampings that were asked for."""
    best: SkillOfDamping
    """With the best damping, which is known afterwards only."""
    auto: SkillOfDamping | None
    """With the damping that the history chooses by forecasting itself; None if it is too short."""


WEAK_SKILL = 0.1
"""A mean skill below is said to be weak: nearer to what came than staying, but by little."""


@dataclass(frozen=True)
class Recommendation:
    """The settings with most skill on average over a backtest."""

    rank: int
    fit: str
    window: int | None
    anchor: str
    damping: float | str
    """``"auto"``: each history chooses its own."""
    mean_skill: float
    least_skill: float
    forecasts: int
    """Over how many the mean is."""
    reach: float
    """The furthest horizon up to which every forecast had positive skill; 0 if none had."""
    reach_is_known: bool
    """Whether one further ahead had none; else nothing further ahead was tested."""


@dataclass(frozen=True)
class BacktestGroup:
    """A tensor, layer or module over all forecasts, with the recommended settings."""

    name: str
    skill: float
    best_damping: float
    moved: float


@dataclass(frozen=True)
class BacktestSummary:
    """What `backtest` found."""

    store: str
    steps: tuple[int, ...]
    exact: bool
    """Whether all figures come from the weights, none from sketches."""
    forecasts: tuple[ForecastSkill, ...]
    recommendation: Recommendation | None
    """None if nothing was better than to stay where one is."""
    group_by: str
    """What has a subspace of its own."""
    groups: tuple[BacktestGroup, ...] = field(repr=False)
    left_out_tensors: tuple[str, ...]
    bytes_read: int
    peak_memory_bytes: int
    elapsed_s: float


@dataclass(frozen=True)
class ReportSummary:
    """What `report` wrote, and the figures that matter most."""

    store: str
    path: str
    """The page."""
    page_bytes: int
    charts: tuple[str, ...]
    """On the page; of others there was too little to draw."""
    pictures: tuple[str, ...]
    tables: tuple[str, ...]
    steps: tuple[int, ...]
    """All that are stored."""
    history: tuple[int, ...]
    exact: bool
    """Whether all figures come from the weights, none from sketches."""
    explained_variance: float
    """Of the model's first component."""
    r2: float
    r2_elsewhere: float
    odd_steps: tuple[int, ...]
    verdict: str
    """Whether the store speaks for extrapolating, in words."""
    recommendation: Recommendation | None
    """As `backtest` gives it."""
    left_out_tensors: tuple[str, ...]
    bytes_read: int
    peak_memory_bytes: int
    elapsed_s: float


@dataclass(frozen=True)
class ExportedFile:
    """One file of an export."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportSummary:
    """What `export` wrote."""

    store: str
    step: int
    path: str
    file_format: str
    """``"ingested"``: the files that were ingested; ``"hf"``: a model like the base."""
    files: tuple[ExportedFile, ...]
    bytes_written: int
    peak_memory_bytes: int
    elapsed_s: float


@dataclass(frozen=True)
class ExportsSummary:
    """What `export_steps` wrote, step by step, each in a directory below `path`."""

    store: str
    path: str
    exports: tuple[ExportSummary, ...]
    bytes_written: int
    peak_memory_bytes: int
    elapsed_s: float


@dataclass(frozen=True)
class StepInfo:
    """One committed step; ``changed_share`` is the share of tracked weights it changed."""

    step: int
    changed_weights: int
    changed_share: float
    frame_bytes: int
    record_bytes: int
    source_bytes: int


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds. ``dtypes`` maps a dtype code to ``(tensors, weights)``."""

    store: str
    format_version: int
    steps: tuple[StepInfo, ...]
    tensors: int
    weights: int
    dtypes: dict[str, tuple[int, int]]
    constant_tensors: int
    seed: int
    base: str
    """Where the base was when the store was built, as recorded (a hint)."""
    base_included: bool
    bytes_in: int
    store_bytes: int
    base_bytes_stored: int
    ratio: float
    bits_per_changed_weight: float


@dataclass(frozen=True)
class VerifySummary:
    """What `verify` checked. ``problems`` is empty when everything is as committed."""

    store: str
    steps: int
    frames: int
    records: int
    blobs: int
    bytes_read: int
    problems: tuple[str, ...]
    """What is damaged, or differs from its checkpoint; after a repair, what is so still."""
    elapsed_s: float
    repaired: tuple[str, ...] = ()
    """Files of the store that were rebuilt; with ``dry_run``, that would be."""
    compared: tuple[int, ...] = ()
    """Steps that were compared with their checkpoints."""
    not_compared: tuple[int, ...] = ()
    """Steps that were not, where others were asked to be: their checkpoints are not there."""
    compared_bytes: int = 0
    """Bytes of checkpoints that were compared."""
    notes: tuple[str, ...] = ()
    """Checkpoints that were found and are of no use, and why."""


@dataclass(frozen=True)
class WatchEvent:
    """What `watch` has to say of a step, as it happens.

    ``kind`` is one of

    - ``"stored"``: it was appended and compared with its source; ``problems`` says how it differs.
    - ``"verified"``: it was in the store already, and was compared with its source.
    - ``"deleting"``: the weights ``files`` of its source are about to be removed.
    - ``"waiting"``: it is not whole, or cannot be taken; ``message`` says what is wrong.
    - ``"given-up"``: the same, and it is not waited for any more.
    - ``"left-out"``: it came when the store held a later step.
    - ``"would-store"``, ``"would-delete"``: with ``dry_run``.
    """

    time: str
    """ISO 8601, local time with its offset."""
    kind: str
    step: int
    message: str = ""
    bytes_in: int = 0
    """Bytes of the checkpoint, weights and side files."""
    bytes_stored: int = 0
    """Bytes of the step's frames and record in the store."""
    ratio: float = 0.0
    elapsed_s: float = 0.0
    """Seconds from the start of its append to the end of its verification."""
    verified: bool = False
    problems: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """Paths below the directory of the checkpoints."""
    bytes_deleted: int = 0


@dataclass(frozen=True)
class WatchSummary:
    """What `watch` did until it ended. ``ended`` says why: see `relex_stream.watch`."""

    store: str
    ended: str
    steps_added: tuple[int, ...]
    steps_verified: tuple[int, ...]
    steps_differing: tuple[int, ...]
    """Steps whose source differs from what is stored; nothing of them was deleted."""
    steps_deleted: tuple[int, ...]
    """Steps whose source weights were deleted."""
    steps_given_up: tuple[int, ...]
    bytes_in: int
    bytes_stored: int
    bytes_deleted: int
    elapsed_s: float


@dataclass(frozen=True)
class DropSummary:
    """What `drop` took back."""

    store: str
    steps_dropped: tuple[int, ...]
    steps_left: tuple[int, ...]
    bytes_freed: int


@dataclass(frozen=True)
class DemoRow:
    """One model of the demonstration and the share of held-out problems it solves.

    ``gain`` is its accuracy less that of the last observed checkpoint (0 for those before), and
    ``gain_error`` the standard error of that difference on the same problems.
    """

    step: int
    kind: str
    """``"base"``, ``"last observed"``, ``"extrapolated"`` or ``"true"``."""
    accuracy: float
    standard_error: float
    gain: float
    gain_error: float


@dataclass(frozen=True)
class DemoSummary:
    """What the demonstration found. ``directory`` is None when its files were temporary."""

    directory: str | None
    history_steps: int
    problems: int
    build: BuildSummary
    median_explained_variance: float | None
    median_r2: float | None
    rows: tuple[DemoRow, ...]
    elapsed_s: float
