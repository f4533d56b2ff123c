"""Guided decoding with ``generate`` of transformers: sampling, greedy, beams, batches with left padding."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from lenvm_client._core import OnError
from lenvm_client._steps import GuidanceReport, GuidedRow, RowReport, WeightedRow, uniform
from lenvm_client._types import CandidateScorer
from lenvm_client.drivers._logits import top
from lenvm_client.drivers._resampled import drawn, repeated
from lenvm_client.errors import InvalidRequestError
from lenvm_client.guided import GuidedDecoder, TextAdapter

__all__ = ["LenVMLogitsProcessor", "generate"]

# transformers applies these after us: each would cut or reweigh what was drawn from q, so they are switched off.
_WARPERS = {"min_p": None, "top_h": None, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


class _Stops(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Stop strings and the caller's own criteria as one, which remembers the rows that they ended and at which length:
    the tokens do not show it, because what transformers puts behind them may be an EOS."""

    def __init__(self, criteria: Iterable[Any]) -> None:
        self.criteria = StoppingCriteriaList(criteria)
        self.ended: dict[int, int] = {}  # row -> its length, padding included

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done: torch.Tensor = self.criteria(input_ids, scores, **kwargs)
        for at in done.nonzero()[:, 0].tolist():
            self.ended.setdefault(at, input_ids.shape[1])
        return done


@dataclass(slots=True)
class _Known:
    """A row so far, without padding; ``end``: where it ended, counted with padding; ``after``: its last answer."""

    ids: list[int] = field(default_factory=list)
    end: int | None = None
    after: WeightedRow | None = None


