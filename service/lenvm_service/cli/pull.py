"""``lenvm pull``: fetch a backbone into the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from lenvm._extras import require
from lenvm.backbones import DEFAULT_BACKBONE, resolve_backbone, verify_backbone
from lenvm_service.cli._output import ProgressReporter

__all__ = ["command"]


def command(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="A known name, a hub id (org/name), a .gguf file or a folder.")
    ] = DEFAULT_BACKBONE,
    verify: Annotated[bool, typer.Option("--verify", help="Check the SHA-256 of every file that is there.")] = False,
) -> None:
    """Fetch a backbone into the cache ($LENVM_CACHE, else ~/.cache/lenvm) and print its folder."""
    require("serve", "gguf", "numpy", "huggingface_hub")
    folder = resolve_backbone(name)
    if verify:
        total = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) >> 20
        done = 0
        with ProgressReporter() as progress:

            def on_bytes(count: int) -> None:
                nonlocal done
                done += count
                progress.update("Verifying (MiB)", done >> 20, total)

            verify_backbone(folder, on_bytes)
    typer.echo(str(folder))
