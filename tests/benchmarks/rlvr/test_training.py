"""Teaching by example and by verified completions, on models of a thousand weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.processes import BenchmarkError
from benchmarks.rlvr import training
from benchmarks.rlvr.tasks import TASKS
from benchmarks.rlvr.training import (
    _policy_loss,
    build_model,
    completion_logits,
    reinforce,
    supervise,
)
from relex_stream.demo.task import (
    EOS_TOKEN,
    SPECIAL_TOKENS,
    build_tokenizer,
    complete,
    completion_texts,
)

EOS = SPECIAL_TOKENS.index(EOS_TOKEN)


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", TASKS)
def test_the_logits_are_those_that_drew_the_completion(name, tiny):
    task = TASKS[name]
    model = build_model(replace(tiny, task=name))
    tokenizer = build_tokenizer(task.symbols)
    texts = [problem.prompt for problem in task.draw("train", 8)]
    prompts = tokenizer(texts, return_tensors="pt").input_ids
    completions = complete(model, prompts, length=task.completion_tokens)
    assert prompts.shape[1] == task.prompt_tokens
    assert completions.shape == (8, task.completion_tokens)
    sequences = torch.cat([prompts, completions], dim=1)
    logits = completion_logits(model, sequences, task.completion_tokens)
    assert torch.equal(logits.argmax(dim=-1), completions)


def test_examples_are_learned(tiny):
    settings = replace(tiny, supervised_target=0.01)
    model = build_model(settings)
    tokenizer = build_tokenizer(TASKS[tiny.task].symbols)
    assert supervise(model, tokenizer, settings) % 5 == 0


def test_a_target_out_of_reach_is_said_to_be_so(tiny):
    settings = replace(tiny, supervised_target=1.0, supervised_steps_limit=5)
    tokenizer = build_tokenizer(TASKS[tiny.task].symbols)
    with pytest.raises(BenchmarkError, match="after 5 supervised steps, expected 1"):
        supervise(build_model(settings), tokenizer, settings)


def test_what_is_rewarded_becomes_more_frequent(tiny, monkeypatch):
    monkeypatch.setattr(training, "reward", lambda problem, text: float(text.startswith("3")))
    settings = replace(
        tiny, steps=30, learning_rate=1e-2, problems_per_step=16, samples_per_problem=8
    )
    tokenizer = build_tokenizer(TASKS[tiny.task].symbols)
    rewards = dict(reinforce(build_model(settings), tokenizer, settings))
    assert list(rewards) == list(range(1, 31))
    assert rewards[1] < 0.3
    assert rewards[30] > 0.9


def test_without_differences_in_reward_nothing_changes(tiny, monkeypatch):
    monkeypatch.setattr(training, "reward", lambda problem, text: 1.0)
    model = build_model(tiny)
    before = [parameter.clone() for parameter in model.parameters()]
    tokenizer = build_tokenizer(TASKS[tiny.task].symbols)
    assert [reward for _, reward in reinforce(model, tokenizer, tiny)] == [1.0] * 10
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_what_follows_the_end_does_not_count(tiny):
    task = TASKS[tiny.task]
    model = build_model(tiny)
    tokenizer = build_tokenizer(task.symbols)
    sequence = tokenizer(["345*6=07"], return_tensors="pt").input_ids
    ended = torch.cat([sequence, torch.tensor([[EOS, 5, EOS]])], dim=1)
    otherwise = torch.cat([sequence, torch.tensor([[EOS, 7, 8]])], dim=1)
    unlike = torch.cat([sequence, torch.tensor([[5, EOS, 8]])], dim=1)
    one = torch.ones(1)
    loss = _policy_loss(model, ended, one, task)
    assert torch.equal(loss, _policy_loss(model, otherwise, one, task))
    assert not torch.equal(loss, _policy_loss(model, unlike, one, task))
    assert completion_texts(tokenizer, ended[:, task.prompt_tokens :]) == ["07"]
