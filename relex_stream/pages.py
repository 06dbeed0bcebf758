"""Where a buffer lies within a page of memory, against where its bytes lie in a page of a file.

A read copies from the page cache into the buffer, a write the other way. If the two differ by a few
bytes modulo a page, each load waits for an earlier store that only seems to go to the same place
(their addresses agree in the low 12 bits), and the copy runs at a fifth of its speed. Large arrays
begin 16 bytes into a page, so that tensors whose bytes begin a page are hit, and others by luck.
"""

from __future__ import annotations

PAGE_BYTES = 4096


def page_lead(address: int, file_offset: int) -> int:
    """Return how far behind `address` a buffer for bytes at `file_offset` should begin.

    There it agrees with the offset modulo a page, as near as 8-byte alignment lets it.

    Examples
    --------
    >>> page_lead(16, 4096 + 24)
    8
    >>> page_lead(32, 4096 + 24)
    4088
    """
    return (file_offset - address) % PAGE_BYTES // 8 * 8
