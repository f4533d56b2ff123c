"""The hash chain over a prefix: a key for each full block of tokens, and a session handle for the whole of it.

A key says everything that the block's numbers depend on: the model, the form of its blocks, the tenant, and every
token from the first one on. So equal keys mean equal states, wherever they were computed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

__all__ = ["Chain", "ChainBlock", "ChainRoot"]

_VERSION = 1  # of keys and values: replicas of another version see nothing of ours
_HANDLE_BYTES = 16
_PREFIX = "s-"


class ChainBlock(NamedTuple):
    """A full block of a prefix. ``tokens``: its ids, little-endian uint32."""

    key: bytes
    tokens: bytes


@dataclass(frozen=True)
class ChainRoot:
    """The empty prefix of one tenant under one model.

    Args:
        model_sha: digest of everything that an answer depends on.
        layout: how the engine's blocks lie in bytes; engines of another layout share nothing.
        block_tokens: tokens a block.
        tenant: whose prefixes these are.
        handle_secret: key of the session handles, 16 to 64 bytes: nobody can make a handle for a prefix that they have
            not sent.
        secret: key of the block keys, so that nobody who reads Redis can test whether a prompt was sent; empty where
            replicas share none.
    """

    model_sha: str
    layout: str
    block_tokens: int
    tenant: str
    handle_secret: bytes = field(repr=False)
    secret: bytes = field(default=b"", repr=False)
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = [_VERSION, self.model_sha, self.layout, self.block_tokens, self.tenant]
        digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=32, key=self.secret).digest()
        object.__setattr__(self, "digest", digest)

    def empty(self) -> Chain:
        """The chain of no tokens."""
        return Chain(self, (), b"")

    def extend(self, token_ids: Sequence[int]) -> Chain:
        """The chain of a whole prefix; ids are in [0, 2^32)."""
        return self.empty().extend(token_ids)


class Chain:
    """A prefix as its full blocks and the rest; ``extend`` costs only the tokens that it adds."""

    __slots__ = ("_handle", "blocks", "root", "tail")

    def __init__(self, root: ChainRoot, blocks: tuple[ChainBlock, ...], tail: bytes) -> None:
        self.root, self.blocks, self.tail = root, blocks, tail
        self._handle: str | None = None

    def extend(self, token_ids: Sequence[int]) -> Chain:
        """The chain of this prefix and ``token_ids`` after it."""
        if not len(token_ids):
            return self
        size = 4 * self.root.block_tokens
        # A decoding step adds one token: NumPy would take ten times as long over it.
        added_bytes = struct.pack("<I", *token_ids) if len(token_ids) == 1 else np.asarray(token_ids, "<u4").tobytes()
        rest = self.tail + added_bytes
        whole = len(rest) - len(rest) % size
        parent = self.blocks[-1].key if self.blocks else self.root.digest
        added = []
        for start in range(0, whole, size):
            tokens = rest[start : start + size]
            parent = hashlib.sha256(parent + tokens).digest()
            added.append(ChainBlock(parent, tokens))
        return Chain(self.root, (*self.blocks, *added) if added else self.blocks, rest[whole:])

    @property
    def handle(self) -> str:
        """The session handle of this prefix, however its tokens arrived."""
        if self._handle is None:
            parent = self.blocks[-1].key if self.blocks else self.root.digest
            keyed = hashlib.blake2b(
                parent + self.tail, digest_size=_HANDLE_BYTES, key=self.root.handle_secret, person=b"lenvm-session"
            )
            self._handle = _PREFIX + keyed.hexdigest()
        return self._handle

    @property
    def length(self) -> int:
        """Tokens of the prefix."""
        return len(self.blocks) * self.root.block_tokens + len(self.tail) // 4

    @property
    def packed(self) -> bytes:
        """All token ids, little-endian uint32."""
        return b"".join(block.tokens for block in self.blocks) + self.tail

    @property
    def usable(self) -> int:
        """Full blocks that a prefix may begin with so that at least one token is left: a state's value is computed
        with its last token."""
        return max(0, self.length - 1) // self.root.block_tokens
