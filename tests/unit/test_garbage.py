"""When the garbage collector looks through young objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lenvm_service import garbage


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    found: list[int] = []
    monkeypatch.setattr(garbage._Young, "rows", 0)
    monkeypatch.setattr(garbage._Young, "ours", False)
    monkeypatch.setattr(garbage._Young, "generation", 0)
    thresholds = gc.get_threshold()
    garbage.settle_garbage()
    monkeypatch.setattr(gc, "collect", found.append)
    yield found
    garbage.let_garbage_be()
    gc.set_threshold(*thresholds)


def test_young_objects_are_looked_through_by_rows(looked: list[int]) -> None:
    for rows in (1, 126, 1, 127, 1, 500):
        garbage.collect_young(rows)
    assert looked == [1, 0, 1]


def test_a_process_that_is_not_ours_keeps_python_s_ways(looked: list[int]) -> None:
    garbage.let_garbage_be()
    garbage.collect_young(1_000)
    assert looked == []
    assert gc.get_freeze_count() == 0


def test_cycles_that_were_under_way_go_at_the_second_look(looked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    garbage._Young.ours = True

    class Cycle:
        me: Cycle

    mine = Cycle()
    mine.me = mine
    garbage._Young.generation = 1
    garbage.collect_young(128)  # the youngest: it is in use, and older now
    del mine
    garbage.collect_young(128)
    assert not any(isinstance(each, Cycle) for each in gc.get_objects())
