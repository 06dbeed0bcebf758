"""The demonstration's verifiable task: adding two numbers, the answer's digits written backwards.

A prompt is ``345+678=`` and its only right completion is ``3201``: the digits of 1023 from the
units up, so that a small causal model can carry as it writes. Every prompt and every answer has
the same length, hence batches need no padding.

Three splits, chosen by a hash of the *unordered* operand pair: a pair belongs to one split for
ever, whatever the seed, and ``345+678`` is in the same split as ``678+345``. Nothing held out, in
either order, is ever trained on. Supervised and reinforcement learning draw from ``train``;
settings are chosen on ``validation``; published accuracies come from ``held-out``.

What completes, decodes and counts here asks of a problem only what `Verifiable` says, so that other
tasks of fixed lengths can be put to it.

Importing this module loads neither torch nor transformers; the functions that need them do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "validation", "held-out"]

OPERAND_DIGITS = 3
ANSWER_DIGITS = OPERAND_DIGITS + 1
SYMBOLS = "0123456789+="
"""The characters of prompts and answers."""
# Beginning of sequence, two operands, "+" and "=".
PROMPT_TOKENS = 2 * OPERAND_DIGITS + 3
# The answer and the end-of-sequence token after it.
COMPLETION_TOKENS = ANSWER_DIGITS + 1

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
"""Their identifiers are 0, 1 and 2; those of a task's characters follow."""

# The message's content is the prompt: a template that adds words would leave the vocabulary.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"

# Hash buckets out of ten; all others are `train`.
_HELD_OUT_BUCKET, _VALIDATION_BUCKET, _BUCKETS = 0, 1, 10


class Verifiable(Protocol):
    """A problem whose completions can be verified; within a task, all lengths are the same."""

    @property
    def prompt(self) -> str:
        """The text the model continues."""

    @property
    def answer(self) -> str:
        """A right completion."""

    def solved_by(self, completion: str) -> bool:
        """Verify the model's text up to, and without, the end-of-sequence token."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One addition.

    Parameters
    ----------
    left, right : int
        Operands, each below ``10**OPERAND_DIGITS``.

    Examples
    --------
    >>> problem = Problem(345, 78)
    >>> problem.prompt, problem.answer
    ('345+078=', '3240')
    """

    left: int
    right: int

    @property
    def prompt(self) -> str:
        """The text the model continues, operands padded with zeros."""
        return f"{self.left:0{OPERAND_DIGITS}}+{self.right:0{OPERAND_DIGITS}}="

    @property
    def answer(self) -> str:
        """The only right completion, units first, padded with zeros."""
        return f"{self.left + self.right:0{ANSWER_DIGITS}}"[::-1]

    def solved_by(self, completion: str) -> bool:
        """Verify by integer arithmetic that every digit is right and nothing else was written."""
        well_formed = len(completion) == ANSWER_DIGITS and set(completion) <= set("0123456789")
        return well_formed and int(completion[::-1]) == self.left + self.right


def split_of(problem: Problem) -> Split:
    """Return the split to which a problem belongs.

    Parameters
    ----------
    problem : Problem
        The order of its operands does not matter.

    Returns
    -------
    {"train", "validation", "held-out"}

    Examples
    --------
    >>> split_of(Problem(345, 678)) == split_of(Problem(678, 345))
    True
    """
    return splits_of_keys(_keys(np.array([[problem.left, problem.right]])))[0]


def splits_of_keys(keys: NDArray[np.uint64]) -> list[Split]:
    """Return the split of each key: a tenth is held out, a tenth is for validation.

    Parameters
    ----------
    keys : numpy.ndarray of uint64, shape (n,)
        One number for everything that must never be in two splits.

    Returns
    -------
    list of {"train", "validation", "held-out"}

    Notes
    -----
    The hash is splitmix64 (Steele, Lea and Flood, 2014).
    """
    mixed = keys + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    buckets: NDArray[np.uint64] = (mixed ^ (mixed >> np.uint64(31))) % np.uint64(_BUCKETS)
    return [_split_of_bucket(bucket) for bucket in buckets.tolist()]


