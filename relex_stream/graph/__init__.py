"""Stages as graphs of tasks, and where they run: threads of this process, or a dask cluster.

The only package that imports dask. A stage says what is done with the blocks of a tensor
(`stages`), a graph which of them are one task and how their results add up (`tasks`); an executor
runs it (`threads`, `cluster`), and `connect` says which one. Sums are trees of fan-in 8 over the
same leaves wherever they run, so that results do not depend on how many workers there are, where,
or which is faster.
"""

from relex_stream.graph.connect import open_executor
from relex_stream.graph.lazy import lazy_array
from relex_stream.graph.stages import Group, Stage, grouped, run_in_order
from relex_stream.graph.threads import Executor, Fetcher, Threads, one_blas_thread

__all__ = [
    "Executor",
    "Fetcher",
    "Group",
    "Stage",
    "Threads",
    "grouped",
    "lazy_array",
    "one_blas_thread",
    "open_executor",
    "run_in_order",
]
