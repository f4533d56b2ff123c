"""One clear line instead of a traceback where an optional dependency is not installed."""

from __future__ import annotations

import importlib.util
import sys

from lenvm.errors import MissingExtraError

__all__ = ["extra_of", "missing_extra", "require"]

# The smallest extra that brings each optional module.
_EXTRA_OF = {
    "fastapi": "serve",
    "gguf": "serve",
    "gradio": "ui",
    "huggingface_hub": "serve",
    "jinja2": "serve",
    "matplotlib": "train",
    "numpy": "serve",
    "onnx": "export",
    "onnxruntime": "onnx",
    "opentelemetry": "otel",
    "prometheus_client": "serve",
    "pyarrow": "train",
    "pydantic_settings": "serve",
    "ray": "ray",
    "redis": "serve",
    "safetensors": "serve",
    "tokenizers": "serve",
    "torch": "serve",
    "transformers": "serve",
    "uvicorn": "serve",
    "wordcloud": "train",
}


def extra_of(module: str) -> str | None:
    """The extra that brings ``module`` (a dotted name is fine), or None where no extra does."""
    return _EXTRA_OF.get(module.partition(".")[0])


def missing_extra(extra: str, *modules: str) -> MissingExtraError:
    """The error for ``modules`` that are not installed; its message is the command that brings them."""
    return MissingExtraError(f"{', '.join(modules)} not installed: run pip install 'lenvm[{extra}]'")


def require(extra: str, *modules: str) -> None:
    """Raise :class:`MissingExtraError` unless every top-level module can be found.

    Nothing is imported, so that a command can check first and still start quickly.
    """
    absent = [module for module in modules if not _is_installed(module.partition(".")[0])]
    if absent:
        raise missing_extra(extra, *absent)


def _is_installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # an import hook refused it, or a half-made module without a spec
        return False
