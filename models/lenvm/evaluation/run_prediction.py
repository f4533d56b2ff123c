"""``lenvm eval prediction``: how well does the prompt boundary predict the length of the answer?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lenvm.calibration import Calibration
from lenvm.decoding import SamplingParams
from lenvm.distribution import quantile, restricted_mean, survival
from lenvm.errors import InvalidRequestError
from lenvm.evaluation.along import errors_along
from lenvm.evaluation.coverage import GRID, Prediction
from lenvm.evaluation.prediction import DomainData, PromptSamples, evaluate
from lenvm.evaluation.probe import MIN_PROMPTS, LinearProbe, fit_probe, prompt_features
from lenvm.evaluation.states import PromptAnswers, StateRow, StateScores, by_domain, group_prompts, score_states
from lenvm.modeling import LengthValueModel
from lenvm.prompts import DOMAINS, Prompt, load_prompts, select
from lenvm.returns import horizon_from_logit
from lenvm.rollouts import RolloutSet
from lenvm.rollouts.sampling import LocalGenerator, sample_rollouts
from lenvm.scoring import Scorer, TorchScorer

__all__ = [
    "PredictionOptions",
    "evaluate_prompts",
    "evaluate_rollouts",
    "predict",
    "predictions_of",
    "rollouts_to_evaluate",
]

FloatArray: TypeAlias = NDArray[np.float64]
Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PredictionOptions:
    """What ``evaluate_rollouts`` measures beside the model at the prompt boundary.

    ``along``: finished answers of each prompt to follow to their end (0: none). ``probe_prompts``: train prompts for
    the linear probe at most (None: all; 0, or fewer than 10 in all: no probe). ``prompt_encoder``: a checkpoint
    trained with ``s_0`` supervised alone.
    """

    along: int = 2
    probe_prompts: int | None = None
    prompt_encoder: LengthValueModel | None = None
    device: str = "cpu"
    seed: int = 0


def predict(
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    *,
    cap: int | None = None,
    calibration: Calibration | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """What the model says at the last token of each tokenised prompt, all in remaining tokens ``l`` (EOS included).

    ``cap``: where answers were cut (default: the end of the bins). Quantiles are calibrated ones with ``calibration``.
    """
    scores = score_states(scorer, [StateRow(ids) for ids in prompts], progress=progress)
    return predictions_of(scorer, scores, cap=cap, calibration=calibration)


def predictions_of(
    scorer: Scorer,
    scores: Sequence[StateScores],
    *,
    cap: int | None = None,
    calibration: Calibration | None = None,
) -> list[Prediction]:
    """``predict`` from scores of the prompts' last tokens. The mean is the network's own, as it is served."""
    if not scores:
        return []
    logits = np.concatenate([score.logits[-1:] for score in scores])
    horizons = np.asarray(horizon_from_logit(logits, scorer.gamma)).tolist()
    bins = scorer.bins
    if bins is None:
        return [Prediction(horizon) for horizon in horizons]
    logp = np.stack([score.bin_logprobs[-1] for score in scores if score.bin_logprobs is not None])
    means = restricted_mean(logp, bins).tolist()
    if calibration is not None:
        logp = calibration.apply(logits, logp, bins, scorer.gamma)
    lengths = quantile(logp, bins, GRID)[0].tolist()
    beyond = survival(logp, bins, bins.cap if cap is None else cap).tolist()
    return [
        Prediction(horizon, mean, dict(zip(GRID, row, strict=True)), above)
        for horizon, mean, row, above in zip(horizons, means, lengths, beyond, strict=True)
    ]


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
    splits: Sequence[str] = ("test", "train"),
) -> tuple[RolloutSet, ...]:
    """Sample every test prompt ``samples`` times, and some train prompts for the baselines; aligned with ``splits``.

    What ``work`` already holds is used, so an interrupted command can be run again.
    """
    generator = LocalGenerator(backbone, device=device, max_rows=2048 if device.startswith("cuda") else None)
    params = params or SamplingParams()
    made = []
    for split in splits:
        count, repeat = (None, samples) if split == "test" else (train_prompts, 4)
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
    return tuple(made)


def evaluate_rollouts(
    model: LengthValueModel,
    test: RolloutSet,
    train: RolloutSet,
    options: PredictionOptions | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """``evaluate_prompts`` on stored rollouts."""
    return evaluate_prompts(model, group_prompts(test), group_prompts(train), options, progress=progress)


def evaluate_prompts(
    model: LengthValueModel,
    prompts: Sequence[PromptAnswers],
    train_prompts: Sequence[PromptAnswers],
    options: PredictionOptions | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Metrics by domain (``lenvm.evaluation.prediction``) of ``model`` on the answers to test prompts.

    The cap is the generator's: an answer cut there counts as that long. ``train_prompts`` fit the baselines. Answers
    whose tokens are not known are not followed along.
    """
    options = options or PredictionOptions()
    cap, gamma = model.config.generator.max_new_tokens, model.config.gamma
    scorer, calibration = TorchScorer(model), Calibration.from_dict(model.config.calibration)
    _check_domains(prompts, train_prompts)
    ids = [prompt.prompt_ids for prompt in prompts]
    scores = score_states(scorer, [StateRow(one) for one in ids], progress=_stage(progress, "prompts"))
    predictions = predictions_of(scorer, scores, cap=cap, calibration=calibration)
    own = predictions_of(scorer, scores, cap=cap) if calibration is not None else []
    baselines, fits = _rivals(model, prompts, train_prompts, cap, options, progress)
    fitted, domains = by_domain(train_prompts), {}
    for domain in by_domain(prompts):
        at = [index for index, prompt in enumerate(prompts) if prompt.domain == domain]
        domains[domain] = DomainData(
            [predictions[index] for index in at],
            [_samples(prompts[index]) for index in at],
            [_samples(prompt) for prompt in fitted[domain]],
            {name: None if found is None else found[at] for name, found in baselines.items()},
            [own[index] for index in at] if own else (),
        )
    metrics = evaluate(domains, cap=cap, gamma=gamma)
    for row in metrics.values():
        row["baseline_fit"] |= fits
        row["calibrated"] = calibration is not None
    if options.along and all(prompt.rollouts is not None for prompt in prompts):
        found = errors_along(scorer, prompts, answers=options.along, progress=_stage(progress, "along the answers"))
        for domain, row in found.items():
            metrics[domain]["along"] = row
    return metrics


