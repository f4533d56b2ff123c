"""``lenvm eval conditional`` on tiny parts: what is asked of prompts, parts that add up, reports and figures."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lenvm.decoding import SamplingParams
from lenvm.errors import DataError, InvalidRequestError
from lenvm.evaluation import run_conditional as module
from lenvm.evaluation.conditional import Pair
from lenvm.evaluation.lifebench import KINDS
from lenvm.evaluation.run_conditional import ConditionalSettings, pool_tokens, run_conditional
from lenvm.rollouts.sampling import LocalGenerator
from lenvm.scoring import TorchScorer
from lenvm_service.cli import main

SETTINGS = ConditionalSettings(
    prompts=6, samples=16, pairs_per_prompt=2, max_new_tokens=96, params=SamplingParams(0.7, top_k=8), most_cut=0.9
)
KEYS = {
    "ks", "ks_null", "ks_null_95", "ks_hard", "pairs", "logprob_gap", "natural_end_rate", "by_domain", "tolerance",
}  # fmt: skip


@pytest.fixture
def generator(tiny_backbone: Path) -> Any:
    return LocalGenerator(str(tiny_backbone), max_rows=48)


@pytest.fixture
def run(generator: Any, tiny_model: Any, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(settings, ...) -> (metrics, pairs by kind, jobs that were sampled)``."""
    jobs: list[Any] = []
    pairs: dict[str, list[Pair]] = {}
    plain, measure = module._Runner._guide, module.conditional_metrics

    def guide(self: Any, missing: Any) -> Any:
        jobs.extend(missing)
        return plain(self, missing)

    def metrics_of(found: Any, **options: Any) -> Any:
        # The first call of a kind has all of its pairs; those of each domain follow.
        pairs.setdefault(found[0].kind, list(found))
        return measure(found, nulls=2, **options)

    monkeypatch.setattr(module._Runner, "_guide", guide)
    monkeypatch.setattr(module, "conditional_metrics", metrics_of)

    def go(settings: ConditionalSettings = SETTINGS, **options: Any) -> Any:
        jobs.clear()
        pairs.clear()
        metrics = run_conditional(generator, TorchScorer(tiny_model), tiny_data, settings, **options)
        return metrics, dict(pairs), list(jobs)

    return go


def test_a_whole_run(run: Any) -> None:
    metrics, pairs, jobs = run()
    assert set(metrics) == {*KINDS, "sampling", "sampled_by"}
    assert metrics["sampling"] | {"unguided_mean_length": 0, "unguided_cut_share": 0} == {
        "prompts": 6, "prompts_too_long": 0, "prompts_mostly_cut": 0, "samples": 16, "samples_for_targets": 4,
        "resample": 1, "max_new_tokens": 96, "strength": 1.0, "min_eos_prob": 0.0,
        "unguided_mean_length": 0, "unguided_cut_share": 0,
    }  # fmt: skip
    kinds = Counter(job.kind for job in jobs)
    assert kinds[None] == 6 * 16
    for kind in KINDS:
        assert set(metrics[kind]) >= KEYS
        assert 0 < metrics[kind]["pairs"] == len(pairs[kind]) == kinds[kind] <= 12
        assert sum(row["pairs"] for row in metrics[kind]["by_domain"].values()) == metrics[kind]["pairs"]
        assert metrics[kind]["tolerance"] == (0.1 if kind == "equal_to" else 0.05)
        for pair in pairs[kind]:
            assert len(pair.unguided) == 12  # those that the target was not chosen from
            assert pair.guided.length <= 96
            assert pair.guided.logprob < 0.0 or pair.guided.length == 0
            assert all(abs(answer.text_cost) < 1e-9 for answer in pair.unguided)


def test_one_of_several_answers_is_drawn(run: Any, tmp_path: Path) -> None:
    work = tmp_path / "work.jsonl"
    single, _, _ = run(work=work)
    metrics, _, sampled = run(replace(SETTINGS, resample=3), work=work)
    assert {job.answer for job in sampled} == {1, 2}  # the first of each pair is there already
    assert metrics["sampling"] == single["sampling"] | {"resample": 3}
    again, _, sampled = run(replace(SETTINGS, resample=3), work=work)
    assert not sampled
    for kind in KINDS:
        drawn = metrics[kind].pop("resampled")
        assert again[kind].pop("resampled") == drawn
        assert metrics[kind] == single[kind]
        assert set(drawn) == {*single[kind], "effective_sample_size"}
        assert 1.0 < drawn["effective_sample_size"] <= 3.0
        assert drawn["satisfied_rate"] >= single[kind]["satisfied_rate"]
    empty, _, _ = run(replace(SETTINGS, resample=2, most_cut=0.0, prompts=3, max_new_tokens=4))
    assert empty["at_most"] == {"pairs": 0, "resampled": {"pairs": 0}}
    with pytest.raises(InvalidRequestError, match="at least 1"):
        replace(SETTINGS, resample=0)


def test_guided_answers_follow_their_objective(run: Any) -> None:
    _, pairs, _ = run(replace(SETTINGS, tolerances=dict.fromkeys(KINDS, 0.01), prompts=6, pairs_per_prompt=3))
    within = [pair.guided.length <= pair.target + 3 for pair in pairs["at_most"]]
    beyond = [pair.guided.length >= pair.target - 3 for pair in pairs["at_least"]]
    # The head is not trained; endings are weighed exactly all the same.
    assert sum(within) >= 0.9 * len(within)
    assert sum(beyond) >= 0.9 * len(beyond)


