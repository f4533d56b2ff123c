"""The command line on a tiny random model: what it prints, its JSON, and one line and a status for every failure."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lenvm import __version__
from lenvm.config import GeneratorRef, HeadConfig
from lenvm.distribution import LengthBins
from lenvm.modeling import LengthValueModel
from lenvm_service.cli import _output, main, predict
from lenvm_service.demo import Demo
from lenvm_service.demo.parts import PROMPTS

GAMMA = 0.97
BINS = LengthBins(cap=128, unit=8, ratio=1.3)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COLUMNS", raising=False)


def make_checkpoint(folder: Path, backbone: Path, bins: LengthBins | None) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        LengthValueModel.create(
            backbone,
            name="tiny",
            head=HeadConfig(16, bins),
            gamma=GAMMA,
            generator=GeneratorRef(str(backbone), 0.7, 1.0, 64),
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("lenvm") / "tiny", tiny_backbone, BINS)


@pytest.fixture(scope="module")
def value_only(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("lenvm") / "value-only", tiny_backbone, None)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LengthValueModel:
    return LengthValueModel.from_pretrained(checkpoint)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``lenvm`` in this process: status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def run_json(run: Callable[..., tuple[int, str, str]]) -> Callable[..., dict[str, Any]]:
    """Run with ``--json``: the one document of a command that succeeds and is silent on stderr."""

    def run_json(*arguments: object) -> dict[str, Any]:
        status, out, err = run(*arguments, "--json")
        assert (status, err) == (0, "")
        document: dict[str, Any] = json.loads(out)
        return document

    return run_json


# -- lenvm itself ------------------------------------------------------------------------------------------------------


def test_version_and_help(run: Any) -> None:
    assert run("--version") == (0, f"lenvm {__version__}\n", "")
    status, out, _ = run("--help")
    assert status == 0
    for command in ("pull", "predict", "score", "generate", "rollout", "train", "eval", "demo"):
        assert re.search(rf"\b{command}\b", out)
        assert run(command, "--help")[0] == 0


def test_wrong_usage_is_one_line_and_status_2(run: Any) -> None:
    assert run()[0] == 2
    assert run("eval")[0] == 2
    for arguments in (["nonsense"], ["predict"], ["predict", "x", "--nonsense"], ["score", "x"], ["pull", "a", "b"]):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+ \(see lenvm[^\n]* --help\)\n", err)


def test_debug_shows_the_traceback(run: Any, tmp_path: Path) -> None:
    status, _, err = run("--debug", "predict", "x", "--model", tmp_path)
    assert status == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in run("predict", "x", "--model", tmp_path)[2]


def test_an_interrupt_is_130_and_silent(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "read_lines", interrupted)
    assert run("predict", "x") == (130, "", "")


def test_an_unexpected_error_is_one_line_too(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(predict, "read_lines", broken)
    status, out, err = run("predict", "x")
    assert (status, out) == (1, "")
    assert err.startswith("error: ZeroDivisionError: two lines (unexpected")
    assert err.count("\n") == 1


def test_a_closed_pipe_is_quiet() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "lenvm_service.cli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (0, 1, 141)


WITHOUT_EXTRAS = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "transformers", "tokenizers", "safetensors", "pyarrow", "gguf"):
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Block())
from lenvm_service.cli import main
for arguments in sys.argv[1:]:
    print(main(arguments.split()), file=sys.stderr)
"""


def test_the_base_install_names_the_extra() -> None:
    commands = {
        "pull smollm2-135m-instruct": "serve",
        "predict x": "serve",
        "score x --completion y": "serve",
        "generate x": "serve",
        "demo": "serve",
        "rollout --data x --out y": "train",
        "train x --data y": "train",
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *commands], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(commands)
    for index, extra in enumerate(commands.values()):
        assert re.fullmatch(rf"error: .* not installed: run pip install 'lenvm\[{extra}\]'", lines[2 * index])
        assert lines[2 * index + 1] == "1"


