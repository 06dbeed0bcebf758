"""Whole models of every method against the float64 oracle, and what must not change them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray

import relex_stream as rs
from relex_stream import grouping, models, outline, subspaces
from relex_stream.request import check_extrapolation
from relex_stream.sketch import sketch_basis
from tests import oracle
from tests.make_checkpoints import Trajectory, make_trajectory, raw, round_to, write_model
from tests.make_stores import build_store
from tests.test_extrapolate import read_weights, weights_digest

Bits = NDArray[Any]

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (61, 24),
    "model.layers.0.mlp.weight": (96, 131),
    "model.layers.0.mlp.bias": (1009,),
    "model.layers.0.norm.weight": (24,),
    "model.layers.1.mlp.weight": (80, 131),
    "model.layers.1.norm.weight": (40,),
    "scale": (),
}
STEPS = (1, 2, 4, 7, 11, 16, 17, 25, 40, 41, 58, 60)
LAST = STEPS[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    root = tmp_path_factory.mktemp("models")
    return make_trajectory(root, steps=STEPS, tensors=SHAPES, change_share=0.05)


@pytest.fixture(scope="module")
def store(run: Trajectory) -> Path:
    """Sketches for every tensor."""
    path = run.base.parent / "store"
    build_store(run.base, run.checkpoints, path, sketch_min_elements=0)
    return path


Groups = Mapping[str, Sequence[str]]

BY_TENSOR: Groups = {name: [name] for name in SHAPES}
BY_LAYER: Groups = {
    "embed": ["model.embed_tokens.weight"],
    "0": [name for name in SHAPES if ".0." in name],
    "1": [name for name in SHAPES if ".1." in name],
    "scale": ["scale"],
}
BY_MODULE: Groups = {
    "embed": ["model.embed_tokens.weight"],
    "mlp": [name for name in SHAPES if ".mlp." in name],
    "norm": [name for name in SHAPES if "norm" in name],
    "scale": ["scale"],
}
BY_MODEL: Groups = {"model": list(SHAPES)}


class Truth:
    """What the formulas say of a run, with tensors side by side that share a subspace."""

    def __init__(self, run: Trajectory, groups: Groups, steps: Sequence[int] = STEPS) -> None:
        self._bits = run.bits
        self._groups = groups
        self._histories = {
            name: oracle.History(
                self._beside(0, names),
                "BF16",
                [self._beside(step, names) for step in steps],
                "BF16",
                steps,
            )
            for name, names in groups.items()
        }

    def _beside(self, step: int, names: Sequence[str]) -> Bits:
        return np.concatenate([self._bits[step][name].reshape(-1) for name in names])

    def weights(self, make: Callable[[oracle.History], oracle.Prediction]) -> dict[str, Bits]:
        """Return every tensor of a model, from what its group's history predicts."""
        found = {}
        for group, names in self._groups.items():
            bits = make(self._histories[group]).bits
            sizes = [self._bits[0][name].size for name in names]
            parts = np.split(bits, np.cumsum(sizes)[:-1])
            found |= {
                name: part.reshape(self._bits[0][name].shape)
                for name, part in zip(names, parts, strict=True)
            }
        return found


def assert_same_model(found: Mapping[str, Bits], expected: Mapping[str, Bits]) -> None:
    """Hold bits against the oracle's: one weight of 25,000 may be a rounding apart."""
    differing = total = 0
    for name, bits in expected.items():
        distance = oracle.ulp_distance(found[name], bits)
        assert distance.max(initial=0) <= 1, name
        differing += int((distance > 0).sum())
        total += bits.size
    assert differing <= 1 + total // 25_000


# --- extrapolation -------------------------------------------------------------------------------