def draw_problems(split: Split, count: int, *, seed: int | Sequence[int] = 0) -> list[Problem]:
    """Draw problems of one split: operands uniform and independent, with replacement.

    Parameters
    ----------
    split : {"train", "validation", "held-out"}
        Where the operand pairs may come from.
    count : int
        How many to draw.
    seed : int or sequence of int
        The same seed gives the same problems on every machine; a trainer passes the run's seed
        and the step.

    Returns
    -------
    list of Problem

    Raises
    ------
    ValueError
        If `split` is not one of the three.

    Examples
    --------
    >>> [problem.prompt for problem in draw_problems("held-out", 2)]
    ['175+813=', '970+729=']
    """
    check_split(split)
    random = np.random.Generator(np.random.PCG64(seed))
    drawn: list[Problem] = []
    while len(drawn) < count:
        pairs = random.integers(10**OPERAND_DIGITS, size=(4096, 2))
        splits = splits_of_keys(_keys(pairs))
        for (left, right), its_split in zip(pairs.tolist(), splits, strict=True):
            if its_split == split:
                drawn.append(Problem(left, right))
    return drawn[:count]


def check_split(split: str) -> None:
    """Raise ValueError if there is no such split."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(get_args(Split))}")


def reward(problem: Verifiable, completion: str) -> float:
    """Return the reward of a completion.

    Parameters
    ----------
    problem : Problem or other Verifiable
        What was asked.
    completion : str
        The model's text up to, and without, the end-of-sequence token.

    Returns
    -------
    float
        1 if the problem is solved, otherwise 0.

    Examples
    --------
    >>> reward(Problem(345, 678), "3201"), reward(Problem(345, 678), "1023")
    (1.0, 0.0)
    """
    return float(problem.solved_by(completion))


def build_tokenizer(
    symbols: str = SYMBOLS, *, longest: int = PROMPT_TOKENS + COMPLETION_TOKENS
) -> PreTrainedTokenizerFast:
    """Return a task's tokenizer: one token per character, three special tokens.

    Parameters
    ----------
    symbols : str
        The task's characters, in the order of their identifiers.
    longest : int
        Tokens of a prompt with its completion.

    Returns
    -------
    PreTrainedTokenizerFast
        Puts the beginning-of-sequence token in front of every text; has a chat template.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    identifiers = {token: identifier for identifier, token in enumerate(vocabulary(symbols))}
    # A character outside the vocabulary becomes padding; a separate unknown token would be a
    # row of the embedding that no text of this task ever trains.
    tokenizer = Tokenizer(models.WordLevel(identifiers, unk_token=PAD_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    # Without it, decoding would put a blank between any two digits.
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, identifiers[BOS_TOKEN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=longest,
    )


def vocabulary(symbols: str = SYMBOLS) -> tuple[str, ...]:
    """Return the tokens of a task with these characters, in the order of their identifiers."""
    return (*SPECIAL_TOKENS, *symbols)


def complete(
    model: Any,
    prompts: torch.Tensor,
    *,
    length: int = COMPLETION_TOKENS,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Complete a batch of prompts of equal length, one token of each at a time.

    Parameters
    ----------
    model : transformers causal language model
        In evaluation mode, or without dropout.
    prompts : torch.Tensor, shape (n, prompt tokens), int64
        Token identifiers.
    length : int
        Tokens per completion.
    samples : int
        Completions per prompt; they share the prompt's keys and values.
    generator : torch.Generator, optional
        Source of randomness: tokens are drawn at temperature 1. Greedy without it.

    Returns
    -------
    torch.Tensor, shape (n * samples, length), int64
        Completions of one prompt are adjacent. What follows an end-of-sequence token is
        meaningless.
    """
    import torch

    with torch.inference_mode():
        output = model(prompts, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        cache.batch_repeat_interleave(samples)
        logits = output.logits[:, -1].repeat_interleave(samples, dim=0)
        tokens = []
        while True:
            if generator is None:
                tokens.append(logits.argmax(dim=-1, keepdim=True))
            else:
                odds = logits.float().softmax(dim=-1)
                tokens.append(torch.multinomial(odds, 1, generator=generator))
            if len(tokens) == length:
                return torch.cat(tokens, dim=1)
            output = model(tokens[-1], past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1]


def completion_texts(tokenizer: Any, completions: torch.Tensor) -> list[str]:
    """Return the text of each completion up to its end-of-sequence token.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        As `build_tokenizer` makes it.
    completions : torch.Tensor, shape (n, length), int64
        As `complete` returns them.

    Returns
    -------
    list of str
        Other special tokens stay visible, so that the reward can reject them.
    """
    texts = tokenizer.batch_decode(completions, skip_special_tokens=False)
    return [text.partition(EOS_TOKEN)[0] for text in texts]


def greedy_solved(
    model_directory: str | Path, problems: Sequence[Verifiable], *, batch_size: int = 1000
) -> NDArray[np.bool_]:
    """Return which problems a saved model solves by greedy decoding.

    Parameters
    ----------
    model_directory : str or Path
        Weights, config and tokenizer as transformers reads them.
    problems : sequence of Problem or other Verifiable
        Of one task; usually ``draw_problems("held-out", 2000)``.
    batch_size : int
        Problems decoded together.

    Returns
    -------
    ndarray of bool, shape (n,)
        Its mean is the accuracy, with a standard error of ``sqrt(p * (1 - p) / n)``: 0.011 at
        2,000 problems.

    Notes
    -----
    Weights are read as saved (bf16) and widened exactly to float32, in which all arithmetic is
    done: CPUs are slow in bf16, and float32 answers do not depend on the batch size in practice.
    Nothing is fetched from a network.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Widened afterwards: the argument for it has another name before transformers 4.56.
    model = AutoModelForCausalLM.from_pretrained(model_directory, local_files_only=True)
    model = model.float().eval()
    tokenizer = AutoTokenizer.from_pretrained(model_directory, local_files_only=True)
    return solved(model, tokenizer, problems, batch_size=batch_size)


def solved(
    model: Any, tokenizer: Any, problems: Sequence[Verifiable], *, batch_size: int = 1000
) -> NDArray[np.bool_]:
    """Return which problems a loaded model solves by greedy decoding.

    Parameters
    ----------
    model : transformers causal language model
        In evaluation mode, or without dropout.
    tokenizer : PreTrainedTokenizerFast
        As `build_tokenizer` makes it.
    problems : sequence of Problem or other Verifiable
        At least one, all of one task.
    batch_size : int
        Problems decoded together.

    Returns
    -------
    ndarray of bool, shape (n,)
    """
    rewards: list[float] = []
    length = len(problems[0].answer) + 1  # with the end-of-sequence token
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        prompts = tokenizer([problem.prompt for problem in batch], return_tensors="pt").input_ids
        texts = completion_texts(tokenizer, complete(model, prompts, length=length))
        rewards.extend(map(reward, batch, texts))
    return np.array(rewards) > 0


def _keys(pairs: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a number for each operand pair, the same for both orders of a pair.

    Parameters
    ----------
    pairs : numpy.ndarray, shape (n, 2)
        Operands.

    Returns
    -------
    numpy.ndarray, shape (n,)
    """
    low, high = np.sort(pairs, axis=1).astype(np.uint64).T
    keys: NDArray[np.uint64] = low * np.uint64(10**OPERAND_DIGITS) + high
    return keys


def _split_of_bucket(bucket: int) -> Split:
    """Return the split of a hash bucket."""
    if bucket == _HELD_OUT_BUCKET:
        return "held-out"
    return "validation" if bucket == _VALIDATION_BUCKET else "train"
