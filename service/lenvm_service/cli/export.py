"""``lenvm export``: a checkpoint becomes an ONNX graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lenvm._extras import require
from lenvm_service.cli._options import JsonOption
from lenvm_service.cli._output import print_json
from lenvm_service.cli._session import need

__all__ = ["command"]


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="NAME|DIR", help="A checkpoint folder or a shipped one.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the export goes.")],
    variant: Annotated[
        Literal["fp32", "fp16", "int8"],
        typer.Option("--variant", help="fp32 gives what torch gives; int8 is for CPUs, fp16 for GPUs."),
    ] = "fp32",
    as_json: JsonOption = False,
) -> None:
    """Write an ONNX graph of a checkpoint, backbone and adapter merged, to serve without torch.

    The graph is compared with torch in float32 first, along real texts and over decoding steps; where it differs by
    more than its variant may, nothing is written.
    """
    need("serve")
    require("export", "onnx", "onnxruntime")
    from lenvm.export.run import export_model
    from lenvm.modeling import LengthValueModel

    info = export_model(LengthValueModel.from_pretrained(checkpoint), out, variant=variant)
    if as_json:
        print_json({"out": str(out), "variant": info.variant, "parity": dict(info.parity)})
        return
    parity = info.parity
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    typer.echo(f"{out}: {variant}, {size:.0f} MB")
    typer.echo(
        f"Value error against torch: {parity['value_mean']:.2g} on average, {parity['value_max']:.2g} at most, "
        f"over {parity['states']:.0f} states"
    )