CURVES: dict[str, tuple[dict[str, Any], oracle.Curve]] = {
    "line": ({}, oracle.line),
    "origin": ({"fit": "linear-origin"}, oracle.line_from_base),
    "parabola": ({"fit": "polynomial:2"}, oracle.polynomial(2)),
    "cubic": ({"fit": "polynomial:3"}, oracle.polynomial(3)),
    "window": ({"window": 5}, oracle.windowed(oracle.line, 5)),
    "window of a parabola": (
        {"fit": "polynomial:2", "window": 6},
        oracle.windowed(oracle.polynomial(2), 6),
    ),
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("rank", [1, 3])
def test_every_fit(run: Trajectory, store: Path, tmp_path: Path, name: str, rank: int) -> None:
    options, curve = CURVES[name]
    rs.extrapolate(store, tmp_path / "out", target_steps=[90], rank=rank, svd="exact", **options)
    truth = Truth(run, BY_TENSOR)
    expected = truth.weights(lambda history: history.predict(90, rank, curve=curve))
    assert_same_model(read_weights(tmp_path / "out"), expected)
    other = truth.weights(lambda history: history.predict(90, rank))
    moved = sum(int((other[key] != expected[key]).sum()) for key in expected)
    assert (moved > 100) == (name != "line")


def test_refits(tmp_path: Path) -> None:
    steps = tuple(range(1, 13))
    run = make_trajectory(tmp_path, steps=steps, tensors=SHAPES, change_share=0.05)
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    truth = Truth(run, BY_TENSOR, steps)
    for window, every in ((6, 4), (12, 1)):
        out = tmp_path / f"{window}"
        rs.extrapolate(
            tmp_path / "store",
            out,
            target_steps=[31],
            svd="exact",
            window=window if window < 12 else None,
            refit_every=every,
        )
        curve = oracle.refitted(oracle.line, window, every)
        expected = truth.weights(lambda history, curve=curve: history.predict(31, 1, curve=curve))
        assert_same_model(read_weights(out), expected)


def test_a_sinusoid_of_whole_weights(tmp_path: Path) -> None:
    # Coefficients that are a sinusoid: deltas a pattern times that, in numbers BF16 has.
    rng = np.random.default_rng(0)
    base, pattern = rng.integers(-8, 8, (2, 30, 40)).astype(np.float64) * 2.0**-4
    steps = tuple(range(1, 21))

    def there(step: int) -> Bits:
        delta = pattern * (np.sin(2 * np.pi * step / 9.3) + 1.5)
        return (base + delta).astype(np.float32).view(np.uint32)

    for step in (0, *steps):
        directory = tmp_path / (f"run/step_{step}" if step else "base")
        bits = base.astype(np.float32).view(np.uint32) if step == 0 else there(step)
        write_model(directory, {"w": raw(bits, "F32")})
    rs.build_store(tmp_path / "base", tmp_path / "run", tmp_path / "store")
    rs.extrapolate(
        tmp_path / "store", tmp_path / "out", target_steps=[33], fit="sinusoid", svd="exact"
    )
    found = read_weights(tmp_path / "out")["w"].view(np.float32).reshape(30, 40)
    np.testing.assert_allclose(found, there(33).view(np.float32), atol=2e-4)


def test_a_sinusoid_that_is_none_is_told_of(store: Path, tmp_path: Path) -> None:
    with pytest.warns(rs.RelexStreamWarning, match="sinusoids could not be refined"):
        rs.extrapolate(store, tmp_path / "out", target_steps=[90], fit="sinusoid")


@pytest.mark.parametrize("anchor", ["base", "latest"])
@pytest.mark.parametrize("damping", [0.3, 1.0, -0.5])
def test_damping_and_anchors(
    run: Trajectory, store: Path, tmp_path: Path, damping: float, anchor: str
) -> None:
    rs.extrapolate(
        store, tmp_path / "out", target_steps=[90], svd="exact", damping=damping, anchor=anchor
    )
    expected = Truth(run, BY_TENSOR).weights(
        lambda history: history.predict(90, 1, damping=damping, anchor=anchor)
    )
    assert_same_model(read_weights(tmp_path / "out"), expected)


def test_no_damping_at_all_is_the_last_checkpoint_or_the_base(
    run: Trajectory, store: Path, tmp_path: Path
) -> None:
    for anchor, step in (("latest", LAST), ("base", 0)):
        rs.extrapolate(store, tmp_path / anchor, target_steps=[90], damping=0, anchor=anchor)
        for name, bits in read_weights(tmp_path / anchor).items():
            np.testing.assert_array_equal(bits, run.bits[step][name])


@pytest.mark.parametrize(
    ("group_by", "groups"), [("layer", BY_LAYER), ("module", BY_MODULE), ("model", BY_MODEL)]
)
@pytest.mark.parametrize("rank", [1, 2])
def test_groups_of_tensors(
    run: Trajectory, store: Path, tmp_path: Path, group_by: str, groups: Groups, rank: int
) -> None:
    expected = Truth(run, groups).weights(lambda history: history.predict(90, rank))
    for svd, passes in (("exact", 1), ("randomized", 3)):
        out = tmp_path / svd
        summary = rs.extrapolate(
            store,
            out,
            target_steps=[90],
            rank=rank,
            svd=svd,
            power_iterations=passes,
            group_by=group_by,
        )
        assert_same_model(read_weights(out), expected)
        changed = [each for each in groups if each != "scale"]
        assert len(changed) <= len(summary.figures) <= len(groups)


def test_a_group_starts_from_the_sketches_of_all_its_tensors(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grams: list[NDArray[np.float64]] = []

    def keep(gram: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
        grams.append(gram)
        return sketch_basis(gram, rank)

    monkeypatch.setattr(subspaces, "sketch_basis", keep)
    rs.extrapolate(store, tmp_path / "all", target_steps=[90], group_by="model", workers=1)
    rs.extrapolate(store, tmp_path / "each", target_steps=[90], workers=1)
    (together, *each) = grams
    assert len(each) > 3
    np.testing.assert_allclose(together, np.sum(each, axis=0), rtol=1e-12)


def test_what_is_copied_does_not_overflow(tmp_path: Path) -> None:
    # Only a norm moves: extrapolated it would leave half precision, copied it does not.
    for step in range(4):
        directory = tmp_path / (f"run/step_{step}" if step else "base")
        tensors = {"model.norm.weight": np.full(64, 1.0 + step), "w": np.ones((8, 8))}
        raws = {
            name: raw(round_to(v.astype(np.float32), "F16"), "F16") for name, v in tensors.items()
        }
        write_model(directory, raws)
    rs.build_store(tmp_path / "base", tmp_path / "run", tmp_path / "store")
    options: dict[str, Any] = {"overwrite": True}
    beside = ["two-point:target=1e6", "expo:alpha=0"]  # the other one is a sum
    summary = rs.combine(tmp_path / "store", tmp_path / "out", recipes=beside, **options)
    for output in summary.outputs:
        np.testing.assert_array_equal(
            read_weights(Path(output.path))["model.norm.weight"],
            round_to(np.full(64, 4.0, np.float32), "F16"),
        )
    recipe = "two-point:target=1e6,norms=extrapolate"
    with pytest.warns(rs.RelexStreamWarning, match="overflow"):
        rs.combine(tmp_path / "store", tmp_path / "out", recipes=[recipe], **options)


def test_runs_of_tensors(run: Trajectory, tmp_path: Path) -> None:
    # Blocks of 512 weights, runs of 1,024.
    store = tmp_path / "store"
    build_store(run.base, run.checkpoints, store, block_bytes=1024)
    with mock.patch.object(grouping, "RUN_ELEMENTS", 1024):
        summary = rs.extrapolate(store, tmp_path / "out", target_steps=[90], group_by="run")
    found = read_weights(tmp_path / "out")
    for name, base in run.bits[0].items():
        for start in range(0, base.size, 1024):
            part = slice(start, start + 1024)
            history = oracle.History(
                base.reshape(-1)[part],
                "BF16",
                [run.bits[step][name].reshape(-1)[part] for step in STEPS],
                "BF16",
                STEPS,
            )
            expected = {name: history.predict(90, 1).bits}
            assert_same_model({name: found[name].reshape(-1)[part]}, expected)
    names = {figure.name for figure in summary.figures}
    assert "model.layers.0.mlp.weight[1024:2048]" in names
    assert "model.layers.0.mlp.weight[12288:12576]" in names
    assert "model.layers.0.mlp.bias" in names


def test_figures_of_a_group_are_those_of_its_deltas(
    run: Trajectory, store: Path, tmp_path: Path
) -> None:
    names = BY_LAYER["0"]
    deltas = np.concatenate(
        [
            np.stack(
                [
                    oracle.values(run.bits[step][name], "BF16").reshape(-1)
                    - oracle.values(run.bits[0][name], "BF16").reshape(-1)
                    for step in STEPS
                ]
            )
            for name in names
        ],
        axis=1,
    )
    left, singular, _ = np.linalg.svd(deltas, full_matrices=False)
    for svd in ("exact", "randomized"):
        summary = rs.extrapolate(
            store,
            tmp_path / svd,
            target_steps=[90],
            rank=3,
            svd=svd,
            power_iterations=4,
            group_by="layer",
        )
        (figure,) = (each for each in summary.figures if each.name == "model.layers.0")
        np.testing.assert_allclose(figure.singular_values, singular[:3], rtol=1e-4)
        shares = np.cumsum(singular**2)[:3] / (singular**2).sum()
        np.testing.assert_allclose(figure.explained_variance, shares, rtol=1e-4)
        line = np.polyval(np.polyfit(STEPS, left[:, 0], 1), STEPS)
        total = ((left[:, 0] - left[:, 0].mean()) ** 2).sum()
        expected = 1 - ((left[:, 0] - line) ** 2).sum() / total
        assert figure.r2[0] == pytest.approx(expected, rel=1e-3)


# --- what is left out ----------------------------------------------------------------------------


@pytest.mark.parametrize("excluded_from", ["base", "latest"])
def test_tensors_that_are_left_out_are_copied(
    run: Trajectory, store: Path, tmp_path: Path, excluded_from: str
) -> None:
    patterns = ("*.layers.1.*", "*embed*")
    summary = rs.extrapolate(
        store,
        tmp_path / "out",
        target_steps=[90, 120],
        svd="exact",
        exclude=patterns,
        excluded_from=excluded_from,
    )
    assert summary.excluded_tensors == 3
    expected = Truth(run, BY_TENSOR).weights(lambda history: history.predict(90, 1))
    step = 0 if excluded_from == "base" else LAST
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.weight"):
        expected[name] = run.bits[step][name]
    found = read_weights(tmp_path / "out" / "step_90")
    assert_same_model(found, expected)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.weight"):
        np.testing.assert_array_equal(found[name], run.bits[step][name])
    assert {figure.name for figure in summary.figures} <= set(SHAPES) - {
        "model.embed_tokens.weight",
        "model.layers.1.mlp.weight",
    }
    record = json.loads((tmp_path / "out" / "relex_stream.json").read_text())
    assert record["exclude"] == list(patterns)
    card = (tmp_path / "out" / "step_90" / "README.md").read_text()
    assert f"those of the {'base' if excluded_from == 'base' else 'last checkpoint'}" in card


def test_what_is_left_out_does_not_count_in_a_shared_subspace(
    run: Trajectory, store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    rs.extrapolate(
        store, out, target_steps=[90], svd="exact", group_by="model", include=["*.mlp.*"]
    )
    names = [name for name in SHAPES if ".mlp." in name]
    expected = Truth(run, {"mlp": names}).weights(lambda history: history.predict(90, 1))
    found = read_weights(out)
    assert_same_model(found, expected)
    for name in set(SHAPES) - set(names):
        np.testing.assert_array_equal(found[name], run.bits[0][name])


@pytest.mark.parametrize("base_dtype", ["BF16", "F16"])
def test_a_copy_of_wider_checkpoints_is_rounded_once(tmp_path: Path, base_dtype: str) -> None:
    rng = np.random.default_rng(0)
    narrow = torch.bfloat16 if base_dtype == "BF16" else torch.float16
    base = torch.from_numpy(rng.standard_normal(5000)).to(narrow)
    patterns = rng.integers(0, 1 << 32, 5000, dtype=np.uint32)
    special = [0x7F800000, 0xFF800000, 0x7F800001, 0xFFC12345, 0x80000000, 1, 0x477FF000]
    patterns[: len(special)] = special
    for step, values in ((1, base.float() * 1.5), (2, torch.from_numpy(patterns.view(np.float32)))):
        directory = tmp_path / f"run/step_{step}"
        directory.mkdir(parents=True)
        tensors = {"w": values.clone(), "v": values.clone()}
        safetensors.torch.save_file(tensors, directory / "model.safetensors")
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(
        {"w": base.clone(), "v": base.clone()}, tmp_path / "base" / "model.safetensors"
    )
    store = tmp_path / "store"
    rs.build_store(tmp_path / "base", tmp_path / "run", store, allow_nonfinite=True)
    options: dict[str, Any] = {"exclude": ["w"], "excluded_from": "latest"}
    with pytest.warns(rs.RelexStreamWarning):
        rs.extrapolate(store, tmp_path / "out", target_steps=[3], **options)
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")["w"]
    expected = torch.from_numpy(patterns.view(np.float32)).to(narrow)
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int16), expected[~nan].view(torch.int16))


# --- reconstruction ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_step_projected_into_its_subspace(
    run: Trajectory, store: Path, tmp_path: Path, rank: int
) -> None:
    rs.reconstruct(store, tmp_path / "out", steps=[25], rank=rank, svd="exact")
    truth = Truth(run, BY_TENSOR)
    expected = truth.weights(lambda history: history.project(25, rank))
    assert_same_model(read_weights(tmp_path / "out"), expected)


def test_a_step_on_the_fitted_line(run: Trajectory, store: Path, tmp_path: Path) -> None:
    rs.reconstruct(store, tmp_path / "out", steps=[25, 60], fitted=True, svd="exact", window=6)
    truth = Truth(run, BY_TENSOR)
    curve = oracle.windowed(oracle.line, 6)
    for step in (25, 60):
        expected = truth.weights(lambda history, step=step: history.predict(step, 1, curve=curve))
        assert_same_model(read_weights(tmp_path / "out" / f"step_{step}"), expected)


def test_in_full_rank_a_step_is_itself(run: Trajectory, store: Path, tmp_path: Path) -> None:
    rs.reconstruct(store, tmp_path / "out", steps=[25], rank=len(STEPS), svd="exact")
    assert_same_model(read_weights(tmp_path / "out"), run.bits[25])


# --- combinations --------------------------------------------------------------------------------


def test_combinations(run: Trajectory, store: Path, tmp_path: Path) -> None:
    recipes = ["lawa:last=3", "expo:alpha=0.5", "ema:decay=0.8"]
    summary = rs.combine(
        store, tmp_path / "out", recipes=recipes, weights=["7=0.25,25=1.5"], exclude=["scale"]
    )
    values = {
        step: {name: oracle.values(bits, "BF16") for name, bits in run.bits[step].items()}
        for step in run.bits
    }

    def average(name: str) -> NDArray[np.float64]:
        found = values[0][name]
        for step in STEPS:
            found = 0.8 * found + 0.2 * values[step][name]
        return found

    formulas: list[Callable[[str], NDArray[np.float64]]] = [
        lambda name: np.mean([values[step][name] for step in STEPS[-3:]], axis=0),
        lambda name: values[LAST][name] + 0.5 * (values[LAST][name] - values[0][name]),
        average,
        lambda name: -0.75 * values[0][name] + 0.25 * values[7][name] + 1.5 * values[25][name],
    ]
    assert len(summary.outputs) == 4
    for output, formula in zip(summary.outputs, formulas, strict=True):
        expected = {
            name: np.where(
                np.all([run.bits[step][name] == bits for step in STEPS], axis=0),
                bits,
                oracle.rounded(formula(name), "BF16"),
            ).astype(bits.dtype)
            for name, bits in run.bits[0].items()
            if name != "scale"
        }
        found = read_weights(Path(output.path))
        # Sums of rounded numbers are ties far more often than those of an extrapolation; which
        # way they go is float64's last bit.
        for name, bits in expected.items():
            distance = oracle.ulp_distance(found[name], bits)
            assert distance.max(initial=0) <= 1
            assert (distance > 0).mean() < 0.01
        np.testing.assert_array_equal(found["scale"], run.bits[0]["scale"])
        record = json.loads((Path(output.path) / "relex_stream.json").read_text())
        assert record["weights"] == {str(k): v for k, v in output.what["weights"].items()}
        assert record["recipe"] in (Path(output.path) / "README.md").read_text()


def test_two_points_leave_norms_where_they_were(
    run: Trajectory, store: Path, tmp_path: Path
) -> None:
    rs.combine(store, tmp_path / "out", recipes=["two-point:target=90,from=11,to=41"])
    found = read_weights(tmp_path / "out")
    for name in SHAPES:
        old, new = (oracle.values(run.bits[step][name], "BF16") for step in (11, 41))
        if "norm" in name:
            np.testing.assert_array_equal(found[name], run.bits[41][name])
            continue
        expected = oracle.rounded(old + (90 - 11) / (41 - 11) * (new - old), "BF16")
        distance = oracle.ulp_distance(found[name], expected)
        assert distance.max(initial=0) <= 1
        assert (distance > 0).mean() < 1e-3


def test_one_checkpoint_alone_is_that_checkpoint(
    run: Trajectory, store: Path, tmp_path: Path
) -> None:
    rs.combine(store, tmp_path / "out", weights=["25=1"])
    for name, bits in read_weights(tmp_path / "out").items():
        np.testing.assert_array_equal(bits, run.bits[25][name])


# --- as the authors' scripts ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trajectory, Path]:
    """F32 checkpoints, which half precision rounds (BF16 ones mostly fit it), and their store."""
    root = tmp_path_factory.mktemp("wide")
    run = make_trajectory(root, steps=STEPS, tensors=SHAPES, dtype="F32", base_dtype="BF16")
    build_store(run.base, run.checkpoints, root / "store", sketch_min_elements=0)
    return run, root / "store"


def values_at(run: Trajectory, step: int, name: str) -> NDArray[np.float64]:
    dtype = run.dtype if step else run.base_dtype
    return oracle.values(run.bits[step][name], dtype).reshape(-1)


def relex_deltas(run: Trajectory, name: str) -> NDArray[np.float16]:
    """Return ``fp16(theta_t) - fp16(theta_0)``, subtracted in fp16."""
    base, *others = (values_at(run, step, name).astype(np.float16) for step in (0, *STEPS))
    return np.stack([other - base for other in others])


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 1.0), ({"step_scale": 2.0}, 2.0), ({"window": 5}, 1.0), ({"fit": "polynomial:2"}, 1.0)],
)
def test_as_the_authors_scripts(
    wide: tuple[Trajectory, Path], tmp_path: Path, svd: str, options: dict[str, Any], scale: float
) -> None:
    run, store = wide
    rs.extrapolate(
        store,
        tmp_path / "out",
        target_steps=[90],
        rank=2,
        svd=svd,
        power_iterations=3,
        compat="relex",
        **options,
    )
    found = read_weights(tmp_path / "out")
    rows, differing, plain = len(STEPS), 0, 0
    window = options.get("window", rows)
    degree = 2 if "fit" in options else 1
    for name, base in run.bits[0].items():
        deltas = relex_deltas(run, name).astype(np.float64)
        left, singular, _ = np.linalg.svd(deltas, full_matrices=False)
        kept = int((singular[:2] > 1e-6 * singular.max(initial=0)).sum())
        right = deltas.T @ left[:, :kept] / singular[:kept]
        target = window - 1 + (round(90 * scale) - LAST)
        parameters = np.polyfit(np.arange(window), (deltas @ right)[-window:], degree)
        there = np.array([np.polyval(column, target) for column in parameters.T])
        origin = values_at(run, 0, name)
        expected = oracle.rounded(origin + right @ there, "BF16").reshape(base.shape)
        differing += int((oracle.ulp_distance(found[name], expected) > 0).sum())
        plain += int((values_at(run, LAST, name) - origin != deltas[-1]).sum())
    total = sum(base.size for base in run.bits[0].values())
    assert differing <= 1e-4 * total
    assert plain > 0.5 * total  # deltas in half precision are others


