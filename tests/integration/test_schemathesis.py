"""The service on a tiny model against its own OpenAPI document: 1,000 requests made from it, well-formed and not.

``LENVM_CASES=5000`` makes it as many; ``LENVM_CASES_FILE`` is told how many there were.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks, not_a_server_error

from lenvm.config import GeneratorRef, HeadConfig
from lenvm.distribution import LengthBins
from lenvm.modeling import LengthValueModel
from lenvm_service.api import create_app
from lenvm_service.engine import Engine
from lenvm_service.metrics import Metrics
from lenvm_service.settings import Settings

CASES_A_ROUTE = {"/predict_length": 180, "/score": 200, "/tokenize": 70, "/detokenize": 60, "/feedback": 70}
CASES_OF_GET = 8  # nothing but a header can differ
VOCABULARY = 128


@pytest.fixture(scope="module")
def app(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    folder = tmp_path_factory.mktemp("schemathesis")
    LengthValueModel.create(
        tiny_backbone,
        name="tiny",
        head=HeadConfig(16, LengthBins(cap=64)),
        gamma=0.99,
        generator=GeneratorRef("tiny-backbone", 0.7, 1.0, 64),
    ).save_pretrained(folder)
    metrics = Metrics()
    # Smaller than by default, so that what is too large is cheap to make.
    limits = Settings(max_batch_rows=64, max_candidates=64, max_body_bytes=65_536)
    engine = Engine.load("tiny", folder, limits, metrics)
    engine.start()
    while engine.state == "loading":
        time.sleep(0.01)
    assert engine.failure is None
    yield create_app({"tiny": engine}, limits, metrics)
    assert engine.ready  # nothing that was sent has hurt it
    engine.close()


def tamed(value: Any, name: str = "") -> Any:
    """Ids that the tiny model knows, and time enough: most of what a schema allows would end at the same two checks."""
    if isinstance(value, dict):
        known = {"models": ["nobody", "tiny"]} if value.get("models") else {}
        return {key: tamed(inner, key) for key, inner in value.items() if key != "model"} | known
    if isinstance(value, list):
        return [tamed(inner, name) for inner in value]
    if name in ("token_ids", "candidates", "completion_ids", "append", "eos_ids") and type(value) is int:
        return abs(value) % VOCABULARY
    return max(value, 60_000) if name == "deadline_ms" and isinstance(value, int | float) else value


def test_a_thousand_requests_from_the_document(app: FastAPI) -> None:
    wanted = int(os.environ.get("LENVM_CASES", "1000"))
    load_all_checks()
    conformance = ("status_code", "content_type", "response_headers", "response_schema")
    checks = [not_a_server_error, *CHECKS.get_by_names([f"{name}_conformance" for name in conformance])]
    assert len(checks) == 5
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    seen: Counter[str] = Counter()  # answers by route and status
    answered: Counter[str] = Counter()  # rows that were no error

    def try_one(case: schemathesis.Case, wild: bool) -> None:
        # A deadline that cannot be kept is a 504, as declared; here every 5xx is a failure.
        if not wild or (isinstance(case.body, dict) and "deadline_ms" in case.body):
            case.body = tamed(case.body)
            if case.headers and isinstance(case.body, dict) and {"models", "inputs"} & set(case.body):
                case.headers.pop("x-lenvm-headers", None)  # refused with these
        response = case.call()
        seen[f"{case.operation.path} {response.status_code}"] += 1
        case.validate_response(response, checks=checks)
        if response.status_code == 200 and case.operation.path in ("/predict_length", "/score"):
            for name in ("predictions", "scores", "results"):
                answered[name] += sum("error" not in row for row in response.json().get(name, ()))

    for found in document.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            run = settings(
                max_examples=-(-wanted * CASES_A_ROUTE.get(operation.path, CASES_OF_GET) // 1000),
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            wild = st.just(mode is schemathesis.GenerationMode.NEGATIVE)
            run(given(case=operation.as_strategy(generation_mode=mode), wild=wild)(try_one))()
    assert sum(seen.values()) >= wanted
    if "LENVM_CASES_FILE" in os.environ:
        Path(os.environ["LENVM_CASES_FILE"]).write_text(str(sum(seen.values())))
    for path in CASES_A_ROUTE:  # both sides were reached
        assert seen[f"{path} 200"] >= 10, seen
        assert sum(seen[f"{path} {status}"] for status in (400, 404, 422)) >= 10, seen
    # And the model itself, alone and among several.
    assert min(answered["predictions"] + answered["results"], answered["scores"]) >= 20, answered
    assert min(answered["predictions"], answered["results"]) >= 5, answered