# -- predict -----------------------------------------------------------------------------------------------------------


def test_predict_gives_the_fields_of_the_wire(run_json: Any, checkpoint: Path, model: LengthValueModel) -> None:
    from lenvm.backbones import encode_chat
    from lenvm.distribution import quantile, restricted_mean, survival
    from lenvm.scoring import TorchScorer

    found = run_json("predict", "hello", "a longer prompt", "--model", checkpoint, "--max-tokens", 9)
    assert (found["model"], found["gamma"], found["cap"]) == ("tiny", GAMMA, 128)
    scorer = TorchScorer(model)
    prompts = [encode_chat(model.tokenizer, text) for text in ("hello", "a longer prompt")]
    states = scorer.open(prompts)
    for index, (ids, state, row) in enumerate(zip(prompts, states, found["predictions"], strict=True)):
        assert row["index"] == index
        assert row["prompt_tokens"] == len(ids)
        assert row["value"] == pytest.approx(-1 / (1 + np.exp(-state.logit)))
        assert row["horizon"] == pytest.approx(np.log1p(row["value"]) / np.log(GAMMA))
        assert row["mean"] == pytest.approx(float(restricted_mean(state.bin_logprobs, BINS)))
        lengths, saturated = quantile(state.bin_logprobs, BINS, [0.5, 0.9, 0.95])
        assert row["quantiles"] == dict(zip(["0.5", "0.9", "0.95"], lengths.tolist(), strict=True))
        assert row["saturated"] is bool(saturated.any())
        assert row["p_exceeds_max_tokens"] == pytest.approx(float(survival(state.bin_logprobs, BINS, 9)))


def test_predict_without_a_distribution_gives_nulls(run: Any, run_json: Any, value_only: Path) -> None:
    (row,) = run_json("predict", "hello", "--model", value_only)["predictions"]
    assert row["value"] < 0
    fields = ("mean", "quantiles", "saturated", "p_exceeds_max_tokens")
    assert [row[name] for name in fields] == [None] * 4
    assert run("predict", "hello", "--model", value_only, "--max-tokens", 5)[0] == 0


def test_predict_reads_files_and_stdin(
    run_json: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"two\n\nthree\r\n")))
    (tmp_path / "more.txt").write_text("four\n \nfive")
    rows = run_json("predict", "one", "-", "--prompts-file", tmp_path / "more.txt", "--model", checkpoint)[
        "predictions"
    ]
    (apart,) = run_json("predict", "five", "--model", checkpoint)["predictions"]
    assert len(rows) == 5
    assert rows[4]["horizon"] == pytest.approx(apart["horizon"], rel=1e-4)


def test_predict_takes_token_ids(run_json: Any, checkpoint: Path, model: LengthValueModel) -> None:
    from lenvm.backbones import encode_chat

    ids = ",".join(map(str, encode_chat(model.tokenizer, "hello")))
    (row,) = run_json("predict", ids, "--token-ids", "--model", checkpoint)["predictions"]
    assert row == run_json("predict", "hello", "--model", checkpoint)["predictions"][0]


def test_predict_prints_texts_as_they_are(run: Any, checkpoint: Path) -> None:
    status, out, err = run("predict", "[red]x[/blue] \x1b[31m :smile:", "--model", checkpoint, "--quantiles", "0.25")
    assert (status, err) == (0, "")
    assert r"[red]x[/blue] \x1b[31m :smile:" in out
    assert "EOS included" in out
    assert "p25" in out


# -- score -------------------------------------------------------------------------------------------------------------


