"""From a batch of torch logits to guided rows and back: what the drivers over torch share."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from lenvm_client.drivers._host import GuidedRequest
from lenvm_client.guided import GuidedDecoder

__all__ = ["choose", "choose_or_pass", "keep", "top"]

_log = logging.getLogger(__name__)


def top(logprobs: torch.Tensor, top_k: int, end_ids: Sequence[int]) -> list[tuple[list[int], list[float], list[float]]]:
    """``[R, V]`` natural logs -> of each row the ``top_k`` likeliest ids, their logs, and those of ``end_ids``; one
    transfer from the device."""
    best = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1)
    ends = logprobs[:, list(end_ids)]
    values = torch.cat([best.values, ends], dim=-1).tolist()
    return [(ids, row[: len(ids)], row[len(ids) :]) for ids, row in zip(best.indices.tolist(), values, strict=True)]


def choose(
    decoder: GuidedDecoder,
    logits: torch.Tensor,
    requests: Sequence[tuple[int, GuidedRequest, Sequence[int], int]],
) -> list[tuple[int, int]]:
    """Draw the next token of some rows of ``logits`` [R, V]: (row, token) of each; one call of the service for all.

    ``requests``: (row, request, prefix, generated). A row whose logits make no law (NaN) has no token.
    """
    if not requests:
        return []
    places = torch.tensor([at for at, *_ in requests], device=logits.device)
    heat = [request.temperature or 1.0 for _, request, *_ in requests]
    scaled = logits[places].float() / torch.tensor(heat, device=logits.device)[:, None]
    ends = list(dict.fromkeys(token for _, request, *_ in requests for token in request.end_ids))
    at_end = {token: at for at, token in enumerate(ends)}
    tops = top(torch.log_softmax(scaled, dim=-1), max(request.top_k for _, request, *_ in requests), ends)
    asked, rows = [], []
    for (at, request, prefix, generated), (ids, logs, end_logs) in zip(requests, tops, strict=True):
        if logs[0] == logs[0]:  # no NaN
            asked.append((at, request, generated))
            own = [end_logs[at_end[token]] for token in request.end_ids]
            rows.append(request.row(prefix, generated, ids, logs, own))
    return [
        (at, request.choose(weighted, generated))
        for (at, request, generated), weighted in zip(asked, decoder.step(rows), strict=True)
    ]


def choose_or_pass(
    decoder: GuidedDecoder,
    logits: torch.Tensor,
    requests: Sequence[tuple[int, GuidedRequest, Sequence[int], int]],
) -> list[tuple[int, int]]:
    """``choose`` inside an engine, which any error raised here would end, with all of its requests: it is logged, and
    the step left unguided."""
    try:
        return choose(decoder, logits, requests)
    except Exception:
        _log.exception("a step goes on without guidance")
        return []


def keep(logits: torch.Tensor, chosen: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Leave the chosen token alone in its row of ``logits`` [R, V]: 0, all others -inf; in place."""
    if chosen:
        rows, tokens = (torch.tensor(each, device=logits.device) for each in zip(*chosen, strict=True))
        logits[rows] = -torch.inf
        logits[rows, tokens] = 0.0
    return logits
