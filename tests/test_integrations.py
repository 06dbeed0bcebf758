"""The callback for Hugging Face's Trainer: what it saves is stored, and nothing disturbs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import relex_stream as rs
from relex_stream.errors import RelexStreamWarning
from tests.crash.runs import tiny_trajectory
from tests.test_export import digests

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def found_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def callback_of(*arguments: Any, **options: Any) -> Any:
    # transformers takes seconds, which other tests need not wait for.
    from relex_stream.integrations.hf import RelexStreamCallback

    return RelexStreamCallback(*arguments, **options)


def tiny_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def train(tmp_path: Path, callback: Any) -> Any:
    import torch
    from transformers import Trainer, TrainingArguments

    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    rows = torch.arange(32 * 8).reshape(32, 8) % 64
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=6,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[callback],
    )
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("default")
def test_a_real_run_is_stored_as_it_is_saved(tmp_path):
    import torch
    from safetensors.torch import load_file

    from relex_stream.integrations.hf import RelexStreamCallback

    store = tmp_path / "run.store"
    kept = []

    class Noting(RelexStreamCallback):
        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            kept.append((state.global_step, digests(directory)))
            super().on_save(args, state, control, **rest)

    callback = Noting(tmp_path / "base", store, options=["--delete-ingested", "--include-base"])
    trainer = train(tmp_path, callback)
    assert rs.open_store(store).steps == (2, 4, 6)
    for step, expected in kept:
        exported = rs.export(store, tmp_path / f"export-{step}", step=step)
        sums = {file.path: file.sha256 for file in exported.files}
        assert "model.safetensors" in sums
        assert "trainer_state.json" in sums
        assert sums.items() <= expected.items()
    left = sorted(path.parent.name for path in (tmp_path / "out").rglob("model.safetensors"))
    assert left == ["checkpoint-6"]
    # What was stored last is what was trained.
    written = load_file(tmp_path / "export-6" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(written[name], trainer.model.state_dict()[name])


STATE = SimpleNamespace(is_world_process_zero=True, global_step=1)


@pytest.fixture
def made(tmp_path) -> tuple[Path, Any]:
    run = tiny_trajectory(tmp_path, range(1, 3))
    return run.base, SimpleNamespace(output_dir=str(run.checkpoints))


def test_other_processes_do_nothing(tmp_path, made):
    base, arguments = made
    callback = callback_of(base, tmp_path / "run.store")
    state = SimpleNamespace(is_world_process_zero=False, global_step=1)
    callback.on_save(arguments, state, None)
    callback.on_train_end(arguments, state, None)
    assert not (tmp_path / "run.store").exists()


def test_training_does_not_wait_and_the_end_of_it_does(tmp_path, made, monkeypatch):
    base, arguments = made
    callback = callback_of(os.path.relpath(base), tmp_path / "run.store")
    began = time.monotonic()
    callback.on_save(arguments, STATE, None)
    monkeypatch.chdir(tmp_path)  # as a trainer may
    assert time.monotonic() - began < 0.5
    callback.on_train_end(arguments, STATE, None)
    assert rs.open_store(tmp_path / "run.store").steps == (1, 2)


def test_what_goes_wrong_is_a_warning_with_the_way_out(tmp_path, made):
    _, arguments = made
    callback = callback_of(tmp_path / "nowhere", tmp_path / "run.store")
    callback.on_save(arguments, STATE, None)
    with pytest.warns(RelexStreamWarning) as caught:
        callback.on_train_end(arguments, STATE, None)
    told, missing = (str(warning.message) for warning in caught)
    assert "ended with exit status 2: error: " in told
    assert "nowhere: no such directory" in told
    assert f"run: {sys.executable} -m relex_stream watch " in told
    assert missing.endswith("run.store lacks 1")


def test_a_process_that_cannot_be_started_is_a_warning(tmp_path, made, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    base, arguments = made
    monkeypatch.setattr(subprocess, "Popen", refuse)
    callback = callback_of(base, tmp_path / "run.store")
    callback.on_save(arguments, STATE, None)
    with pytest.warns(RelexStreamWarning) as caught:
        callback.on_train_end(arguments, STATE, None)
    assert "not being stored: no more processes" in str(caught[0].message)


class FakeProcess:
    """Takes a second, and does nothing."""

    pid = os.getpid()
    started = 0

    def __init__(self, command: list[str], **_: object) -> None:
        type(self).started += 1

    def wait(self) -> int:
        time.sleep(1)
        return 0


@pytest.fixture
def fake_processes(monkeypatch: pytest.MonkeyPatch) -> type[FakeProcess]:
    class Counted(FakeProcess):
        pass

    monkeypatch.setattr(subprocess, "Popen", Counted)
    monkeypatch.setattr(os, "setpriority", lambda *_: None)
    return Counted


def test_what_was_deleted_before_it_was_stored_is_warned_of(tmp_path, made, fake_processes):
    base, arguments = made
    rs.build_store(base, arguments.output_dir, tmp_path / "run.store", steps="2", workers=1)
    callback = callback_of(base, tmp_path / "run.store")
    for step in (1, 2):
        state = SimpleNamespace(is_world_process_zero=True, global_step=step)
        callback.on_save(arguments, state, None)
    with pytest.warns(RelexStreamWarning, match=r"of the steps that were saved, .* lacks 1$"):
        callback.on_train_end(arguments, STATE, None)
    # One for both, or one for each: never two at a time, and one after the last was saved.
    assert 1 <= fake_processes.started <= 2


def test_the_end_of_training_waits_no_longer_than_asked(tmp_path, made, fake_processes):
    base, arguments = made
    callback = callback_of(base, tmp_path / "run.store", finish_s=0.1)
    callback.on_save(arguments, STATE, None)
    began = time.monotonic()
    with pytest.warns(RelexStreamWarning) as caught:
        callback.on_train_end(arguments, STATE, None)
    assert time.monotonic() - began < 0.9
    assert "within 0.1 s of the end" in str(caught[0].message)
    assert fake_processes.started == 1


def test_the_package_does_without_the_trainer_and_says_what_to_install():
    code = (
        "import sys, relex_stream, relex_stream.integrations, relex_stream.api\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "from relex_stream.errors import MissingDependencyError\n"
        "try:\n    import relex_stream.integrations.hf\n"
        "except MissingDependencyError as error:\n    assert 'install transformers' in str(error)\n"
        "else:\n    raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
