"""Guided decoding through NVIDIA Dynamo's logits processing (its TensorRT-LLM back end): one processor a request.

Dynamo hands over one row at a time, so that each row is a call of the service. Checked against ai-dynamo 1.6.1. An
error raised here would only be logged by Dynamo, and the step left unguided: use a decoder with ``on_error="log"``,
such as ``decoder_from_environment()``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lenvm_client.drivers._host import GuidedRequest, decoder_from_environment
from lenvm_client.drivers._logits import choose, keep
from lenvm_client.guided import GuidedDecoder

__all__ = ["GuidedRequest", "LenVMLogitsProcessor", "decoder_from_environment"]


class LenVMLogitsProcessor:
    """A ``dynamo.logits_processing.BaseLogitsProcessor`` (a protocol: nothing is inherited).

    Args:
        decoder: may be shared by the requests of a thread.
        request: objective, EOS and stop ids, and sampling parameters.
        prompt_tokens: length of the prompt; None: all that the first call is given.
    """

    def __init__(self, decoder: GuidedDecoder, request: GuidedRequest, *, prompt_tokens: int | None = None) -> None:
        self.decoder, self.request, self.prompt_tokens = decoder, request.seeded(), prompt_tokens

    def __call__(self, input_ids: Sequence[int], logits: torch.Tensor) -> None:
        """``input_ids``: the prompt and all that was generated; ``logits`` [V], in place."""
        prefix = [int(token) for token in input_ids]
        if self.prompt_tokens is None:
            self.prompt_tokens = len(prefix)
        row = logits[None]
        keep(row, choose(self.decoder, row, [(0, self.request, prefix, len(prefix) - self.prompt_tokens)]))
