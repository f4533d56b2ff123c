"""The record of the engines' interfaces against the engines' own files, where they are: installed, or unpacked wheels
in $LENVM_ENGINE_SOURCES (``pip download --no-deps vllm sglang ai-dynamo-runtime llama-cpp-python``, unzip into one
folder)."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from tests.support.engine_interfaces import RECORD, differences


@pytest.mark.parametrize("engine", RECORD)
def test_interfaces_are_as_recorded(engine: str) -> None:
    record = RECORD[engine]
    unpacked = os.environ.get("LENVM_ENGINE_SOURCES")
    if unpacked:
        folder = Path(unpacked)
    else:
        try:
            folder = Path(str(importlib.metadata.distribution(record["package"]).locate_file("")))
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{record['package']} is not installed, and LENVM_ENGINE_SOURCES names no unpacked wheels")
    assert differences(engine, folder) == [], f"recorded from {record['package']} {record['version']}"
