"""Options and arguments that several commands share, and how their texts are read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from lenvm.backbones import DEFAULT_BACKBONE
from lenvm.errors import InvalidRequestError

__all__ = [
    "DEFAULT_MODEL",
    "BackboneOption",
    "DataOption",
    "DeviceOption",
    "JsonOption",
    "ModelOption",
    "SeedOption",
    "TokenIdsOption",
    "UrlOption",
    "parse_ids",
    "parse_part",
    "parse_quantiles",
    "read_lines",
    "read_text",
]

DEFAULT_MODEL = DEFAULT_BACKBONE  # the shipped checkpoint bears its backbone's name

ModelOption: TypeAlias = Annotated[
    str, typer.Option("--model", metavar="NAME|DIR", help="Length value model: a checkpoint folder or a shipped one.")
]
BackboneOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--backbone", metavar="NAME|DIR", help="Generator: a name, folder or hub id. Default: the model's."),
]
DeviceOption: TypeAlias = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
UrlOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Ask this running service instead of loading the value model here."),
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
SeedOption: TypeAlias = Annotated[int, typer.Option("--seed", min=0, max=2**61, help="Seed of the first answer.")]
DataOption: TypeAlias = Annotated[
    Path, typer.Option("--data", metavar="DIR", help="The folder that holds prompts/ and bench/.")
]
TokenIdsOption: TypeAlias = Annotated[
    bool, typer.Option("--token-ids", help="Texts are token ids (comma or space between them); no chat template.")
]


def read_text(text: str) -> str:
    """A text from the command line; ``-`` reads all of standard input."""
    return _decode(sys.stdin.buffer.read(), "standard input").rstrip("\n") if text == "-" else text


def read_lines(texts: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of the command line (``-``: standard input) and of a file, where each line is one and blank ones are not.

    Raises InvalidRequestError for a file that cannot be read and where there is no prompt at all.
    """
    prompts: list[str] = []
    for text in texts:
        if text == "-":
            prompts += _lines(_decode(sys.stdin.buffer.read(), "standard input"))
        else:
            prompts.append(text)
    if file is not None:
        try:
            prompts += _lines(_decode(file.read_bytes(), str(file)))
        except OSError as error:
            raise InvalidRequestError(f"{file} cannot be read ({error.strerror}): check the path") from None
    if not prompts:
        raise InvalidRequestError("there is no prompt on any line: write one a line")
    return prompts


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{where} is not UTF-8 (byte {error.start}): convert it first") from None


def parse_quantiles(text: str) -> list[float]:
    """``0.5,0.9`` as numbers. Raises BadParameter unless each lies between 0 and 1."""
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or not all(0.0 < level < 1.0 for level in levels):
        raise typer.BadParameter(f"{text!r}: give numbers between 0 and 1 with commas between them, like 0.5,0.9")
    return list(dict.fromkeys(levels))


def parse_part(text: str) -> tuple[int, int]:
    """``1/2`` as (0, 2): which of how many parts, from 0. Raises BadParameter otherwise."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise typer.BadParameter(f"{text!r}: write it as 1/2", param_hint="--part")
    return int(index) - 1, int(count)


def parse_ids(text: str) -> list[int]:
    """``1,2,3`` or ``1 2 3`` as token ids. Raises InvalidRequestError otherwise; the scorer checks the range."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise InvalidRequestError(
            f"{text[:40]!r} are not token ids: give whole numbers with commas between them", param="token_ids"
        ) from None
