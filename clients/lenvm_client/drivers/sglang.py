"""Guided decoding inside SGLang, for trusted networks only: the server must run with
``--enable-custom-logit-processor``, which lets every client of it run code there.

Start it with ``--disable-overlap-schedule`` too: else a step is sampled before the token of the last one is known, and
rows go on unguided (the log says so). With several tensor-parallel ranks, each of which asks the service, set
``SYNC_TOKEN_IDS_ACROSS_TP=1``, lest one of them be late alone. ``lenvm`` must be installed beside it; where the service
is: ``LENVM_CLIENT_URL`` and others, see ``decoder_from_environment``. A request carries ``request_fields(objective)``::

    body = {"text": prompt, "sampling_params": {"temperature": 0.7}}
    fields = request_fields({"kind": "equal_to", "target": 200})
    body["sampling_params"] |= fields.pop("sampling_params")
    requests.post(f"{url}/generate", json=body | fields)

All guided rows of a step go in one call with a deadline; late or failed steps go on unguided. Returned log-probs are
those of the token that was drawn. Checked against SGLang 0.5.23.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from sglang.srt.runtime_context import get_schedule
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from lenvm_client.drivers._host import KEY, GuidedRequest, decoder_from_environment, parse_objective
from lenvm_client.drivers._logits import choose_or_pass, keep
from lenvm_client.errors import InvalidRequestError

__all__ = ["LenVMLogitProcessor", "request_fields"]

# SGLang makes a new processor for every new batch: what is to last lives in the process.
_decoder = cache(decoder_from_environment)
_log = logging.getLogger(__name__)


def request_fields(objective: Mapping[str, Any], *, top_k: int = 16) -> dict[str, Any]:
    """What a guided request to ``/generate`` has beside its text: the processor's name and its parameters."""
    params = {KEY: dict(objective), f"{KEY}_top_k": top_k}
    parse_objective(params)
    return {"custom_logit_processor": LenVMLogitProcessor.to_str(), "sampling_params": {"custom_params": params}}


class LenVMLogitProcessor(CustomLogitProcessor):  # type: ignore[misc]  # SGLang is not installed here
    """Reads ``lenvm`` and ``lenvm_top_k`` among a request's ``custom_params``."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any] | None] | None = None
    ) -> torch.Tensor:
        """``[R, V]``, in place; ``custom_param_list`` has one entry a row."""
        guided = [(at, params) for at, params in enumerate(custom_param_list or ()) if params and "__req__" in params]
        if not guided or not _in_order():
            return logits
        if len({id(params) for _, params in guided}) < len(guided):  # a row for each token of a draft
            _refuse("lenvm guides nothing: start SGLang without speculative decoding")
            return logits
        rows = []
        for at, params in guided:
            req = params["__req__"]
            request = _request(req, params)
            if request is not None:
                prefix = [*req.origin_input_ids, *req.output_ids]
                rows.append((at, request, prefix, len(req.output_ids)))
        return keep(logits, choose_or_pass(_decoder(), logits, rows))


def _request(req: Any, params: dict[str, Any]) -> GuidedRequest | None:
    if "__lenvm__" not in params:  # once a request: its parameters are its own
        params["__lenvm__"] = _read(req, params)
    request: GuidedRequest | None = params["__lenvm__"]
    return request


def _read(req: Any, params: Mapping[str, Any]) -> GuidedRequest | None:
    try:
        objective, top_k = parse_objective(params)
    except InvalidRequestError as error:  # raised here, it would end the server
        _log.warning("a request goes on without guidance: %s", error)
        return None
    if objective is None:
        return None
    sampling, tokenizer = req.sampling_params, req.tokenizer
    ends = {*(req.eos_token_ids or ()), *(sampling.stop_token_ids or ())}
    if tokenizer is not None:
        ends |= {tokenizer.eos_token_id, *(getattr(tokenizer, "additional_stop_token_ids", None) or ())} - {None}
    greedy = sampling.top_k == 1  # what SGLang makes of temperature 0
    return GuidedRequest(
        objective=objective,
        end_ids=() if sampling.ignore_eos else tuple(sorted(ends)),
        temperature=0.0 if greedy else sampling.temperature,
        top_k=top_k if greedy or sampling.top_k < 1 else min(top_k, sampling.top_k),
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=_seed(req.rid) if sampling.sampling_seed is None else sampling.sampling_seed,
    ).seeded()


def _seed(rid: str) -> int:
    """The same in every rank."""
    return int.from_bytes(hashlib.blake2b(rid.encode(), digest_size=8).digest(), "big")


def _in_order() -> bool:
    in_order = bool(get_schedule().disable_overlap_schedule)
    if not in_order:
        _refuse("lenvm guides nothing: start SGLang with --disable-overlap-schedule")
    return in_order


@cache
def _refuse(message: str) -> None:
    """Said once."""
    _log.error(message)
