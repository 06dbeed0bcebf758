"""Make a run: a base, a checkpoint per step, the store and the record of them.

The policy is the float32 master copy, which starts from the bf16 base widened; a checkpoint is the
masters rounded to bf16, as a trainer hands them to its inference engine.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from transformers import Qwen2ForCausalLM

import relex_stream as rs
from benchmarks.rlvr.checkpoints import RoundedCopy
from benchmarks.rlvr.runs import accuracy
from benchmarks.rlvr.settings import Settings
from benchmarks.rlvr.tasks import TASKS
from benchmarks.rlvr.training import build_model, reinforce, supervise
from relex_stream.demo.task import Split, build_tokenizer

STORE, BASE, CHECKPOINTS, RECORD = "store", "base", "checkpoints", "trajectory.json"
"""What a run leaves in its directory; base and checkpoints only if they are to be kept."""

ACCURACY_STEPS = 10
"""Steps between two accuracies on the held-out problems."""


def record_run(
    out_dir: Path, settings: Settings, *, log_every: int = 5, keep_checkpoints: bool = False
) -> dict[str, Any]:
    """Train, keep the checkpoints in a store, and write down what they are worth.

    Parameters
    ----------
    out_dir : Path
        Created; must not hold an earlier run.
    settings : Settings
        The run's.
    log_every : int
        Steps between two lines of progress, each with the accuracy on the validation split.
    keep_checkpoints : bool
        Leave the directories of base and checkpoints too.

    Returns
    -------
    dict
        What ``trajectory.json`` holds.

    Raises
    ------
    FileExistsError
        If `out_dir` exists.
    BenchmarkError
        If the supervised phase does not reach its target.
    """
    out_dir.mkdir(parents=True)
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    with _deterministic(settings.threads):
        record = _train(out_dir, settings, log_every=log_every)
        rs.build_store(
            out_dir / BASE,
            out_dir / CHECKPOINTS,
            out_dir / STORE,
            steps=settings.stored_steps,
            include_base=True,
        )
        record["held_out_accuracy"] = _held_out_accuracy(out_dir, settings)
    record["elapsed_s"] = round(time.perf_counter() - started, 1)
    record["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (out_dir / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not keep_checkpoints:
        shutil.rmtree(out_dir / BASE)
        shutil.rmtree(out_dir / CHECKPOINTS)
    return record


def checkpoint_directory(out_dir: Path, step: int) -> Path:
    """Return where a step's model is, as a trainer lays it out; step 0 is the base."""
    if step == 0:
        return out_dir / BASE
    return out_dir / CHECKPOINTS / f"global_step_{step}" / "huggingface"


def _train(out_dir: Path, settings: Settings, *, log_every: int) -> dict[str, Any]:
    """Make base and checkpoints; return what the training itself says."""
    torch.manual_seed(settings.seed)
    task = TASKS[settings.task]
    tokenizer = build_tokenizer(task.symbols, longest=task.prompt_tokens + task.completion_tokens)
    model = build_model(settings)
    supervised_steps = supervise(model, tokenizer, settings)
    rounded = RoundedCopy(model, tokenizer)
    rounded.widen_into_masters()
    rounded.save(checkpoint_directory(out_dir, 0))
    click.echo(f"base after {supervised_steps} supervised steps")
    rows = list(_checkpoints(out_dir, model, rounded, settings, log_every=log_every))
    return {
        "settings": asdict(settings),
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "supervised_steps": supervised_steps,
        "mean_changed_share": sum(row["changed_share"] for row in rows) / len(rows),
        "train_reward": [round(row["train_reward"], 5) for row in rows],
    }


def _checkpoints(
    out_dir: Path,
    model: Qwen2ForCausalLM,
    rounded: RoundedCopy,
    settings: Settings,
    *,
    log_every: int,
) -> Iterator[dict[str, Any]]:
    """Reinforce, save a checkpoint per step, print; yield each step's reward and changed share."""
    started = time.perf_counter()
    for step, train_reward in reinforce(model, rounded.tokenizer, settings):
        row = {"train_reward": train_reward, "changed_share": rounded.refresh()}
        directory = checkpoint_directory(out_dir, step)
        rounded.save(directory)
        if step % log_every == 0:
            click.echo(
                f"step {step}: reward {train_reward:.3f}, "
                f"validation {_accuracy(directory, settings, 'validation'):.3f}, "
                f"changed {row['changed_share']:.2%}, {time.perf_counter() - started:.0f} s"
            )
        yield row


def _held_out_accuracy(out_dir: Path, settings: Settings) -> dict[int, float]:
    """Return the accuracy of the base and of each tenth step."""
    return {
        step: _accuracy(checkpoint_directory(out_dir, step), settings, "held-out")
        for step in range(0, settings.steps + 1, ACCURACY_STEPS)
    }


def _accuracy(model_directory: Path, settings: Settings, split: Split) -> float:
    solved = accuracy(model_directory, settings.task, settings.evaluation_problems, split)
    return float(solved.mean())


@contextmanager
def _deterministic(threads: int) -> Iterator[None]:
    """Let torch round the same way every time; leave it as it was found."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(mode=before[1])