def test_score_has_one_state_more_than_tokens(run_json: Any, checkpoint: Path) -> None:
    (row,) = run_json("score", "hello", "--completion", "abc", "--model", checkpoint)["scores"]
    assert row["tokens"] == ["a", "b", "c"]
    values = row["values"]
    assert (len(values), len(row["horizons"]), len(row["length_shifts"])) == (4, 4, 3)
    for t in (1, 2, 3):
        assert row["length_shifts"][t - 1] == pytest.approx(-(-(1 - GAMMA) + GAMMA * values[t] - values[t - 1]))
    (longer,) = run_json("score", "hello", "--completion", "abc", "--eos", "--model", checkpoint)["scores"]
    assert longer["values"] == pytest.approx([*values, 0.0], rel=1e-5)
    assert longer["horizons"][-1] == 0.0
    assert longer["token_ids"][-1] == 2
    assert longer["length_shifts"][-1] == pytest.approx((1 - GAMMA) + values[-1])
    (prefix,) = run_json("predict", "hello", "--model", checkpoint)["predictions"]
    assert values[0] == pytest.approx(prefix["value"], rel=1e-5)


def test_score_prints_a_row_a_state(run: Any, checkpoint: Path) -> None:
    status, out, err = run("score", "hello", "--completion", "a b\n", "--eos", "--model", checkpoint)
    assert (status, err) == (0, "")
    rows = [line for line in out.splitlines() if re.match(r"│ +\d", line)]
    assert len(rows) == 6
    assert "⏎" in rows[4]
    assert "<|im_end|>" in rows[5]


def test_score_of_an_empty_answer_is_its_end(run_json: Any, checkpoint: Path) -> None:
    (row,) = run_json("score", "hello", "--completion", "", "--eos", "--model", checkpoint)["scores"]
    assert row["tokens"] == ["<|im_end|>"]
    assert len(row["values"]) == 2


def test_colours_follow_the_sign() -> None:
    assert "red" in _output.shift_style(0.1, 0.1)
    assert "blue" in _output.shift_style(-0.1, 0.1)
    assert _output.shift_style(0.001, 0.1) == "dim"


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_unguided_and_guided(run_json: Any, checkpoint: Path) -> None:
    options = ("--model", checkpoint, "--max-new-tokens", 40, "--n", 3, "--seed", 5)
    plain = run_json("generate", "hello", *options)
    assert plain["objective"] is None
    assert plain["sampling"] == {"temperature": 0.7, "top_k": 16, "max_new_tokens": 40}
    assert [row["seed"] for row in plain["generations"]] == [5, 6, 7]
    for row in plain["generations"]:
        assert row["content_tokens"] == len(row["token_ids"]) == len(row["text"])
        assert row["length_score"] is None
        assert row["text_cost"] == pytest.approx(0.0, abs=1e-9)
    for method in ("posterior", "paper"):
        found = run_json("generate", "hello", "--equal-to", 12, "--method", method, *options)
        assert found["objective"] == {
            "kind": "equal_to",
            "target": 12,
            "method": method,
            "tolerance": 0.05,
            "strength": 1.0,
            "space": "value",
            "min_eos_prob": 0.0,
        }
        assert all(0 < row["length_score"] <= 100 for row in found["generations"])
        assert found["generations"] != plain["generations"]


