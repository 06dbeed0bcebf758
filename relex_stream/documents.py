"""What goes with models into their directories: cards, records, and an index of several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from relex_stream import cards
from relex_stream.mixing import medians
from relex_stream.request import Job
from relex_stream.store import Store
from relex_stream.summaries import SubspaceFigures
from relex_stream.writer import MARKER, OutputDirectory

OWN_FILES = ("README.md", MARKER)
"""Of each model; what the base has under these names is not copied."""


@dataclass(frozen=True)
class Made:
    """The models of a job, written.

    Attributes
    ----------
    store : Store
    job : Job
    prefixes : tuple of str
        Directory of each below the output, with a slash behind it; ``""`` for the only one.
    figures : tuple of SubspaceFigures
    """

    store: Store
    job: Job
    prefixes: tuple[str, ...]
    figures: tuple[SubspaceFigures, ...]

    def without_figures(self) -> Made:
        """Return the same, when the documents are written."""
        return replace(self, figures=())

    def write_documents(self, output: OutputDirectory) -> None:
        """Write the model card and the record of each."""
        outputs = list(zip(self.job.products, self.prefixes, strict=True))
        for product, prefix in outputs:
            explained, r2 = medians(self.figures, product.facts.get("rank"))
            card = cards.model_card(
                self.store,
                settings=self.job.settings,
                facts=product.facts,
                median_explained_variance=explained,
                median_r2=r2,
            )
            output.write_file(prefix + "README.md", card)
        for product, prefix in outputs:
            written = [
                name.removeprefix(prefix) for name in output.files if name.startswith(prefix)
            ]
            record = cards.record(
                self.store,
                settings=self.job.settings,
                facts=product.facts,
                figures=self.figures,
                files=[*written, MARKER],
            )
            output.write_file(prefix + MARKER, record)


def write_index(made: Sequence[Made], output: OutputDirectory) -> None:
    """Write what each of several models is, in ``relex_stream.json`` beside their directories."""
    if sum(len(each.prefixes) for each in made) < 2:
        return
    common, differing = common_settings([each.job for each in made])
    histories = {each.job.method.history for each in made}
    index = {
        "outputs": [
            {"path": prefix.rstrip("/"), **own, **product.facts}
            for each, own in zip(made, differing, strict=True)
            for product, prefix in zip(each.job.products, each.prefixes, strict=True)
        ],
        **common,
        **({"history": list(histories.pop())} if len(histories) == 1 else {}),
        "files": [*output.files, MARKER],
    }
    output.write_file(MARKER, (json.dumps(index, indent=1) + "\n").encode())


def common_settings(jobs: Sequence[Job]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what jobs have in common, and what is each one's own.

    Of the history, only where it ends, as ``history_steps``, and only where that differs.
    """
    settings = []
    for job in jobs:
        each = dict(job.settings)
        each["history_steps"] = each.pop("history")[-1]
        # What an entry of a grid is called, where it tells it from others.
        each |= {name: value for name, value in job.levels if name == "name"}
        settings.append(each)
    names = list(dict.fromkeys(name for each in settings for name in each))
    alike = [
        name
        for name in names
        if all(name in each and each[name] == settings[0][name] for each in settings)
    ]
    common = {name: settings[0][name] for name in alike if name not in ("history_steps", "name")}
    own = [{name: value for name, value in each.items() if name not in alike} for each in settings]
    return common, own
