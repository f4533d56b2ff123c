"""Every block of code in the documentation is run (tests/integration/test_docs_run.py) or checked (here)."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from tests.support import documented
from tests.support.documented import PAGES, Block, blocks, check_lenvm, check_python, console_steps, read_data, same
from tests.support.documented_commands import check_command, check_script

BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(*treatments: str) -> list[object]:
    return [pytest.param(block, id=block.where) for block in BLOCKS if block.treatment in treatments]


@pytest.mark.parametrize("block", of("read", "file"))
def test_data_can_be_read(block: Block) -> None:
    read_data(block)


@pytest.mark.parametrize("block", of("check"))
def test_what_cannot_be_run_here_is_checked(block: Block, tmp_path: Path, real_parts_required: bool) -> None:
    if block.language == "python":
        check_python(block.text, block.where)
    else:
        check_script(block.text, tmp_path, required=real_parts_required)


@pytest.mark.parametrize("block", of("run", "serve"))
def test_what_is_run_elsewhere_can_be_parsed(block: Block) -> None:
    """A quick word about a mistake that the integration test would only find in minutes."""
    if block.language == "python":
        check_python(block.text, block.where)
    elif block.language == "console":
        assert console_steps(block)
    for words in documented.shell_commands(block.text) if block.language == "bash" else ():
        if words[0] == "lenvm":
            check_lenvm(words[1:])


def test_there_is_something_to_test() -> None:
    found = {(block.language, block.treatment) for block in BLOCKS}
    assert {("bash", "run"), ("bash", "check"), ("bash", "serve"), ("console", "run"), ("python", "run")} <= found


# -- the harness itself ------------------------------------------------------------------------------------------------


def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> list[Block]:
    monkeypatch.setattr(documented, "ROOT", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return blocks(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Indented:\n\n    make demo\n", "fence the block"),
        ("```\nmake demo\n```\n", "none of bash"),
        ("```sh\nmake demo\n```\n", "none of bash"),
        ("<!-- test: skip: never mind this one -->\n```bash\nmake demo\n```\n", "no treatment"),
        ("<!-- test: check -->\n```bash\nmake demo\n```\n", "say why"),
    ],
)
def test_a_block_without_a_treatment_is_refused(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match=reason):
        page(tmp_path, monkeypatch, text)


def test_a_comment_holds_for_the_next_block_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<!-- test: check: takes hours -->\n```bash\nmake test\n```\n\n```bash\nls\n```\n\n"
    text += "<!-- file: a.toml -->\n```toml\na = 1\n```\n"
    found = page(tmp_path, monkeypatch, text)
    assert [(block.treatment, block.argument) for block in found] == [
        ("check", "takes hours"),
        ("run", ""),
        ("file", "a.toml"),
    ]
    moved = page(tmp_path, monkeypatch, "<!-- test: check: takes hours -->\nA text between.\n\n```bash\nls\n```\n")
    assert moved[0].treatment == "run"


@pytest.mark.parametrize(
    "command",
    [
        "lenvm predcit Hello",
        "lenvm generate Hello --equal-too 5",
        "lenvm serve --port high",
        "lenvm eval nothing",
        "make nothing",
        "make serve NOTHING=1",
        "pip install lenvm[nothing]",
        "curl -s localhost:8000/predict -d '{}'",
        "curl -s localhost:8000/predict_length -d '{'",
        "docker compose -f deploy/nothing.yaml up",
        "python benchmarks/nothing.py",
        "torchrun -m lenvm_service.cli train",
        "vllm serve M --logits-processors lenvm_client.drivers.vllm:Nothing",
        "unheard-of --flag",
    ],
)
def test_a_wrong_command_is_found(command: str, tmp_path: Path) -> None:
    (words,) = documented.shell_commands(command)
    with pytest.raises((AssertionError, ValueError, typer.TyperException)):
        check_command(words, tmp_path, required=False)


def test_shell_commands_are_taken_apart() -> None:
    text = "lenvm key a >> keys.toml   # once\nlenvm score 'a | b' \\\n  --json | head -3 && ls\n\n# a comment\n"
    assert list(documented.shell_commands(text)) == [
        ["lenvm", "key", "a"],
        ["lenvm", "score", "a | b", "--json"],
        ["head", "-3"],
        ["ls"],
    ]


def test_answers_are_compared_to_the_digits_that_are_shown() -> None:
    printed = {"value": -0.5201, "session": "s-1...", "rows": [{"n": 3}]}
    assert same({"value": -0.520109, "session": "s-9", "rows": [{"n": 3}]}, printed)
    assert not same({"value": -0.53, "session": "s-9", "rows": [{"n": 3}]}, printed)
    assert not same({"value": -0.5201, "session": "s-9", "rows": [{"n": 4}]}, printed)
    assert not same({"value": -0.5201, "session": "s-9", "rows": [{"n": 3}], "new": 1}, printed)
