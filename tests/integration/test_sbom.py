"""``deploy/sbom.py`` on the environment of the tests: valid CycloneDX, with a version and a licence for each."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from deploy.sbom import allowed, closure, policy
from lenvm import __version__

ROOT = Path(__file__).resolve().parents[2]


def test_the_document(tmp_path: Path) -> None:
    out = tmp_path / "sbom.json"
    command = [sys.executable, str(ROOT / "deploy" / "sbom.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document, rules = json.loads(text), policy()
    assert document["metadata"]["component"]["version"] == __version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {canonicalize_name(component["name"]) for component in document["components"]}
    assert names == set(closure(project))
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for component in document["components"]:
        name = canonicalize_name(component["name"])
        public = component["version"].partition("+")[0]  # torch's builds for one device are 2.13.0+cpu and the like
        if not name.startswith(("cuda-", "nvidia-")):  # these follow from torch
            assert public == pins[name], name
        assert component["purl"].startswith("pkg:pypi/"), name
        (licence,) = component["licenses"]
        assert allowed(name, licence["expression"], rules), name
    assert str(ROOT) not in text
