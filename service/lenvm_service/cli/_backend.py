"""The value model behind the commands: in this process, or a service's (``--url``). The rows are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lenvm.errors import ContextTooLongError, InvalidRequestError
from lenvm_client import Client, RowError
from lenvm_service.answers import prediction_fields, token_score_fields
from lenvm_service.cli._session import encode_completion, encode_prompt, load_value_model

if TYPE_CHECKING:
    from lenvm.decoding import Guide
    from lenvm.guidance import Objective
    from lenvm.modeling import LengthValueModel
    from lenvm.scoring import OnnxModel, Scorer

__all__ = ["Backend", "LocalBackend", "ModelFacts", "RemoteBackend", "open_backend"]

_ROWS = 64  # prompts a call, so that many prompts neither fill the pool nor hide the progress

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ModelFacts:
    """What the commands need to know of a value model. ``backbone`` and ``temperature`` are its generator's; ``cap`` is
    None without a length distribution."""

    name: str
    gamma: float
    cap: int | None
    backbone: str
    temperature: float
    top_p: float
    tokenizer_sha256: str

    @classmethod
    def of(cls, model: LengthValueModel | OnnxModel) -> ModelFacts:
        """Those of a model in this process."""
        config = model.config
        bins = config.head.bins
        return cls(
            name=config.name,
            gamma=config.gamma,
            cap=bins.cap if bins else None,
            backbone=config.generator.backbone,
            temperature=config.generator.temperature,
            top_p=config.generator.top_p,
            tokenizer_sha256=config.backbone.tokenizer_sha256,
        )


class Backend(Protocol):
    """A value model that answers the commands' questions. Texts are token ids where ``token_ids`` is set."""

    facts: ModelFacts

    def encode(self, text: str, *, token_ids: bool = False) -> list[int]:
        """Ids of a prompt up to where the answer begins."""

    def predict(
        self,
        texts: Sequence[str],
        levels: Sequence[float],
        max_tokens: int | None,
        *,
        token_ids: bool = False,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """One prediction a prompt, in the wire's names. An error says which prompt it is about."""

    def score(self, prompt: str, completion: str, *, eos: bool, token_ids: bool = False) -> dict[str, Any]:
        """Values, horizons and length shifts of a completion, in the wire's names."""

    def guide(self, objectives: Sequence[Objective | None]) -> Guide:
        """Steers a generator's rows, one objective each."""

    def close(self) -> None:
        """Let go of connections."""


def open_backend(url: str | None, model: str, *, device: str) -> Backend:
    """The service's model where a URL is given, else one loaded here."""
    if url is not None:
        return RemoteBackend(url)
    return LocalBackend(model, device=device)


class LocalBackend:
    """A checkpoint in this process."""

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        self.model, self.scorer = load_value_model(model, device=device)
        self.facts = ModelFacts.of(self.model)
        from lenvm.calibration import Calibration  # after the check that its extra is there

        self.calibration = Calibration.from_dict(self.model.config.calibration)

    def encode(self, text: str, *, token_ids: bool = False) -> list[int]:
        """See :class:`Backend`."""
        return encode_prompt(self.model.tokenizer, text, token_ids=token_ids)

    def predict(
        self,
        texts: Sequence[str],
        levels: Sequence[float],
        max_tokens: int | None,
        *,
        token_ids: bool = False,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """See :class:`Backend`."""
        encoded = [self._checked_prompt(at, text, len(texts), token_ids) for at, text in enumerate(texts)]
        rows: list[dict[str, Any]] = []
        for start in range(0, len(encoded), _ROWS):
            if progress:
                progress(start, len(encoded))
            rows += self._predict(encoded[start : start + _ROWS], levels, max_tokens)
        return [{"index": index, **row} for index, row in enumerate(rows)]

    def _checked_prompt(self, at: int, text: str, count: int, token_ids: bool) -> list[int]:
        which = f"prompt {at + 1}: " if count > 1 else ""
        try:
            ids = self.encode(text, token_ids=token_ids)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{which}{error}", param=error.param) from None
        context = self.scorer.context
        if len(ids) > context:
            message = f"{which}it has {len(ids)} tokens but the model's context is {context}: shorten it"
            raise ContextTooLongError(message, param="prompt")
        return ids

    def _predict(
        self, encoded: Sequence[Sequence[int]], levels: Sequence[float], max_tokens: int | None
    ) -> list[dict[str, Any]]:
        import numpy as np

        from lenvm.scoring import ScoreRow

        scores = self.scorer.score([ScoreRow(append=ids) for ids in encoded])
        bins = [score.bin_logprobs[-1] for score in scores if score.bin_logprobs is not None]
        fields = prediction_fields(
            [score.logits[-1] for score in scores],
            np.stack(bins) if bins else None,
            bins=self.scorer.bins,
            gamma=self.scorer.gamma,
            quantiles=levels,
            max_tokens=[max_tokens] * len(scores),
            calibration=self.calibration,
        )
        for score in scores:
            score.state.close()
        return [{"prompt_tokens": len(ids), **row} for ids, row in zip(encoded, fields, strict=True)]

    def score(self, prompt: str, completion: str, *, eos: bool, token_ids: bool = False) -> dict[str, Any]:
        """See :class:`Backend`."""
        prompt_ids = self.encode(prompt, token_ids=token_ids)
        ids = encode_completion(self.model.tokenizer, completion, token_ids=token_ids)
        if not ids and not eos:
            raise InvalidRequestError("the completion is empty: pass some text, or --eos", param="completion")
        return score_ids(self.model, self.scorer, prompt_ids, ids, eos=eos)

    def guide(self, objectives: Sequence[Objective | None]) -> Guide:
        """See :class:`Backend`."""
        from lenvm.guides import ValueGuide

        return ValueGuide(self.scorer, objectives)

    def close(self) -> None:
        """Nothing is held."""


def score_ids(
    model: LengthValueModel | OnnxModel, scorer: Scorer, prompt_ids: list[int], completion_ids: list[int], *, eos: bool
) -> dict[str, Any]:
    """Token scores of content tokens; with ``eos`` the answer ends after them."""
    from lenvm.backbones import load_eos_ids

    score = scorer.token_values(prompt_ids, completion_ids)
    score.state.close()
    eos_id = load_eos_ids(model.backbone_dir)[0] if eos else None
    fields = token_score_fields(score.logits, completion_ids, model.tokenizer, gamma=scorer.gamma, eos_id=eos_id)
    return {"prompt_tokens": len(prompt_ids), **fields}


class RemoteBackend:
    """The default model of a running service.

    Raises LenVMClientError where the service cannot be reached or refuses.
    """

    def __init__(self, url: str, *, timeout_s: float = 300.0) -> None:
        # A CPU service may take its time over a large batch; whoever types a command waits.
        self.client = Client(url, timeout=timeout_s)
        info = self.client.info().models[0]
        self.facts = ModelFacts(
            name=info.name,
            gamma=float(info.gamma or 0.0),
            cap=info.cap,
            backbone=str(info.generator.get("backbone", info.backbone)),
            temperature=float(info.generator.get("temperature", 1.0)),
            top_p=float(info.generator.get("top_p", 1.0)),
            tokenizer_sha256=str(info.tokenizer_sha256),
        )

    def encode(self, text: str, *, token_ids: bool = False) -> list[int]:
        """See :class:`Backend`."""
        from lenvm_service.cli._options import parse_ids

        return parse_ids(text) if token_ids else list(self.client.tokenize(prompt=text).token_ids)

    def predict(
        self,
        texts: Sequence[str],
        levels: Sequence[float],
        max_tokens: int | None,
        *,
        token_ids: bool = False,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """See :class:`Backend`."""
        rows: list[dict[str, Any]] = []
        for start in range(0, len(texts), _ROWS):
            if progress:
                progress(start, len(texts))
            inputs = [self._input(text, token_ids) for text in texts[start : start + _ROWS]]
            answer = self.client.predict_length(inputs, quantiles=list(levels), max_tokens=max_tokens)
            for row in answer.predictions:
                index = start + row.index
                if isinstance(row, RowError):
                    which = f"prompt {index + 1}: " if len(texts) > 1 else ""
                    raise InvalidRequestError(f"{which}{row.message}", param=row.param)
                rows.append(asdict(row) | {"index": index})
        return rows

    def _input(self, text: str, token_ids: bool) -> dict[str, Any]:
        from lenvm_service.cli._options import parse_ids

        return {"token_ids": parse_ids(text)} if token_ids else {"prompt": text}

    def score(self, prompt: str, completion: str, *, eos: bool, token_ids: bool = False) -> dict[str, Any]:
        """See :class:`Backend`."""
        from lenvm_service.cli._options import parse_ids

        answer: dict[str, Any] = {"completion_ids": parse_ids(completion)} if token_ids else {"completion": completion}
        (row,) = self.client.score([{**self._input(prompt, token_ids), **answer, "eos": eos}]).scores
        if isinstance(row, RowError):
            raise InvalidRequestError(row.message, param=row.param)
        fields = asdict(row)
        del fields["index"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def guide(self, objectives: Sequence[Objective | None]) -> Guide:
        """See :class:`Backend`."""
        from lenvm_service.remote import RemoteGuide

        return RemoteGuide(self.client, objectives)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
