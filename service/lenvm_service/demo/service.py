"""A service of our own for the demonstration: ``lenvm serve`` in a process beside this one, on a free port."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from lenvm.errors import LenVMError
from lenvm_client import Client, LenVMClientError

__all__ = ["running_service"]

_START_S = 180.0
_STOP_S = 40.0


class DemoServiceError(LenVMError):
    """The service did not start; the message is its own last line."""

    code = "not_ready"


@contextlib.contextmanager
def running_service(model: str, *, device: str = "cpu") -> Iterator[str]:
    """Start ``lenvm serve``, wait until it is ready, give its URL, and stop it gracefully at the end.

    Raises DemoServiceError where it ends or does not become ready.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "lenvm_service.cli", "serve", "--port", str(port), "--model", model]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen([*command, "--device", device], stdout=log, stderr=subprocess.STDOUT)
        try:
            if not _becomes_ready(process, url):
                log.seek(0)
                lines = log.read().splitlines()
                reason = lines[-1].removeprefix("error: ") if lines else f"exit status {process.poll()}"
                raise DemoServiceError(reason)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _becomes_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    end = time.monotonic() + _START_S
    with Client(url, timeout=2.0, max_retries=0) as client:
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(LenVMClientError):
                if client.ready():
                    return True
            time.sleep(0.1)
    return False
