"""Guided decoding inside vLLM: ``vllm serve MODEL --logits-processors lenvm_client.drivers.vllm:LenVMLogitsProcessor``.

vLLM has two interfaces that exclude each other: that of Model Runner V2 and that of V1. ``LenVMLogitsProcessor`` is the
class of the one that this vLLM uses by default (``VLLM_USE_V2_MODEL_RUNNER=0`` asks for V1); where vLLM falls back to
V1 by itself, name ``LenVMLogitsProcessorV1``. Checked against vLLM 0.33.0.

A request is guided by ``SamplingParams(extra_args={"lenvm": {"kind": "equal_to", "target": 200}})``, over HTTP by
``"vllm_xargs": {"lenvm": "{\\"kind\\": \\"equal_to\\", \\"target\\": 200}"}``; ``lenvm_top_k`` (16) beside it. Its own
temperature, top-k, top-p, min-p and seed hold, stop ids too. Where the service is: ``LENVM_CLIENT_URL`` and others, see
``decoder_from_environment``. All guided rows of a step go in one call with a deadline; late or failed steps go on
unguided. Returned ``processed`` log-probs are those of the token that was drawn; ``raw`` ones are the backbone's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group

from lenvm_client.drivers._host import GuidedRequest, decoder_from_environment, parse_objective
from lenvm_client.drivers._logits import choose, choose_or_pass, keep
from lenvm_client.errors import InvalidRequestError
from lenvm_client.guided import GuidedDecoder

# One of the two may be gone, or not there yet.
try:
    from vllm.v1.sample.logits_processor import LogitsProcessor as _V1
    from vllm.v1.sample.logits_processor import MoveDirectionality
except ImportError:
    _V1 = None
try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as _V2
except ImportError:
    _V2 = None

__all__ = [
    "GuidedRequest",
    "LenVMLogitsProcessor",
    "LenVMLogitsProcessorV1",
    "LenVMLogitsProcessorV2",
    "request_logits_processor",
]

# One a process: the front end, which only checks arguments, opens none.
_decoder = cache(decoder_from_environment)


def _request(params: Any) -> GuidedRequest | None:
    """What ``SamplingParams`` ask of us. Raises ValueError, which vLLM answers as a bad request."""
    try:
        objective, top_k = parse_objective(params.extra_args)
    except InvalidRequestError as error:
        raise ValueError(error.message) from error
    if objective is None:
        return None
    ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else params.all_stop_token_ids)}
    return GuidedRequest(
        objective=objective,
        end_ids=tuple(sorted(ends)),
        temperature=params.temperature,
        top_k=min(top_k, params.top_k) if params.top_k > 0 else top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed,
    ).seeded()


def _guided(logits: torch.Tensor, rows: list[tuple[int, GuidedRequest, list[int], int]]) -> torch.Tensor:
    """Every tensor-parallel rank samples for itself and must take the same token: one asks the service and tells."""
    if not rows:
        return logits
    group = get_tp_group()
    chosen = choose_or_pass(_decoder(), logits, rows) if group.rank_in_group == 0 else None
    return keep(logits, group.broadcast_object(chosen, src=0))


class LenVMLogitsProcessorV1(_V1 or object):  # type: ignore[misc]  # vLLM is not installed here
    """For V1. Penalties come after us there and would find one token left: they are refused beside an objective."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, tuple[GuidedRequest, list[int], list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError for an objective that makes no sense."""
        penalties = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
        used = [name for name, neutral in penalties.items() if getattr(sampling_params, name) != neutral]
        if _request(sampling_params) is not None and used:
            raise ValueError(f"{', '.join(used)} cannot be used beside lenvm with vLLM's V1 runner")

    def is_argmax_invariant(self) -> bool:
        """False: greedy decoding is guided too."""
        return False

    def needs_output_token_ids(self) -> bool:
        """True: guidance depends on the answer so far."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows: removed, added, moved, in this order. Of an added row we keep its list of output ids, which
        vLLM goes on appending to."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._requests.pop(index, None)
        for index, params, prompt_ids, output_ids in batch_update.added:
            self._requests.pop(index, None)
            request = _request(params)
            if request is not None and prompt_ids:
                self._requests[index] = (request, prompt_ids, output_ids)
        for start, end, direction in batch_update.moved:
            here, there = self._requests.pop(start, None), self._requests.pop(end, None)
            if here is not None:
                self._requests[end] = here
            if there is not None and direction == MoveDirectionality.SWAP:
                self._requests[start] = there

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """``[R, V]``, in place."""
        rows = [
            (at, request, [*prompt_ids, *output_ids], len(output_ids))
            for at, (request, prompt_ids, output_ids) in sorted(self._requests.items())
            if at < len(logits)
        ]
        return _guided(logits, rows)


class LenVMLogitsProcessorV2(_V2 or object):  # type: ignore[misc]  # vLLM is not installed here
    """For Model Runner V2. The tokens of a request lie on the device: each step fetches its newest, the first all."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("lenvm cannot guide speculative decoding: a draft's rows come before its tokens are known")
        self._states = req_states
        self._requests: dict[int, tuple[GuidedRequest, list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError for an objective that makes no sense."""
        _request(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A request enters a slot, which may have been another's. True where it is guided."""
        self._requests.pop(req_idx, None)
        request = _request(sampling_params)
        if request is not None:
            self._requests[req_idx] = (request, [])
        return request is not None

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """``[R, V]`` float32, in place; row r belongs to slot ``ctx.expanded_idx_mapping[r]``."""
        if not self._requests:
            return logits
        slots = ctx.idx_mapping_np.tolist()
        lengths, newest = torch.stack([ctx.pos + 1, ctx.input_ids.to(ctx.pos.dtype)]).tolist()
        rows = []
        for at, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            # A prompt that is prefilled in pieces draws nothing before its last one.
            if slot not in self._requests or length < self._states.prefill_len.np[slot]:
                continue
            request, known = self._requests[slot]
            if len(known) == length - 1 and known:
                known.append(newest[at])
            elif len(known) != length:
                known[:] = self._states.all_token_ids.gpu[slot, :length].tolist()
            rows.append((at, request, known, length - int(self._states.prompt_len.np[slot])))
        return _guided(logits, rows)


def request_logits_processor(
    decoder: GuidedDecoder, request: GuidedRequest
) -> Callable[[list[int], list[int], torch.Tensor], torch.Tensor]:
    """vLLM's per-request form, for an ``AdapterLogitsProcessor`` of your own: (prompt ids, output ids, logits [V]) ->
    logits. One call of the service for each row: ``LenVMLogitsProcessor`` takes one for all."""
    request = request.seeded()

    def process(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        chosen = choose(decoder, logits[None], [(0, request, [*prompt_ids, *output_ids], len(output_ids))])
        return keep(logits[None], chosen)[0]

    return process


_V1_ASKED = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "").strip().lower() in ("0", "false")
LenVMLogitsProcessor = LenVMLogitsProcessorV1 if _V2 is None or _V1_ASKED else LenVMLogitsProcessorV2
