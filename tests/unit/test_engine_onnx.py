"""The service's engine over an ONNX export: the same answers as over the checkpoint, by torch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lenvm.guidance import Objective
from lenvm_client import CandidateInput, CandidateScores
from lenvm_service.engine import CandidateJob, Engine, EngineOptions, Job, PredictJob, Prefix, TokenScoreJob
from lenvm_service.local import LocalScorer

EOS = 2


def started(folder: Path, **options: Any) -> Engine:
    engine = Engine("tiny", folder, EngineOptions(secret=b"k" * 16, **options))
    engine.start()
    end = time.monotonic() + 30
    while engine.state == "loading":
        assert time.monotonic() < end
        time.sleep(0.005)
    assert engine.failure is None
    return engine


@pytest.fixture
def engine(tiny_export: Path) -> Iterator[Engine]:
    made = started(tiny_export, backend="onnx")
    yield made
    made.close()


def ask(engine: Engine, jobs: list[Job]) -> list[Any]:
    return asyncio.run(engine.submit(jobs)).results


def test_answers_are_those_of_torch(engine: Engine, tiny_checkpoint: Path) -> None:
    torch_engine = started(tiny_checkpoint)
    objective = Objective(kind="equal_to", target=12)
    jobs: list[Job] = [
        PredictJob(Prefix([9, 6, 7])),
        TokenScoreJob([5, 6], [7, 8, 11], eos=True),
        CandidateJob(Prefix([5, 6]), [7, 9, EOS], objective=objective),
    ]
    found, wanted = ask(engine, jobs), ask(torch_engine, jobs)
    for fields in (("value", "mean"), ("values", "length_shifts"), ("value", "values", "log_weights")):
        for got, want in zip(found, wanted, strict=True):
            for name in fields:
                if name in want:
                    np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-4)
    only_end: list[Job] = [CandidateJob(Prefix([5, 6, 8]), [EOS], objective=objective)]
    (got,), (want,) = ask(engine, only_end), ask(torch_engine, only_end)
    assert got["values"] == want["values"] == [0.0]
    assert got["log_weights"] == pytest.approx(want["log_weights"])
    # Another graph may answer otherwise: handles of one must not be taken for the other's.
    assert found[2]["session"] != wanted[2]["session"]
    torch_engine.close()
    promoted = engine.core.scorer.stats.promoted
    step = ask(engine, [CandidateJob(Prefix([7], found[2]["session"]), [9, EOS], 1, objective)])[0]
    assert step["cached_tokens"] == 3
    assert engine.core.scorer.stats.promoted == promoted + 1


def test_what_it_says_of_itself(engine: Engine) -> None:
    found = engine.describe()
    assert (found["dtype"], found["context"], found["vocab_size"], found["eos_ids"]) == ("fp32", 512, 128, [EOS])
    assert engine.core.scorer.pool.used_blocks == 0  # warming up leaves nothing behind


def test_forwards_are_life_signs_and_a_failure_is_survived(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[int] = []
    monkeypatch.setattr(engine.batcher, "beat", lambda: beats.append(1))
    (first,) = ask(engine, [PredictJob(Prefix([5, 6, 7]))])
    assert beats == [1]
    before = engine.core.scorer
    engine._check(1)  # what the thread does after a second failure
    assert engine.core.scorer is not before
    assert ask(engine, [PredictJob(Prefix([5, 6, 7]))])[0]["value"] == first["value"]


def test_old_sessions_make_room_for_candidates_too(tiny_export: Path) -> None:
    engine = started(tiny_export, cache_tokens=600)
    rng = np.random.default_rng(0)
    for _ in range(8):
        job = CandidateJob(Prefix(rng.integers(3, 128, 100).tolist()), list(range(3, 103)))
        assert isinstance(ask(engine, [job])[0], dict)
    assert engine.core.sessions.evicted > 0
    assert engine.core.scorer.pool.used_blocks <= 600
    engine.close()


def test_the_local_scorer_takes_an_export(tiny_export: Path, full_forward: Any) -> None:
    (row,) = LocalScorer(tiny_export).score_candidates([CandidateInput(token_ids=[5, 6], candidates=[7])])
    assert isinstance(row, CandidateScores)
    assert row.values[0] == pytest.approx(-1 / (1 + np.exp(-full_forward([5, 6, 7])[0][-1])), abs=1e-4)
