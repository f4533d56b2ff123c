"""Structured logs on stderr: lines for people, or JSON for machines. Prompts and secrets are never logged."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import IO, Any

__all__ = ["ConsoleFormatter", "JsonFormatter", "configure_logging", "fields", "request_id_var"]

request_id_var: ContextVar[str | None] = ContextVar("lenvm_request_id", default=None)
"""Id of the request being served; every log line written for it carries it."""


def fields(**values: Any) -> dict[str, Any]:
    """``logger.info("request", extra=fields(status=200))``: named values beside the message."""
    return {"fields": values}


def configure_logging(log_format: str = "console", level: str = "info", *, stream: IO[str] | None = None) -> None:
    """Send every logger of the process, uvicorn's too, to ``stream`` (stderr) in one format: "console" or "json"."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else ConsoleFormatter())
    root = logging.getLogger()
    for old in [known for known in root.handlers if getattr(known, "lenvm", False)]:
        root.removeHandler(old)
    handler.lenvm = True  # type: ignore[attr-defined] # how a second call finds it
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # one access line a request: ours
    # What uvicorn says at level info (started, waiting, finished) we say ourselves, with the address.
    logging.getLogger("uvicorn").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
    for chatty in ("asyncio", "filelock", "httpcore2", "httpx2", "huggingface_hub", "transformers", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _values(record: logging.LogRecord) -> dict[str, Any]:
    values: dict[str, Any] = dict(getattr(record, "fields", {}))
    request_id = request_id_var.get()
    if request_id is not None:
        values.setdefault("request_id", request_id)
    return values


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, tz=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the named values, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in _values(record).items() if name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class ConsoleFormatter(logging.Formatter):
    """``time LEVEL logger: message name=value ...``, the traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and the lines of a traceback."""
        # Messages of other libraries may hold what came over the wire: line breaks must not fake a line of ours.
        message = record.getMessage().replace("\n", "\\n").replace("\r", "\\r")
        named = "".join(f" {name}={_shown(value)}" for name, value in _values(record).items())
        line = f"{_time(record)} {record.levelname:<7} {record.name}: {message}{named}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    plain = text.isascii() and text.isprintable() and not set(text) & set(' "=')
    return text if plain and text else json.dumps(text)