def _check_domains(prompts: Sequence[PromptAnswers], train: Sequence[PromptAnswers]) -> None:
    missing = sorted(by_domain(prompts).keys() - by_domain(train).keys())
    if missing:
        raise InvalidRequestError(f"the train rollouts hold no prompt of {', '.join(missing)}: roll some out")
    if twice := {prompt.prompt_id for prompt in prompts} & {prompt.prompt_id for prompt in train}:
        raise InvalidRequestError(f"{len(twice)} prompts are in both rollouts ({min(twice)}): baselines need others")


def _samples(prompt: PromptAnswers) -> PromptSamples:
    return PromptSamples(prompt.lengths.tolist(), prompt.finished.tolist(), len(prompt.prompt_ids))


def _rivals(
    model: LengthValueModel,
    prompts: Sequence[PromptAnswers],
    train: Sequence[PromptAnswers],
    cap: int,
    options: PredictionOptions,
    progress: Progress | None,
) -> tuple[dict[str, FloatArray | None], dict[str, Any]]:
    """Predictions in content tokens [prompts] of the trained baselines, and how these were fitted."""
    found: dict[str, FloatArray | None] = {"linear_probe": None, "prompt_encoder": None}
    fits: dict[str, Any] = {}
    if options.probe_prompts != 0 and len(train) >= MIN_PROMPTS:
        chosen = _probe_prompts(train, options)
        probe, found["linear_probe"] = _probe(model, prompts, chosen, cap, options, progress)
        fits["linear_probe_layer"], fits["linear_probe_ridge"] = probe.layer, probe.ridge
        fits["linear_probe_cross_validated"] = probe.cross_validated
        fits["linear_probe_prompts"] = len(chosen)
    if options.prompt_encoder is not None:
        other = options.prompt_encoder
        report = _stage(progress, "prompt encoder")
        told = predict(TorchScorer(other), [prompt.prompt_ids for prompt in prompts], progress=report)
        found["prompt_encoder"] = np.maximum([one.horizon - 1.0 for one in told], 0.0)
        fits["prompt_encoder"] = other.config.name
    return found, fits


def _probe_prompts(train: Sequence[PromptAnswers], options: PredictionOptions) -> list[PromptAnswers]:
    order = np.random.default_rng(options.seed).permutation(len(train))[: options.probe_prompts]
    return [train[index] for index in sorted(order.tolist())]


def _probe(
    model: LengthValueModel,
    prompts: Sequence[PromptAnswers],
    chosen: Sequence[PromptAnswers],
    cap: int,
    options: PredictionOptions,
    progress: Progress | None,
) -> tuple[LinearProbe, FloatArray]:
    ids = [prompt.prompt_ids for prompt in [*chosen, *prompts]]
    states = prompt_features(
        str(model.backbone_dir), ids, device=options.device, progress=_stage(progress, "linear probe")
    )
    probe = fit_probe(states[: len(chosen)], [_samples(prompt).capped(cap).mean() for prompt in chosen])
    return probe, probe.predict(states[len(chosen) :])


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    report = progress

    def update(done: int, total: int) -> None:
        report(name, done, total)

    return update
