import functools
import os
import pickle
import random
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from relex_stream.errors import SourceError
from relex_stream.sources import CheckpointReader
from relex_stream.sources import reader as reader_module


@pytest.fixture
def files(tmp_path):
    """Files of different sizes and content, by path."""
    content = {}
    for index in range(7):
        path = tmp_path / f"file{index}"
        data = np.random.default_rng(index).bytes(1000 + 331 * index)
        path.write_bytes(data)
        content[str(path)] = data
    return content


@pytest.fixture
def one(files):
    return next(iter(files.items()))


def open_files(monkeypatch):
    """Count the reader's open descriptors; the list keeps the current and the highest count."""
    counts = [0, 0]
    lock = threading.Lock()
    real_open, real_close = os.open, os.close

    def counting_open(*args, **kwargs):
        descriptor = real_open(*args, **kwargs)
        with lock:
            counts[0] += 1
            counts[1] = max(counts)
        return descriptor

    def counting_close(descriptor):
        with lock:
            counts[0] -= 1
        real_close(descriptor)

    monkeypatch.setattr(os, "open", counting_open)
    monkeypatch.setattr(os, "close", counting_close)
    return counts


def test_fills_any_buffer(one):
    path, data = one
    with CheckpointReader() as reader:
        flat = np.zeros(100, dtype=np.uint8)
        reader.read(path, 7, flat)
        assert flat.tobytes() == data[7:107]
        view = memoryview(bytearray(10))
        reader.read(path, 0, view[2:5])
        assert bytes(view) == b"\0\0" + data[:3] + b"\0" * 5
        words = np.zeros((5, 4), dtype=np.uint16)
        reader.read(path, 1, memoryview(words))
        assert words.tobytes() == data[1:41]
        everything = np.zeros(len(data), dtype=np.uint8)
        reader.read(path, 0, everything)
        assert everything.tobytes() == data


def test_empty_buffer_touches_no_file():
    with CheckpointReader() as reader:
        reader.read("/no/such/file", 3, np.empty(0, dtype=np.uint8))
        reader.verify_unchanged()


@pytest.mark.parametrize("most", [1, 3, 64])
@pytest.mark.parametrize("preadv", [True, False])
def test_short_reads_are_continued(one, monkeypatch, most, preadv):
    path, data = one
    if preadv:
        real = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:most]], at))
    else:
        monkeypatch.delattr(os, "preadv")
        real_pread = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, size, at: real_pread(fd, min(size, most), at))
    buffer = np.zeros(200, dtype=np.uint8)
    with CheckpointReader() as reader:
        reader.read(path, 11, buffer)
    assert buffer.tobytes() == data[11:211]


@pytest.mark.parametrize("max_open", [1, 2, 3, None])
def test_many_threads(files, monkeypatch, max_open):
    counts = open_files(monkeypatch)
    paths = list(files)

    def work(seed):
        rng = random.Random(seed)
        buffer = np.zeros(400, dtype=np.uint8)
        for _ in range(200):
            path = rng.choice(paths)
            size = rng.randrange(1, len(buffer))
            offset = rng.randrange(len(files[path]) - size)
            reader.read(path, offset, buffer[:size])
            assert buffer[:size].tobytes() == files[path][offset : offset + size]

    with CheckpointReader(max_open) as reader, ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
        reader.verify_unchanged()
    assert counts[0] == 0
    assert counts[1] <= (max_open or len(paths))


def test_least_recently_used_is_closed(files, monkeypatch):
    opened = []
    real_open = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags: opened.append(path) or real_open(path, flags)
    )
    a, b, c, *_ = files
    buffer = np.zeros(1, dtype=np.uint8)
    with CheckpointReader(max_open=2) as reader:
        for path in (a, b, a, c, a, b):
            reader.read(path, 0, buffer)
    assert opened == [a, b, c, b]


def test_no_file_is_closed_during_a_read(files, monkeypatch):
    """With one slot, a second file waits until the first one's read is over."""
    counts = open_files(monkeypatch)
    (a, _), (b, data), *_ = files.items()
    started, proceed = threading.Event(), threading.Event()
    real = os.preadv

    def slow(descriptor, views, offset):
        if threading.current_thread().name == "slow":
            started.set()
            proceed.wait(10)
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", slow)
    buffers = np.zeros((2, 50), dtype=np.uint8)
    with CheckpointReader(max_open=1) as reader:
        first = threading.Thread(target=reader.read, args=(a, 0, buffers[0]), name="slow")
        second = threading.Thread(target=reader.read, args=(b, 0, buffers[1]))
        first.start()
        assert started.wait(10)
        second.start()
        second.join(0.05)
        assert second.is_alive()
        proceed.set()
        first.join(10)
        second.join(10)
    assert buffers[0].tobytes() == files[a][:50]
    assert buffers[1].tobytes() == data[:50]
    assert counts == [0, 1]


