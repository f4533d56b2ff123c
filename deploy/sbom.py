"""``python deploy/sbom.py``: what users get with lenvm, as a CycloneDX document or (``--licences``) as a table.

The environment that this Python runs in is described by ``cyclonedx-py``; what only developers need is left out, and
each licence is made an SPDX expression by ``deploy/licences.toml``. A licence that is unknown, or not allowed there, is
an error.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from license_expression import ExpressionError, get_spdx_licensing
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["Closure", "LicenceError", "allowed", "closure", "describe", "licence_of", "policy", "sbom", "table"]

ROOT = Path(__file__).resolve().parents[1]
NOT_FOR_USERS = ("dev", "docs")
_SPDX = get_spdx_licensing()


class LicenceError(Exception):
    """A dependency whose licence is unknown or not allowed; the message names it and says what to do."""


class Closure(dict[str, metadata.Distribution]):
    """Canonical name -> distribution. ``missing``: requirement -> extra, of what is not installed here."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: dict[str, str] = {}


def closure(project: Mapping[str, Any], leave_out: Iterable[str] = NOT_FOR_USERS) -> Closure:
    """Everything that the base and the extras bring, directly or not, as installed here."""
    found = Closure()
    waiting: list[tuple[str, str]] = [(line, "") for line in project["dependencies"]]
    for extra, lines in project["optional-dependencies"].items():
        if extra not in leave_out:
            waiting += [(line, extra) for line in lines]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        line, extra = waiting.pop()
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        known = (name, frozenset(wanted.extras))
        if name == project["name"] or known in seen:
            continue
        seen.add(known)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found.missing[name] = extra
            continue
        found[name] = distribution
        for needed in distribution.requires or ():
            marker = Requirement(needed).marker
            if marker is None or any(marker.evaluate({"extra": given}) for given in ("", *wanted.extras)):
                waiting.append((needed, extra))
    return found


def policy() -> dict[str, Any]:
    """``deploy/licences.toml``."""
    return tomllib.loads((ROOT / "deploy" / "licences.toml").read_text(encoding="utf-8"))


def licence_of(distribution: metadata.Distribution, rules: Mapping[str, Any]) -> str:
    """Its SPDX expression: read by hand, else as the metadata has it. Raises LicenceError where neither tells."""
    name, about = canonicalize_name(distribution.metadata["Name"]), distribution.metadata
    if name in rules["read"]:
        return str(rules["read"][name]["licence"])
    candidates = [about.get("License-Expression") or about.get("License") or ""]
    named = [line for line in about.get_all("Classifier") or () if line.startswith("License :: ")]
    if all(line in rules["classifiers"] for line in named):
        candidates.append(" AND ".join(sorted({rules["classifiers"][line] for line in named})))
    for text in candidates:
        try:
            parsed = _SPDX.parse(text.strip(), validate=True) if text.strip() else None
        except ExpressionError:
            continue
        if parsed is not None:
            return str(parsed)
    for exception in _exceptions(name, rules):  # of vendors whose licences have no identifier
        return str(exception["licence"])
    said = " ".join((about.get("License") or "nothing").split())[:60]
    raise LicenceError(
        f"{name}: the licence is not known (its metadata says {said!r} and {named}): read its licence file, and put it "
        "into deploy/licences.toml"
    )


def allowed(name: str, licence: str, rules: Mapping[str, Any]) -> bool:
    """May a dependency be under this expression? Of ``OR`` one part is enough; ``WITH`` only adds permissions."""

    def holds(part: Any) -> bool:
        operator = getattr(part, "operator", "").strip()
        if operator in ("AND", "OR"):
            return (all if operator == "AND" else any)(map(holds, part.args))
        return str(getattr(part, "license_symbol", part)) in rules["allowed"]

    return any(each["licence"] == licence for each in _exceptions(name, rules)) or holds(_SPDX.parse(licence))


def _exceptions(name: str, rules: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those of a package: by its name, or by a pattern."""
    return [given for pattern, given in rules["exceptions"].items() if fnmatch.fnmatchcase(name, pattern)]


def describe() -> dict[str, Any]:
    """The environment of this Python as ``cyclonedx-py`` sees it."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "sbom.json"
        command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", str(ROOT / "pyproject.toml")]
        command += ["--mc-type", "application", "--spec-version", "1.6", "--output-format", "JSON"]
        command += ["--output-reproducible", "--no-validate", "--output-file", str(out), sys.executable]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: cyclonedx-py failed: {done.stderr.strip()}")
        document: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return document


def sbom(document: dict[str, Any], found: Closure, version: str, rules: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with the components in ``found`` alone, and one licence each. Raises LicenceError."""
    kept = []
    for component in document["components"]:
        name = canonicalize_name(component["name"])
        if name in found:
            licence = licence_of(found[name], rules)
            component["licenses"] = [{"expression": licence, "acknowledgement": "concluded"}]
            kept.append(component)
    root = document["metadata"]["component"]
    root |= {"version": version, "purl": f"pkg:pypi/lenvm@{version}"}
    refs = {component["bom-ref"] for component in kept} | {root["bom-ref"]}
    edges = [
        {**edge, "dependsOn": [ref for ref in edge.get("dependsOn", ()) if ref in refs]}
        for edge in document["dependencies"]
        if edge["ref"] in refs
    ]
    return {**document, "components": kept, "dependencies": edges}


def table(found: Closure, rules: Mapping[str, Any]) -> str:
    """Markdown: package, version, licence, and where that is from. Raises LicenceError for one that is not allowed."""
    lines = ["| package | version | licence | |", "| --- | --- | --- | --- |"]
    for name, distribution in sorted(found.items()):
        licence = licence_of(distribution, rules)
        if not allowed(name, licence, rules):
            raise LicenceError(f"{name} is under {licence}, which deploy/licences.toml does not allow")
        why = [given["why"] for given in _exceptions(name, rules) if given["licence"] == licence]
        note = why[0] if why else ("read in its licence file" if name in rules["read"] else "")
        lines.append(f"| {name} | {distribution.version} | {licence} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--licences", action="store_true", help="print the table of licences")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sbom.json", help="where the document goes")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "models"))
    from lenvm import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, rules = closure(project), policy()
    for name, extra in sorted(found.missing.items()):
        print(f"not installed here, hence left out: {name} (of lenvm[{extra}])", file=sys.stderr)
    try:
        text = table(found, rules)  # first, since it is the check
        if arguments.licences:
            print(text, end="")
            return 0
        document = sbom(describe(), found, __version__, rules)
    except LicenceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{arguments.out}: {len(document['components'])} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