def test_the_authors_way_does_not_depend_on_what_is_kept_between_sweeps(
    store: Path, tmp_path: Path
) -> None:
    digests = []
    for svd in ("exact", "randomized"):
        options: dict[str, Any] = {"target_steps": [90], "svd": svd, "compat": "relex"}
        for capacity in (1, 300, 1 << 20):
            out = tmp_path / f"{svd}{capacity}"
            models.make_models(
                store,
                out,
                lambda opened, asked=options: [check_extrapolation(opened, **asked)],
                models.RunOptions(entry_capacity=capacity),
            )
            digests.append(weights_digest(out))
        assert digests[-3] == digests[-2] == digests[-1]


# --- many models at once -------------------------------------------------------------------------

MANY: dict[str, Any] = {
    "target_steps": [90, 200],
    "rank": [1, 3],
    "damping": [0.3, 1.0],
    "anchor": ["base", "latest"],
}


def test_models_written_together_are_the_single_ones_bit_for_bit(
    store: Path, tmp_path: Path
) -> None:
    summary = rs.extrapolate(store, tmp_path / "many", **MANY, power_iterations=2)
    assert len(summary.outputs) == 16
    for output in summary.outputs[::3]:
        what = dict(output.what)
        out = tmp_path / "single"
        # The basis depends on the highest rank asked for: exact statistics do not.
        rs.extrapolate(
            store,
            out,
            target_steps=[what.pop("target_step")],
            **what,
            power_iterations=2,
            overwrite=True,
        )
        single, together = read_weights(out), read_weights(Path(output.path))
        if output.what["rank"] == 3:
            for name, bits in single.items():
                np.testing.assert_array_equal(bits, together[name])
    index = json.loads((tmp_path / "many" / "relex_stream.json").read_text())
    assert [each["path"] for each in index["outputs"]] == [
        str(Path(output.path).relative_to(tmp_path / "many")) for output in summary.outputs
    ]
    assert index["outputs"][5] == {
        "path": "step_90/rank_3/damping_0.3/anchor_latest",
        **summary.outputs[5].what,
    }


