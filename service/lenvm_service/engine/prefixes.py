"""What is held of prefixes: sessions by handle, full blocks by key, one clock of last uses for both."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from lenvm.errors import InvalidRequestError, PoolExhaustedError
from lenvm.scoring import PrefixState, RowScore, Scorer
from lenvm_service.engine.jobs import Prefix, Shared
from lenvm_service.engine.sessions import SessionStore
from lenvm_service.errors import PrefixUnknownError
from lenvm_service.prefix_cache import BlockCache, Chain, ChainBlock, ChainRoot

__all__ = ["PrefixStore"]

_UNSHARED = 4096  # blocks; the oldest are forgotten


class PrefixStore:
    """Resolves prefixes to states of the scorer, and keeps what was scored. Owned by the engine's thread, but for
    :meth:`root`, :meth:`handle_of` and ``in``.

    Args:
        model_sha: digest of everything that an answer depends on.
        layout: how the engine's blocks lie, as text.
        block_tokens: tokens a block.
        secret: key of the session handles, 16 to 64 bytes.
        shared_secret: key of the blocks' keys, of all replicas; empty for none.
    """

    def __init__(
        self,
        *,
        model_sha: str,
        layout: str,
        block_tokens: int,
        secret: bytes,
        shared_secret: bytes = b"",
        sessions: SessionStore | None = None,
    ) -> None:
        self.sessions = SessionStore() if sessions is None else sessions
        self.blocks = BlockCache(self.sessions.tick)
        self.block_tokens = block_tokens
        # Blocks that the last run added: their keys alone, so that they can give way in the middle of a run.
        self.fresh: list[tuple[Chain, ChainBlock]] = []
        # Of earlier runs, not copied for the shared tier yet.
        self.unshared: deque[tuple[Chain, ChainBlock]] = deque(maxlen=_UNSHARED)
        self.answered: list[tuple[Chain, float, Any]] = []  # prefixes of the last run: logit, bin log-probs at the end
        self.stepped: list[tuple[Sequence[Chain], Sequence[PrefixState]]] = []  # and those of its steps
        self.shared_tokens = 0  # of the last run, from the shared tier
        self._roots: dict[str, ChainRoot] = {}
        self._parts = model_sha, layout, secret, shared_secret

    def root(self, tenant: str = "") -> ChainRoot:
        """The empty prefix of a tenant."""
        root = self._roots.get(tenant)
        if root is None:
            sha, layout, secret, shared_secret = self._parts
            made = ChainRoot(sha, layout, self.block_tokens, tenant, secret, shared_secret)
            root = self._roots.setdefault(tenant, made)  # another thread may have been faster, and its root counts
        return root

    def handle_of(self, token_ids: Sequence[int], tenant: str = "") -> str:
        """The session handle that a prefix has, whether or not it is held."""
        return self.root(tenant).extend(token_ids).handle

    def begin(self) -> None:
        """A run begins: nothing was added yet."""
        self.fresh, self.answered, self.stepped, self.shared_tokens = [], [], [], 0

    def clear(self) -> None:
        """Let go of everything that is held."""
        self.begin()
        self.unshared.clear()
        self.sessions.clear()
        self.blocks.clear()

    def resolve(self, prefix: Prefix) -> tuple[Chain, Any]:
        """The prefix's chain, and the state that its appended tokens go on from (None: from nothing, or from blocks).

        Raises PrefixUnknownError for a session that is not held, or is another tenant's; InvalidRequestError for an
        empty prefix.
        """
        ids, root = prefix.token_ids, self.root(prefix.tenant)
        if prefix.session is None:
            if not len(ids):
                raise InvalidRequestError("the prompt is empty: give at least one token", param="token_ids")
            return root.extend(ids), None
        session = self.sessions.get(prefix.session)
        if session is None or session.chain.root is not root:
            raise PrefixUnknownError("this session is not held here: send the whole prefix", param="session")
        return session.chain.extend(ids), session.state

    def from_blocks(self, scorer: Scorer, chain: Chain, shared: Shared | None, *, least: int = 0) -> tuple[Any, int]:
        """A state of the longest part of the prefix that is held in blocks, here or by ``shared``, and its tokens;
        (None, 0) where there is none, or less than ``least`` tokens of it."""
        wanted = chain.blocks[: chain.usable]
        held = self.blocks.match(wanted)
        most = len(held) if shared is None else max(len(held), shared.first + len(shared.payloads))
        if min(most, len(wanted)) * self.block_tokens < least:
            return None, 0
        if shared is not None and shared.first <= len(held) < shared.first + len(shared.payloads):
            payloads = shared.payloads[len(held) - shared.first :][: len(wanted) - len(held)]
            self.make_room(scorer, len(payloads) * self.block_tokens // scorer.pool.block_size)
            try:
                loaded = scorer.load(payloads)
            except PoolExhaustedError:  # then they are computed, where there is room for that
                loaded = []
            self.blocks.put(wanted[len(held) : len(held) + len(loaded)], loaded)
            self.shared_tokens += len(loaded) * self.block_tokens
            held = held + loaded
        tokens = len(held) * self.block_tokens
        return (scorer.join(held), tokens) if tokens and tokens >= least else (None, 0)

    def make_room(self, scorer: Scorer, blocks: int) -> None:
        """Let go of what was used longest ago until so many blocks of the pool are free, or nothing is held."""
        while scorer.pool.free_blocks < blocks:
            session, block = self.sessions.oldest, self.blocks.oldest
            if session is None and block is None:
                return
            if block is None or (session is not None and session <= block):
                self.sessions.evict()
            else:
                self.blocks.evict()

    def keep(self, scorer: Scorer, chain: Chain, score: RowScore) -> None:
        """Hold a scored prefix under its handle, and its full blocks under their keys."""
        self.sessions.put(chain, score.state)
        bins = None if score.bin_logprobs is None else score.bin_logprobs[-1]
        self.answered.append((chain, float(score.logits[-1]), bins))
        self._keep_blocks(scorer, chain, score.state)

    def keep_step(
        self, scorer: Scorer, chains: Sequence[Chain], states: Sequence[PrefixState], before: Sequence[Chain]
    ) -> None:
        """The same for all rows of a decoding step, which went on from ``before``: mostly no block has become full."""
        self.sessions.put_all(chains, states)
        self.stepped.append((chains, states))
        for chain, state, parent in zip(chains, states, before, strict=True):
            if len(chain.blocks) > len(parent.blocks):
                self._keep_blocks(scorer, chain, state)

    def _keep_blocks(self, scorer: Scorer, chain: Chain, state: PrefixState) -> None:
        known = len(chain.blocks)
        while known and chain.blocks[known - 1].key not in self.blocks:
            known -= 1  # from the end: in a decoding loop all but the last were there a step ago
        if known < len(chain.blocks):
            added, held = chain.blocks[known:], scorer.blocks(state, known)
            self.blocks.put(added, held)
            self.fresh += [(chain, block) for block in added]
