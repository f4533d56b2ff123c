"""``lenvm key``: make an API key."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["command"]


def command(
    tenant: Annotated[str, typer.Argument(help="Whose prefixes, sessions and quotas: keys of one tenant share them.")],
    key_id: Annotated[
        str | None, typer.Option("--id", help="Name of the key, in the log.", show_default="the tenant's name")
    ] = None,
    requests_per_s: Annotated[
        float | None, typer.Option(help="Requests a second that it may send.", show_default="no limit")
    ] = None,
) -> None:
    """Make an API key for lenvm serve --api-keys FILE.

    The key goes to stderr: it is shown this once and kept nowhere. What goes to stdout belongs into the file:
    lenvm key search-team >> keys.toml
    """
    from lenvm_service.keys import new_key

    text, table = new_key(key_id or tenant, tenant, requests_per_s)
    typer.echo(table)
    typer.echo(f"key of {tenant}, shown this once: {text}", err=True)
