"""A weights file as the concatenation of literal bytes and tensors, for formats with gaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..specs import FilePart

MAX_PADDING_BYTES = 32 << 20
"""A file with more bytes of no tensor cannot be put together: see `lay_out`."""


def lay_out(
    size: int,
    literals: Iterable[tuple[int, bytes]],
    tensors: Iterable[tuple[int, int, FilePart]],
    read: Callable[[int, int], bytes],
) -> tuple[FilePart, ...] | None:
    """Put the parts of a file in order, and fill what is neither literal nor tensor.

    Parameters
    ----------
    size : int
        Bytes of the file.
    literals : iterable of (int, bytes)
        Offset and bytes of parts that are known.
    tensors : iterable of (int, int, FilePart)
        Offset and bytes of each tensor or part of one. Of those that overlap the first counts:
        tensors may share bytes.
    read : callable
        Takes an offset and a number (that may be 0), and returns these bytes of the file.

    Returns
    -------
    tuple of FilePart or None
        Their concatenation is the file. None if more than 32 MiB of it are neither literal nor
        tensor: they are not kept.

    Examples
    --------
    >>> file = b"<<abcd>>"
    >>> a, copy = FilePart(tensor="a"), FilePart(tensor="copy")
    >>> parts = lay_out(8, [(0, b"<<")], [(2, 3, a), (2, 3, copy)], lambda at, n: file[at : at + n])
    >>> [part.tensor or part.literal for part in parts]
    [b'<<', 'a', b'd>>']
    """
    runs = sorted(
        [
            *((offset, len(literal), FilePart(literal=literal)) for offset, literal in literals),
            *(run for run in tensors if run[1]),
        ],
        key=lambda run: run[0],  # stable: of two at one place the first comes first
    )
    parts: list[FilePart] = []
    loose: list[bytes] = []  # literals in a row
    padding = at = 0
    for offset, nbytes, part in [*runs, (size, 0, FilePart(literal=b""))]:
        if offset < at:
            continue
        padding += offset - at
        if padding > MAX_PADDING_BYTES:
            return None
        loose.append(read(at, offset - at))
        if part.literal is not None:
            loose.append(part.literal)
        else:
            parts += [*_joined(loose), part]
            loose = []
        at = offset + nbytes
    return (*parts, *_joined(loose))


def _joined(literals: list[bytes]) -> list[FilePart]:
    joined = b"".join(literals)
    return [FilePart(literal=joined)] if joined else []
