"""Names of places that are not paths: ``hf://org/name@revision/directory``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote

from relex_stream.errors import OptionError
from relex_stream.locations import Url
from relex_stream.paths import check_relative_path

# A `Path` that was made of one has lost a slash.
_HUB = re.compile(r"hf:/{1,2}(?P<rest>.*)", re.DOTALL)
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_MODEL = re.compile(
    rf"(?P<repository>{_NAME}(?:/{_NAME}(?=[@/]|$)|(?=@|$)))(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]*))?"
    r"(?:/(?P<directory>.*))?",
    re.DOTALL,
)
_OTHER_KINDS = ("datasets", "spaces", "kernels", "buckets")

HUB_EXAMPLE = "hf://org/name, hf://org/name@revision or hf://org/name@revision/directory"


@dataclass(frozen=True)
class HubUrl:
    """A model repository of the Hugging Face Hub, or a part of it.

    Attributes
    ----------
    repository : str
        ``org/name``.
    revision : str or None
        Branch, tag or commit; None if it was left open.
    directory : str
        Path in the repository, empty for all of it.
    """

    repository: str
    revision: str | None = None
    directory: str = ""

    def __str__(self) -> str:
        text = f"hf://{self.repository}"
        if self.revision is not None:
            whole = self.revision.startswith("refs/")
            text += "@" + (self.revision if whole else self.revision.replace("/", "%2F"))
        return f"{text}/{self.directory}" if self.directory else text


def is_hub(place: str | os.PathLike[str] | Url) -> bool:
    """Return whether a place is on the Hugging Face Hub.

    Examples
    --------
    >>> is_hub("hf://org/name"), is_hub("runs/7")
    (True, False)
    """
    return not isinstance(place, Url) and _HUB.match(os.fspath(place)) is not None


def parse_hub(place: str | os.PathLike[str] | Url) -> HubUrl:
    """Take a URL of the Hub apart.

    Parameters
    ----------
    place : str or path
        ``hf://org/name``, then perhaps ``@revision``, then perhaps ``/directory``. A slash in a
        revision is written ``%2F``, but for those that begin with ``refs/``.

    Raises
    ------
    OptionError
        If it has another form, or names something else than a model.

    Examples
    --------
    >>> parse_hub("hf://org/name")
    HubUrl(repository='org/name', revision=None, directory='')
    >>> parse_hub("hf://org/name@runs%2F7/actor/huggingface")
    HubUrl(repository='org/name', revision='runs/7', directory='actor/huggingface')
    """
    text = str(place) if isinstance(place, Url) else os.fspath(place)
    scheme = _HUB.fullmatch(text)
    rest = scheme["rest"].rstrip("/") if scheme is not None else ""
    kind = rest.partition("/")[0]
    if kind in _OTHER_KINDS:
        raise OptionError(f"{text}: {kind} hold no checkpoints; name a model, as {HUB_EXAMPLE}")
    match = _MODEL.fullmatch(rest.removeprefix("models/"))
    if match is None or match["revision"] == "":
        raise OptionError(f"{text}: no such form; write {HUB_EXAMPLE}")
    directory = match["directory"] or ""
    if directory:
        try:
            check_relative_path(directory)
        except ValueError as error:
            raise OptionError(f"{text}: {error}; name a directory of the repository") from None
    revision = match["revision"]
    return HubUrl(match["repository"], None if revision is None else unquote(revision), directory)
