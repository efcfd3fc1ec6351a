"""A request to stop whose KeyboardInterrupt is dropped on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from robust_prune import stopping
from robust_prune.finetune import interruptions
from robust_prune.pipeline.journal import Journal
from robust_prune.pipeline.settings import Events


@pytest.fixture
def dropped() -> Iterator[None]:
    with contextlib.suppress(KeyboardInterrupt):
        stopping.stop()
        raise AssertionError("a request raises")
    try:
        yield
    finally:
        stopping.forget()


def test_no_request_stops_nothing() -> None:
    said: list[str] = []
    journal = Journal(Events(stage=said.append))
    journal.stage("pruning")
    with journal.timed("pruning"), interruptions() as asked:
        assert not asked()
    assert said == ["pruning"]


@pytest.mark.usefixtures("dropped")
def test_the_next_stage_and_station_stop() -> None:
    said: list[str] = []
    journal = Journal(Events(stage=said.append))
    with pytest.raises(KeyboardInterrupt):
        journal.stage("pruning")
    with pytest.raises(KeyboardInterrupt), journal.timed("pruning"):
        said.append("worked on")
    assert said == []


@pytest.mark.usefixtures("dropped")
def test_training_that_comes_after_it_knows() -> None:
    with interruptions() as asked:
        assert asked()
