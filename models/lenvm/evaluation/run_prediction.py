"""``lenvm eval prediction``: how well does the prompt boundary predict the length of the answer?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lenvm.decoding import SamplingParams
from lenvm.distribution import quantile, restricted_mean
from lenvm.evaluation.prediction import LEVELS, DomainData, Prediction, PromptSamples, evaluate
from lenvm.modeling import LengthValueModel
from lenvm.prompts import DOMAINS, Prompt, load_prompts, select
from lenvm.returns import horizon_from_logit
from lenvm.rollouts import RolloutSet
from lenvm.rollouts.sampling import LocalGenerator, sample_rollouts
from lenvm.scoring import Scorer, ScoreRow, TorchScorer

__all__ = ["evaluate_rollouts", "predict", "rollouts_to_evaluate"]

Progress = Callable[[str, int, int], None]


def predict(scorer: Scorer, prompts: Sequence[Sequence[int]], *, batch: int = 32) -> list[Prediction]:
    """What the model says at the last token of each tokenised prompt, all in remaining tokens ``l`` (EOS included)."""
    found: list[Prediction] = []
    for start in range(0, len(prompts), batch):
        for answer in scorer.score([ScoreRow(append=ids) for ids in prompts[start : start + batch]]):
            horizon = float(horizon_from_logit(float(answer.logits[-1]), scorer.gamma))
            if scorer.bins is None or answer.bin_logprobs is None:
                found.append(Prediction(horizon))
            else:
                logp = answer.bin_logprobs[-1]
                lengths, _ = quantile(logp, scorer.bins, LEVELS)
                mean = float(restricted_mean(logp, scorer.bins))
                found.append(Prediction(horizon, mean, dict(zip(LEVELS, lengths.tolist(), strict=True))))
            answer.state.close()
    return found


def rollouts_to_evaluate(
    backbone: str,
    data: Path,
    work: Path,
    *,
    samples: int,
    train_prompts: int = 200,
    params: SamplingParams | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[RolloutSet, RolloutSet]:
    """Sample every test prompt ``samples`` times, and some train prompts for the baselines; ``(test, train)``.

    What ``work`` already holds is used, so an interrupted command can be run again.
    """
    generator = LocalGenerator(backbone, device=device, max_rows=2048 if device.startswith("cuda") else None)
    params = params or SamplingParams()
    made = []
    for split, count, repeat in (("test", None, samples), ("train", train_prompts, 4)):
        prompts: list[Prompt] = [
            p for domain in DOMAINS for p in select(load_prompts(data, domain, split), count, seed=0)
        ]
        total, done = len(prompts) * repeat, [0]

        def on_done(answers: int, _: int, split: str = split, total: int = total, done: list[int] = done) -> None:
            done[0] += answers
            if progress:
                progress(f"rollouts-{split}", done[0], total)

        made.append(
            sample_rollouts(
                generator,
                prompts,
                work / f"rollouts-eval-{split}",
                samples=repeat,
                params=params,
                seed=7,
                # A test prompt is never left out for its length, only for lack of room to answer.
                max_prompt_tokens=generator.sampler.context - params.max_new_tokens,
                on_done=on_done,
            )
        )
    return made[0], made[1]


def evaluate_rollouts(model: LengthValueModel, test: RolloutSet, train: RolloutSet) -> dict[str, dict[str, Any]]:
    """Metrics by domain (``lenvm.evaluation.prediction``) of ``model`` on sampled answers of the test prompts.

    The cap is the generator's: an answer cut there counts as that long.
    """
    scorer = TorchScorer(model)
    fitted = _by_domain(train)
    domains = {}
    for domain, groups in _by_domain(test).items():
        predictions = predict(scorer, [ids for ids, _ in groups])
        domains[domain] = DomainData(
            predictions, [samples for _, samples in groups], [samples for _, samples in fitted[domain]]
        )
    return evaluate(domains, cap=model.config.generator.max_new_tokens)


def _by_domain(rollouts: RolloutSet) -> Mapping[str, list[tuple[list[int], PromptSamples]]]:
    """Domain -> one entry a prompt: its token ids and its sampled answers."""
    domains: dict[str, list[tuple[list[int], PromptSamples]]] = {}
    for indices in rollouts.by_prompt().values():
        ids = rollouts.prompt_tokens(indices[0]).tolist()
        samples = PromptSamples(rollouts.lengths[indices].tolist(), rollouts.finished[indices].tolist(), len(ids))
        domains.setdefault(rollouts.domains[indices[0]], []).append((ids, samples))
    return domains
