"""The playground at ``/ui`` of ``lenvm serve --ui`` (extra ``ui``): the service's own models, for the browser.

``asking`` and ``generation`` do the work, ``*_view`` turn numbers into HTML, ``blocks`` is the page (Gradio), ``mount``
puts it behind the service's own gate. Gradio is imported by the last two alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lenvm_service.api.service import Service

__all__ = ["UI_PATH", "mount_playground"]

UI_PATH = "/ui"


def mount_playground(app: FastAPI, service: Service) -> None:
    """Serve the playground of ``service`` at ``/ui`` of ``app``. Raises MissingExtraError without the extra."""
    from lenvm._extras import require

    require("ui", "gradio")
    from lenvm_service.ui.mount import mount

    mount(app, service)
