"""``lenvm serve`` with the real model, over a real socket: batching, and equal tokens."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lenvm.backbones import DEFAULT_BACKBONE
from lenvm.decoding import Generation, Request, SamplingParams
from lenvm.guidance import Objective
from lenvm.guides import ValueGuide
from lenvm.rollouts.sampling import LocalGenerator
from lenvm.scoring import TorchScorer
from lenvm_client import Client, ModelNotFoundError, Prediction, RowError
from lenvm_service.cli import main
from lenvm_service.remote import RemoteGuide
from tests.integration.conftest import ServiceProcess, start_service

QUESTION = "Why is the sky blue?"
PARAMS = SamplingParams(temperature=0.7, top_k=16, max_new_tokens=24)
MIXED: list[Objective | None] = [
    Objective(kind="equal_to", target=16),
    None,
    Objective(kind="at_most", target=8),
    Objective(kind="at_least", target=20),
    Objective(kind="tilt", lambda_=0.02),
    Objective(kind="scale", factor=0.5),
    Objective(kind="equal_to", target=12, method="paper"),
    Objective(kind="equal_to", target=12, method="paper", space="length"),
]


@pytest.fixture(scope="module")
def client(service: ServiceProcess) -> Any:
    with Client(service.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def generator(real_backbone_dir: Path) -> LocalGenerator:
    return LocalGenerator(DEFAULT_BACKBONE, max_rows=32)


# -- guided generation over HTTP ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_tokens_everywhere(client: Client, generator: LocalGenerator) -> None:
    """In-process, over HTTP in a batch of 32 with mixed objectives, and over HTTP alone."""
    scorer = TorchScorer(_value_model())
    ids = list(client.tokenize(prompt=QUESTION).token_ids)
    objectives = [MIXED[at % len(MIXED)] for at in range(32)]
    requests = [Request(ids, seed) for seed in range(32)]

    def tokens(answers: list[Generation]) -> list[tuple[list[int], bool]]:
        return [(answer.token_ids, answer.finished) for answer in answers]

    local = generator.sampler.generate(requests, PARAMS, guide=ValueGuide(scorer, objectives))
    batched = generator.sampler.generate(requests, PARAMS, guide=RemoteGuide(client, objectives))
    assert tokens(batched) == tokens(local)
    for at in (0, 3, 5, 6):
        (alone,) = generator.sampler.generate([requests[at]], PARAMS, guide=RemoteGuide(client, [objectives[at]]))
        assert tokens([alone]) == tokens([local[at]])
        assert alone.text_cost == pytest.approx(local[at].text_cost, abs=1e-3)
    assert len({tuple(answer.token_ids) for answer in local}) > 16


def _value_model() -> Any:
    from lenvm.modeling import LengthValueModel

    return LengthValueModel.from_pretrained(DEFAULT_BACKBONE)


def test_the_command_line_over_http_says_what_it_says_in_process(
    service: ServiceProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> Any:
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    generate = ("generate", QUESTION, "--equal-to", "12", "--seed", "5", "--max-new-tokens", "24")
    here, there = run(*generate), run(*generate, "--url", service.url)
    assert there["generations"][0]["token_ids"] == here["generations"][0]["token_ids"]
    score = ("score", QUESTION, "--completion", "Because of the air.", "--eos")
    here, there = run(*score), run(*score, "--url", service.url)
    assert there["scores"][0]["tokens"] == here["scores"][0]["tokens"]
    assert there["scores"][0]["values"] == pytest.approx(here["scores"][0]["values"], abs=1e-4)
    here, there = run("predict", QUESTION), run("predict", QUESTION, "--url", service.url)
    assert there["predictions"][0]["quantiles"] == here["predictions"][0]["quantiles"]
    assert there["predictions"][0]["mean"] == pytest.approx(here["predictions"][0]["mean"], rel=1e-3)


def test_cached_tokens_grow_by_one_a_guided_step(client: Client) -> None:
    ids = list(client.tokenize(prompt="Name three rivers.").token_ids)
    objective = {"kind": "equal_to", "target": 30}
    row: dict[str, Any] = {"token_ids": ids}
    cached = []
    for step in range(6):
        (score,) = client.score(
            [{**row, "candidates": [504, 378, 2], "generated": step, "objective": objective}]
        ).scores
        assert not isinstance(score, RowError)
        cached.append(score.cached_tokens)  # type: ignore[union-attr]
        row = {"session": score.session, "append": [504 if step % 2 else 378]}  # type: ignore[union-attr]
    assert cached == [0, *range(len(ids) + 1, len(ids) + 6)]


# -- batching and bad rows ---------------------------------------------------------------------------------------------


def test_32_concurrent_requests_share_forwards(service: ServiceProcess) -> None:
    forwards = service.metric("lenvm_forwards_total")

    def ask(at: int) -> Prediction:
        with Client(service.url, timeout=60) as own:
            return own.predict_length(f"What is {at} times {at + 7}?").prediction

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, range(32)))
    assert len({prediction.session for prediction in found}) == 32
    assert all(prediction.cached_tokens == 0 for prediction in found)
    # A batch is bounded in time too: on a slow machine that is a few rows.
    assert service.metric("lenvm_forwards_total") - forwards <= 16


def test_one_bad_row_of_64(client: Client) -> None:
    inputs: list[Any] = [{"prompt": f"Say {at}."} for at in range(64)]
    inputs[17] = {"prompt": "x", "token_ids": [1]}
    answer = client.predict_length(inputs)
    errors = [row for row in answer.predictions if isinstance(row, RowError)]
    assert [(row.index, row.type) for row in errors] == [(17, "invalid_request")]
    assert sum(isinstance(row, Prediction) for row in answer.predictions) == 63


def test_feedback_reaches_the_metrics(service: ServiceProcess, client: Client) -> None:
    prediction = client.predict_length("Tell me a joke.").prediction
    before = service.metric("lenvm_feedback_total", finish_reason="stop")
    answer = client.feedback(
        {"prediction_id": prediction.prediction_id, "generated_tokens": 40, "finish_reason": "stop"}
    )
    assert answer.accepted == 1
    assert service.metric("lenvm_feedback_total", finish_reason="stop") == before + 1


def test_metrics_of_every_part_are_there(service: ServiceProcess) -> None:
    for name in (
        "lenvm_requests_total",
        "lenvm_request_duration_seconds_count",
        "lenvm_queue_wait_seconds_count",
        "lenvm_batch_rows_count",
        "lenvm_tokens_total",
        "lenvm_sessions",
        "lenvm_guidance_rows_total",
        "lenvm_engine_ready",
    ):
        assert service.metric(name) > 0, name


@pytest.mark.usefixtures("real_backbone_dir")
def test_several_models_in_one_process(tmp_path: Path) -> None:
    running = start_service(tmp_path, "--model", f"one={DEFAULT_BACKBONE}", "--model", f"two={DEFAULT_BACKBONE}")
    try:
        with Client(running.url, timeout=60) as client:
            assert [model.id for model in client.models().data] == ["one", "two"]
            one, two, default = (client.predict_length(QUESTION, model=name) for name in ("one", "two", None))
            assert (one.model, two.model, default.model) == ("one", "two", "one")
            assert two.prediction.value == pytest.approx(one.prediction.value, abs=1e-6)
            assert (one.prediction.cached_tokens, two.prediction.cached_tokens) == (0, 0)  # each has its own states
            assert default.prediction.cached_tokens > 0
            with pytest.raises(ModelNotFoundError):
                client.predict_length(QUESTION, model="three")
    finally:
        assert running.stop() == 0