class LenVMLogitsProcessor(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    """Adds log-weights to the ``top_k`` likeliest tokens and every EOS and stop id; all other tokens get -inf.

    Scores come in raw (transformers puts custom processors before its temperature) and leave as
    ``temperature * log q``, so that sampling at that temperature, with every later warper switched off, follows the
    guided law q exactly. One instance serves one call of ``generate``; the function of that name sets all of this up.

    Args:
        decoder: holds the scorer, the EOS and stop ids, and the report.
        objectives: wire form, one for each prompt; None is unguided. Row i of a step belongs to prompt
            ``i // (rows / prompts)``, as beams and ``num_return_sequences`` are laid out.
        temperature: that of ``generate``; 1 for greedy decoding.
        attention_mask: the prompts' [B, T]; its leading zeros are padding. Without it: leading ``pad_token_id``,
            unless that ends an answer (then none, as transformers has it).
        pad_token_id: what ``generate`` puts after a finished row.
        padding_ends: rows may end without an EOS or stop id (stop strings, other criteria), which only the padding that
            follows shows. The pad id must end no answer then, and is no candidate. (``generate`` does without, but for
            beams: it remembers which rows ended.)
        seeds: one for each row of a step. The processor then draws itself, so that a row's tokens do not depend on
            the batch it shares.
        rows_keep_places: no beams: a row only grows from one step to the next, so that its new tokens alone are read.
    """

    def __init__(
        self,
        decoder: GuidedDecoder,
        objectives: Sequence[Mapping[str, Any] | None],
        *,
        temperature: float = 1.0,
        top_k: int = 16,
        attention_mask: torch.Tensor | None = None,
        pad_token_id: int | None = None,
        padding_ends: bool = False,
        seeds: Sequence[int] | None = None,
        rows_keep_places: bool = False,
    ) -> None:
        if not temperature > 0 or top_k < 1:
            raise InvalidRequestError(f"temperature {temperature} must be above 0 and top_k {top_k} at least 1")
        if padding_ends and (pad_token_id is None or pad_token_id in decoder.end_ids):
            message = "padding that ends rows needs a pad_token_id that ends no answer"
            raise InvalidRequestError(message, param="pad_token_id")
        self.decoder = decoder
        self.objectives = list(objectives)
        self.temperature = temperature
        self.top_k = top_k
        # As transformers has it, an id that ends answers marks no padding in a prompt.
        self._pad = None if pad_token_id in decoder.end_ids else pad_token_id
        self._ends = {*decoder.end_ids, *([self._pad] if padding_ends else [])}
        self._stops = _Stops(())
        self.seeds = seeds
        self._padding = None if attention_mask is None else _left_padding(attention_mask)
        self._width: int | None = None  # of the prompts, padding included
        self._keeps = rows_keep_places
        self._known: list[_Known] = []
        self._seen = 0  # tokens of each of these, padding included

    @property
    def supports_continuous_batching(self) -> bool:
        """Read by transformers' continuous batching alone: raises InvalidRequestError. It packs the rows of several
        requests into one, so that their prefixes cannot be told."""
        raise InvalidRequestError("continuous batching cannot be guided: use generate", param="logits_processor")

    def on_device(self, vocabulary: int, room: int) -> Any | None:
        """A processor that does the same without a word from the host, of a scorer that has one (``LocalScorer`` on a
        GPU); None: this one must do it. ``rows`` has seen the prompts; answers have up to ``room`` tokens."""
        make = getattr(self.decoder.scorer, "device_processor", None)
        if make is None or self.top_k >= vocabulary:
            return None
        return make(
            self.objectives,
            [known.ids for known in self._known],
            end_ids=self.decoder.end_ids,
            temperature=self.temperature,
            top_k=self.top_k,
            room=room,
            vocabulary=vocabulary,
            seeds=self.seeds,
        )

    def rows(self, input_ids: torch.Tensor) -> list[GuidedRow]:
        """``[B * n, T]`` as rows without padding, each up to its end."""
        self._width = self._width or input_ids.shape[1]
        expansion = self._expansion(input_ids)
        if self._padding is None:
            given = input_ids[::expansion] != (-1 if self._pad is None else self._pad)
            self._padding = _left_padding(torch.cummax(given.int(), 1).values)
        if not self._keeps or len(self._known) != len(input_ids) or input_ids.shape[1] < self._seen:
            self._known, self._seen = [_Known() for _ in range(len(input_ids))], 0
        for at, (known, ids) in enumerate(zip(self._known, input_ids[:, self._seen :].tolist(), strict=True)):
            if known.end is None:
                self._grow(known, ids, self._padding[at // expansion], self._stops.ended.get(at))
        self._seen = total = input_ids.shape[1]
        rows = []
        for at, known in enumerate(self._known):
            generated = (total if known.end is None else known.end) - self._width
            finished, objective = known.end is not None, self.objectives[at // expansion]
            rows.append(
                GuidedRow(
                    prefix=known.ids, generated=generated, objective=objective, finished=finished, after=known.after
                )
            )
        return rows

    def _grow(self, known: _Known, ids: list[int], padding: int, stop: int | None) -> None:
        """Take in a row's tokens from ``_seen`` on, up to its end. ``stop``: where a criterion ended it."""
        assert self._width is not None
        for place, token in enumerate(ids, self._seen):
            if place == stop:
                break
            if place >= self._width and token in self._ends:
                known.end = place
                # Its EOS belongs to the answer; padding after another end does not.
                if token in self.decoder.end_ids:
                    known.ids.append(token)
                return
            if place >= padding:
                known.ids.append(token)
        known.end = stop

    def _expansion(self, input_ids: torch.Tensor) -> int:
        expansion, rest = divmod(len(input_ids), len(self.objectives) or len(input_ids) + 1)
        if rest or not expansion:
            message = f"{len(input_ids)} rows for {len(self.objectives)} objectives: give one for each prompt"
            raise InvalidRequestError(message, param="objectives")
        return expansion

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``[B, T]`` ids and ``[B, V]`` raw scores -> ``[B, V]`` scores."""
        logits = scores.float() / self.temperature
        if self._pad in self._ends:
            logits[:, self._pad] = -torch.inf
        ends = self.decoder.end_ids
        tops = top(torch.log_softmax(logits, dim=-1), self.top_k, ends)
        rows = [
            replace(row, candidates=ids, logprobs=logs, eos_logprobs=dict(zip(ends, end_logs, strict=True)))
            for row, (ids, logs, end_logs) in zip(self.rows(input_ids), tops, strict=True)
        ]
        places: list[tuple[int, int, float]] = []
        # Before the call: the service may work on the same GPU, which two processes share by turns.
        out, draws = torch.full_like(scores, -torch.inf), list[float]()

        def meanwhile() -> None:
            if self.seeds is not None:
                draws.extend(uniform(seed, row.generated) for seed, row in zip(self.seeds, rows, strict=True))

        for at, weighted in enumerate(self.decoder.step(rows, meanwhile)):
            if self._keeps:
                self._known[at].after = weighted
            if not weighted.ids:
                out[at] = scores[at]  # finished: transformers puts padding there
            elif self.seeds is not None:
                places.append((at, weighted.draw(draws[at]), 0.0))
            else:
                log_q = zip(weighted.ids, weighted.log_q(), strict=True)
                places += [(at, token, self.temperature * value) for token, value in log_q]
        if places:
            at_rows, tokens, values = zip(*places, strict=True)
            out[list(at_rows), list(tokens)] = torch.tensor(values, dtype=out.dtype, device=out.device)
        return out


def generate(
    model: Any,
    scorer: CandidateScorer,
    inputs: Any,
    *,
    objectives: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None,
    temperature: float = 0.7,
    top_k: int = 16,
    do_sample: bool | None = None,
    stop_token_ids: Iterable[int] = (),
    seeds: Sequence[int] | None = None,
    resample: int = 1,
    on_error: OnError = "passthrough",
    text: TextAdapter | None = None,
    **generate_kwargs: Any,
) -> tuple[Any, GuidanceReport]:
    """``model.generate`` with guidance: what it returns, and the report (a row for each sequence).

    Args:
        inputs: what a tokenizer gives (``input_ids``, ``attention_mask``; padded on the left), or ids ``[B, T]``.
        objectives: wire form; one for all prompts, or one for each (None: unguided, with the same sampler).
        temperature: 0 is greedy. top_k: candidates a step, beside the EOS and stop ids. Nothing else truncates.
        do_sample: False for greedy decoding and beam search, at temperature 1; by default ``temperature > 0``.
        stop_token_ids: end an answer as the model's EOS ids do.
        seeds: one for each sequence: draws that do not depend on the batch.
        resample: above 1 so many answers are sampled to each prompt, of which one is returned, drawn by importance
            weight (see ``lenvm_client.resample``): nearer to the objective at no more text cost, for that many times
            the work. Sampling without beams; posterior objectives. ``seeds`` are then ``resample`` for each prompt.
        on_error, text: see ``GuidedDecoder``.
        generate_kwargs: the rest goes to ``model.generate``, e.g. ``max_new_tokens``, ``num_beams``.

    Raises LenVMClientError: see ``GuidedDecoder``; InvalidRequestError for arguments that do not fit each other.
    """
    if resample != 1:
        return _resampled(
            model, scorer, inputs, objectives, resample, seeds, temperature=temperature, top_k=top_k,
            do_sample=do_sample, stop_token_ids=list(stop_token_ids), on_error=on_error, text=text, **generate_kwargs,
        )  # fmt: skip
    if getattr(model.config, "is_encoder_decoder", False):
        raise InvalidRequestError("the model must be a decoder: prompt and answer are one sequence", param="model")
    refused = sorted({*_WARPERS, "input_ids", "attention_mask", "watermarking_config"} & generate_kwargs.keys())
    if refused:
        message = f"{', '.join(refused)} cannot be given here: candidates are cut by top_k alone, ids go into inputs"
        raise InvalidRequestError(message, param=refused[0])
    given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    ids = _checked_ids(given.get("input_ids"))
    # Beside a config object transformers takes no settings, and what is None in one it fills from the model's own:
    # so its fields go in one by one, below what was given directly.
    generate_kwargs = {**_fields(generate_kwargs.pop("generation_config", None)), **generate_kwargs}

    def setting(name: str) -> Any:
        return generate_kwargs[name] if name in generate_kwargs else getattr(model.generation_config, name, None)

    if setting("watermarking_config") is not None:
        message = "a watermark reweighs what was drawn from the guided law: leave watermarking_config out"
        raise InvalidRequestError(message, param="watermarking_config")
    sampling = temperature > 0 if do_sample is None else do_sample
    beams, count = setting("num_beams") or 1, len(ids) * (setting("num_return_sequences") or 1)
    if seeds is not None and (not sampling or beams > 1 or len(seeds) != count):
        raise InvalidRequestError("seeds go with sampling without beams, one for each sequence", param="seeds")
    each = [objectives] * len(ids) if objectives is None or isinstance(objectives, Mapping) else list(objectives)
    if len(each) != len(ids):
        raise InvalidRequestError(f"{len(ids)} prompts need as many objectives, not {len(each)}", param="objectives")
    eos_ids = _as_ids(setting("eos_token_id"))
    # Room for beams that ended: they are reported when the others have ended too.
    room = max(8192, 64 * count * beams)
    decoder = GuidedDecoder(
        scorer, eos_ids, _checked_stops(stop_token_ids, model), on_error=on_error, max_prefixes=room, text=text
    )
    decoder.start(sampled=sampling and beams == 1)
    pad, ending, others = setting("pad_token_id"), *_criteria(setting, generate_kwargs)
    # Beams change places, so that no row of theirs can be remembered: what follows their end must show it. transformers
    # puts an EOS there where it is given no pad id, or 0.
    if beams > 1 and ending and (not pad or pad in decoder.end_ids or not decoder.end_ids):
        message = "beams with stop strings or criteria need a pad_token_id above 0 that ends no answer, and an EOS id"
        raise InvalidRequestError(message, param="pad_token_id")
    processor = LenVMLogitsProcessor(
        decoder,
        each,
        temperature=temperature if sampling else 1.0,
        top_k=top_k,
        attention_mask=given.get("attention_mask"),
        pad_token_id=pad,
        padding_ends=beams > 1 and bool(ending),
        seeds=seeds,
        rows_keep_places=beams == 1,
    )
    processor.rows(ids)  # checks the shapes before anything is computed
    if ending:
        if beams == 1:
            processor._stops = _Stops(ending)
            ending = [processor._stops]
        generate_kwargs |= {"stop_strings": None, "stopping_criteria": StoppingCriteriaList([*others, *ending])}
    generate_kwargs["eos_token_id"] = list(decoder.end_ids) or None
    if sampling:
        generate_kwargs |= {"temperature": temperature, "top_k": 0, **_WARPERS}
    generate_kwargs["do_sample"] = sampling
    room = setting("max_new_tokens") or (setting("max_length") or 0) - ids.shape[1]
    ahead = setting("assistant_model") or setting("prompt_lookup_num_tokens")  # tokens that may be taken back
    device = None
    if beams == 1 and count == len(ids) and not ending and not ahead and text is None and room > 0:
        device = processor.on_device(model.config.get_text_config().vocab_size, room)
    return _run(model, given, generate_kwargs, processor, device, sampled=sampling)


def _resampled(
    model: Any,
    scorer: CandidateScorer,
    inputs: Any,
    objectives: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None,
    of: int,
    seeds: Sequence[int] | None,
    **options: Any,
) -> tuple[Any, GuidanceReport]:
    if of < 1:
        raise InvalidRequestError(f"resample must be at least 1, not {of}", param="resample")
    settings = {**vars(model.generation_config), **_fields(options.get("generation_config")), **options}
    if (settings.get("num_beams") or 1) > 1 or (settings.get("num_return_sequences") or 1) > 1:
        message = "resample goes with sampling, one answer to a prompt: leave num_beams and num_return_sequences out"
        raise InvalidRequestError(message, param="resample")
    ids = _checked_ids(dict(inputs).get("input_ids") if isinstance(inputs, Mapping) else inputs)
    each = [objectives] * len(ids) if objectives is None or isinstance(objectives, Mapping) else list(objectives)
    if any((objective or {}).get("unit", "tokens") != "tokens" for objective in each):
        raise InvalidRequestError(
            "answers are drawn by their tokens: leave unit out, or use lenvm_client.resample", param="unit"
        )
    wanted = [objective for objective in each for _ in range(of)]
    output, report = generate(model, scorer, repeated(inputs, of), objectives=wanted, seeds=seeds, **options)
    ends = {*_as_ids(settings.get("eos_token_id")), *options["stop_token_ids"]}
    return drawn(output, report, width=ids.shape[1], ends=ends, objectives=each, of=of, seeds=seeds)


def _as_ids(eos: int | Sequence[int] | None) -> list[int]:
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _run(
    model: Any,
    given: Mapping[str, Any],
    generate_kwargs: dict[str, Any],
    processor: LenVMLogitsProcessor,
    device: Any | None,
    *,
    sampled: bool,
) -> tuple[Any, GuidanceReport]:
    """``device``: does the processor's work where there is one."""
    processors = [*(generate_kwargs.pop("logits_processor", None) or ()), device or processor]
    try:
        output = model.generate(**given, **generate_kwargs, logits_processor=LogitsProcessorList(processors))
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if device is None:
            return output, processor.decoder.report(processor.rows(sequences))
        return output, _device_report(device.finish(sequences[:, -1]), processor.objectives, sampled=sampled)
    finally:
        if device is not None:
            device.finish()


def _device_report(
    rows: Sequence[Any], objectives: Sequence[Mapping[str, Any] | None], *, sampled: bool
) -> GuidanceReport:
    """From what ``DeviceProcessor`` kept."""
    reports = [
        RowReport(
            steps=row.steps,
            guided_steps=row.steps if objective is not None else 0,
            forced_stop=row.forced_stop,
            text_cost=row.text_cost if sampled else math.nan,
        )
        for row, objective in zip(rows, objectives, strict=True)
    ]
    return GuidanceReport(tuple(reports), calls=max((row.steps for row in rows), default=0))


def _checked_ids(ids: Any) -> torch.Tensor:
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        message = 'inputs must hold ids as a tensor [B, T], e.g. tokenizer(texts, return_tensors="pt", padding=True)'
        raise InvalidRequestError(message, param="inputs")
    return ids


def _checked_stops(stop_token_ids: Iterable[int], model: Any) -> list[int]:
    """Ids outside the vocabulary have no log-prob."""
    size = model.config.get_text_config().vocab_size
    try:
        stops = [operator.index(token) for token in stop_token_ids]
    except TypeError:
        stops = [-1]
    if not all(0 <= token < size for token in stops):
        message = f"stop_token_ids must be ids of the vocabulary, 0 to {size - 1}"
        raise InvalidRequestError(message, param="stop_token_ids")
    return stops


def _fields(config: Any) -> dict[str, Any]:
    """What a ``GenerationConfig`` says."""
    if config is None:
        return {}
    names = vars(GenerationConfig()).keys() - {"transformers_version"}
    given = {name: getattr(config, name, None) for name in names if not name.startswith("_")}
    return {name: value for name, value in given.items() if value is not None}


def _criteria(setting: Any, generate_kwargs: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """The criteria that may end one row before the others, stop strings among them; and the rest, which end all rows at
    once and, as transformers has it, take the place of its own of their type."""
    given = list(generate_kwargs.get("stopping_criteria") or ())
    others = [each for each in given if isinstance(each, MaxLengthCriteria | MaxTimeCriteria)]
    ending = [each for each in given if each not in others]
    if setting("stop_strings"):
        tokenizer = generate_kwargs.get("tokenizer")
        if tokenizer is None:
            raise InvalidRequestError("stop_strings need the model's tokenizer: give tokenizer", param="tokenizer")
        ending.append(StopStringCriteria(tokenizer, setting("stop_strings")))
    return ending, others


def _left_padding(mask: torch.Tensor) -> list[int]:
    """Leading zeros of each row of ``[B, T]``."""
    if bool((mask.int().diff(dim=1) < 0).any()) or not bool(mask[:, -1].all()):
        raise InvalidRequestError("prompts must be padded on the left, and none may be empty", param="attention_mask")
    return [int(zeros) for zeros in (mask == 0).sum(dim=1).tolist()]
