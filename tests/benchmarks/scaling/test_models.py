"""Models are as large as they should be; their hollow checkpoints are real ones."""

from __future__ import annotations

import pytest

from benchmarks.scaling.models import MODELS, shards, write_hollow
from relex_stream.sources import open_checkpoint
from tests.benchmarks.scaling.small import SMALL


@pytest.mark.parametrize(
    ("name", "weights", "tensors"),
    [
        ("8B", 8_190_735_360, 399),
        ("70B", 70_553_706_496, 723),
        ("405B", 405_853_388_800, 1137),
        ("1T", 1.027e12, 70_000),
    ],
)
def test_models_are_as_large_as_those_they_are_named_after(name, weights, tensors):
    model = MODELS[name]()
    assert model.weights == pytest.approx(weights, rel=0.001)
    assert len(model.shapes) == pytest.approx(tensors, rel=0.005)
    assert sum(len(shapes) for shapes in shards(model)) == len(model.shapes)


def test_hollow_checkpoints_are_read_like_any_other(tmp_path):
    write_hollow(SMALL, tmp_path / "hollow")
    found = open_checkpoint(tmp_path / "hollow", 3)
    assert {name: place.spec.shape for name, place in found.tensors.items()} == SMALL.shapes
    assert found.nbytes > SMALL.nbytes
    assert len(found.weights_files) == len(shards(SMALL)) > 1