def test_parts_add_up_to_the_whole(run: Any, tmp_path: Path) -> None:
    whole, pairs, _ = run()
    first, second = tmp_path / "runs" / "a.jsonl", tmp_path / "runs" / "b.jsonl"
    _, _, left = run(replace(SETTINGS, part=(1, 2)), work=first)
    _, _, right = run(replace(SETTINGS, part=(2, 2)), work=second)
    assert left
    assert right
    assert not {job.prompt.id for job in left} & {job.prompt.id for job in right}
    merged, again, sampled = run(work=first, others=[second])
    assert not sampled
    for kind in KINDS:
        assert [(pair.prompt_id, pair.target, pair.guided.length) for pair in again[kind]] == [
            (pair.prompt_id, pair.target, pair.guided.length) for pair in pairs[kind]
        ]
        assert merged[kind]["ks"] == whole[kind]["ks"]
    # More pairs and other tolerances go on in the same file.
    _, _, sampled = run(replace(SETTINGS, pairs_per_prompt=3, kinds=("at_most",)), work=first, others=[second])
    assert {(job.kind, job.number) for job in sampled} == {("at_most", 2)}
    with pytest.raises(DataError, match="max_new_tokens differ"):
        run(replace(SETTINGS, max_new_tokens=64), work=first)


def test_an_unlikely_eos_is_not_offered(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = module.ValueGuide

    def guide(scorer: Any, objectives: Any) -> Any:
        asked.extend(objectives)
        return plain(scorer, objectives)

    monkeypatch.setattr(module, "ValueGuide", guide)
    work = tmp_path / "work.jsonl"
    run(work=work)
    assert {objective.min_eos_prob for objective in asked} == {0.0}
    assert "min_eos_prob" not in work.read_text()  # files of before it stay of use
    asked.clear()
    metrics, _, sampled = run(replace(SETTINGS, min_eos_prob=0.01), work=work)
    assert metrics["sampling"]["min_eos_prob"] == 0.01
    assert sampled
    assert all(job.kind for job in sampled)  # unguided answers are the same
    assert {objective.min_eos_prob for objective in asked} == {0.01}
    assert "min_eos_prob=0.01" in work.read_text()


def test_prompts_that_do_not_qualify(run: Any) -> None:
    metrics, _, jobs = run(replace(SETTINGS, max_new_tokens=4, prompts=3))
    # Where nearly every answer is cut there is no length to ask for.
    assert metrics["sampling"]["prompts_mostly_cut"] + len({job.prompt.id for job in jobs if job.kind}) <= 3
    metrics, _, _ = run(replace(SETTINGS, most_cut=0.0, prompts=3, max_new_tokens=4))
    assert metrics["sampling"]["prompts_mostly_cut"] == 3
    assert metrics["at_most"] == {"pairs": 0}
    with pytest.raises(DataError, match="no prompt leaves room for 512 tokens"):
        run(replace(SETTINGS, max_new_tokens=512))
    metrics, _, jobs = run(replace(SETTINGS, prompts=0, tasks=2, kinds=("at_least",)))
    assert metrics["sampling"]["prompts"] == 2
    assert {job.prompt.domain for job in jobs} == {"lifebench"}


def test_settings_that_do_not_fit(generator: Any) -> None:
    for changes, message in (
        ({"kinds": ("exactly",)}, "unknown kind exactly"),
        ({"kinds": ()}, "unknown kind"),
        ({"part": (3, 2)}, "part 3/2"),
        ({"part": (0, 2)}, "part 0/2"),
        ({"apart": 16}, "some choose|some answers choose"),
        ({"strength": -1.0}, "strength"),
        ({"min_eos_prob": 2.0}, "min_eos_prob"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            replace(SETTINGS, **changes)
    assert pool_tokens(generator, SETTINGS) >= 48 * 512


def test_the_command(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, figures, work = tmp_path / "conditional.json", tmp_path / "figures", tmp_path / "work.jsonl"
    command = [
        "eval", "conditional", "--data", str(tiny_data), "--model", str(tiny_checkpoint), "--prompts", "4",
        "--samples", "12", "--pairs-per-prompt", "1", "--max-new-tokens", "96", "--work", str(work),
    ]  # fmt: skip
    assert main([*command, "--report", str(report), "--figures", str(figures)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 prompts" in shown
    assert "at least" in shown
    metrics = json.loads(report.read_text())["metrics"]
    for kind in KINDS:
        assert 0.0 <= metrics[kind]["ks"] <= 1.0
    svg = (figures / "conditional.svg").read_text()
    assert "exact:" in svg
    before = work.read_text()
    assert main([*command, "--json"]) == 0  # the answers are there already
    assert work.read_text() == before
    again = json.loads(capsys.readouterr().out)
    assert again["equal_to"]["ks"] == pytest.approx(metrics["equal_to"]["ks"], rel=1e-5)
    assert main([*command, "--json", "--min-eos-prob", "0.05"]) == 0
    assert json.loads(capsys.readouterr().out)["sampling"]["min_eos_prob"] == 0.05
    assert main([*command, "--resample", "2", "--figures", str(figures)]) == 0
    assert "at least, 1 of 2" in " ".join(capsys.readouterr().out.split())
    assert (figures / "conditional.svg").read_text().count("exact:") == 6
    assert main([*command, "--part", "2"]) == 2
    assert "write it as 1/2" in " ".join(capsys.readouterr().err.split())