def test_generate_draws_one_of_several(run: Any, run_json: Any, checkpoint: Path) -> None:
    options = ("generate", "hello", "--equal-to", 12, "--model", checkpoint, "--max-new-tokens", 40)
    found = run_json(*options, "--seed", 5, "--n", 3, "--resample", 3)["generations"]
    assert [(row["index"], row["seed"]) for row in found] == [(0, 5), (1, 6), (2, 7)]
    for row in found:
        assert row["resampled_from"] == 3
        assert 1.0 <= row["effective_sample_size"] <= 3.0
        # The seed alone says which answer it is, and no two of them share what they are drawn from.
        (again,) = run_json(*options, "--seed", row["seed"], "--resample", 3)["generations"]
        assert again["token_ids"] == row["token_ids"]
        for name in ("text_cost", "effective_sample_size"):
            assert again[name] == pytest.approx(row[name], rel=1e-4)
    assert len({tuple(row["token_ids"]) for row in found}) == 3
    shown = " ".join(run(*options, "--resample", 3)[1].split())
    assert "Each drawn from 3, effective sample size" in shown
    for wrong in (("--scale", 0.5), ("--equal-to", 9, "--method", "paper"), ()):
        status, _, err = run("generate", "hello", *wrong, "--resample", 2, "--model", checkpoint)
        assert status == 2
        assert "answers are weighed by" in " ".join(err.split())
    status, _, err = run(*options, "--resample", 2, "--temperature", 0)
    assert status == 2
    assert "greedy answers" in " ".join(err.split())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--at-most", 9], {"kind": "at_most", "target": 9}),
        (["--at-least", 9, "--strength", 2], {"kind": "at_least", "target": 9, "strength": 2.0}),
        (["--tilt", -0.5], {"kind": "tilt", "lambda": -0.5, "method": "posterior"}),
        (["--tilt", -5, "--method", "paper"], {"kind": "tilt", "beta": -5.0, "method": "paper"}),
        (["--scale", 0.5, "--tolerance", 0.1], {"kind": "scale", "factor": 0.5, "tolerance": 0.1}),
        (["--equal-to", 9, "--method", "paper", "--space", "length"], {"space": "length"}),
    ],
)
def test_generate_knows_every_objective(
    run_json: Any, checkpoint: Path, options: list[object], wanted: dict[str, Any]
) -> None:
    found = run_json("generate", "hello", *options, "--model", checkpoint, "--max-new-tokens", 16)
    assert found["objective"].items() >= wanted.items()
    assert len(found["generations"]) == 1


def test_generate_prints_text_and_figures(run: Any, run_json: Any, checkpoint: Path) -> None:
    options = ("generate", "hello", "--at-most", 10, "--model", checkpoint, "--max-new-tokens", 30)
    status, out, err = run(*options)
    assert (status, err) == (0, "")
    (row,) = run_json(*options)["generations"]
    assert "at_most 10 by posterior" in out
    assert re.search(rf"│ +1 │ +{row['content_tokens']} │", out)


