"""``lenvm demo``: what the value model does, on three prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from lenvm_service.cli._options import (
    DEFAULT_MODEL,
    BackboneOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    SeedOption,
    UrlOption,
)
from lenvm_service.cli._output import print_json
from lenvm_service.cli._session import need

__all__ = ["command"]


def command(
    context: typer.Context,
    samples: Annotated[int, typer.Option("--samples", min=1, metavar="K", help="Answers a prompt.")] = 8,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=12, help="Cap of every answer and every prediction.")
    ] = 512,
    seed: SeedOption = 0,
    model: ModelOption = DEFAULT_MODEL,
    backbone: BackboneOption = None,
    device: DeviceOption = "cpu",
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch the backbone, start the service on a free port, and over HTTP: predict lengths beside sampled ones, explain
    one answer token by token, and steer its length.

    A part that fails is named on stderr, the others go on, and the exit status is 1.
    """
    need("serve")
    from lenvm_service.demo import DemoOptions, run_demo

    options = DemoOptions(samples, max_new_tokens, seed, model, backbone, device, url)
    document = run_demo(options, show=not as_json, debug=context.find_root().params["debug"])
    if as_json:
        print_json(document)
    if document["failures"]:
        raise typer.Exit(1)
