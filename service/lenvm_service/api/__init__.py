"""The HTTP layer: everything between the socket and the engine."""

from __future__ import annotations

from lenvm_service.api.app import create_app

__all__ = ["create_app"]