def test_another_generator_is_named_in_a_warning(
    run: Any, checkpoint: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_backbone, tmp_path / "other")
    options = ("generate", "hello", "--model", checkpoint, "--max-new-tokens", 4, "--backbone", other)
    status, out, err = run(*options, "--json")
    assert status == 0
    assert err.startswith("warning: generator_mismatch: tiny was trained on answers of")
    assert err.count("\n") == 1
    assert json.loads(out)["warnings"]
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    (other / "chat_template.jinja").unlink(missing_ok=True)
    status, _, err = run(*options)
    assert status == 1
    assert "has another tokenizer" in err


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = [
    (1, "the prompt is empty", ["predict", ""]),
    (1, "the prompt is empty", ["predict", " ", "--json"]),
    (1, "prompt 2: the prompt is empty", ["predict", "x", ""]),
    (1, "the prompt is empty", ["predict", "", "--token-ids"]),
    (1, "not token ids", ["predict", "1,x", "--token-ids"]),
    (1, "token_ids must be in [0, 128)", ["predict", "5,128", "--token-ids"]),
    (1, "token_ids must be in [0, 128)", ["score", "5", "--completion", "-1", "--token-ids"]),
    (1, "tokens but the model's context is 512", ["predict", "x" * 600]),
    (1, "the model's context is 512", ["score", "x", "--completion", "y" * 600]),
    (1, "the completion is empty", ["score", "x", "--completion", ""]),
    (1, "the prompt is not valid UTF-8", ["predict", "\udcff"]),
    (1, "the completion is not valid UTF-8", ["score", "x", "--completion", "\udcff"]),
    (1, "unknown device 'gpu'", ["predict", "x", "--device", "gpu"]),
    (1, "use --device cpu", ["predict", "x", "--device", "cuda:63"]),
    (1, "cannot be read", ["predict", "--prompts-file", "no/such/file"]),
    (1, "the prompt is empty", ["generate", ""]),
    (1, "the backbone's context is 512", ["generate", "x" * 600]),
    (1, "objective.target must be a whole number of tokens from 0", ["generate", "x", "--equal-to", "-3"]),
    (1, "objective.lambda must be a finite number", ["generate", "x", "--tilt", "nan"]),
    (1, "objective.beta must be a finite number", ["generate", "x", "--tilt", "inf", "--method", "paper"]),
    (1, "objective.factor must be a finite number", ["generate", "x", "--scale", "-1"]),
    (1, "paper has no scale", ["generate", "x", "--scale", "2", "--method", "paper"]),
    (
        1,
        "objective.space length applies to method paper only",
        ["generate", "x", "--at-most", "3", "--space", "length"],
    ),
    (1, "objective.tolerance must be a finite number", ["generate", "x", "--at-most", "3", "--tolerance", "nan"]),
    (1, "objective.strength must be a finite number", ["generate", "x", "--at-most", "3", "--strength", "-1"]),
    (1, "temperature must be finite", ["generate", "x", "--temperature", "nan"]),
    (1, "temperature must be finite", ["generate", "x", "--temperature", "-1"]),
    (1, "no backbone 'no-such'", ["generate", "x", "--backbone", "no-such"]),
    (1, "no backbone 'no-such'", ["pull", "no-such"]),
    (2, "'--equal-to'", ["generate", "x", "--equal-to", "nan"]),
    (2, "'--equal-to'", ["generate", "x", "--equal-to", "12.5"]),
    (2, "--at-most and --tilt exclude each other", ["generate", "x", "--at-most", "5", "--tilt", "1"]),
    (2, "--method needs an objective", ["generate", "x", "--method", "paper"]),
    (2, "'--method'", ["generate", "x", "--at-most", "5", "--method", "wish"]),
    (2, "cannot be reached within --max-new-tokens 8", ["generate", "x", "--equal-to", "9", "--max-new-tokens", "8"]),
    (2, "--top-k", ["generate", "x", "--equal-to", "9", "--top-k", "0"]),
    (2, "'--n'", ["generate", "x", "--n", "0"]),
    (2, "'--seed'", ["generate", "x", "--seed", "-1"]),
    (2, "give numbers between 0 and 1", ["predict", "x", "--quantiles", "0.5,1"]),
    (2, "give numbers between 0 and 1", ["predict", "x", "--quantiles", "nan"]),
    (2, "give numbers between 0 and 1", ["predict", "x", "--quantiles", "p50"]),
    (2, "'--max-tokens'", ["predict", "x", "--max-tokens", "0"]),
]


@pytest.mark.parametrize(("wanted", "message", "arguments"), BAD, ids=lambda value: None)
def test_bad_input_is_one_line(run: Any, checkpoint: Path, wanted: int, message: str, arguments: list[str]) -> None:
    model = [] if arguments[0] == "pull" else ["--model", str(checkpoint)]
    status, out, err = run(*arguments, *model)
    assert (status, out) == (wanted, "")
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert message in err


def test_posterior_needs_a_distribution(run: Any, value_only: Path) -> None:
    for options in (["--equal-to", 5], ["--scale", 0.5]):
        status, out, err = run("generate", "x", *options, "--model", value_only)
        assert (status, out) == (1, "")
        assert "distribution" in err
        assert err.count("\n") == 1
    assert (
        run("generate", "x", "--equal-to", 5, "--method", "paper", "--max-new-tokens", 8, "--model", value_only)[0] == 0
    )


