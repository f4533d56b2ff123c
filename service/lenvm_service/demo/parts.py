"""What the demonstration computes; the printing is in ``show``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lenvm_service.cli._session import encode_prompt, load_generator, load_scorer, sample
from lenvm_service.cli.generate import generation_fields
from lenvm_service.cli.predict import prediction
from lenvm_service.cli.score import score_completion

if TYPE_CHECKING:
    from lenvm.decoding import Generation
    from lenvm.guidance import Objective
    from lenvm.modeling import LengthValueModel
    from lenvm.rollouts.sampling import LocalGenerator
    from lenvm.scoring import TorchScorer

__all__ = ["PROMPTS", "STEERED_PROMPT", "Demo", "DemoOptions"]

PROMPTS = {
    "math": "A baker fills 14 trays with 9 rolls each and sells 87 rolls. How many rolls are left?",
    "code": "Write a Python function that returns the second largest number in a list.",
    "instruction": "Write a short thank-you note to a colleague who covered my shift on Friday.",
}
STEERED_PROMPT = "Why does the sea look blue?"
_LEVELS = [0.5, 0.9]
_EXPLAINED = 24  # tokens that an answer should have at least to be worth explaining


@dataclass(frozen=True)
class DemoOptions:
    """``max_new_tokens`` caps every answer, and every predicted length, so that the two can be compared."""

    samples: int = 8
    max_new_tokens: int = 512
    seed: int = 0
    model: str = "smollm2-135m-instruct"
    backbone: str | None = None
    device: str = "cpu"


@dataclass
class Demo:
    """The parts, in order; later ones use what ``setup`` loaded and, where it is there, what ``lengths`` sampled."""

    options: DemoOptions
    _sampled: list[tuple[list[int], Generation]] = field(default_factory=list)
    _model: LengthValueModel | None = None
    _scorer: TorchScorer | None = None
    _generator: LocalGenerator | None = None

    def setup(self) -> dict[str, Any]:
        """Fetch the backbone where it is not there yet, and load it twice: as value model and as generator."""
        from lenvm.backbones import DEFAULT_BACKBONE, resolve_backbone

        if self.options.model == DEFAULT_BACKBONE:
            resolve_backbone(DEFAULT_BACKBONE)  # with its progress bar, before anything else can fail
        self._model, self._scorer = load_scorer(self.options.model, device=self.options.device)
        self._generator, warnings = load_generator(self._model, self.options.backbone, device=self.options.device)
        config = self._model.config
        return {
            "model": config.name,
            "backbone": self._generator.name,
            "gamma": config.gamma,
            "temperature": config.generator.temperature,
            "warnings": warnings,
        }

    @property
    def _loaded(self) -> tuple[LengthValueModel, TorchScorer, LocalGenerator]:
        assert self._model is not None
        assert self._scorer is not None
        assert self._generator is not None
        return self._model, self._scorer, self._generator

    def lengths(self) -> dict[str, Any]:
        """Predicted remaining length of three prompts beside sampled ones, everything as ``min(l, cap)``."""
        from lenvm.decoding import Request, SamplingParams
        from lenvm.scoring import ScoreRow

        model, scorer, generator = self._loaded
        cap, samples = self.options.max_new_tokens, self.options.samples
        encoded = [encode_prompt(generator.tokenizer, text) for text in PROMPTS.values()]
        scores = scorer.score([ScoreRow(append=ids) for ids in encoded])
        requests = [Request(ids, self.options.seed + sample) for ids in encoded for sample in range(samples)]
        settings = model.config.generator
        params = SamplingParams(temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=cap)
        answers = sample(generator, requests, params, label="Sampling answers")
        self._sampled = [(list(r.prompt_ids), answer) for r, answer in zip(requests, answers, strict=True)]
        rows = []
        for index, (kind, text) in enumerate(PROMPTS.items()):
            own = answers[index * samples : (index + 1) * samples]
            # A finished answer has l = L + 1; a cut one has l > cap.
            lengths = [len(answer.token_ids) + 1 if answer.finished else cap for answer in own]
            scores[index].state.close()
            rows.append(
                {
                    "kind": kind,
                    "prompt": text,
                    "predicted": _capped_prediction(scorer, scores[index], cap),
                    "sampled": {
                        "lengths": lengths,
                        "mean": sum(lengths) / len(lengths),
                        "min": min(lengths),
                        "max": max(lengths),
                        "cut": sum(not answer.finished for answer in own),
                    },
                }
            )
        return {"cap": cap, "rows": rows}

    def shifts(self) -> dict[str, Any]:
        """Length shifts of one sampled answer: the shortest finished one that has something to explain."""
        from lenvm.decoding import Request, SamplingParams

        model, scorer, generator = self._loaded
        found = [item for item in self._sampled if item[1].finished and len(item[1].token_ids) >= _EXPLAINED]
        if found:
            prompt, answer = min(found, key=lambda item: len(item[1].token_ids))
        elif self._sampled:
            prompt, answer = self._sampled[0]
        else:  # the part before this one failed
            prompt = encode_prompt(generator.tokenizer, PROMPTS["math"])
            params = SamplingParams(
                temperature=model.config.generator.temperature, max_new_tokens=min(96, self.options.max_new_tokens)
            )
            (answer,) = sample(generator, [Request(prompt, self.options.seed)], params, label="Sampling an answer")
        row = score_completion(model, scorer, prompt, answer.token_ids, eos=answer.finished)
        texts = {tuple(encode_prompt(generator.tokenizer, text)): text for text in PROMPTS.values()}
        return {"prompt": texts.get(tuple(prompt), ""), "finished": answer.finished, **row}

    def guided(self) -> dict[str, Any]:
        """One prompt under every objective by both methods, and unguided: one batch, one sampler."""
        from lenvm.decoding import DEFAULT_CANDIDATES, Request, SamplingParams
        from lenvm.guides import ValueGuide

        model, scorer, generator = self._loaded
        cap = self.options.max_new_tokens
        objectives = _objectives(cap)
        ids = encode_prompt(generator.tokenizer, STEERED_PROMPT)
        temperature = model.config.generator.temperature
        params = SamplingParams(temperature=temperature, top_k=DEFAULT_CANDIDATES, max_new_tokens=cap)
        guide = ValueGuide(scorer, objectives)
        # One seed for all: rows differ by their objective alone.
        requests = [Request(ids, self.options.seed) for _ in objectives]
        answers = sample(generator, requests, params, guide, "Steering answers")
        rows = [
            {
                "objective": None if objective is None else objective.to_dict(),
                **generation_fields(answer, objective, generator.tokenizer),
            }
            for objective, answer in zip(objectives, answers, strict=True)
        ]
        return {"prompt": STEERED_PROMPT, "top_k": DEFAULT_CANDIDATES, "cap": cap, "rows": rows}


def _capped_prediction(scorer: TorchScorer, score: Any, cap: int) -> dict[str, Any]:
    """``prediction``, every length restricted to the cap: ``mean`` is ``E[min(l, cap)] = sum_{n < cap} P(l > n)``."""
    import numpy as np

    from lenvm.distribution import survival

    found = prediction(scorer, score, _LEVELS)
    mean = None
    if scorer.bins is not None and score.bin_logprobs is not None:
        # Past their own cap the bins know nothing.
        steps = np.arange(min(cap, scorer.bins.cap))
        mean = float(survival(score.bin_logprobs[-1], scorer.bins, steps).sum())
    quantiles = {level: min(length, cap) for level, length in (found["quantiles"] or {}).items()}
    return {"value": found["value"], "horizon": min(found["horizon"], cap), "mean": mean, "quantiles": quantiles}


def _objectives(cap: int) -> list[Objective | None]:
    """Unguided, then every objective by both methods. A small cap (a quick run) shrinks the targets."""
    from lenvm.guidance import Objective

    rows: list[Objective | None] = [None]
    for kind, target in (("equal_to", 64), ("at_most", 40), ("at_least", 256)):
        for method in ("posterior", "paper"):
            wanted = min(target, cap // 2)
            rows.append(Objective.from_dict({"kind": kind, "target": wanted, "method": method}))
    rows.append(Objective(kind="tilt", lambda_=0.02))
    rows.append(Objective(kind="tilt", beta=-20.0, method="paper"))
    rows.append(Objective(kind="scale", factor=0.5))  # the paper has no scale
    return rows
