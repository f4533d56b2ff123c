"""Rows of requests: the short way of a decoding loop's rows reads what the schema reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm_client import CandidateInput, CandidateScores, GuidedDecoder, GuidedRow
from lenvm_client._wire import make_call
from lenvm_service.api import rows
from lenvm_service.api.errors import RequestError
from lenvm_service.engine.jobs import CandidateJob, StepJob
from lenvm_service.errors import PayloadTooLargeError

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


@given(st.lists(ROWS, min_size=1, max_size=3), st.booleans(), st.one_of(IDS, ODD))
def test_columns_are_read_as_their_rows_would_be(listed: list[dict[str, Any]], alike: bool, ends: Any) -> None:
    names = [name for name in ("append", "generated", "logprobs") if all(name in row for row in listed)]
    columns = {name: [row[name] for row in listed] for name in ("session", "candidates", *names)}
    objectives = [row.get("objective") for row in listed]
    columns["objective"] = objectives[0] if alike and not isinstance(objectives[0], list) else objectives
    call = rows.read_score(json.dumps({"columns": {**columns, "eos_ids": ends}}).encode(), 8)
    assert call.columns is not None
    job = rows.step_job(call.columns, 3, "tenant")
    spread = rows.spread(call.columns)
    with patch.object(rows, "_plain_candidate_job", lambda *_: None):
        wanted = rows.score_jobs(replace(call, rows=spread), None, 3, "tenant")
    assert len(wanted) == len(listed)
    if job is None:
        return
    for one, other in zip(job.rows(), wanted, strict=True):
        assert isinstance(other, CandidateJob)
        assert (list(one.prefix.token_ids), list(one.candidates)) == ([*other.prefix.token_ids], [*other.candidates])
        assert (one.prefix.session, one.prefix.tenant) == (other.prefix.session, "tenant")
        assert (one.generated, one.objective, one.logprobs) == (other.generated, other.objective, other.logprobs)
        assert (list(one.eos_ids), one.return_values, other.return_values) == ([*other.eos_ids], False, False)


COLUMNS = {"session": ["s-1", "s-2"], "append": [[7], []], "candidates": [[3, 4], [5]], "generated": [1, 2]}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"objective": {"kind": "equal_to", "target": 9}},
        {"objective": [{"kind": "equal_to", "target": 9}, None]},
        {"logprobs": [[-1.0, -2.0], [-0.5]], "eos_ids": [2]},
        {"append": None, "generated": None, "logprobs": None, "objective": None, "eos_ids": None},
    ],
)
def test_plain_columns_are_one_job(more: dict[str, Any]) -> None:
    call = rows.read_score(json.dumps({"columns": {**COLUMNS, **more}}).encode(), 8)
    assert call.columns is not None
    with patch.object(rows, "check", side_effect=AssertionError("the schema was asked")):
        job = rows.step_job(call.columns, 3)
    assert isinstance(job, StepJob)
    assert len(job.rows()) == 2


@pytest.mark.parametrize(
    ("columns", "reason", "param"),
    [
        ([], "dict_type", "columns"),
        ("x", "dict_type", "columns"),
        ({**COLUMNS, "prompt": ["a", "b"]}, "extra_forbidden", "columns"),
        ({"candidates": [[1]]}, "list_type", "columns.session"),
        ({**COLUMNS, "session": []}, "list_type", "columns.session"),
        ({**COLUMNS, "session": "s-1"}, "list_type", "columns.session"),
        ({"session": ["s-1"]}, "column_length", "columns.candidates"),
        ({**COLUMNS, "candidates": [[1]]}, "column_length", "columns.candidates"),
        ({**COLUMNS, "append": [1, 2, 3]}, "column_length", "columns.append"),
        ({**COLUMNS, "generated": 4}, "column_length", "columns.generated"),
        ({**COLUMNS, "logprobs": {}}, "column_length", "columns.logprobs"),
        ({**COLUMNS, "objective": []}, "column_length", "columns.objective"),
    ],
)
def test_what_is_no_columns_is_refused_as_a_whole(columns: Any, reason: str, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        rows.read_score(json.dumps({"columns": columns}).encode(), 8)
    assert (caught.value.reason, caught.value.param) == (reason, param)


def test_columns_and_rows_do_not_go_together_and_are_limited_alike() -> None:
    for beside in ({"inputs": [{}]}, {"prompt": "a"}, {"candidates": [1]}):
        with pytest.raises(RequestError, match="beside columns"):
            rows.read_score(json.dumps({"columns": COLUMNS, **beside}).encode(), 8)
    assert rows.read_score(json.dumps({"columns": COLUMNS, "inputs": None}).encode(), 8).columns is not None
    with pytest.raises(PayloadTooLargeError):
        rows.read_score(json.dumps({"columns": COLUMNS}).encode(), 1)
    with pytest.raises(RequestError):
        rows.read_score(json.dumps({"columns": COLUMNS, "priority": "x"}).encode(), 8)
