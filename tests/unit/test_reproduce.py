"""reports/reproduce.py: a plan that hangs together, and a scheduler that loses nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.unit
SCRIPT = Path(__file__).parents[2] / "reports" / "reproduce.py"


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("gpus", "keep"), [(0, False), (1, False), (4, False), (4, True)])
def test_every_step_needs_steps_that_stand_before_it(
    reproduce: ModuleType, gpus: int, keep: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--keep-model"] if keep else []
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--data", "D", "--gpus", str(gpus), "--plan", *more])
    reproduce.main()
    text = capsys.readouterr().out
    seen: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# "):
            name, _, after = line[2:].partition(", after ")
            assert set(after.split(", ")) <= seen | {"nothing"}
            seen.add(name)
    assert len({name for name in seen if name.startswith("sample/")}) == max(1, gpus)
    for report in ("prediction", "lifebench", "conditional", "tradeoff", "tokens", "ablation", "precision", "scaling"):
        assert f"--report reports/{report}.json" in text
    trains = {
        line.partition("--only ")[2].split()[0] for line in text.splitlines() if "ablation.jsonl --report" in line
    }
    assert trains == {"target,head,order,gamma,lambda"}, "the report trains what no step before it did"
    assert ("torch.distributed.run" in text) == (gpus > 1 and not keep)
    assert ("train" in seen) == ("calibrate" in seen) == (not keep)


def test_steps_run_once_share_what_there_is_and_a_failure_takes_down_what_needs_it(
    reproduce: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, log = reproduce.Step, tmp_path / "log"
    steps = [
        step("a/1", f"echo a1 $CUDA_VISIBLE_DEVICES >> {log}"),
        step("a/2", f"echo a2 >> {log}"),
        step("bad", "exit 3", ("a/1",)),
        step("lost", f"echo lost >> {log}", ("bad",)),
        step("all", f"echo all $CUDA_VISIBLE_DEVICES >> {log}", ("a/1", "a/2"), gpus=reproduce.ALL),
        step("last", f"echo last >> {log}", ("all",)),
    ]
    assert reproduce.Scheduler(steps, tmp_path / "work", 2).run() == 2
    lines = log.read_text().splitlines()
    assert sorted(lines[:2]) in (["a1 0", "a2"], ["a1 1", "a2"])
    assert lines[2:] == ["all 0,1", "last"]
    out = capsys.readouterr().out
    assert "FAILED with 3" in out
    assert "lost                     not run" in out
    # Again: what is done stays done, what failed is tried once more.
    fixed = [step("bad", "true", ("a/1",)) if one.name == "bad" else one for one in steps]
    assert reproduce.Scheduler(fixed, tmp_path / "work", 2).run() == 0
    assert log.read_text().splitlines() == [*lines, "lost"]


def test_a_step_that_gives_way_is_begun_again(reproduce: ModuleType, tmp_path: Path) -> None:
    step, mark = reproduce.Step, tmp_path / "mark"
    steps = [
        step("slow", f"if [ -e {mark} ]; then echo done; else touch {mark}.began; sleep 60; fi", gives_way=True),
        step("first", f"while [ ! -e {mark}.began ]; do sleep 0.05; done"),
        step("all", f"touch {mark}", ("first",), gpus=reproduce.ALL),
    ]
    assert reproduce.Scheduler(steps, tmp_path / "work", 2).run() == 0
    assert "done" in (tmp_path / "work" / "logs" / "slow.log").read_text()


def test_a_step_that_gives_way_does_so_for_any_that_lacks_a_gpu(reproduce: ModuleType, tmp_path: Path) -> None:
    step, mark = reproduce.Step, tmp_path / "mark"
    steps = [
        step("begin", f"touch {mark}.begin"),
        step("filler", f"if [ -e {mark} ]; then echo done; else touch {mark}.filler; sleep 60; fi", gives_way=True),
        step("wait", f"while [ ! -e {mark}.filler ]; do sleep 0.05; done", ("begin",)),
        step("both/1", f"touch {mark}", ("wait",)),
        step("both/2", f"touch {mark}", ("wait",)),
    ]
    assert reproduce.Scheduler(steps, tmp_path / "work", 2).run() == 0
    assert "done" in (tmp_path / "work" / "logs" / "filler.log").read_text()
