"""The limit: only read the same files once, or read some and write as many bytes as they have.

Nothing is computed. Threads take pieces, of all files in turn, and read each into one small buffer
that they use again and again; a new page of memory would cost more than reading into it. Buffers
are whole pages, as the pieces of a file are: some processors copy at a fifth of the speed where the
address is a few bytes ahead of the file's offset, modulo the page. Files are read side by side,
since a disk often gives many streams more than one (here 1.7 GB/s, and 1.1 file by file). Written
files are synced, as relex-stream syncs its own before it calls them done.

Run it as ``python read_write.py [--read PATH]... [--copy FROM TO]... --threads N``. The last line
it prints is JSON: seconds without start-up and imports, bytes read and written.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PIECE_BYTES = 2 << 20
"""As much as relex-stream reads at a time."""


@dataclass(frozen=True)
class Piece:
    """A run of a file, and the files it is copied to."""

    source: int
    offset: int
    nbytes: int
    targets: tuple[int, ...] = ()


def weight_files(path: Path) -> list[Path]:
    """Return the weight files below a directory; of links and files, the path itself."""
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


def pieces_of(source: int, targets: tuple[int, ...] = ()) -> list[Piece]:
    """Cut an open file."""
    size = os.fstat(source).st_size
    return [
        Piece(source, offset, min(PIECE_BYTES, size - offset), targets)
        for offset in range(0, size, PIECE_BYTES)
    ]


def transfer(pieces: Sequence[Piece], threads: int) -> dict[str, int]:
    """Read all pieces, write those that have targets; return the bytes of both."""
    local = threading.local()

    def move(piece: Piece) -> tuple[int, int]:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(mmap.mmap(-1, PIECE_BYTES))
        view = local.buffer[: piece.nbytes]
        done = 0
        while done < piece.nbytes:
            count = os.preadv(piece.source, [view[done:]], piece.offset + done)
            if count == 0:
                raise SystemExit("a file became shorter while it was read")
            done += count
        for target in piece.targets:
            sent = 0
            while sent < piece.nbytes:
                sent += os.pwrite(target, view[sent:], piece.offset + sent)
        return piece.nbytes, piece.nbytes * len(piece.targets)

    with ThreadPoolExecutor(threads) as pool:
        moved = list(pool.map(move, pieces))
    return {
        "bytes_read": sum(read for read, _ in moved),
        "bytes_written": sum(written for _, written in moved),
    }


def run(
    reads: Sequence[Path], copies: Sequence[tuple[Path, Path]], *, threads: int
) -> dict[str, float]:
    """Read paths; copy weight files from directories to new ones, several from one at a time.

    Returns
    -------
    dict
        The figures that are printed.
    """
    # All files are open at once.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    started = time.perf_counter()
    opened: list[int] = []
    written: list[int] = []
    pieces: list[Piece] = []
    try:
        for file in [file for path in reads for file in weight_files(path)]:
            opened.append(os.open(file, os.O_RDONLY))
            pieces += pieces_of(opened[-1])
        # What is copied several times is read once.
        for source in dict.fromkeys(source for source, _ in copies):
            for file in weight_files(source):
                opened.append(os.open(file, os.O_RDONLY))
                targets = []
                for _, out in (copy for copy in copies if copy[0] == source):
                    out.mkdir(parents=True, exist_ok=True)
                    target = os.open(out / file.name, os.O_WRONLY | os.O_CREAT, 0o644)
                    os.ftruncate(target, file.stat().st_size)
                    targets.append(target)
                written += targets
                pieces += pieces_of(opened[-1], tuple(targets))
        totals = transfer(sorted(pieces, key=lambda piece: piece.offset), threads)
        for descriptor in written:
            os.fsync(descriptor)
    finally:
        for descriptor in opened + written:
            os.close(descriptor)
    return {"call_s": time.perf_counter() - started, **totals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", type=Path, action="append", default=[], metavar="PATH")
    parser.add_argument(
        "--copy", type=Path, nargs=2, action="append", default=[], metavar=("FROM", "TO")
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    copies = [(source, out) for source, out in options.copy]
    print(json.dumps(run(options.read, copies, threads=options.threads)))


if __name__ == "__main__":
    main()
