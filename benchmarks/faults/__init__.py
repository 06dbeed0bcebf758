"""The ``faults`` command: break files, disks and processes on purpose, and count what was lost.

The harnesses live in ``tests/``, where a small sample of each runs with every change; here they run
in full, with counts as figures. Run it in a checkout::

    python -m benchmarks faults formats --json formats.json

`formats` knows how other formats are written and read, `damage` damages their files.
"""

from benchmarks.faults.main import command

__all__ = ["command"]