def damaged(checkpoint: Path, folder: Path, damage: str) -> Path:
    if damage == "missing":
        return folder
    shutil.copytree(checkpoint, folder)
    head, config = folder / "head.safetensors", folder / "lenvm.json"
    if damage == "truncated":
        head.write_bytes(head.read_bytes()[:-40])
    elif damage == "tampered":
        head.write_bytes(head.read_bytes()[:-1] + b"\x01")
    elif damage == "no head":
        head.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "half a config":
        config.write_text(config.read_text()[:100])
    elif damage == "gamma":
        config.write_text(config.read_text().replace(f'"gamma": {GAMMA}', '"gamma": 1.5'))
    elif damage == "backbone":
        data = json.loads(config.read_text())
        data["backbone"]["sha256"] = "0" * 64
        config.write_text(json.dumps(data))
    return folder


DAMAGES = ["missing", "truncated", "tampered", "no head", "no config", "half a config", "gamma", "backbone"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line(run: Any, checkpoint: Path, tmp_path: Path, damage: str) -> None:
    folder = damaged(checkpoint, tmp_path / "copy", damage)
    status, out, err = run("predict", "x", "--model", folder)
    assert (status, out) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert "unexpected" not in err
    assert str(folder) in err or "checkpoint 'tiny'" in err


# -- pull, rollout, train ----------------------------------------------------------------------------------------------


def test_pull_prints_the_folder(run: Any, tiny_backbone: Path) -> None:
    assert run("pull", tiny_backbone, "--verify") == (0, f"{tiny_backbone}\n", "")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with 16 train prompts a domain."""
    folder = tmp_path / "data" / "prompts"
    folder.mkdir(parents=True)
    for domain in ("math", "code", "if"):
        rows = [
            {"id": f"{domain}-{i}", "domain": domain, "source": "ours", "prompt": f"{domain} task {i}"}
            for i in range(16)
        ]
        (folder / f"{domain}_train.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return folder.parent


def test_rollout_samples_and_goes_on(run: Any, run_json: Any, data: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    options = ["rollout", "--data", data, "--out", tmp_path / "out", "--backbone", tiny_backbone, "--prompts", 3]
    options += ["--samples", 2, "--max-new-tokens", 24]
    found = run_json(*options, "--domain", "math", "--domain", "code")
    assert {name: row["count"] for name, row in found["domains"].items()} == {"math": 6, "code": 6, "all": 12}
    status, out, err = run(*options)
    assert (status, err) == (0, "")
    assert re.search(r"^all +18 +9 ", out, re.MULTILINE)
    assert "#" in out
    status, out, err = run(*options, "--temperature", 0.9)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    for wrong in (["--domain", "poetry"], ["--split", "test"], ["--data", tmp_path]):
        status, out, err = run(*options, *wrong)
        assert (status, out) == (1, "")
        assert re.fullmatch(r"error: [^\n]+\n", err)


RECIPE = """
name = "tiny"
backbone = "{backbone}"
gamma = 0.97
generator = {{ temperature = 0.7, max_new_tokens = 24 }}
rollouts = {{ prompts = {{ math = 4, code = 4, if = 4 }}, samples = 2, valid_prompts = 2, max_rows = 16 }}
head = {{ width = 16, bins = {{ cap = 64, unit = 8, ratio = 1.3 }} }}
train = {{ epochs = 1, batch_tokens = 512, micro_tokens = 512, learning_rate = 1e-3, lora_rank = 2 }}
"""


def test_train_writes_a_checkpoint_that_predicts(
    run: Any, run_json: Any, data: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE.format(backbone=tiny_backbone))
    output = tmp_path / "made"
    options = ("train", recipe, "--data", data, "--work", tmp_path / "work", "--output", output)
    status, out, err = run(*options)
    assert (status, err) == (0, "")
    assert "train" in out
    assert f"Checkpoint: {output}" in out
    assert run_json(*options)["rollouts"]["train"]["answers"] == 24
    (row,) = run_json("predict", "x", "--model", output)["predictions"]
    assert row["horizon"] > 0


def test_train_refuses_a_bad_recipe(run: Any, data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    for text in ("name = ", "name = 'x'", RECIPE.format(backbone="b").replace("0.97", "1.5"), RECIPE + "\nmore = 1"):
        bad.write_text(text)
        status, out, err = run("train", bad, "--data", data)
        assert (status, out) == (1, "")
        assert re.fullmatch(r"error: [^\n]+\n", err)
    err = run("train", "no-such", "--data", data)[2]
    assert re.search(r"pass a \.toml file or one of [^\n]*\bsmollm2-135m-instruct\b", err)


# -- demo --------------------------------------------------------------------------------------------------------------

DEMO = ("demo", "--samples", 2, "--max-new-tokens", 16)


def test_demo_json_holds_every_part(run_json: Any, checkpoint: Path) -> None:
    found = run_json(*DEMO, "--model", checkpoint)
    assert found["failures"] == []
    assert [row["kind"] for row in found["lengths"]["rows"]] == list(PROMPTS)
    for row in found["lengths"]["rows"]:
        assert len(row["sampled"]["lengths"]) == 2
        assert 1 <= row["sampled"]["min"] <= row["sampled"]["mean"] <= row["sampled"]["max"] <= 16
        assert 1 <= row["predicted"]["mean"] <= 16
        assert row["predicted"]["horizon"] <= 16
    assert len(found["shifts"]["values"]) == len(found["shifts"]["tokens"]) + 1
    objectives = [row["objective"] for row in found["guided"]["rows"]]
    assert objectives[0] is None
    pairs = {(objective["kind"], objective["method"]) for objective in objectives[1:]}
    both = {(kind, method) for kind in ("equal_to", "at_most", "at_least", "tilt") for method in ("posterior", "paper")}
    assert pairs == both | {("scale", "posterior")}


def test_demo_goes_on_after_a_failed_part_and_says_so(
    run: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lenvm_service.demo.PARTS", (("lengths", failing, print), *_later_parts()))
    status, out, err = run(*DEMO, "--model", checkpoint)
    assert status == 1
    assert err == "error: demo, part lengths: ZeroDivisionError: no luck\n"
    assert "2. What did each token do" in out
    assert "3. Steering the length" in out
    assert "1 part failed" in out


def failing(_: Demo) -> dict[str, Any]:
    raise ZeroDivisionError("no\nluck")


def _later_parts() -> tuple[Any, ...]:
    from lenvm_service.demo import PARTS

    return PARTS[1:]


def test_demo_without_a_checkpoint_fails_in_one_line(run: Any, tmp_path: Path) -> None:
    status, _, err = run(*DEMO, "--model", tmp_path / "none")
    assert status == 1
    assert re.fullmatch(r"error: demo, part setup: [^\n]+\n", err)


# -- output ------------------------------------------------------------------------------------------------------------


def test_numbers_texts_and_json() -> None:
    assert _output.number(None) == _output.number(float("nan")) == "-"
    assert _output.number(-0.01) == "0.0"
    assert _output.number(-1.26) == "-1.3"
    assert _output.elide("a" * 50, 10, 5) == "a" * 10 + " […] " + "a" * 5
    assert _output.elide("a b\nc", 10) == "a b c"
    assert _output.elide("one two three four five six", 9, 8) == "one two […] five six"
    assert _output.printable("a\x1b\n\u2028é\u200e") == "a\\x1b\n\u2028é\\u200e"
    assert _output._plain({"a": [float("inf"), (1, "x")], "b": {"c": float("nan")}}) == {
        "a": [None, [1, "x"]],
        "b": {"c": None},
    }


def test_progress_is_a_bar_on_a_terminal_and_rare_lines_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with _output.ProgressReporter(every_s=3600) as progress:
        progress.update("stage", 1, 2)
    with _output.ProgressReporter(every_s=0) as progress:
        progress.update("stage", 1, None, {"tokens": 5})
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "stage: 1/?  tokens 5\n")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with _output.ProgressReporter() as progress:
        progress.update("stage", 1, 2, {"tokens": 5})
        progress.update("stage", 2, 2, {"tokens": 7})
    assert "tokens 7" in capsys.readouterr().err
