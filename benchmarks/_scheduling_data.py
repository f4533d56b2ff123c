"""What the scheduling study draws its requests from: prompts, sampled answers, and the value model's predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from _scheduling import FloatArray, IntArray

from lenvm.calibration import Calibration
from lenvm.config import LenVMConfig
from lenvm.distribution import LengthBins, log_pmf, quantile, restricted_mean
from lenvm.evaluation.states import PromptAnswers, StateRow, score_states
from lenvm.modeling import LengthValueModel, find_checkpoint
from lenvm.scoring import TorchScorer

__all__ = ["Population", "boundary_population", "progressive_population"]

Scores: TypeAlias = tuple[FloatArray, FloatArray]  # value logits [states], bin log-probs [states, bins]


@dataclass(frozen=True)
class Population:
    """Prompts, the tokens of their answers [prompts, samples], what is predicted of them.

    ``progressive``: for each prompt (with one answer) the predicted mean of what is still to come after 0, quantum,
    2 quantum ... tokens of that answer.
    """

    prompt_tokens: IntArray
    work: IntArray  # EOS included where it came
    p50: FloatArray
    p90: FloatArray
    mean: FloatArray
    pmf: FloatArray  # predicted, of l = 1 .. cap [prompts, cap]
    progressive: Sequence[Sequence[float]] | None = None

    @property
    def own_pmf(self) -> FloatArray:
        """Of the prompts' own samples [prompts, cap]."""
        counts = np.zeros_like(self.pmf)
        np.add.at(counts, (np.arange(len(self.work))[:, None], self.work - 1), 1.0)
        return counts / self.work.shape[1]


def boundary_population(prompts: Sequence[PromptAnswers], model: str, cache: Path, device: str) -> Population:
    """Predictions at the prompt boundary alone; the answers' tokens need not be known."""
    rows = [StateRow(prompt.prompt_ids) for prompt in prompts]
    return _population(prompts, _scored(rows, model, cache, device), LenVMConfig.load(find_checkpoint(model)))


def progressive_population(
    prompts: Sequence[PromptAnswers], model: str, cache: Path, device: str, quantum: int
) -> Population:
    """The first answer of each prompt, with predictions after every ``quantum`` of its tokens."""
    config = LenVMConfig.load(find_checkpoint(model))
    assert isinstance(config.head.bins, LengthBins)
    cap = config.generator.max_new_tokens
    firsts = [PromptAnswers(p.prompt_id, p.domain, p.prompt_ids, p.lengths[:1], p.finished[:1]) for p in prompts]
    places = [range(0, int(size), quantum) for (size,) in _work(firsts, cap)]
    rows = [StateRow(p.prompt_ids, p.tokens(0), at) for p, at in zip(prompts, places, strict=True)]
    logits, logp = _scored(rows, model, cache, device)
    ends = np.cumsum([len(at) for at in places])
    starts = ends - [len(at) for at in places]
    means = restricted_mean(logp, config.head.bins)
    tables = [
        np.minimum(means[start:end], cap - np.asarray(at)).tolist()
        for start, end, at in zip(starts, ends, places, strict=True)
    ]
    return _population(firsts, (logits[starts], logp[starts]), config, tables)


def _population(
    prompts: Sequence[PromptAnswers],
    scores: Scores,
    config: LenVMConfig,
    progressive: Sequence[Sequence[float]] | None = None,
) -> Population:
    """Predictions as the service gives them: calibrated quantiles, the network's own mean."""
    logits, logp = scores
    bins, calibration = config.head.bins, Calibration.from_dict(config.calibration)
    assert isinstance(bins, LengthBins)
    cap = config.generator.max_new_tokens
    calibrated = logp if calibration is None else calibration.apply(logits, logp, bins, config.gamma)
    levels = quantile(calibrated, bins, [0.5, 0.9])[0].astype(np.float64)
    pmf = np.exp(log_pmf(calibrated, bins))[:, : cap + 1]
    pmf[:, cap - 1] += pmf[:, cap:].sum(axis=1)  # the server cuts answers at the cap
    return Population(
        np.array([len(prompt.prompt_ids) for prompt in prompts]),
        _work(prompts, cap),
        levels[:, 0],
        levels[:, 1],
        np.asarray(restricted_mean(logp, bins)),
        pmf[:, :cap],
        progressive,
    )


def _work(prompts: Sequence[PromptAnswers], cap: int) -> IntArray:
    tokens = np.stack([np.minimum(prompt.lengths + prompt.finished, cap) for prompt in prompts])
    return np.maximum(tokens, 1)


def _scored(rows: Sequence[StateRow], model: str, cache: Path, device: str) -> Scores:
    """What the model says at all places of all rows, one after the other; from ``cache`` where that is of the same."""
    digest = hashlib.sha256(json.dumps([[row.prompt_ids, row.token_ids, list(row.places)] for row in rows]).encode())
    for path in sorted(find_checkpoint(model).glob("*.safetensors")):
        digest.update(path.read_bytes())
    if cache.exists():
        kept = np.load(cache, allow_pickle=False)
        if str(kept["key"]) == digest.hexdigest():
            return kept["logits"], kept["logp"]
    scorer = TorchScorer(LengthValueModel.from_pretrained(model, device=device))
    scores = score_states(scorer, rows, progress=_progress(cache.stem))
    logits = np.concatenate([score.logits for score in scores])
    logp = np.concatenate([np.asarray(score.bin_logprobs, dtype=np.float64) for score in scores])
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.savez(cache, key=digest.hexdigest(), logits=logits, logp=logp)
    return logits, logp


def _progress(name: str) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        print(f"{name}: {done} of {total}", flush=True)

    return report
