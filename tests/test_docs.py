"""The documents are true: their Python runs, their links resolve, their commands parse."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from relex_stream.cli.main import cli
from relex_stream.codec import Changes, FrameCodec
from tests.make_checkpoints import make_trajectory
from tests.test_layers import ROOMS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not-run: \S.* -->")
SHELLS = {"bash", "console", "sh", "shell"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the number of its first line, its text."""

    language: str
    line: int
    text: str
    runs: bool


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def blocks_of(text: str) -> list[Block]:
    blocks: list[Block] = []
    lines = text.splitlines()
    opened, language, runs = 0, "", True
    before = ""  # the last line that is not blank
    for number, line in enumerate(lines, 1):
        fence = line.strip().startswith("```")
        if fence and not opened:
            opened, language = number, line.strip().removeprefix("```").strip()
            runs = NOT_RUN.fullmatch(before.strip()) is None
        elif fence:
            content = "\n".join(lines[opened : number - 1]) + "\n"
            blocks.append(Block(language, opened + 1, content, runs))
            opened = 0
        if line.strip():
            before = line
    assert not opened, f"the block that begins in line {opened} does not end"
    return blocks


# --- Python --------------------------------------------------------------------------------------


def python_blocks(document: Path) -> list[Block]:
    return [b for b in blocks_of(document.read_text()) if b.language == "python" and b.runs]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if python_blocks(d)], ids=name_of)
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory = make_trajectory(tmp_path)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {
        "__name__": "__docs__",
        "base": str(trajectory.base),
        "checkpoints": str(trajectory.checkpoints),
    }
    for block in python_blocks(document):
        # Blank lines in front, so that a traceback has the document's line numbers.
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(document), "exec"), namespace)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.9])
def test_the_specified_decoder_reads_what_the_codec_writes(itemsize: int, share: float) -> None:
    namespace: dict[str, Any] = {}
    for block in python_blocks(ROOT / "docs" / "store-format.md"):
        exec(block.text, namespace)
        if "decode_frame" in namespace:
            break
    elements, bits = 3001, 8 * itemsize
    rng = np.random.default_rng(itemsize)
    changes = Changes(elements, itemsize)
    positions = np.flatnonzero(rng.random(elements) < share)
    differences = rng.geometric(0.1, positions.size) * rng.choice([-1, 1], positions.size)
    differences[0] = 1 << (bits - 1)
    changes.count = positions.size
    changes.positions[: positions.size] = positions
    changes.zigzags[: positions.size] = (differences << 1 ^ differences >> 63) & ((1 << bits) - 1)
    changes.zigzags[0] = (1 << bits) - 1
    frame = FrameCodec(elements, itemsize).encode(7, changes, elements)
    row, decoded = namespace["decode_frame"](frame, elements, itemsize)
    assert row == 7
    assert list(decoded) == positions.tolist()
    assert list(decoded.values()) == (differences % (1 << bits)).tolist()


# --- links ---------------------------------------------------------------------------------------


def prose_of(text: str) -> str:
    without_blocks = re.sub(r"^```.*?^```\s*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", without_blocks)


def links_of(text: str) -> list[str]:
    return re.findall(r"\]\(\s*<?([^)\s>]+)", prose_of(text))


def anchors_of(text: str) -> set[str]:
    headings = re.findall(
        r"^#+ +(.*?) *$", re.sub(r"^```.*?^```\s*?$", "", text, flags=re.S | re.M), re.M
    )
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return set(slugs)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_relative_links_resolve(document: Path) -> None:
    for link in links_of(document.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{name_of(document)} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors_of(target.read_text()), f"no heading for {link}"


# --- commands ------------------------------------------------------------------------------------


def commands_of(block: Block) -> list[list[str]]:
    """Return the arguments of each ``relex-stream`` call in a shell block."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "".join(
            line.removeprefix("$ ") + "\n" for line in text.splitlines() if line.startswith("$ ")
        )
    calls = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.wordchars += "{}:,@%^"
        simple: list[list[str]] = [[]]
        for token in lexer:
            if set(token) <= set("();<>|&"):
                # A redirection's target is no argument; what follows another operator is a call.
                simple.append([] if "<" not in token and ">" not in token else ["redirection"])
            else:
                simple[-1].append(token)
        for words in simple:
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            # Alone it stands in the set-up of shell completion.
            if len(words) > 1 and os.path.basename(words[0]) == "relex-stream":
                calls.append(words[1:])
    return calls


def parse(arguments: list[str]) -> None:
    """Parse a command line as the program would, without running it."""
    with cli.make_context("relex-stream", list(arguments)) as context:
        rest = [*context._protected_args, *context.args]
        name, command, arguments = cli.resolve_command(context, rest)
        assert command is not None
        with command.make_context(name, arguments, parent=context):
            pass


SHELL_CALLS = [
    (document, block, call)
    for document in DOCUMENTS
    for block in blocks_of(document.read_text())
    if block.language in SHELLS
    for call in commands_of(block)
]


@pytest.mark.parametrize(
    ("document", "block", "call"),
    [
        pytest.param(*case, id=f"{name_of(case[0])}:{case[1].line}: {' '.join(case[2])}")
        for case in SHELL_CALLS
    ],
)
def test_commands_parse(document: Path, block: Block, call: list[str]) -> None:
    try:
        parse(call)
    except click.UsageError as error:
        pytest.fail(f"{name_of(document)}, line {block.line}: {error.format_message()}")


# --- the checks themselves -----------------------------------------------------------------------


def test_calls_are_found_and_wrong_ones_refused() -> None:
    text = (
        "$ pip install x && .venv/bin/relex-stream info run.store  # a comment\n"
        "relex-stream is not called in a line of output\n"
        "$ X=1 relex-stream export run.store out \\\n    --step 5 > sums\n"
        "$ (cd x; relex-stream build-store a b c --pattern 'e-{step}' --steps 1:75,80)\n"
    )
    calls = commands_of(Block("console", 1, text, runs=True))
    assert calls == [
        ["info", "run.store"],
        ["export", "run.store", "out", "--step", "5"],
        ["build-store", "a", "b", "c", "--pattern", "e-{step}", "--steps", "1:75,80"],
    ]
    for call in calls:
        parse(call)
    for wrong in (["nothing"], ["info"], ["info", "x", "--stepp", "1"], ["export", "a"]):
        with pytest.raises(click.UsageError):
            parse(wrong)


def test_blocks_and_marks_are_found() -> None:
    text = "a\n```python\n1\n```\n<!-- not-run: takes hours -->\n\n```python\n2\n```\n"
    assert blocks_of(text) == [
        Block("python", 3, "1\n", runs=True),
        Block("python", 8, "2\n", runs=False),
    ]


def test_links_and_anchors_are_found() -> None:
    text = "[a](b.md#c) `[x](y)`\n```text\n[d](e)\n# f\n```\n## A `b`, c\n"
    assert links_of(text) == ["b.md#c"]
    assert anchors_of(text) == {"a-b-c"}


def test_the_design_names_every_room() -> None:
    section = (ROOT / "docs" / "design.md").read_text().partition("\n## Modules\n")[2]
    rooms = {room for room in ROOMS if not room.startswith("_")}
    assert rooms <= set(re.findall(r"`(\w+)`", section))
