"""The interfaces that the drivers implement, as the engines publish them: names of methods and parameters, fields that
are read, and the order of calls. ``engine_interfaces.json`` holds them with the versions that they were read from; this
module reads them from an engine's source files, without importing them.

``python -m tests.support.engine_interfaces FOLDER`` checks the record against a folder with unpacked wheels.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

RECORD: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    return [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def find(tree: ast.AST, name: str) -> Any:
    """``Class``, ``function`` or ``Class.method``."""
    for part in name.split("."):
        tree = next(
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == part
        )
    return tree


def fields(cls: ast.ClassDef) -> set[str]:
    """Annotated and assigned names of the body, properties, and what ``__init__`` sets on ``self``."""
    out: set[str] = set()
    for node in cls.body:
        if isinstance(node, ast.AnnAssign):
            out.add(ast.unparse(node.target))
        elif isinstance(node, ast.Assign):
            out |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.FunctionDef):
            if any(ast.unparse(each) == "property" for each in node.decorator_list):
                out.add(node.name)
            if node.name == "__init__":
                stores = (each for each in ast.walk(node) if isinstance(each, ast.Attribute))
                out |= {
                    each.attr
                    for each in stores
                    if isinstance(each.ctx, ast.Store) and ast.unparse(each.value) == "self"
                }
    return out


def calls(function: ast.AST) -> list[str]:
    """Names of what is called, in the order of the text."""
    found = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    found.sort(key=lambda node: (node.func.end_lineno or 0, node.func.end_col_offset or 0))
    return [ast.unparse(node.func).rpartition(".")[2] for node in found]


def differences(engine: str, folder: Path) -> list[str]:
    """What the source files below ``folder`` have otherwise than the record; empty where all fits."""
    wrong = []
    for item in RECORD[engine]["files"]:
        tree = ast.parse((folder / item["path"]).read_text(encoding="utf-8"))
        for name, wanted in item.get("methods", {}).items():
            here = parameters(find(tree, name))
            if here != wanted:
                wrong.append(f"{item['path']}: {name} takes {here}, not {wanted}")
        for name, wanted in item.get("takes", {}).items():
            lacking = sorted(set(wanted) - set(parameters(find(tree, name))))
            if lacking:
                wrong.append(f"{item['path']}: {name} does not take {lacking}")
        for name, wanted in item.get("fields", {}).items():
            lacking = sorted(set(wanted) - fields(find(tree, name)))
            if lacking:
                wrong.append(f"{item['path']}: {name} has no {lacking}")
        for name, wanted in item.get("order", {}).items():
            here = iter(calls(find(tree, name)))
            if not all(call in here for call in wanted):
                wrong.append(f"{item['path']}: {name} does not call {' -> '.join(wanted)} in this order")
        for name, wanted in item.get("assigned", {}).items():
            source = {
                ast.unparse(node.targets[0]): ast.unparse(node.value)
                for node in tree.body
                if isinstance(node, ast.Assign)
            }
            if source.get(name) != wanted:
                wrong.append(f"{item['path']}: {name} is {source.get(name)}, not {wanted}")
    return wrong


if __name__ == "__main__":
    found = [line for engine in RECORD for line in differences(engine, Path(sys.argv[1]))]
    print("\n".join(found) or f"all interfaces of {', '.join(RECORD)} are as recorded")
    sys.exit(bool(found))
