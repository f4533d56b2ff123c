"""Settings of ``lenvm serve``: environment variables ``LENVM_*``, and flags, which win."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lenvm.backbones import DEFAULT_BACKBONE
from lenvm.errors import InvalidRequestError
from lenvm_service.prefix_cache.connect import check_url

__all__ = ["ModelSpec", "Settings", "load_settings", "model_spec"]

_ALIAS = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})=(.+)", re.DOTALL)


class ModelSpec(NamedTuple):
    """One ``--model``: what requests call it (None: the checkpoint's own name), and its name or folder."""

    alias: str | None
    source: str


class Settings(BaseSettings):
    """How the service runs. Every field is the flag ``--field-name`` of ``lenvm serve`` and the variable
    ``LENVM_FIELD_NAME``; ``lenvm serve --help`` says what each means."""

    model_config = SettingsConfigDict(
        env_prefix="LENVM_", env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    # NoDecode: the variable is a list with commas, where pydantic-settings would expect JSON.
    model: Annotated[list[str], NoDecode] = Field(default=[DEFAULT_BACKBONE], min_length=1)
    backend: Literal["auto", "torch", "onnx"] = "auto"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    api_workers: int = Field(default=1, ge=1, le=256)
    batch_tokens: int | None = Field(default=None, ge=1)
    batch_wait_ms: float = Field(default=2.0, ge=0, le=1000, allow_inf_nan=False)
    max_queue_tokens: int = Field(default=262_144, ge=1)
    max_queue_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    cache_tokens: int | None = Field(default=None, ge=1)
    max_body_bytes: int = Field(default=2 * 1024 * 1024, ge=1024)
    max_batch_rows: int = Field(default=512, ge=1)
    max_candidates: int = Field(default=1024, ge=1)
    default_deadline_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    drain_grace_s: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    drain_timeout_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    stall_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    read_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    secret: SecretStr | None = None
    api_keys: Path | None = None  # see lenvm_service.keys
    redis_url: SecretStr | None = None  # it may hold a password
    redis_lookup_ms: float = Field(default=50.0, gt=0, le=10_000, allow_inf_nan=False)
    redis_ttl_s: float = Field(default=3600.0, ge=1, allow_inf_nan=False)
    redis_queue_bytes: int = Field(default=256 << 20, ge=0)
    redis_tenant_bytes: int | None = Field(default=None, ge=1)
    redis_payload: Literal["exact", "int8"] = "exact"
    otel_endpoint: str | None = Field(default=None, pattern=r"^https?://\S+$")

    @field_validator("model", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list | tuple):
            return [part.strip() if isinstance(part, str) else part for part in parts if part != ""]
        return parts

    @field_validator("secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not 16 <= len(value.get_secret_value().encode()) <= 64:
            raise ValueError("give 16 to 64 bytes")
        return value

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            try:
                check_url(value.get_secret_value())
            except InvalidRequestError as error:
                raise ValueError(str(error)) from None
        return value


def load_settings(**flags: Any) -> Settings:
    """Settings from the environment and from those flags that are not None, which win.

    Raises InvalidRequestError for the first field that is wrong; the message names flag and variable, not the value.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = str(first["loc"][0])
        flag, reason = name.replace("_", "-"), first["msg"].removeprefix("Value error, ")
        raise InvalidRequestError(f"--{flag} (or LENVM_{name.upper()}): {reason}", param=name) from None


def model_spec(text: str) -> ModelSpec:
    """``NAME``, ``PATH``, ``ALIAS=NAME`` or ``ALIAS=PATH``. A folder of that very name comes before an alias."""
    found = None if Path(text).is_dir() else _ALIAS.fullmatch(text)
    return ModelSpec(found[1], found[2]) if found else ModelSpec(None, text)
