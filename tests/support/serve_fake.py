"""``python tests/support/serve_fake.py CHECKPOINT [flag=value...]``: the real server over a fake engine.

An answer takes ``FAKE_SECONDS``; loading ``FAKE_LOADING_SECONDS``, and fails where ``FAKE_LOADING_FAILS`` is set.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lenvm.errors import BackboneError
from lenvm_service.engine.jobs import Job, Reply
from lenvm_service.server import serve
from lenvm_service.settings import load_settings
from tests.support.fake_engine import FakeEngine

__all__ = ["SlowEngine", "main"]


class SlowEngine(FakeEngine):
    def __init__(self, name: str, *_: Any) -> None:
        super().__init__(name, state="loading")

    def start(self) -> None:
        threading.Thread(target=self._load, daemon=True).start()

    def _load(self) -> None:
        time.sleep(float(os.environ.get("FAKE_LOADING_SECONDS", "0")))
        if os.environ.get("FAKE_LOADING_FAILS"):
            self.failure = BackboneError("the weights are damaged: fetch them again")
            self.state = "failed"
        else:
            self.state = "ready"

    async def submit(self, jobs: Sequence[Job], **options: Any) -> Reply:
        await asyncio.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        return await super().submit(jobs, **options)


def main() -> int:
    flags = dict(argument.split("=", 1) for argument in sys.argv[2:])
    return serve(load_settings(model=[f"fake={sys.argv[1]}"], **flags), load=SlowEngine)


if __name__ == "__main__":
    sys.exit(main())
