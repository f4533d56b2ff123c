"""Rows of a step as columns on the wire: when, what goes out, how the answer is read, and services without them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

from lenvm_client import (
    AsyncClient,
    BadAnswerError,
    CandidateInput,
    CandidateScores,
    Client,
    GuidedDecoder,
    GuidedRow,
    InvalidRequestError,
    MockTransport,
    RowError,
)
from lenvm_client._columns import StepAnswers, StepRows, step_call
from lenvm_service.api import create_app
from lenvm_service.metrics import Metrics
from lenvm_service.settings import Settings
from tests.support.fake_engine import KNOWN, FakeEngine

WANTED = {"kind": "equal_to", "target": 9}
ROW = CandidateInput(
    session=KNOWN, append=(5,), candidates=(6, 7, 2), generated=3, objective=WANTED, eos_ids=(2,), return_values=False
)
OTHER = replace(ROW, append=(8,), candidates=(9, 4))


def sent(rows: list[CandidateInput]) -> Any:
    """The body of the one request for these rows."""
    transport = MockTransport()
    with Client(transport=transport) as client:
        answers = client.score_candidates(rows)
    assert [answer.index for answer in answers] == list(range(len(rows)))
    (request,) = transport.requests
    return request.body


def test_rows_of_a_step_go_as_columns() -> None:
    assert sent([ROW, OTHER]) == {
        "columns": {
            "session": [KNOWN, KNOWN],
            "append": [[5], [8]],
            "candidates": [[6, 7, 2], [9, 4]],
            "generated": [3, 3],
            "objective": WANTED,
            "eos_ids": [2],
        }
    }
    body = sent([replace(ROW, objective=dict(WANTED)), replace(OTHER, objective=None)])
    assert body["columns"]["objective"] == [WANTED, None]
    body = sent([replace(ROW, logprobs=(-1.0, -2.0, -3.0)), replace(OTHER, logprobs=[-0.5, -1.5])])
    assert body["columns"]["logprobs"] == [[-1.0, -2.0, -3.0], [-0.5, -1.5]]
    body = sent([replace(ROW, candidates=np.array([6, 7, 2])), OTHER])  # type: ignore[arg-type]
    assert body["columns"]["candidates"] == [[6, 7, 2], [9, 4]]


@pytest.mark.parametrize(
    "rows",
    [
        [ROW],
        [ROW, replace(OTHER, session=None, append=(), token_ids=(1, 2))],
        [ROW, replace(OTHER, return_values=True)],
        [ROW, replace(OTHER, eos_ids=(3,))],
        [replace(ROW, logprobs=(-1.0, -2.0, -3.0)), OTHER],
        [ROW, replace(OTHER, prompt="a")],
    ],
)
def test_what_does_not_fit_goes_row_by_row(rows: list[CandidateInput]) -> None:
    assert step_call(rows, {}) is None
    assert len(sent(rows)["inputs"]) == len(rows)


def test_options_and_what_json_cannot_carry() -> None:
    transport = MockTransport()
    with Client(transport=transport, model="m") as client:
        client.score_candidates([ROW, OTHER], deadline_ms=250.0, priority=2)
        body = transport.requests[0].body
        assert (body["model"], body["deadline_ms"], body["priority"]) == ("m", 250.0, 2)
        nan = replace(ROW, logprobs=(-1.0, float("nan"), -2.0))
        with pytest.raises(InvalidRequestError, match=r"inputs\[1\]\.logprobs\[1\] is not finite"):
            client.score_candidates([replace(OTHER, logprobs=(-1.0, -1.0)), nan])
        with pytest.raises(InvalidRequestError, match="not finite"):
            client.score_candidates(
                [replace(row, objective={**WANTED, "strength": float("inf")}) for row in (ROW, OTHER)]
            )
    assert len(transport.requests) == 1


def answer(**changed: Any) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "prefix_tokens": [10, 11],
        "cached_tokens": [9, 11],
        "value": [-0.5, -0.25],
        "horizon": [3.0, 2.0],
        "log_weights": [[0.0, -1.0, -2.5], [-3.0, 0.5]],
        "session": ["s-a", "s-b"],
        "objective": [None, None],
    }
    errors = changed.pop("errors", [])
    return {"model": "m", "columns": {**columns, **changed}, "errors": errors, "warnings": [], "timings_ms": {}}


def ask(found: Mapping[str, Any]) -> list[CandidateScores | RowError]:
    with Client(transport=MockTransport({"/score": found}), max_retries=0) as client:
        return client.score_candidates([ROW, OTHER])


def test_answers_come_back_as_rows() -> None:
    first, second = ask(answer())
    assert first == CandidateScores(
        index=0, values=(), horizons=(), log_weights=(0.0, -1.0, -2.5), session="s-a", value=-0.5, horizon=3.0,
        prefix_tokens=10, cached_tokens=9,
    )  # fmt: skip
    assert isinstance(second, CandidateScores)
    assert (second.index, second.log_weights, second.session) == (1, (-3.0, 0.5), "s-b")


def test_what_is_not_just_so_is_read_row_by_row() -> None:
    tilt = {"kind": "tilt", "lambda": 0.1}
    first, second = ask(answer(objective=[tilt, None], value=[0, -0.25], log_weights=[None, [-3, 0.5]]))
    assert isinstance(first, CandidateScores)
    assert isinstance(second, CandidateScores)
    assert (first.objective, first.value, first.log_weights, second.log_weights) == (tilt, 0.0, None, (-3.0, 0.5))
    error = {"type": "prefix_unknown", "message": "gone", "code": "prefix_unknown", "param": "columns[1].session"}
    nothing = {name: [values[0], None] for name, values in answer()["columns"].items()}
    first, second = ask(answer(**nothing, errors=[{"index": 1, "error": error}]))
    assert isinstance(first, CandidateScores)
    assert isinstance(second, RowError)
    assert (second.index, second.type, second.param) == (1, "prefix_unknown", "columns[1].session")


@pytest.mark.parametrize(
    "found",
    [
        {**answer(), "columns": None},
        {**answer(), "columns": []},
        {**answer(), "errors": None},
        answer(value=[-0.5]),
        answer(session=None),
        answer(log_weights=[[0.0, -1.0], [-3.0, 0.5]]),
        answer(log_weights=[[0.0, -1.0, "x"], [-3.0, 0.5]]),
        answer(value=[None, -0.25]) | {"model": 4, "columns": {**answer()["columns"], "log_weights": [3, 4]}},
        answer(horizon=[True, 2.0]),
        answer(errors=[{"index": 1}]),
        answer(errors=[3]),
        {"model": "m", "scores": [], "warnings": []},
    ],
)
def test_what_does_not_fit_the_question_is_no_answer(found: dict[str, Any]) -> None:
    with pytest.raises(BadAnswerError):
        ask(found)


class TestOldServices:
    """One that does not know columns refuses them by name, and gets rows from then on."""

    @staticmethod
    def old(request: Any) -> Any:
        if "columns" in request.body:
            error = {"type": "invalid_request", "message": "columns is unknown", "code": "extra_forbidden"}
            return httpx2.Response(422, json={"error": error})
        return None

    def test_blocking(self) -> None:
        transport = MockTransport({"/score": self.old})
        with Client(transport=transport) as client:
            for _ in range(2):
                assert all(isinstance(row, CandidateScores) for row in client.score_candidates([ROW, OTHER]))
        assert ["columns" in request.body for request in transport.requests] == [True, False, False]

    def test_asynchronous(self) -> None:
        transport = MockTransport({"/score": self.old})

        async def run() -> None:
            async with AsyncClient(transport=transport) as client:
                for _ in range(2):
                    assert all(isinstance(row, CandidateScores) for row in await client.score_candidates([ROW, OTHER]))

        asyncio.run(run())
        assert ["columns" in request.body for request in transport.requests] == [True, False, False]

    def test_a_refusal_of_both_forms_is_raised_and_columns_are_tried_again(self) -> None:
        refused = InvalidRequestError("deadline_ms must be above 0", param="deadline_ms", status=422)
        transport = MockTransport({"/score": refused})
        with Client(transport=transport) as client:
            for _ in range(2):
                with pytest.raises(InvalidRequestError, match="deadline_ms"):
                    client.score_candidates([ROW, OTHER])
        assert ["columns" in request.body for request in transport.requests] == [True, False, True, False]


def test_both_clients_read_what_the_service_answers() -> None:
    engine = FakeEngine()
    service = TestClient(create_app({"fake": engine}, Settings(), Metrics()))

    def over(request: Any) -> Any:
        found = service.post("/score", json=request.body)
        return httpx2.Response(found.status_code, content=found.content, headers={"content-type": "application/json"})

    rows = [ROW, replace(OTHER, session="s-nobody"), OTHER]
    with Client(transport=MockTransport({"/score": over})) as client:
        found = client.score_candidates(rows)

    async def asked() -> Any:
        async with AsyncClient(transport=MockTransport({"/score": over})) as client:
            return await client.score_candidates(rows)

    assert [type(row) for row in found] == [CandidateScores, RowError, CandidateScores]
    assert [row if isinstance(row, CandidateScores) else row.type for row in found] == [
        row if isinstance(row, CandidateScores) else row.type for row in asyncio.run(asked())
    ]
    assert isinstance(found[1], RowError)
    assert found[1].param == "columns[1].session"
    assert len(engine.calls[0][0]) == 1  # one job


def test_a_bad_row_among_columns_is_its_own_error() -> None:
    service = TestClient(create_app({"fake": FakeEngine()}, Settings(), Metrics()))
    columns = {"session": [KNOWN] * 3, "candidates": [[5], [5, -1], []], "objective": [WANTED, {"kind": "x"}, None]}
    found = service.post("/score", json={"columns": columns}).json()
    assert [(row["index"], row["error"]["type"]) for row in found["errors"]] == [
        (1, "invalid_request"),
        (2, "invalid_request"),
    ]
    assert found["columns"]["session"] == [KNOWN, None, None]
    assert found["columns"]["log_weights"] == [[0.0], None, None]


def test_odd_eos_ids_are_told_as_those_of_rows() -> None:
    assert sent([replace(ROW, eos_ids=None), replace(OTHER, eos_ids=None)])["columns"]["session"]  # type: ignore[arg-type]
    arrays = [replace(ROW, eos_ids=np.array([2, 3])), replace(OTHER, eos_ids=np.array([2, 3]))]  # type: ignore[arg-type]
    assert sent(arrays)["columns"]["eos_ids"] == [2, 3]
    assert step_call([replace(ROW, eos_ids=(2.5,)), replace(OTHER, eos_ids=(2.5,))], {}) is None  # type: ignore[arg-type]
    service = TestClient(create_app({"fake": FakeEngine()}, Settings(), Metrics()))
    for odd in ("", 0, False, {}):
        found = service.post("/score", json={"columns": {"session": [KNOWN], "candidates": [[5]], "eos_ids": odd}})
        assert [row["error"]["type"] for row in found.json()["errors"]] == ["invalid_request"], odd


def test_a_stand_in_that_answers_rows_is_read() -> None:
    row = {"values": [], "horizons": [], "session": "s-a", "value": -0.5, "horizon": 3.0}
    rows = [{"index": 0, "log_weights": [0.0, 1.0, 2.0], **row}, {"index": 1, "log_weights": [3.0, 4.0], **row}]
    first, second = ask({"model": "m", "scores": rows})
    assert isinstance(first, CandidateScores)
    assert isinstance(second, CandidateScores)
    assert (first.log_weights, second.log_weights) == ((0.0, 1.0, 2.0), (3.0, 4.0))
    with pytest.raises(BadAnswerError):
        ask({"model": "m", "scores": rows[::-1]})


class TestSideBySide:
    """A decoder's rows as columns from the start: what goes out and comes back is what it is row by row."""

    @staticmethod
    def decoded(transport: MockTransport, *, side: bool, **changed: Any) -> tuple[list[Any], list[Any], str]:
        """Bodies, answers and the report of five steps of three rows."""
        found, prefixes = [], [[5, 6, 7], [8, 9], [4, 4, 4, 4]]
        named, own = changed.pop("named", True), changed.pop("own", False)
        fits = "decoder" not in changed
        with Client(transport=transport, max_retries=0) as client:
            decoder = GuidedDecoder(client, [2], on_error="raise", **changed.pop("decoder", {}))
            step_rows, made = decoder._step_rows, list[Any]()
            decoder._step_rows = (  # type: ignore[method-assign]
                lambda rows: made.append(step_rows(rows)) or made[-1] if side else None  # type: ignore[func-returns-value]
            )
            last: list[Any] = [None] * 3
            for step in range(5):
                rows = [
                    GuidedRow(
                        prefix=list(prefix), candidates=[20 + step, 11, 12], logprobs=[-1.0, -2.0, -0.5 * step - 1.0],
                        generated=step, objective=dict(WANTED) if own else WANTED, eos_logprobs={2: -4.0},
                        after=after if named else None, **changed,
                    )
                    for prefix, after in zip(prefixes, last, strict=True)
                ]  # fmt: skip
                last = decoder.step(rows)
                found.append(last)
                for prefix in prefixes:
                    prefix.append(11)
            report = decoder.report(
                [GuidedRow(prefix=prefix, generated=5, objective=WANTED, **changed) for prefix in prefixes]
            )
        assert [each is not None for each in made[1:]] == [fits] * (4 * side)
        return [request.body for request in transport.requests], found, str(report.rows)

    @pytest.mark.parametrize(
        "changed",
        [
            {},
            {"objective": {"kind": "equal_to", "target": 9, "method": "paper"}},
            {"objective": {"kind": "at_most", "target": 9, "min_eos_prob": 0.1}},
            {"end_ids": (2, 3)},
            {"named": False},
            {"own": True},
            {"decoder": {"max_batch_rows": 2}},
            {"decoder": {"max_body_bytes": 1500}},
        ],
        ids=["plain", "paper", "bounded", "own ends", "not named", "own objectives", "few rows", "few bytes"],
    )
    def test_the_same_as_row_by_row(self, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(globals(), "WANTED", changed.pop("objective", WANTED))
        asked, by_rows = MockTransport(), MockTransport()
        found, wanted = self.decoded(asked, side=True, **changed), self.decoded(by_rows, side=False, **changed)
        assert found == wanted
        assert any("columns" in body for body in found[0])

    def test_a_row_s_error_costs_its_neighbours_nothing(self) -> None:
        def once() -> Any:
            calls = 0

            def answered(request: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls != 3:
                    return None
                columns = {
                    "prefix_tokens": [5, None, 6], "cached_tokens": [5, None, 6], "value": [-0.5, None, -0.25],
                    "horizon": [3.0, None, 2.0], "log_weights": [[0.0, -1.0, 0.5, 0.25], None, [1.0, 2.0, 3.0, 4.0]],
                    "session": ["s-x", None, "s-z"], "objective": [None] * 3,
                }  # fmt: skip
                error = {"type": "prefix_unknown", "message": "gone", "code": "prefix_unknown", "param": "session"}
                return httpx2.Response(
                    200, json={"model": "m", "columns": columns, "errors": [{"index": 1, "error": error}]}
                )

            return answered

        found, wanted = (self.decoded(MockTransport({"/score": once()}), side=side) for side in (True, False))
        assert found == wanted
        assert [row.log_weights[:2] for row in found[1][2]][::2] == [(0.0, -1.0), (1.0, 2.0)]
        resent = found[0][3]  # the row whose session is gone, whole
        assert [len(row["token_ids"]) for row in resent["inputs"]] == [4]

    def test_an_older_service_gets_rows_and_what_is_no_answer_is_told(self) -> None:
        transport = MockTransport({"/score": TestOldServices.old})
        found, wanted = self.decoded(transport, side=True), self.decoded(MockTransport(), side=False)
        assert found[1:] == wanted[1:]
        assert ["columns" in body for body in found[0]] == [False, True, *[False] * 4]
        bad = MockTransport({"/score": lambda request: answer() if "columns" in request.body else None})
        with pytest.raises(BadAnswerError, match="3 inputs were sent"):
            self.decoded(bad, side=True)

    def test_as_sequences(self) -> None:
        side = StepRows.of([ROW, OTHER])
        assert side is not None
        assert list(side) == [replace(ROW, eos_ids=[2]), replace(OTHER, eos_ids=[2])] == side[:2]
        assert StepRows.of(side) is side
        call = step_call(side, {})
        assert call is not None
        found = call._decoded(answer())
        assert isinstance(found, StepAnswers)
        assert list(found) == ask(answer()) == found[:]
        assert found[1] == ask(answer())[1]
