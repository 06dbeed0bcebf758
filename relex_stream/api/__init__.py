"""What Python callers and the commands use; everything else is inside.

All functions take paths as ``str`` or ``Path`` and raise `RelexStreamError` for what the user can
mend. Sizes are bytes. `progress` is any object with the methods of `specs.Progress`.
"""

from relex_stream.api.arguments import AnyPath, RunArguments
from relex_stream.api.models import combine, extrapolate, reconstruct, sweep
from relex_stream.api.stores import (
    build_store,
    drop,
    export,
    export_steps,
    info,
    open_store,
    verify,
)
from relex_stream.api.trajectories import analyze, backtest, report
from relex_stream.api.watching import watch
from relex_stream.opened import OpenStore

__all__ = [
    "AnyPath",
    "OpenStore",
    "RunArguments",
    "analyze",
    "backtest",
    "build_store",
    "combine",
    "drop",
    "export",
    "export_steps",
    "extrapolate",
    "info",
    "open_store",
    "reconstruct",
    "report",
    "sweep",
    "verify",
    "watch",
]
