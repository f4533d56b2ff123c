"""The OpenAPI document: complete, pinned, and without anything of the framework's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lenvm_service.api import create_app
from lenvm_service.api.openapi import document
from lenvm_service.api.routes import router
from lenvm_service.metrics import Metrics
from lenvm_service.settings import Settings
from tests.support.fake_engine import FakeEngine

PINNED = Path(__file__).resolve().parents[2] / "docs" / "openapi.json"


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return document()


def test_the_pinned_copy_is_up_to_date(made: dict[str, Any]) -> None:
    assert json.loads(PINNED.read_text(encoding="utf-8")) == made, (
        "the wire contract changed; if that is meant: .venv/bin/python -m lenvm_service.api > docs/openapi.json"
    )


def test_it_is_what_the_service_answers(made: dict[str, Any]) -> None:
    client = TestClient(create_app({"fake": FakeEngine()}, Settings(max_batch_rows=3), Metrics()))
    assert client.get("/openapi.json").json() == made
    assert "swagger" in client.get("/docs").text


def test_every_route_is_described(made: dict[str, Any]) -> None:
    operations = {(path, method) for path, operations in made["paths"].items() for method in operations}
    routes = {
        (route.path, method.lower())
        for route in router.routes
        for method in route.methods  # type: ignore[attr-defined]
        if route.include_in_schema  # type: ignore[attr-defined]
    }
    assert operations == routes
    for path, operations_of_path in made["paths"].items():
        for method, operation in operations_of_path.items():
            assert ("requestBody" in operation) is (method == "post"), path
            assert {"200", "500"} <= set(operation["responses"]), path
            for status, response in operation["responses"].items():
                assert "x-request-id" in response["headers"]
                (schema,) = [content["schema"] for content in response["content"].values()]
                assert (schema == {"$ref": "#/components/schemas/ErrorResponse"}) is (status != "200")


def test_every_reference_resolves_and_nothing_is_left_over(made: dict[str, Any]) -> None:
    text = json.dumps(made)
    used = set(re.findall(r'"#/components/(\w+/\w+)"', text))
    schemes = [name for path in made["paths"].values() for operation in path.values() for name in _schemes(operation)]
    used |= {f"securitySchemes/{name}" for name in schemes}
    there = {f"{kind}/{name}" for kind, entries in made["components"].items() for name in entries}
    assert used == there
    assert "HTTPValidationError" not in text


def test_every_operation_but_liveness_may_want_a_key(made: dict[str, Any]) -> None:
    for path, operations in made["paths"].items():
        for operation in operations.values():
            open_to_all = path == "/health/live"
            assert bool(_schemes(operation)) is not open_to_all
            assert ("401" in operation["responses"]) is not open_to_all


def _schemes(operation: dict[str, Any]) -> list[str]:
    return [name for choice in operation.get("security", ()) for name in choice]
