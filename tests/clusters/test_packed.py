"""A stage in the processes of a cluster: opened by those that may, and left when it is given up."""

from __future__ import annotations

import pickle
import threading

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from relex_stream.errors import ClusterError
from relex_stream.graph import packed
from tests.clusters.runs import Numbers


class Counts(Numbers):
    """Counts how often it was opened."""

    opened = 0

    def __setstate__(self, state):  # type: ignore[no-untyped-def]
        super().__setstate__(state)
        Counts.opened += 1


def sent(stage: packed.PackedStage) -> packed.PackedStage:
    copy: packed.PackedStage = pickle.loads(pickle.dumps(stage))
    return copy


def test_a_process_of_other_versions_does_not_open_a_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = packed.PackedStage(Counts(), "of-these-versions", 1)
    there = packed.versions() | {"numpy": "1.0"}
    before = Counts.opened
    with monkeypatch.context() as patch:
        patch.setattr(packed, "versions", lambda: there)
        with (
            pytest.raises(ClusterError, match=r"a worker has other versions .*: numpy 1\.0 \(here"),
            sent(stage).turn(None, 0),
        ):
            raise AssertionError("it was opened")
    assert Counts.opened == before
    with sent(stage).turn(None, 0):
        assert Counts.opened == before + 1


def test_copies_of_a_stage_in_a_process_are_one_as_long_as_one_is_there() -> None:
    stage = packed.PackedStage(Counts(), "copied", 1)
    before = Counts.opened
    one, another = sent(stage), sent(stage)
    for copy in (one, another, one):
        with copy.turn(None, 0):
            pass
    assert Counts.opened == before + 1
    del one, another, copy
    with sent(stage).turn(None, 0):
        assert Counts.opened == before + 2


def test_a_task_that_waited_while_its_run_was_given_up_does_not_begin() -> None:
    stage = packed.PackedStage(Numbers(), "given-up", 1)
    counted, errors, begun = threading.Event(), [], []

    def wait_for_a_turn() -> None:
        try:
            with stage.turn(None, 0):
                begun.append("second")
        except ClusterError as error:
            errors.append(str(error))

    with stage.turn(None, 0):
        second = threading.Thread(target=wait_for_a_turn)
        second.start()
        while packed._running["given-up"] < 2:
            counted.wait(0.001)
        assert packed.abandon("given-up") == 2
    second.join()
    assert (begun, errors) == ([], ["the command that sent this task has given it up"])
    assert packed.abandon("given-up") == 0


def test_limits_of_blas_that_overlap_end_with_the_last() -> None:
    def threads() -> set[int]:
        return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}

    with threadpool_limits(3, user_api="blas"):
        blas = packed._Blas()
        blas.limit()
        blas.limit()
        assert threads() == {1}
        blas.release()
        assert threads() == {1}
        blas.release()
        assert threads() == {3}


def test_tasks_of_a_run_that_was_given_up_are_refused() -> None:
    stage = packed.PackedStage(Numbers(), "some-run", 1)
    with stage.turn(None, 0):
        # Counted from before it opens anything.
        assert packed.abandon("some-run") == 1
        # A long task ends before its next call of the stage.
        with pytest.raises(ClusterError, match="has given it up"):
            stage.check_wanted()
    assert packed.abandon("some-run") == 0
    with pytest.raises(ClusterError, match="has given it up"), stage.turn(None, 0):
        pass
    # Nor do they open anything.
    before = Counts.opened
    stage = sent(packed.PackedStage(Counts(), "some-run", 1))
    with pytest.raises(ClusterError, match="has given it up"), stage.turn(None, 0):
        pass
    assert Counts.opened == before
