"""The registry of shared options and parameter types; sizes such as ``8GB`` are parsed here."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click

from relex_stream.cli.session import Session
from relex_stream.errors import OptionError
from relex_stream.locations import local_directory, location
from relex_stream.urls import is_hub

Function = TypeVar("Function", bound=Callable[..., Any])

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]*)", re.ASCII | re.IGNORECASE)
_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: factor**power
    for power, prefix in enumerate("kmgt", start=1)
    # A bare letter is binary, as in systemd and container tools.
    for suffix, factor in (("b", 1000), ("ib", 1024), ("", 1024))
}


def parse_bytes(text: str) -> int:
    """Return the number of bytes that `text` names, rounded down.

    Parameters
    ----------
    text : str
        A positive number and a unit: B, kB, MB, GB, TB (powers of 1000); KiB, MiB, GiB, TiB or
        just K, M, G, T (powers of 1024); none for bytes. Case does not matter.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    ValueError
        If `text` has another form, or comes to less than one byte.

    Examples
    --------
    >>> parse_bytes("512MiB"), parse_bytes("8GB"), parse_bytes("4096")
    (536870912, 8000000000, 4096)
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _UNITS.get(match["unit"].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write it like 512MiB, 8GB or 1073741824")
    size = int(Fraction(match["number"]) * factor)
    if size < 1:
        raise ValueError(f"{text!r} is less than one byte")
    return size


class ByteSize(click.ParamType[int]):
    """A size in bytes, written with or without a unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the size in bytes."""
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class DampingType(click.ParamType[float | str]):
    """A number, or ``auto``."""

    name = "damping"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | str:
        """Return the number, or the word."""
        if value == "auto" or isinstance(value, float):
            return str(value) if value == "auto" else float(value)
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)


class NumberOr(click.ParamType[int | None]):
    """A whole number of 1 or more, or a word for none."""

    name = "number"

    def __init__(self, word: str) -> None:
        self._word = word

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Return the number, or None."""
        if value is None or value == self._word:
            return None
        if isinstance(value, int):
            return value
        if not (value.isascii() and value.isdecimal() and int(value) >= 1):
            self.fail(f"{value!r} is neither a number of 1 or more nor {self._word}", param, ctx)
        return int(value)


class _Place(click.Path):
    """A path or URL as it is: whether it exists is for the library to say, in one wording.

    Parameters
    ----------
    urls : {"none", "objects", "all"}
        Which URLs may be given: none, those of object storage, or those of the Hub too, which stay
        text.
    """

    def __init__(self, urls: str) -> None:
        super().__init__(path_type=Path)
        self._urls = urls

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a path, or a URL where there may be one."""
        if is_hub(str(value)) and self._urls != "objects":
            if self._urls == "all":
                return value
            self.fail(f"{value} is on the Hub; give a directory here", param, ctx)
        try:
            if self._urls != "none":
                return location(value)
            what = param.make_metavar(ctx) if param is not None and ctx is not None else "path"
            return local_directory(value, what)
        except OptionError as error:
            self.fail(str(error), param, ctx)


PATH = _Place("none")
"""What is written, and other files: a path of this machine."""

PLACE = _Place("objects")
"""A store: a path, or a URL of object storage."""

PATH_OR_URL = _Place("all")
"""What is read: a path, a URL of object storage, or one of the Hugging Face Hub."""