def test_close_waits_for_reads(one, monkeypatch):
    path, data = one
    started, proceed = threading.Event(), threading.Event()
    real = os.preadv

    def slow(descriptor, views, offset):
        started.set()
        proceed.wait(10)
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", slow)
    buffer = np.zeros(5, dtype=np.uint8)
    reader = CheckpointReader()
    reading = threading.Thread(target=reader.read, args=(path, 0, buffer))
    closing = threading.Thread(target=reader.close)
    reading.start()
    assert started.wait(10)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    proceed.set()
    reading.join(10)
    closing.join(10)
    assert buffer.tobytes() == data[:5]


def test_file_too_short(one):
    path, data = one
    with CheckpointReader() as reader:
        for offset in (len(data) - 3, len(data), len(data) + 9):
            with pytest.raises(SourceError, match=f"{path}: truncated while reading"):
                reader.read(path, offset, np.zeros(4, dtype=np.uint8))
        reader.read(path, len(data) - 4, np.zeros(4, dtype=np.uint8))


def test_unreadable_files(tmp_path):
    buffer = np.zeros(4, dtype=np.uint8)
    with CheckpointReader(max_open=1) as reader:
        for _ in range(3):  # a failure takes no slot
            with pytest.raises(SourceError, match="none: cannot be read: No such file"):
                reader.read(str(tmp_path / "none"), 0, buffer)
        with pytest.raises(SourceError, match="cannot be read: Is a directory"):
            reader.read(str(tmp_path), 0, buffer)


def change_content(path):
    path.write_bytes(b"longer than before" * 1000)


def change_time(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(0, 0))
    other.replace(path)


@pytest.mark.parametrize("change", [change_content, change_time, replace, os.unlink])
def test_changed_files_are_named(files, tmp_path, change):
    path = tmp_path / "file1"
    with CheckpointReader() as reader:
        for other in files:
            reader.read(other, 0, np.zeros(4, dtype=np.uint8))
        reader.verify_unchanged()
        change(path)
        with pytest.raises(SourceError, match=rf"{path}: (changed while|cannot be read)"):
            reader.verify_unchanged()


def test_a_reader_limited_to_some_files_takes_along_no_others(files, tmp_path):
    first, second, *others = files
    with CheckpointReader() as reader:
        for path in files:
            reader.read(path, 0, np.zeros(4, dtype=np.uint8))
        state = pickle.dumps(reader.limited_to([first, second]))
    assert os.fsencode(first) in state
    assert os.fsencode(second) in state
    assert not any(os.fsencode(path) in state for path in others)
    change_time(tmp_path / "file1")
    with pickle.loads(state) as limited:
        limited.read(first, 0, np.zeros(4, dtype=np.uint8))
        with pytest.raises(SourceError, match="file1: changed while"):
            limited.read(second, 0, np.zeros(4, dtype=np.uint8))
        with pytest.raises(SourceError, match="file1: changed while"):
            limited.verify_unchanged([first, second])


def test_change_is_seen_on_opening_again(files, tmp_path, monkeypatch):
    counts = open_files(monkeypatch)
    a, b, *_ = files
    buffer = np.zeros(4, dtype=np.uint8)
    with CheckpointReader(max_open=1) as reader:
        reader.read(a, 0, buffer)
        reader.read(b, 0, buffer)
        change_time(tmp_path / "file0")
        with pytest.raises(SourceError, match=f"{a}: changed while it was being read"):
            reader.read(a, 0, buffer)
        reader.read(b, 0, buffer)
    assert counts == [0, 1]


# --- descriptors lent ----------------------------------------------------------------------------


def in_threads(*works):
    """Start functions, each in a thread that a deadlock does not let hang the tests."""
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    return threads


def finished(threads, seconds=30):
    for thread in threads:
        thread.join(seconds)
    return not any(thread.is_alive() for thread in threads)


def first_bytes(descriptors):
    return [os.pread(descriptor, 8, 0) for descriptor in descriptors]


def test_borrowed_descriptors_are_those_of_the_files_in_order(files, monkeypatch):
    counts = open_files(monkeypatch)
    a, b, c, *_ = files
    with CheckpointReader(max_open=3) as reader:
        for paths in ([a, b, c], [c, a], [b, b, b], [a], []):
            with reader.borrow(paths) as descriptors:
                assert first_bytes(descriptors) == [files[path][:8] for path in paths]
        reader.verify_unchanged()
    assert counts == [0, 3]


def test_no_more_can_be_borrowed_than_may_be_open(files):
    with CheckpointReader(max_open=2) as reader:
        assert reader.max_open == 2
        with (
            pytest.raises(ValueError, match="3 files asked for at once, at most 2"),
            reader.borrow([*files][:3]),
        ):
            pass
        with reader.borrow([*files][:2]):
            pass


