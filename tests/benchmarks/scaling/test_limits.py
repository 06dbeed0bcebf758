"""The least memory limit is the least."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.scaling.graphs import describe
from benchmarks.scaling.limits import least_limit, plan_build, plan_extrapolate
from relex_stream.errors import MemoryLimitError
from tests.benchmarks.scaling.small import SMALL


@pytest.mark.parametrize("plan", [plan_build, plan_extrapolate])
def test_the_least_limit_is_the_least(plan):
    tensors = describe(SMALL)
    arguments = (SMALL.nbytes, 100) if plan is plan_build else (100,)
    planned = partial(plan, tensors, *arguments, threads=4)
    limit = least_limit(planned, 4)
    assert planned(limit).workers == 4
    assert planned(limit).projected_bytes <= limit
    assert planned(limit - (1 << 20)).workers < 4
    with pytest.raises(MemoryLimitError):
        planned(100 << 20)
