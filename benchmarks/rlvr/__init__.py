"""The ``rlvr`` command: small models trained by reinforcement learning with verifiable rewards.

Each named run trains a tiny Qwen2 model on a task whose answers can be verified exactly, first by
example until it solves about half of the problems, then by GRPO, with a checkpoint per step. What
is kept of a run is a relex-stream store of its checkpoints and a record of what they are worth on
held-out problems. The runs that are committed here serve to study when extrapolation helps.

`main` is the command. `runs` has the named runs, how they were tuned, and what reads a committed
one; `recording` makes a run, `training` teaches, `checkpoints` rounds and saves, `tasks` asks and
verifies, `settings` lists what decides the course of a run.
"""

from benchmarks.rlvr.main import command

__all__ = ["command"]
