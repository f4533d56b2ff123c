"""Prefix states by what they are states of: a hash chain over blocks of tokens, the engine's own blocks (L1), and the
blocks that replicas share through Redis (L2)."""

from __future__ import annotations

from lenvm_service.prefix_cache.chain import Chain, ChainBlock, ChainRoot
from lenvm_service.prefix_cache.codec import Codec, CodecError, SessionRecord
from lenvm_service.prefix_cache.costs import TransferCosts
from lenvm_service.prefix_cache.local import BlockCache

__all__ = [
    "BlockCache",
    "Chain",
    "ChainBlock",
    "ChainRoot",
    "Codec",
    "CodecError",
    "SessionRecord",
    "TransferCosts",
]
