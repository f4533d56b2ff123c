"""Reports: stable JSON, honest commits, no NaN."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lenvm import reports
from lenvm.errors import DataError, InvalidRequestError
from lenvm.reports import commit, device_name, versions, write_report


@pytest.fixture(autouse=True)
def fixed_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Outside any checkout, so that no test depends on the state of this one."""
    monkeypatch.setattr(reports, "__file__", str(tmp_path / "wheel/reports.py"))
    monkeypatch.setenv("LENVM_COMMIT", "abc1234")
    (tmp_path / "wheel").mkdir()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new/prediction.json"
    metrics = {
        "math": {"mre": 1 / 3, "ci": (np.float32(0.25), float("nan")), "n": np.int64(3), "ok": np.bool_(True)},
        "array": np.asarray([1.0, np.inf]),
        5: None,
    }
    returned = write_report(path, command=["lenvm", "eval", "a b"], metrics=metrics, device="CPU", extra={"note": "x"})
    report = read(path)
    assert report == returned
    assert list(report) == ["command", "commit", "date", "device", "metrics", "note", "versions"]
    assert report["command"] == "lenvm eval 'a b'"
    assert report["commit"] == "abc1234"
    assert report["metrics"] == {
        "math": {"mre": 0.333333, "ci": [0.25, None], "n": 3, "ok": True},
        "array": [1.0, None],
        "5": None,
    }
    assert report["date"].endswith("+00:00")
    assert report["versions"] == versions()
    assert path.read_text().endswith("}\n")


def test_bytes_do_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    texts = []
    for metrics in ({"a": 123456789.0, "b": 1e-9}, {"b": 1e-9, "a": 123456789.0}):
        write_report(tmp_path / "r.json", command="c", metrics=metrics, device="d", versions={"lenvm": "1"})
        texts.append([line for line in (tmp_path / "r.json").read_text().splitlines() if '"date"' not in line])
    assert texts[0] == texts[1]
    assert read(tmp_path / "r.json")["metrics"] == {"a": 123457000.0, "b": 1e-9}
    assert read(tmp_path / "r.json")["versions"] == {"lenvm": "1"}


def test_a_failed_report_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_report(path, command="c", metrics={"a": 1}, device="d")
    before = path.read_bytes()
    with pytest.raises(InvalidRequestError, match=r"report\.metrics\.a\[1\] is a object"):
        write_report(path, command="c", metrics={"a": [1, object()]}, device="d")
    with pytest.raises(InvalidRequestError, match="'commit' is taken"):
        write_report(path, command="c", metrics={}, device="d", extra={"commit": "mine"})
    assert path.read_bytes() == before
    with pytest.raises(DataError, match="cannot be written"):
        write_report(path / "below", command="c", metrics={}, device="d")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["r.json", "wheel"]


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "repo/models/reports.py"
    for path in (source, tmp_path / "repo/reports/a.json"):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    monkeypatch.setattr(reports, "__file__", str(source))
    assert commit() == "abc1234"  # no repository at all
    git(tmp_path / "repo", "init", "-q")
    assert commit() == "abc1234"  # this file is not of that repository
    git(tmp_path / "repo", "add", ".")
    assert commit() == "abc1234"  # no commit yet
    git(tmp_path / "repo", "commit", "-qm", "x")
    clean = commit()
    assert 7 <= len(clean) <= 12
    (tmp_path / "repo/new").write_text("untracked")
    (tmp_path / "repo/reports/a.json").write_text("2")  # the output of the command before
    assert commit() == clean
    source.write_text("2")
    assert commit() == f"{clean}-dirty"


def test_no_checkout_and_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() == "abc1234"
    monkeypatch.delenv("LENVM_COMMIT")
    assert commit() == "unknown"


def test_versions_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(versions()) == ["lenvm", "numpy", "python", "torch", "transformers"]
    assert versions()["numpy"] == np.__version__

    def absent(name: str) -> str:
        raise reports.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(reports.metadata, "version", absent)
    assert versions()["torch"] == "none"


def test_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(initialized: bool, available: bool) -> SimpleNamespace:
        cuda = SimpleNamespace(
            is_initialized=lambda: initialized,
            is_available=lambda: available,
            get_device_name=lambda device: f"GPU {device}",
        )
        return SimpleNamespace(cuda=cuda)

    monkeypatch.setitem(sys.modules, "torch", fake(True, True))
    assert device_name() == "GPU None"
    assert device_name("cuda:1") == "GPU cuda:1"
    assert device_name("cpu").startswith("CPU: ")
    monkeypatch.setitem(sys.modules, "torch", fake(False, True))
    assert "core" in device_name()
    monkeypatch.delitem(sys.modules, "torch")
    assert device_name("cuda").startswith("CPU: ")
