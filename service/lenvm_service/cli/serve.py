"""``lenvm serve``: the HTTP service."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm._extras import require
from lenvm.errors import InvalidRequestError
from lenvm_service.cli._options import DEFAULT_MODEL
from lenvm_service.cli._session import need_model

__all__ = ["command"]


def command(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.", show_default="8000")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[ALIAS=]NAME|DIR",
            help="Length value model: a shipped checkpoint or a folder. Repeat it to serve several; the first one is "
            "the default of requests. LENVM_MODEL takes a list with commas.",
            show_default=DEFAULT_MODEL,
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="torch, or onnx for what lenvm export wrote; auto goes by the model.", show_default="auto"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="cpu")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16, of torch; an export has its own.", show_default="float32"),
    ] = None,
    api_workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that speak HTTP, check and tokenise, around the one that owns the models; 1 does all of it "
            "in one process, which takes some hundred requests a second.",
            show_default="1",
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="New tokens a batch.", show_default="4096, 16384 on a GPU")
    ] = None,
    batch_wait_ms: Annotated[
        float | None, typer.Option(help="How long a batch is held open for others.", show_default="2")
    ] = None,
    max_queue_tokens: Annotated[
        int | None, typer.Option(help="Tokens that may wait; more is refused (429).", show_default="262144")
    ] = None,
    max_queue_s: Annotated[
        float | None,
        typer.Option(help="Seconds of work that may wait; more is refused (429).", show_default="30"),
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens of prefix states held.", show_default="a quarter of the memory")
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request body.", show_default="2097152")] = None,
    max_batch_rows: Annotated[int | None, typer.Option(help="Rows a request.", show_default="512")] = None,
    max_candidates: Annotated[int | None, typer.Option(help="Candidates a row.", show_default="1024")] = None,
    default_deadline_ms: Annotated[
        float | None, typer.Option(help="Deadline of requests that name none.", show_default="none")
    ] = None,
    drain_grace_s: Annotated[
        float | None,
        typer.Option(help="How long at least 'draining' is shown after SIGTERM or SIGINT.", show_default="0.5"),
    ] = None,
    drain_timeout_s: Annotated[
        float | None, typer.Option(help="How long requests in flight may take after it.", show_default="30")
    ] = None,
    stall_s: Annotated[
        float | None,
        typer.Option(help="An engine without a heartbeat for so long is not alive.", show_default="60"),
    ] = None,
    read_timeout_s: Annotated[
        float | None, typer.Option(help="How long a client may take to send a request.", show_default="30")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json.", show_default="console")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    secret: Annotated[
        str | None,
        typer.Option(
            help="Key of session handles, for replicas that resume each other's. Better set as LENVM_SECRET: other "
            "users of the machine can read arguments.",
            show_default="a fresh one",
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="API keys and their tenants (lenvm key makes them); read again when it changes. Without it everybody "
            "may ask.",
            show_default="none",
        ),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            help="Redis in which replicas share prefix states: redis://, rediss://, unix://, redis+sentinel:// or "
            "redis+cluster://. Better set as LENVM_REDIS_URL if it holds a password.",
            show_default="none",
        ),
    ] = None,
    redis_lookup_ms: Annotated[
        float | None, typer.Option(help="How long a request waits for Redis at most.", show_default="50")
    ] = None,
    redis_ttl_s: Annotated[
        float | None, typer.Option(help="How long shared states live after their last use.", show_default="3600")
    ] = None,
    redis_queue_bytes: Annotated[
        int | None, typer.Option(help="What may wait to be stored; more is dropped.", show_default="268435456")
    ] = None,
    redis_tenant_bytes: Annotated[
        int | None, typer.Option(help="Bytes that a tenant may store.", show_default="no limit")
    ] = None,
    redis_payload: Annotated[
        str | None,
        typer.Option(help="exact, or int8: a quarter of the bytes, at a small error.", show_default="exact"),
    ] = None,
    otel_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="OpenTelemetry collector for traces (OTLP over HTTP), http://HOST:4318; needs lenvm[otel].",
            show_default="OTEL_EXPORTER_OTLP_ENDPOINT, else none",
        ),
    ] = None,
) -> None:
    """Serve predictions and scores over HTTP.

    Every option is also an environment variable: --batch-tokens is LENVM_BATCH_TOKENS. Options win.

    One line on stdout says when all models are ready. SIGTERM or Ctrl-C drains: new work is refused, work in flight is
    answered, then the process ends with status 0. A second one ends it at once.
    """
    with _ending_quietly():
        require("serve", "fastapi", "numpy", "prometheus_client", "pydantic_settings", "uvicorn")
        from lenvm_service.server import serve
        from lenvm_service.settings import load_settings, model_spec

        # An option that may be repeated is an empty list where it was not given.
        flags: dict[str, Any] = {name: value for name, value in context.params.items() if value not in (None, [], ())}
        try:
            settings = load_settings(**flags)
        except InvalidRequestError as error:
            raise typer.BadParameter(str(error)) from None
        for text in settings.model:
            need_model(model_spec(text).source, settings.backend)
        status = serve(settings)
        _leave_busy_engines(status)
    raise typer.Exit(status)


@contextlib.contextmanager
def _ending_quietly() -> Iterator[None]:
    """A signal before uvicorn has set its handlers (torch is being imported, for seconds) ends the process with status
    0: nothing is served yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: os._exit(0)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_busy_engines(status: int) -> None:
    """End the process here where an engine is still loading, or stuck: it cannot be told to stop, and an interpreter
    that is taken down under a thread inside torch may crash, which would spoil the exit status."""
    if any(thread.name.startswith("lenvm-") and thread.is_alive() for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
