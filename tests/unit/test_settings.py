"""Settings: defaults, environment, flags, and one line for what is wrong. And what the logs show of them."""

from __future__ import annotations

import inspect
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lenvm.errors import InvalidRequestError
from lenvm_service.cli import main, serve
from lenvm_service.logs import configure_logging, fields, request_id_var
from lenvm_service.settings import ModelSpec, Settings, load_settings, model_spec


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"LENVM_{name.upper()}", raising=False)


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (load_settings().port, load_settings().model) == (8000, ["smollm2-135m-instruct"])
    monkeypatch.setenv("LENVM_PORT", "9000")
    monkeypatch.setenv("LENVM_MODEL", "a, b=c ,,d")
    monkeypatch.setenv("LENVM_BATCH_WAIT_MS", "")  # empty is not set
    found = load_settings(port=None, model=None)
    assert (found.port, found.model, found.batch_wait_ms) == (9000, ["a", "b=c", "d"], 2.0)
    found = load_settings(port=9001, model=["e,f"])
    assert (found.port, found.model) == (9001, ["e,f"])  # a flag is one model: folders may have commas


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "70000"),
        ("port", "x"),
        ("model", ","),
        ("backend", "jax"),
        ("dtype", "int8"),
        ("batch_wait_ms", "nan"),
        ("batch_tokens", "0"),
        ("drain_timeout_s", "inf"),
        ("stall_s", "0"),
        ("log_format", "xml"),
        ("log_level", "loud"),
        ("host", ""),
        ("redis_url", "http://:hidden@host"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    if value:
        monkeypatch.setenv(f"LENVM_{name.upper()}", value)
        with pytest.raises(InvalidRequestError) as from_environment:
            load_settings()
        assert f"LENVM_{name.upper()}" in str(from_environment.value)
    with pytest.raises(InvalidRequestError) as from_flag:
        load_settings(**{name: [value] if name == "model" and value != "," else value})
    assert str(from_flag.value).startswith(f"--{name.replace('_', '-')} ")
    assert "hidden" not in str(from_flag.value)
    assert "\n" not in str(from_flag.value)


def test_every_setting_is_a_flag_and_its_default_is_shown() -> None:
    parameters = inspect.signature(serve.command, eval_str=True).parameters
    flags = {name: parameter for name, parameter in parameters.items() if name != "context"}
    assert list(flags) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        (option,) = flags[name].annotation.__metadata__
        default: Any = field.default
        if default is None:
            assert option.show_default, name
        else:
            shown = (
                ",".join(default)
                if isinstance(default, list)
                else f"{default:g}"
                if isinstance(default, float)
                else str(default)
            )
            assert option.show_default == shown, name


def test_wrong_usage_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "70000"]) == 2
    assert main(["serve", "--log-format", "xml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_an_alias_before_a_name_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_spec("name") == ModelSpec(None, "name")
    assert model_spec("short=some/folder=x") == ModelSpec("short", "some/folder=x")
    assert model_spec("./a=b") == ModelSpec(None, "./a=b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert model_spec("a=b") == ModelSpec(None, "a=b")


def test_secrets_are_not_shown() -> None:
    found = load_settings(secret="hidden-from-sight")
    assert "hidden-from-sight" not in repr(found)
    assert "hidden-from-sight" not in str(found)
    assert found.secret is not None
    assert found.secret.get_secret_value() == "hidden-from-sight"


# -- logs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _restored_logging() -> Iterator[None]:
    names = ["", "uvicorn", "uvicorn.error", "uvicorn.access", "asyncio"]
    loggers = [logging.getLogger(name) for name in names]
    kept = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, level, handlers, propagate in kept:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


def _logged(log_format: str, level: str = "info") -> list[str]:
    stream = io.StringIO()
    configure_logging("console", stream=io.StringIO())
    configure_logging(log_format, level, stream=stream)  # the second call takes the place of the first
    token = request_id_var.set("id 1")
    logging.getLogger("lenvm_service.x").info("one\ntwo", extra=fields(status=200, kind='a "b"', model=None))
    request_id_var.reset(token)
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("uvicorn.error").exception("broken")
    logging.getLogger("uvicorn.access").info("not ours")
    logging.getLogger("lenvm_service.x").debug("detail")
    return stream.getvalue().splitlines()


@pytest.mark.usefixtures("_restored_logging")
def test_json_logs_are_one_object_a_line() -> None:
    first, second = map(json.loads, _logged("json"))
    assert first["time"].endswith("Z")
    assert {name: first[name] for name in first if name != "time"} == {
        "level": "info",
        "logger": "lenvm_service.x",
        "message": "one\ntwo",
        "status": 200,
        "kind": 'a "b"',
        "model": None,
        "request_id": "id 1",
    }
    assert (second["logger"], second["message"]) == ("uvicorn.error", "broken")
    assert second["exception"].endswith("ValueError: why")


@pytest.mark.usefixtures("_restored_logging")
def test_console_logs_cannot_be_faked_by_line_breaks() -> None:
    lines = _logged("console", "debug")
    assert lines[0].endswith(
        r'INFO    lenvm_service.x: one\ntwo status=200 kind="a \"b\"" model=null request_id="id 1"'
    )
    assert lines[1].endswith("ERROR   uvicorn.error: broken")
    assert lines[-2:] == ["ValueError: why", lines[-1]]
    assert lines[-1].endswith("DEBUG   lenvm_service.x: detail")


@pytest.mark.parametrize("secret", ["short", "x" * 65])
def test_a_secret_that_cannot_be_a_key(secret: str) -> None:
    with pytest.raises(InvalidRequestError, match="16 to 64 bytes") as caught:
        load_settings(secret=secret)
    assert secret not in str(caught.value)
