"""Teach a tiny model a task: by example first, then by its own verified completions.

The reinforcement learning is GRPO (Shao et al., arXiv 2402.03300) without the divergence term and,
since each batch serves for a single step, without ratio clipping: completions are drawn at
temperature 1, each is rewarded 1 or 0 by exact verification, and its advantage is its reward's
z-score within the group that answers the same problem.

The same seed gives the same bits on one machine with one number of threads; another processor may
round differently and then leads elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import torch
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.processes import BenchmarkError
from benchmarks.rlvr.settings import Settings
from benchmarks.rlvr.tasks import TASKS, Task
from relex_stream.demo.task import (
    BOS_TOKEN,
    EOS_TOKEN,
    PAD_TOKEN,
    SPECIAL_TOKENS,
    complete,
    completion_texts,
    reward,
    solved,
    vocabulary,
)

# First element of the seed sequence: supervised and reinforcement batches are drawn independently.
_SUPERVISED, _REINFORCEMENT = 0, 1


def build_model(settings: Settings) -> Qwen2ForCausalLM:
    """Return a freshly initialised float32 model; draws from torch's global generator."""
    tokens = vocabulary(TASKS[settings.task].symbols)
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        # The customary 0.02 suits models a hundred times as wide; here it delays learning and makes
        # weights so small that bf16 resolves nearly every optimizer step.
        initializer_range=settings.initial_deviation,
        pad_token_id=tokens.index(PAD_TOKEN),
        bos_token_id=tokens.index(BOS_TOKEN),
        eos_token_id=tokens.index(EOS_TOKEN),
    )
    return Qwen2ForCausalLM(config)


def completion_logits(
    model: Qwen2ForCausalLM, sequences: torch.Tensor, completion_tokens: int
) -> torch.Tensor:
    """Return the logits that predict each completion token.

    Parameters
    ----------
    model : Qwen2ForCausalLM
        The policy.
    sequences : torch.Tensor, shape (n, prompt and completion tokens), int64
        Prompts with their completions.
    completion_tokens : int
        How many of them are the completion's.

    Returns
    -------
    torch.Tensor, shape (n, completion_tokens, vocabulary), float32
    """
    # The last token predicts nothing: the logits of token t stand at position t - 1.
    logits: torch.Tensor = model(sequences[:, :-1], logits_to_keep=completion_tokens).logits
    return logits


def supervise(model: Qwen2ForCausalLM, tokenizer: Any, settings: Settings) -> int:
    """Teach the task by example until the target accuracy is reached.

    Parameters
    ----------
    model : Qwen2ForCausalLM
        Changed in place.
    tokenizer : PreTrainedTokenizerFast
        The task's.
    settings : Settings
        The run's.

    Returns
    -------
    int
        Steps taken.

    Raises
    ------
    BenchmarkError
        If the limit of steps comes first.
    """
    task = TASKS[settings.task]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    validation = task.draw("validation", 1000)
    for step in range(1, settings.supervised_steps_limit + 1):
        problems = task.draw(
            "train", settings.supervised_batch, seed=(settings.seed, _SUPERVISED, step)
        )
        texts = [problem.prompt + problem.answer + EOS_TOKEN for problem in problems]
        sequences = tokenizer(texts, return_tensors="pt").input_ids
        logits = completion_logits(model, sequences, task.completion_tokens)
        loss = cross_entropy(logits.flatten(0, 1), sequences[:, task.prompt_tokens :].flatten())
        learning_rate = settings.supervised_learning_rate * min(step / 50, 1)
        _descend(model, optimizer, loss, learning_rate, norm_limit=1.0)
        if step % 5 == 0:
            accuracy = float(solved(model, tokenizer, validation).mean())
            if step % 100 == 0:
                click.echo(f"supervised step {step}: validation {accuracy:.3f}")
            if accuracy >= settings.supervised_target:
                return step
    raise BenchmarkError(
        f"accuracy {accuracy:.3f} after {step} supervised steps, expected "
        f"{settings.supervised_target}; raise supervised_steps_limit or take another seed"
    )


def reinforce(
    model: Qwen2ForCausalLM, tokenizer: Any, settings: Settings
) -> Iterator[tuple[int, float]]:
    """Improve the policy by its own verified completions.

    Parameters
    ----------
    model : Qwen2ForCausalLM
        The float32 masters, changed in place.
    tokenizer : PreTrainedTokenizerFast
        The task's.
    settings : Settings
        The run's.

    Yields
    ------
    step : int
        From 1; the model is then the one after this step.
    train_reward : float
        Mean reward of the step's completions, drawn before its update.
    """
    task = TASKS[settings.task]
    optimizer = torch.optim.AdamW(model.parameters(), betas=settings.adam_betas, weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    group = settings.samples_per_problem
    for step in range(1, settings.steps + 1):
        problems = task.draw(
            "train", settings.problems_per_step, seed=(settings.seed, _REINFORCEMENT, step)
        )
        prompts = tokenizer([problem.prompt for problem in problems], return_tensors="pt").input_ids
        completions = complete(
            model, prompts, length=task.completion_tokens, samples=group, generator=generator
        )
        texts = completion_texts(tokenizer, completions)
        rewards = torch.tensor(
            [reward(problems[row // group], text) for row, text in enumerate(texts)]
        ).view(-1, group)
        spread = rewards.std(dim=1, keepdim=True)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-6)

        # A group of equal rewards has advantages of zero and no gradient: leaving it out saves
        # its forward and backward pass and changes nothing.
        informative = (spread[:, 0] > 0).repeat_interleave(group)
        if informative.any():
            sequences = torch.cat([prompts.repeat_interleave(group, dim=0), completions], dim=1)
            loss = _policy_loss(
                model, sequences[informative], advantages.flatten()[informative], task
            )
            loss = loss / (len(sequences) * task.completion_tokens)
            _descend(model, optimizer, loss, settings.learning_rate, settings.gradient_norm_limit)
        yield step, rewards.mean().item()


def _policy_loss(
    model: Qwen2ForCausalLM, sequences: torch.Tensor, advantages: torch.Tensor, task: Task
) -> torch.Tensor:
    """Return the loss whose gradient is minus the policy gradient, summed over tokens.

    Parameters
    ----------
    model : Qwen2ForCausalLM
        The policy that drew the completions.
    sequences : torch.Tensor, shape (n, prompt and completion tokens), int64
        Prompts with their completions.
    advantages : torch.Tensor, shape (n,)
        One per completion, shared by its tokens.
    task : Task
        Knows the lengths.

    Returns
    -------
    torch.Tensor, scalar
    """
    logits = completion_logits(model, sequences, task.completion_tokens)
    completions = sequences[:, task.prompt_tokens :]
    surprise = cross_entropy(logits.transpose(1, 2), completions, reduction="none")
    # Tokens after the end of sequence were drawn, but are no part of the completion.
    ends = completions == SPECIAL_TOKENS.index(EOS_TOKEN)
    ended = ends.cumsum(dim=1)
    counted = (ended == 0) | ((ended == 1) & ends)
    return (surprise * counted).sum(dim=1) @ advantages


def _descend(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    learning_rate: float,
    norm_limit: float,
) -> None:
    """Take one optimizer step along the clipped gradient."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), norm_limit)
    optimizer.step()