def test_what_is_lent_stays_open_and_is_closed_only_afterwards(files, monkeypatch):
    counts = open_files(monkeypatch)
    closed = []
    close = os.close
    monkeypatch.setattr(os, "close", lambda number: closed.append(number) or close(number))
    a, *others = files
    buffer = np.zeros(4, dtype=np.uint8)
    with CheckpointReader(max_open=2) as reader:
        with reader.borrow([a]) as (descriptor,):
            for path in others * 3:
                reader.read(path, 0, buffer)
                assert os.pread(descriptor, 8, 0) == files[a][:8]
            assert descriptor not in closed
        reader.read(others[0], 0, buffer)
        reader.read(others[1], 0, buffer)
        assert descriptor in closed
    assert counts == [0, 2]


def test_a_borrower_waits_with_empty_hands(files):
    """With one of two slots lent, who wants two must not hold the other one meanwhile."""
    a, b, c, d, *_ = files
    reader = CheckpointReader(max_open=2)
    got = []

    def two():
        with reader.borrow([b, c]) as descriptors:
            got.append(first_bytes(descriptors))

    def one():
        with reader.borrow([d]) as descriptors:
            got.append(first_bytes(descriptors))

    with reader.borrow([a]):
        waiting = in_threads(two)
        assert not finished(waiting, 0.05)
        assert finished(in_threads(one))
        assert not finished(waiting, 0.05)
    assert finished(waiting)
    assert got == [[files[d][:8]], [files[b][:8], files[c][:8]]]
    reader.close()


@pytest.mark.parametrize("max_open", [1, 2, 3, 5])
def test_many_borrowers_never_wait_for_each_other_for_ever(files, monkeypatch, max_open):
    counts = open_files(monkeypatch)
    reader = CheckpointReader(max_open)
    paths = list(files)
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        buffer = np.zeros(8, dtype=np.uint8)
        for _ in range(150):
            wanted = [rng.choice(paths) for _ in range(rng.randint(1, max_open))]
            with reader.borrow(wanted) as descriptors:
                found = first_bytes(descriptors)
            if found != [files[path][:8] for path in wanted]:
                wrong.append(wanted)
            reader.read(wanted[0], 0, buffer)

    threads = in_threads(*(functools.partial(work, seed) for seed in range(12)))
    assert finished(threads, 60)
    assert not wrong
    reader.verify_unchanged()
    reader.close()
    assert counts[0] == 0
    assert counts[1] <= max_open


def test_a_file_that_cannot_be_opened_leaves_the_others_free(files, tmp_path):
    a, b, c, *_ = files
    reader = CheckpointReader(max_open=3)

    def everything():
        with reader.borrow([a, b, c]):
            pass

    for place in range(3):
        paths = [a, b]
        paths.insert(place, str(tmp_path / "none"))
        for _ in range(3):
            with pytest.raises(SourceError, match="No such file"), reader.borrow(paths):
                pass
    with pytest.raises(KeyError), reader.borrow([a, b, c]):
        raise KeyError
    assert finished(in_threads(everything))
    reader.close()


def test_a_file_that_changed_is_not_lent(files, tmp_path):
    a, b, c, *_ = files
    reader = CheckpointReader(max_open=2)
    for paths in ([a], [b, c]):  # the second closes the first
        with reader.borrow(paths):
            pass
    change_time(tmp_path / "file0")
    for _ in range(3):
        with (
            pytest.raises(SourceError, match=f"{a}: changed while it was being read"),
            reader.borrow([b, a]),
        ):
            pass
    assert finished(in_threads(lambda: reader.read(c, 0, np.zeros(4, dtype=np.uint8))))
    reader.close()


def test_closing_sends_those_away_who_wait_and_waits_for_those_who_have(files):
    a, b, *_ = files
    reader = CheckpointReader(max_open=1)
    errors = []

    def borrow():
        try:
            with reader.borrow([b]):
                pass
        except ValueError as error:
            errors.append(str(error))

    with reader.borrow([a]) as (descriptor,):
        waiting = in_threads(borrow)
        closing = in_threads(reader.close)
        assert finished(waiting)
        assert not finished(closing, 0.05)
        assert os.pread(descriptor, 8, 0) == files[a][:8]
    assert finished(closing)
    assert errors == ["the reader is closed"]


def test_misuse(one):
    path, _ = one
    with pytest.raises(ValueError, match="max_open must be at least 1"):
        CheckpointReader(0)
    reader = CheckpointReader()
    with pytest.raises(ValueError, match="offset must not be negative"):
        reader.read(path, -1, np.zeros(4, dtype=np.uint8))
    with pytest.raises(ValueError, match="writable and contiguous"):
        reader.read(path, 0, np.zeros(8, dtype=np.uint8)[::2])
    with pytest.raises(ValueError, match="writable and contiguous"):
        reader.read(path, 0, memoryview(b"read only"))
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read(path, 0, np.zeros(4, dtype=np.uint8))


@pytest.mark.parametrize(
    ("soft", "expected"), [(1024, 512), (100, 50), (1, 1), (10**6, 512), (-1, 512)]
)
def test_default_max_open(monkeypatch, soft, expected):
    assert resource.RLIM_INFINITY == -1
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert reader_module._default_max_open() == expected
