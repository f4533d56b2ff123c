"""docs/client.md names everything that is public, and nothing that is not there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import lenvm_client

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", TEXT)
WORDS = {word for code in CODE for word in re.findall(r"\w+", code)}
CALL = re.compile(r"(\w+)\(([^)]*)\)")


def test_every_public_name_is_there() -> None:
    assert sorted(set(lenvm_client.__all__) - WORDS) == []


@pytest.mark.parametrize("kind", ["Client", "AsyncTracker", "BudgetPlanner", "TokenBudget", "GuidedDecoder"])
def test_every_public_method_is_there(kind: str) -> None:
    names = {name for name in dir(getattr(lenvm_client, kind)) if not name.startswith("_")}
    fields = set(getattr(getattr(lenvm_client, kind), "__dataclass_fields__", ()))
    assert sorted((names | fields) - WORDS - {"capacity"}) == []


def test_what_looks_like_a_name_of_ours_exists() -> None:
    kinds = {
        word for word in WORDS if re.fullmatch(r"[A-Z]\w+(Error|Client|Response|Row|Report|Input|Scores|Item)", word)
    }
    assert len(kinds) > 20
    assert sorted(kinds - set(lenvm_client.__all__) - {"ConnectionError", "TimeoutError"}) == []


def test_calls_have_the_arguments_that_they_are_shown_with() -> None:
    shown = 0
    for code in CODE:
        for name, arguments in CALL.findall(code):
            target = getattr(lenvm_client, name, None) or getattr(lenvm_client.Client, name, None)
            if target is None or "=" in arguments:
                continue
            given = {argument.strip() for argument in arguments.split(",")} - {"", "...", "**options"}
            if all(argument.isidentifier() for argument in given):
                shown += 1
                assert given <= set(inspect.signature(target).parameters), code
    assert shown > 15


def test_its_examples_run() -> None:
    transport = lenvm_client.MockTransport()
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(examples) == 2
    names: dict[str, object] = {"transport": transport}
    for example in examples:
        mocked = example.replace('Client("http://127.0.0.1:8000")', "Client(transport=transport)")
        assert "transport=transport" in mocked
        exec(compile(mocked, "client.md", "exec"), names)
    assert [request.path for request in transport.requests] == ["/predict_length"] * 3
