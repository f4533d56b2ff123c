"""Reference pages from what the code says of itself: OpenAPI document, command line, settings, reports."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["cli", "http", "reports", "settings"]

_NAME = re.compile(r"#/components/(\w+)/(\w+)")


def http(document: Mapping[str, Any]) -> str:
    """Routes and schemas of an OpenAPI document."""
    parts: list[str] = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += _route(document, method.upper(), path, operation)
    parts.append("## Schemas\n\nA field that is not marked *required* may be left out.\n")
    for name, schema in document["components"]["schemas"].items():
        parts += [f"### {name} {{ #{_anchor(name)} }}\n", f"{_text(schema)}\n", *_fields(schema)]
    return "\n".join(parts)


def _route(document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {method} {path} {{ #{operation['operationId']} }}\n"
    yield f"{operation['summary']}.\n"
    if operation.get("description"):
        yield f"{operation['description']}\n"
    body = operation.get("requestBody")
    if body:
        yield f"Body: {_type(body['content']['application/json']['schema'])}.\n"
    headers = [_resolve(document, parameter) for parameter in operation.get("parameters", ())]
    if headers:
        yield "| request header | |\n| --- | --- |"
        for header in headers:
            yield f"| `{header['name']}` | {_text(header)} |"
        yield ""
    yield "| status | answer | when |\n| --- | --- | --- |"
    for status, response in operation["responses"].items():
        answers = [_type(kind["schema"]) for kind in response.get("content", {}).values() if "schema" in kind]
        yield f"| {status} | {', '.join(answers) or 'text'} | {_text(response)} |"
    yield ""
    found = operation["responses"]["200"].get("headers", {})
    if found:
        yield "Headers of the answer: " + ", ".join(f"`{name}`" for name in found) + ".\n"


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    fields = schema.get("properties")
    if not fields:
        yield f"{_type(schema)}\n"
        return
    required = set(schema.get("required", ()))
    one_of = [names["required"][0] for names in schema.get("oneOf", ()) if names.get("required")]
    if one_of:
        yield "Exactly one of " + ", ".join(f"`{name}`" for name in one_of) + ".\n"
    yield "| field | type | |\n| --- | --- | --- |"
    for name, field in fields.items():
        marks = ["*required*"] if name in required else []
        if field.get("default") is not None:
            marks.append(f"default `{json.dumps(field['default'])}`")
        said = ". ".join(part for part in (", ".join(marks), _text(field)) if part)
        yield f"| `{name}` | {_type(field)} | {said} |"
    yield ""


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = _reference(schema["$ref"])[1]
        return f"[{name}](#{_anchor(name)})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema and "properties" not in schema:
            return " or ".join(dict.fromkeys(map(_type, schema[key])))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}{_bounds(schema, 'Items')}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return f"{kind}{_bounds(schema, 'Length')}"


def _bounds(schema: Mapping[str, Any], of: str) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", f"min{of}": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    found = [f"{sign} {schema[name]}" for name, sign in {**signs, f"max{of}": "≤"}.items() if name in schema]
    counted = " " + of.lower() if found and (f"min{of}" in schema or f"max{of}" in schema) else ""
    return f" ({', '.join(found)}{counted})" if found else ""


def _reference(text: str) -> tuple[str, str]:
    found = _NAME.fullmatch(text)
    if found is None:
        raise ValueError(f"{text} is no reference into the components")
    return found[1], found[2]


def _resolve(document: Mapping[str, Any], item: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in item:
        return item
    kind, name = _reference(item["$ref"])
    found: Mapping[str, Any] = document["components"][kind][name]
    return found


def _anchor(name: str) -> str:
    return f"schema-{name.lower()}"


def _text(item: Mapping[str, Any]) -> str:
    """A description as a cell of a table, in Markdown (docstrings quote code twice)."""
    text = " ".join(str(item.get("description", "")).split()).replace("``", "`")
    return text.rstrip(".").replace("|", "\\|")


# -- the command line --------------------------------------------------------------------------------------------------


def cli(group: Any, name: str = "lenvm") -> str:
    """Every command below ``group`` (of typer's kind), with each argument and option."""
    parts = [f"## {name} {{ #{name.replace(' ', '-')} }}\n", *_command(group, name)]
    for sub, command in sorted(getattr(group, "commands", {}).items()):
        parts.append(cli(command, f"{name} {sub}"))
    return "\n".join(parts)


def _command(command: Any, name: str) -> Iterator[str]:
    context = command.make_context(name, [], resilient_parsing=True)
    yield f"```text\n{' '.join([name, *command.collect_usage_pieces(context)])}\n```\n"
    yield f"{_help(command.help)}\n"
    commands = sorted(getattr(command, "commands", {}))
    if commands:
        links = [f"[`{sub}`](#{name.replace(' ', '-')}-{sub})" for sub in commands]
        yield "Commands: " + ", ".join(links) + ".\n"
    yield "| | value | default | |\n| --- | --- | --- | --- |"
    for parameter in command.params:
        if not parameter.hidden:
            names = parameter.get_usage_pieces(context) or [*parameter.opts, *parameter.secondary_opts]
            flag = getattr(parameter, "is_flag", False)
            kind = "" if flag else _code(str(parameter.metavar or parameter.display_type(context)).strip("<>"))
            shown = ", ".join(_code(name.strip("{}")) for name in names)
            yield f"| {shown} | {kind} | {_default(parameter)} | {_cell(parameter.help)} |"
    yield "| <code>-h</code>, <code>--help</code> | | | Show this and exit |\n"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "*required*"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    return "" if parameter.default in (None, False, (), []) else f"`{parameter.default}`"


def _code(text: str) -> str:
    """As HTML: in Markdown a bar ends the cell of a table, in code too."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def _help(text: str | None) -> str:
    paragraphs = (text or "").replace("\b\n", "").strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;").rstrip(".")


# -- settings and reports ----------------------------------------------------------------------------------------------


def settings(model: Any, serve: Any) -> str:
    """The fields of ``Settings`` beside the help of the option of ``lenvm serve`` that each is."""
    options = {parameter.name: parameter for parameter in serve.params}
    lines = ["| variable, flag | type | default | |", "| --- | --- | --- | --- |"]
    schema = model.model_json_schema()["properties"]
    for name in model.model_fields:
        field = schema[name]
        kind = _type(field).replace(" or null", "") if "null" in _type(field) else _type(field)
        flag = name.replace("_", "-")
        option = options[name]
        lines.append(
            f"| `LENVM_{name.upper()}`<br>`--{flag}` | {kind} | {_default(option) or 'none'} | {_cell(option.help)} |"
        )
    return "\n".join(lines) + "\n"


def reports(folder: Path) -> str:
    """Each report, and the command, commit, day and device that made it."""
    lines = ["| report | command | commit | day | device |", "| --- | --- | --- | --- | --- |"]
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        cells = [_cell(str(found.get(name, ""))) for name in ("commit", "date", "device")]
        cells[1] = cells[1][:10]
        command = _code(str(found["command"]))
        lines.append(f"| [{path.name}](../reports/{path.name}) | {command} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