@pytest.mark.parametrize("at_once", [1, 5])
def test_how_many_are_written_in_a_pass_changes_no_bit(
    store: Path, tmp_path: Path, at_once: int
) -> None:
    options: dict[str, Any] = {**MANY, "exclude": ["scale"], "excluded_from": "latest"}
    rs.extrapolate(store, tmp_path / "together", **options)
    with mock.patch.object(outline, "OUTPUTS_AT_ONCE", at_once):
        summary = rs.extrapolate(store, tmp_path / "passes", **options)
    names = [stage.name for stage in summary.plan.stages if stage.name.startswith("write")]
    assert len(names) == -(-16 // at_once)
    assert names[-1] == ("write outputs 16 to 16 of 16")
    assert weights_digest(tmp_path / "passes") == weights_digest(tmp_path / "together")


def test_where_memory_is_short_fewer_are_written_in_a_pass(store: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**MANY, "dry_run": True, "workers": 1}
    plan = rs.extrapolate(store, tmp_path / "out", **options).plan
    stages = [stage for stage in plan.stages if stage.name.startswith("write")]
    assert len(stages) == 1
    # So little less that the plan of all at once does not fit.
    least = plan.projected_bytes - 1
    with mock.patch.object(
        outline.planner, "write_worker_bytes", lambda *arguments: 50_000_000 * arguments[2]
    ):
        few = rs.extrapolate(store, tmp_path / "out", **options, memory_limit=least + 120_000_000)
    passes = [stage for stage in few.plan.stages if stage.name.startswith("write")]
    assert [stage.name for stage in passes][:1] == ["write outputs 1 to 2 of 16"]
    assert len(passes) == 8
    assert few.plan.projected_bytes <= few.plan.memory_limit_bytes


@pytest.mark.parametrize("group_by", ["layer", "run", "model"])
def test_the_number_of_workers_changes_no_bit(store: Path, tmp_path: Path, group_by: str) -> None:
    digests = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        rs.extrapolate(
            store, out, target_steps=[90], group_by=group_by, workers=workers, anchor="latest"
        )
        digests.append(weights_digest(out))
    assert digests[0] == digests[1] == digests[2]
