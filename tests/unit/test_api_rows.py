"""Rows of requests: the short way of a decoding loop's rows reads what the schema reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm_client import CandidateInput, CandidateScores, GuidedDecoder, GuidedRow
from lenvm_client._wire import make_call
from lenvm_service.api import rows
from lenvm_service.api.errors import RequestError
from lenvm_service.engine.jobs import CandidateJob

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.just(2**31),
    st.floats(0, 3),
    st.text(max_size=2),
    st.just("s" * 257),
)
IDS = st.lists(st.integers(0, 50_000), max_size=4)
OBJECTIVES = st.fixed_dictionaries(
    {"kind": st.sampled_from(["equal_to", "at_most", "tilt", "none such"])},
    optional={"target": st.one_of(st.integers(-1, 300), ODD), "lambda": st.one_of(st.floats(0, 1), ODD), "other": ODD},
)
ROWS = st.fixed_dictionaries(
    {"candidates": st.one_of(IDS, ODD, st.lists(ODD, max_size=3)), "session": st.one_of(st.just("s-1"), ODD)},
    optional={
        "append": st.one_of(IDS, ODD, st.lists(ODD, max_size=3)),
        "generated": st.one_of(st.integers(0, 9), ODD),
        "logprobs": st.one_of(st.lists(st.floats(-9, 0), max_size=4), ODD, st.lists(ODD, max_size=3)),
        "objective": st.one_of(OBJECTIVES, ODD),
        "return_values": ODD,
        "eos_ids": st.one_of(IDS, ODD, st.lists(ODD, max_size=3), st.just([1] * 65)),
        "prompt": ODD,
    },
)


def read(row: Any) -> Any:
    call = rows.read_score(json.dumps({"inputs": [row]}).encode(), 8)
    (found,) = rows.score_jobs(call, None, 3, "tenant")
    return found


def by_schema(row: Any) -> Any:
    with patch.object(rows, "_plain_candidate_job", lambda *_: None):
        return read(row)


@given(ROWS)
def test_a_decoding_loop_s_rows_are_read_as_the_schema_reads_them(row: dict[str, Any]) -> None:
    one, other = read(row), by_schema(row)
    if isinstance(other, CandidateJob):
        assert isinstance(one, CandidateJob)
        assert (list(one.candidates), list(one.prefix.token_ids)) == (
            list(other.candidates),
            list(other.prefix.token_ids),
        )
        assert (one.prefix.session, one.prefix.tenant) == (other.prefix.session, other.prefix.tenant)
        assert (one.generated, one.objective, one.logprobs) == (other.generated, other.objective, other.logprobs)
        assert (list(one.eos_ids), one.return_values) == (list(other.eos_ids), other.return_values)
    else:
        assert (type(one), str(one), getattr(one, "param", None)) == (
            type(other),
            str(other),
            getattr(other, "param", None),
        )


PLAIN = {"session": "s-1", "append": [7], "candidates": [3, 4], "generated": 2, "return_values": False}


@pytest.mark.parametrize(
    "more", [{}, {"objective": {"kind": "equal_to", "target": 9}}, {"logprobs": [-1.0, -2.0]}, {"eos_ids": [2]}]
)
def test_they_do_not_go_through_the_schema(more: dict[str, Any]) -> None:
    body = json.dumps({"inputs": [{**PLAIN, **more}]}).encode()
    call = rows.read_score(body, 8)
    with patch.object(rows, "check", side_effect=AssertionError("the schema was asked")):
        assert isinstance(rows.score_jobs(call, None, 3)[0], CandidateJob)


def test_nor_do_those_of_our_own_guided_decoder() -> None:
    sent: list[CandidateInput] = []

    class Scorer:
        def score_candidates(self, given: Sequence[CandidateInput]) -> list[CandidateScores]:
            sent.extend(given)
            weights = [(0.0,) * len(row.candidates) for row in given]
            return [
                CandidateScores(index=at, values=(), horizons=(), log_weights=each, session="s-1")
                for at, each in enumerate(weights)
            ]

    decoder = GuidedDecoder(Scorer(), [2])
    wanted = {"kind": "equal_to", "target": 9}
    for prefix in ([5, 6], [5, 6, 7]):
        decoder.step([GuidedRow(prefix=prefix, candidates=[7, 2], logprobs=[-1.0, -2.0], objective=wanted)])
    call = rows.read_score(make_call("POST", "/score", Any, {"inputs": sent[1:]}).content or b"", 8)
    with patch.object(rows, "check", side_effect=AssertionError("the schema was asked")):
        (job,) = rows.score_jobs(call, None, 8)
    assert isinstance(job, CandidateJob)
    assert (job.prefix.session, list(job.prefix.token_ids), tuple(job.eos_ids)) == ("s-1", [7], (2,))


@pytest.mark.parametrize(
    "odd",
    [
        {"logprobs": [-1.0, float("-inf")]},
        {"eos_ids": [1] * 65},
        {"candidates": [1, 2, 3, 4]},
        {"prompt": None},
        {"append": [True]},
        {"candidates": [-1]},
        {"generated": 1.0},
        {"logprobs": [-1, -2]},
    ],
)
def test_all_else_does(odd: dict[str, Any]) -> None:
    call = rows.read_score(json.dumps({"inputs": [PLAIN, PLAIN]}).encode(), 8)
    assert rows.step_jobs(call, 3) == rows.score_jobs(call, None, 3)
    call.rows[1] = {**PLAIN, **odd}
    assert rows.step_jobs(call, 3) is None
    with patch.object(rows, "check", side_effect=AssertionError("the schema was asked")):
        assert rows.score_jobs(rows.Call(call.options, call.rows[:1], flat=False), None, 3) != []
    assert isinstance(rows.score_jobs(call, None, 3)[0], CandidateJob)  # its neighbour is none the worse for it


def test_a_number_that_no_float_holds_is_the_schema_s_error() -> None:
    body = json.dumps({"inputs": [{**PLAIN, "logprobs": [-1.0, -2.5]}]}).replace("-2.5", "-1e999")
    (found,) = rows.score_jobs(rows.read_score(body.encode(), 8), None, 3)
    assert isinstance(found, RequestError)
    assert found.param == "logprobs[1]"