class NameMap(click.ParamType[tuple[str, str]]):
    """A regular expression and its replacement, with ``=`` between."""

    name = "map"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Return the two."""
        if isinstance(value, tuple):
            return value
        # A pattern may hold a "="; names of tensors do not.
        pattern, equals, replacement = value.rpartition("=")
        if not equals or not pattern:
            self.fail(
                f"{value!r} is not PATTERN=REPLACEMENT, like '^transformer=model'", param, ctx
            )
        return pattern, replacement


NAME_MAP = NameMap()


def _remember(attribute: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    """Return a callback that sets a flag of the `Session`."""

    def callback(ctx: click.Context, _param: click.Parameter, value: bool) -> None:  # noqa: FBT001
        session = ctx.find_object(Session)
        if not value or session is None:
            return
        setattr(session, attribute, True)
        if session.debug:
            logging.getLogger("relex_stream").setLevel(logging.DEBUG)
        if session.quiet and session.verbose:
            raise click.UsageError("--quiet and --verbose exclude each other", ctx)

    return callback


def _flag(*names: str, sets: str, help: str) -> Callable[[Function], Function]:  # noqa: A002
    # Eager, so that the session knows before any other value is found wrong.
    return click.option(
        *names, is_flag=True, is_eager=True, expose_value=False, callback=_remember(sets), help=help
    )


debug = _flag("--debug", sets="debug", help="Show tracebacks, and warnings of other packages.")
_json = _flag("--json", sets="json", help="Print the result as one JSON document.")
_quiet = _flag(
    "-q", "--quiet", sets="quiet", help="Say nothing but warnings, errors and what was asked for."
)
_verbose = _flag("-v", "--verbose", sets="verbose", help="Say more: plans, full lists, figures.")


def common(function: Function) -> Function:
    """Add the options that every command has."""
    for option in (debug, _verbose, _quiet, _json):
        function = option(function)
    return function


store_argument = click.argument("store", type=PLACE)

base = click.option(
    "--base",
    type=PATH_OR_URL,
    metavar="DIRECTORY",
    help="Where the base model is now, if not where the store says; may be a URL: "
    "s3://bucket/path, or hf://org/name on the Hugging Face Hub.",
)


def cast(help: str) -> Callable[[Function], Function]:  # noqa: A002
    """Return the option ``--as``, which each command explains in its own words."""
    return click.option("--as", "cast", type=click.Choice(["bf16"]), help=help)


pattern = click.option(
    "--pattern",
    metavar="PATTERN",
    help="Names of the checkpoint directories below CHECKPOINTS, with {step} where the number is, "
    "like 'epoch-{step}'.  [default: those of trainers: global_step_N, checkpoint-N, step_N, ...]",
)

steps = click.option(
    "--steps",
    metavar="STEPS",
    help="Which steps to take: numbers, ranges and ranges with a stride, like 80, 1:75 or "
    "10:500:10, with commas between.  [default: all]",
)

source = click.option(
    "--source",
    type=click.Choice(
        ["auto", "safetensors", "split-safetensors", "fsdp", "dcp", "grail", "changed-safetensors"]
    ),
    default="auto",
    show_default=True,
    help="The format of the checkpoints; auto takes the first that all steps have.",
)

strip_prefix = click.option(
    "--strip-prefix",
    metavar="PREFIX",
    help="What names of tensors in the checkpoints begin with and the base's do not, like "
    "'app.model.'.  [default: found out]",
)

map_names = click.option(
    "--map",
    "map_names",
    type=NAME_MAP,
    multiple=True,
    metavar="PATTERN=REPLACEMENT",
    help="A regular expression and what replaces its matches in names of tensors in the "
    "checkpoints, like '^transformer[.]=model.'. May be given several times.",
)

step_offset = click.option(
    "--step-offset",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="What is added to the numbers of the steps in CHECKPOINTS.",
)

then = click.option(
    "--then",
    type=(PLACE, click.IntRange(min=0)),
    multiple=True,
    metavar="DIR OFFSET",
    help="Another directory of checkpoints, which continues the run, and what is added to the "
    "numbers of its steps. May be given several times.",
)

include_base = click.option(
    "--include-base",
    is_flag=True,
    help="Keep the base's weights in the store too, so that it needs nothing else.",
)

allow_nonfinite = click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Take checkpoints with infinities or NaNs where the base has none.",
)

seed = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="S",
    help="Seed of the random sketches; set when a store is made.",
)

memory_limit = click.option(
    "--memory-limit",
    type=ByteSize(),
    metavar="SIZE",
    help="Most memory the process may use, like 512MiB or 8GB; work that does not fit is refused "
    "before it starts. With a cluster, of each of its processes.  [default: 768MiB, less if less "
    "is free]",
)

workers = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads that work at once.  [default: one per usable core]",
)

_scheduler = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Do the work on a dask cluster: the address of its scheduler, like tcp://host:8786, or "
    "the path of its scheduler file. All its machines see the same paths.",
)

_local_cluster = click.option(
    "--local-cluster",
    type=click.IntRange(min=1),
    metavar="N",
    help="Do the work in N processes of this machine, started for it.",
)


devices = click.option(
    "--devices",
    default="auto",
    show_default=True,
    metavar="DEVICES",
    help="What works on blocks: cpu, cuda (all GPUs), a list such as cuda:0,cuda:2, or auto: what "
    "is projected to be faster.",
)

device_memory_limit = click.option(
    "--device-memory-limit",
    type=ByteSize(),
    metavar="SIZE",
    help="Most memory to take of each GPU.  [default: 0.8 of what is free]",
)


def cluster(function: Function) -> Function:
    """Add the options that say where block tasks run."""
    for option in (_local_cluster, _scheduler):
        function = option(function)
    return function


_overwrite = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace OUT, if it is a model that this program wrote and nothing was added to it.",
)

_dry_run = click.option(
    "--dry-run", is_flag=True, help="Print the plan and its memory; write nothing."
)


def making(function: Function) -> Function:
    """Add the options that say how models are made, which change none of them."""
    for option in (
        cluster,
        _dry_run,
        _overwrite,
        device_memory_limit,
        devices,
        workers,
        memory_limit,
        base,
    ):
        function = option(function)
    return function


exact = click.option(
    "--exact",
    is_flag=True,
    help="Read the weights, instead of the sketches in the store with their standard errors.",
)

history_steps = click.option(
    "--history-steps",
    type=click.IntRange(min=1),
    metavar="K",
    help="Use the stored steps up to step K only.  [default: all]",
)

rank = click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=(1,),
    show_default="1",
    metavar="R",
    multiple=True,
    help="Rank of the subspace of weight deltas. May be given several times.",
)

_svd = click.option(
    "--svd",
    type=click.Choice(["randomized", "exact"]),
    default="randomized",
    show_default=True,
    help="How the subspace is found: from the stored sketches, or from full Gram matrices.",
)

_power_iterations = click.option(
    "--power-iterations",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="Q",
    help="Passes over the store that refine the randomized subspace. One is within 1e-4 of the "
    "exact rank-1 result; take 2 or 3 for higher ranks.",
)

_group_by = click.option(
    "--group-by",
    type=click.Choice(["tensor", "run", "layer", "module", "model"]),
    default="tensor",
    show_default=True,
    help="What has a subspace of its own: each tensor, each run of 1 Mi weights of a tensor, each "
    "layer, each module (the same tensor of all layers), or the whole model.",
)

fit = click.option(
    "--fit",
    default="linear",
    show_default=True,
    metavar="FIT",
    help="How coefficients go on: linear, linear-origin (0 at the base), polynomial:2 (or another "
    "degree) or sinusoid.",
)

window = click.option(
    "--window",
    type=click.IntRange(min=1),
    metavar="W",
    help="Fit through the last W checkpoints; the subspace is still that of all.  [default: all]",
)


def subspace(function: Function) -> Function:
    """Add the options of subspaces and of fits in them."""
    for option in (window, fit, _group_by, _power_iterations, _svd, rank, history_steps):
        function = option(function)
    return function


_include = click.option(
    "--include",
    metavar="PATTERN",
    multiple=True,
    help="Predict tensors whose names match only, like '*.mlp.*'. May be given several times.  "
    "[default: all]",
)

_exclude = click.option(
    "--exclude",
    metavar="PATTERN",
    multiple=True,
    help="Leave out tensors whose names match, like '*norm*'. May be given several times.",
)

_excluded_from = click.option(
    "--excluded-from",
    type=click.Choice(["base", "latest"]),
    default="base",
    show_default=True,
    help="Where tensors that are left out come from: the base, or the last checkpoint used.",
)


def selection(function: Function) -> Function:
    """Add the options that leave tensors out."""
    for option in (_excluded_from, _exclude, _include):
        function = option(function)
    return function
