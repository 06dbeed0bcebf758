"""A device that is none: torch on the CPU, to test the benchmark where there is no GPU.

Processes are told of it by a program in place of ``-m relex_stream``, or by a worker's preload.
"""

from __future__ import annotations

import os
from pathlib import Path

from relex_stream import devices
from relex_stream.devices import Device

PRETEND_NOTE = (
    "PRETEND DEVICES: no GPU was used. What is called a device here is torch on the CPU, sizes are "
    "tiny, and the figures mean nothing."
)
PRETEND = Device("pretend device", "cpu", 1 << 30)
PRETEND_PROGRAM = "from benchmarks.devices.pretend import pretend_main; pretend_main()"
PRETEND_WORKER = "from benchmarks.devices.pretend import pretend_here\n\npretend_here()\n"
_CHECKOUT = Path(__file__).resolve().parents[2]


def pretend_here() -> None:
    """Have this process find a pretend device and nothing else."""
    devices.find_devices = lambda *_: (PRETEND,)


def pretend_main() -> None:
    """Run relex-stream's command line with a pretend device."""
    from relex_stream.cli.main import main  # it reads sys.argv

    pretend_here()
    main()


def environment() -> dict[str, str]:
    """Return the environment of a process that has to find this checkout, and its benchmarks."""
    paths = [str(_CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)}
