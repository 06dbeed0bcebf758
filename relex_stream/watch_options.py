"""What a watch is told: how steps are appended, what is waited for, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from relex_stream.errors import OptionError


class BuildOptions(TypedDict, total=False):
    """How steps are appended: arguments of `build_store`."""

    pattern: str | None
    source: str
    strip_prefix: str | None
    map_names: Sequence[tuple[str, str]]
    cast: str | None
    include_base: bool
    allow_nonfinite: bool
    seed: int
    memory_limit: int | None
    workers: int | None


@dataclass(frozen=True)
class WatchOptions:
    """What is watched for, and what becomes of it; `relex_stream.api.watch` says more."""

    steps: str | None = None
    settle_s: float = 30.0
    poll_s: float = 10.0
    give_up_s: float | None = None
    delete_ingested: bool = False
    base_kept_elsewhere: bool = False
    keep_every: int | None = None
    keep_last: int = 1
    until: int | None = None
    once: bool = False
    idle_exit_s: float | None = None
    on_commit: Sequence[str] = ()
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("settle_s", "poll_s", "give_up_s", "idle_exit_s", "keep_last"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                option = name.removesuffix("_s").replace("_", "-")
                raise OptionError(f"--{option} must be a number of 0 or more, not {value}")
        for name in ("keep_every", "until"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")


BUILD_DEFAULTS: BuildOptions = {
    "pattern": None,
    "include_base": False,
    "allow_nonfinite": False,
    "seed": 0,
    "memory_limit": None,
    "workers": None,
}
"""What `build` has no defaults for."""
