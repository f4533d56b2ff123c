"""The work file of ``benchmarks/drivers.py``: finished generations are not made again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lenvm.decoding import Generation
from lenvm.evaluation.answers import AnswerFile

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TARGETS = (64, 16, 64, 16, 32)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("drivers")
    for name in ("drivers", "_engine", "_second"):
        sys.modules.pop(name, None)


def test_a_run_that_broke_off_goes_on(study: Any, tmp_path: Path) -> None:
    jobs = [study.Job("lifebench", "hf", at, [5, 6], target, None, 128) for at, target in enumerate(TARGETS)]
    batches: list[list[int]] = []

    def run(rows: Sequence[Any]) -> list[Generation]:
        if len(batches) == 1 and batches[0] == [1, 3]:
            batches.append([])
            raise KeyboardInterrupt
        batches.append([job.at for job in rows])
        return [Generation([7] * job.target, finished=True, text_cost=1.0) for job in rows]

    work = tmp_path / "work.jsonl"
    with AnswerFile(work, {}) as store, pytest.raises(KeyboardInterrupt):
        study.make(store, run, jobs, 2)
    with AnswerFile(work, {}) as store:
        took = study.make(store, run, jobs, 2)
        assert took["tokens"] == 64 + 64 + 32
        assert study.make(store, run, jobs, 2) == {}  # nothing was made, and no time is told
        metrics, scores = study.figures(store, jobs, [store[job].length for job in jobs])
    assert batches == [[1, 3], [], [4, 0], [2]]  # like targets together, each once
    assert scores == [100.0] * len(jobs)
    assert metrics["by_target"] == {"16": 100.0, "32": 100.0, "64": 100.0}
    assert (metrics["kl_per_sequence"], metrics["finished"], metrics["forced_stop_rate"]) == (1.0, 1.0, 0.0)


def test_shards_share_the_generations(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [study.Job("lifebench", "hf", at, [5], 8, None, 16) for at in range(7)]
    common = ["drivers.py", "--data", "x", "--work", "y"]
    shares = []
    for at in range(3):
        monkeypatch.setattr("sys.argv", [*common, "--shard", f"{at}/3"])
        shares.append([job.at for job in study.parsed().mine(jobs)])
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    for wrong in (["--shard", "3/3"], ["--shard", "0/2", "--second"]):
        monkeypatch.setattr("sys.argv", [*common, *wrong])
        with pytest.raises(SystemExit):
            study.parsed()


def test_answers_end_before_their_first_end_id(study: Any) -> None:
    from lenvm_client import RowReport

    job = study.Job("second", "guided", 0, [5], 4, None, 4)
    ended = study.generation(job, [7, 8, 3, 0], [2, 3], RowReport(forced_stop=True, text_cost=2.0))
    assert (ended.token_ids, ended.finished, ended.forced_stop, ended.text_cost) == ([7, 8], True, True, 2.0)
    cut = study.generation(job, [7, 8, 9, 9], [2, 3], RowReport())
    assert (cut.token_ids, cut.finished) == ([7, 8, 9, 9], False)
