"""What must be the same wherever tasks run: versions of everything that touches a bit."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

from relex_stream._version import __version__

_PACKAGES = ("numpy", "numba", "numcodecs", "safetensors", "google-crc32c", "dask", "distributed")


@cache
def versions() -> dict[str, str]:
    """Return versions by name; of this package also a digest of its source.

    A checkout on which somebody works has one version for many states.
    """
    found = {"python": platform.python_version(), "relex-stream": f"{__version__}+{_digest()}"}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _digest() -> str:
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def difference(here: dict[str, str], there: dict[str, str]) -> str:
    """Return what differs, for people; nothing if nothing does.

    Examples
    --------
    >>> difference({"numpy": "2.4.6", "dask": "2026.8.0"}, {"numpy": "2.4.5", "dask": "2026.8.0"})
    'numpy 2.4.5 (here 2.4.6)'
    """
    return ", ".join(
        f"{name} {there.get(name, 'none')} (here {version})"
        for name, version in here.items()
        if there.get(name) != version
    )
