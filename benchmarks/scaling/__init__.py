"""The ``scaling`` command: what larger models, more checkpoints and more nodes would take.

Nothing here reads a weight. Models are lists of tensors; their checkpoints are files with real
headers and holes for weights. The tables, stages, groups and graphs made of them are those that
the commands make; a real scheduler, in a process of its own, hands out the tasks of such graphs to
real workers, which do nothing or wait as long as the work would take. What times and bandwidths
make of that for other machines is arithmetic, and said to be.

`main` has the options and the order of things. `models` are the shapes, `graphs` what the commands
make of them, `client` and `cluster` what is measured; `limits` and `projection` are the arithmetic,
`figures` what it takes as given.
"""

from benchmarks.scaling.main import command

__all__ = ["command"]
