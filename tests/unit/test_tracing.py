"""When there are traces, and that nothing is paid for them when there are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lenvm.errors import MissingExtraError
from lenvm_service import tracing
from lenvm_service.settings import Settings
from lenvm_service.tracing import make_tracing, traced

CODE = """
import sys
from lenvm_service.server import make_parts
from lenvm_service.settings import Settings
from tests.support.fake_engine import FakeEngine
parts = make_parts(Settings(model=["tiny=" + sys.argv[1]]), load=lambda name, *_: FakeEngine(name))
assert parts.tracing is None
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def test_nothing_of_opentelemetry_is_imported_when_nobody_asks_for_traces(tiny_checkpoint: Path) -> None:
    command = [sys.executable, "-c", CODE, str(tiny_checkpoint)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_traces_are_off_without_a_collector_or_where_they_are_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_tracing(Settings()) is None
    with traced(None, "name") as span:
        assert span is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert make_tracing(Settings()) is None


def test_a_missing_extra_is_an_error_for_the_option_and_a_warning_for_the_variable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Absent:
        def __init__(self, endpoint: str | None) -> None:
            raise ModuleNotFoundError(name="opentelemetry.sdk")

    monkeypatch.setattr(tracing, "Tracing", Absent)
    with pytest.raises(MissingExtraError, match=r"lenvm\[otel\]"):
        make_tracing(Settings(otel_endpoint="http://localhost:4318"))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    assert make_tracing(Settings()) is None
    assert "lenvm[otel]" in caplog.text
