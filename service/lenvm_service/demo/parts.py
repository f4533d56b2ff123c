"""What the demonstration computes; the printing is in ``show``."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lenvm_client import CompletionInput, PredictInput, RowError, TokenScores
from lenvm_service.answers import generation_fields, level_name
from lenvm_service.cli._backend import RemoteBackend
from lenvm_service.cli._session import load_generator, need, sample
from lenvm_service.demo.service import running_service

if TYPE_CHECKING:
    from lenvm.decoding import Generation
    from lenvm.guidance import Objective
    from lenvm.rollouts.sampling import LocalGenerator

__all__ = ["PROMPTS", "STEERED_PROMPT", "Demo", "DemoOptions"]

PROMPTS = {
    "math": "A baker fills 14 trays with 9 rolls each and sells 87 rolls. How many rolls are left?",
    "code": "Write a Python function that returns the second largest number in a list.",
    "instruction": "Write a short thank-you note to a colleague who covered my shift on Friday.",
}
STEERED_PROMPT = "Why does the sea look blue?"
_LEVELS = [0.5, 0.9]
_GRID = [(2 * step + 1) / 100 for step in range(50)]  # the mean of these quantiles is that of the distribution
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
    url: str | None = None  # a service that runs already; None starts one


@dataclass
class Demo:
    """The parts, in order; later ones use what ``setup`` started and, where it is there, what ``lengths`` sampled.

    The value model is asked over HTTP only; the generator runs in this process.
    """

    options: DemoOptions
    _sampled: list[tuple[list[int], Generation]] = field(default_factory=list)
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _backend: RemoteBackend | None = None
    _generator: LocalGenerator | None = None

    def setup(self) -> dict[str, Any]:
        """Fetch the backbone where it is not there yet, start the service, and load the generator."""
        from lenvm.backbones import DEFAULT_BACKBONE, resolve_backbone

        need("serve")
        if self.options.model == DEFAULT_BACKBONE:
            resolve_backbone(DEFAULT_BACKBONE)  # with its progress bar, before anything else can fail
        url = self.options.url
        if url is None:
            url = self._held.enter_context(running_service(self.options.model, device=self.options.device))
        self._backend = backend = RemoteBackend(url)
        self._held.callback(backend.close)
        self._generator, warnings = load_generator(backend.facts, self.options.backbone, device=self.options.device)
        return {
            "url": url,
            "model": backend.facts.name,
            "backbone": self._generator.name,
            "gamma": backend.facts.gamma,
            "temperature": backend.facts.temperature,
            "warnings": warnings,
        }

    def close(self) -> None:
        """Stop the service that ``setup`` started."""
        self._held.close()

    @property
    def _started(self) -> tuple[RemoteBackend, LocalGenerator]:
        assert self._backend is not None
        assert self._generator is not None
        return self._backend, self._generator

    def lengths(self) -> dict[str, Any]:
        """Predicted remaining length of three prompts beside sampled ones, everything as ``min(l, cap)``."""
        from lenvm.decoding import Request, SamplingParams

        backend, generator = self._started
        cap, samples = self.options.max_new_tokens, self.options.samples
        encoded = [backend.encode(text) for text in PROMPTS.values()]
        inputs = [PredictInput(token_ids=ids) for ids in encoded]
        predicted = list(backend.client.predict_length(inputs, quantiles=[*_LEVELS, *_GRID]))
        requests = [Request(ids, self.options.seed + sample) for ids in encoded for sample in range(samples)]
        facts = backend.facts
        params = SamplingParams(temperature=facts.temperature, top_p=facts.top_p, max_new_tokens=cap)
        answers = sample(generator, requests, params, label="Sampling answers")
        self._sampled = [(list(r.prompt_ids), answer) for r, answer in zip(requests, answers, strict=True)]
        rows = []
        for index, (kind, text) in enumerate(PROMPTS.items()):
            own = answers[index * samples : (index + 1) * samples]
            # A finished answer has l = L + 1; a cut one has l > cap.
            lengths = [len(answer.token_ids) + 1 if answer.finished else cap for answer in own]
            rows.append(
                {
                    "kind": kind,
                    "prompt": text,
                    "predicted": _capped_prediction(asdict(predicted[index]), cap),
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

        backend, generator = self._started
        found = [item for item in self._sampled if item[1].finished and len(item[1].token_ids) >= _EXPLAINED]
        if found:
            prompt, answer = min(found, key=lambda item: len(item[1].token_ids))
        elif self._sampled:
            prompt, answer = self._sampled[0]
        else:  # the part before this one failed
            prompt = backend.encode(PROMPTS["math"])
            params = SamplingParams(
                temperature=backend.facts.temperature, max_new_tokens=min(96, self.options.max_new_tokens)
            )
            (answer,) = sample(generator, [Request(prompt, self.options.seed)], params, label="Sampling an answer")
        asked = CompletionInput(token_ids=prompt, completion_ids=answer.token_ids, eos=answer.finished)
        (row,) = backend.client.score([asked]).scores
        if isinstance(row, RowError):
            raise row.to_exception()
        assert isinstance(row, TokenScores)
        texts = {tuple(backend.encode(text)): text for text in PROMPTS.values()}
        return {"prompt": texts.get(tuple(prompt), ""), "finished": answer.finished, **asdict(row)}

    def guided(self) -> dict[str, Any]:
        """One prompt under every objective by both methods, and unguided: one batch, one sampler."""
        from lenvm.decoding import DEFAULT_CANDIDATES, Request, SamplingParams

        backend, generator = self._started
        cap = self.options.max_new_tokens
        objectives = _objectives(cap)
        ids = backend.encode(STEERED_PROMPT)
        params = SamplingParams(temperature=backend.facts.temperature, top_k=DEFAULT_CANDIDATES, max_new_tokens=cap)
        guide = backend.guide(objectives)
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


def _capped_prediction(found: dict[str, Any], cap: int) -> dict[str, Any]:
    """A prediction, every length restricted to the cap: ``mean`` is ``E[min(l, cap)]``, over a grid of quantiles."""
    quantiles = {level: min(length, cap) for level, length in (found["quantiles"] or {}).items()}
    grid = [quantiles[level_name(level)] for level in _GRID if quantiles]
    return {
        "value": found["value"],
        "horizon": min(found["horizon"], cap),
        "mean": sum(grid) / len(grid) if grid else None,
        "quantiles": {name: quantiles[name] for name in map(level_name, _LEVELS) if quantiles},
    }


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
