"""Keep an RLVR trajectory losslessly in a small store, and answer for any step of it.

``build_store`` compresses a base model and its checkpoints, ``export`` gives a stored step back
byte for byte, ``extrapolate`` predicts a later one (RELEX, arXiv 2605.21468), ``reconstruct``
projects a stored one into its subspace, ``combine`` sums stored ones, ``sweep`` does any of it for
grids of settings; ``watch`` follows a run while it is trained. ``import relex_stream`` loads
nothing heavy: each public name is imported when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from relex_stream._version import __version__

if TYPE_CHECKING:
    from relex_stream.api import (
        OpenStore,
        analyze,
        backtest,
        build_store,
        combine,
        drop,
        export,
        export_steps,
        extrapolate,
        info,
        open_store,
        reconstruct,
        report,
        sweep,
        verify,
        watch,
    )
    from relex_stream.errors import (
        ClusterError,
        CorruptionError,
        DeviceError,
        FitError,
        ForecastWarning,
        MemoryLimitError,
        MissingDependencyError,
        OptionError,
        OutputError,
        RelexStreamError,
        RelexStreamWarning,
        RemoteError,
        SourceError,
        StoreBusyError,
        StoreError,
        TrajectoryError,
    )

__all__ = [
    "ClusterError",
    "CorruptionError",
    "DeviceError",
    "FitError",
    "ForecastWarning",
    "MemoryLimitError",
    "MissingDependencyError",
    "OpenStore",
    "OptionError",
    "OutputError",
    "RelexStreamError",
    "RelexStreamWarning",
    "RemoteError",
    "SourceError",
    "StoreBusyError",
    "StoreError",
    "TrajectoryError",
    "__version__",
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

_HOMES = {
    "relex_stream.api": (
        "OpenStore",
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
    ),
    "relex_stream.errors": tuple(name for name in __all__ if name.endswith(("Error", "Warning"))),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module that defines `name` and bind all public names of that module here."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(home)
    for exported in _HOMES[home]:
        globals()[exported] = getattr(module, exported)
    return globals()[name]


def __dir__() -> list[str]:
    """List the public names, whether or not they have been imported yet."""
    return sorted({*globals(), *__all__})
