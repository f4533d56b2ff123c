"""Sessions: immutable handles on prefixes whose states the scorer holds.

A handle is a keyed digest of the model, the tenant and the prefix's tokens, however they arrived
(:class:`lenvm_service.prefix_cache.Chain`): the same prefix has the same handle, a repeated call gives the same answer,
and nobody can make a handle for a prefix that they have not sent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lenvm_service.prefix_cache import Chain

__all__ = ["Session", "SessionStore"]


@dataclass(slots=True)
class Session:
    """What a handle stands for: a state of the scorer and the chain that its children go on from."""

    state: Any
    chain: Chain
    used: int = 0  # tick of its last use

    @property
    def held_candidates(self) -> int:
        """Candidates whose keys and values the state still keeps for promotion."""
        scored = self.state.scored
        return 0 if scored is None else len(scored.ids)


class SessionStore:
    """Least recently used sessions go first. Owned by the engine's thread, as the scorer's states are.

    Args:
        max_sessions: handles kept.
        max_candidates: candidates kept for promotion, over all sessions; older sessions lose theirs, which costs a
            token of computation when they are continued and nothing else.
        tick: the clock of last uses, shared with the blocks, so that both give way in one order.
    """

    def __init__(
        self, *, max_sessions: int = 65_536, max_candidates: int = 8_192, tick: list[int] | None = None
    ) -> None:
        self.tick = [0] if tick is None else tick
        self.max_sessions = max_sessions
        self.max_candidates = max_candidates
        self.evicted = 0
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._holding: OrderedDict[str, int] = OrderedDict()  # those with candidates, oldest first
        self._held = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, handle: str) -> Session | None:
        """The session, which is now the most recently used one."""
        session = self._sessions.get(handle)
        if session is not None:
            self._sessions.move_to_end(handle)
            self.tick[0] += 1
            session.used = self.tick[0]
        return session

    def get_all(self, handles: Sequence[str]) -> list[Session] | None:
        """:meth:`get` of each of them; None where any is not held."""
        found, sessions, tick = list[Session](), self._sessions, self.tick
        for handle in handles:
            session = sessions.get(handle)
            if session is None:
                return None
            sessions.move_to_end(handle)
            tick[0] += 1
            session.used = tick[0]
            found.append(session)
        return found

    def __contains__(self, handle: object) -> bool:
        """True where the handle is held; may be asked from any thread."""
        return handle in self._sessions

    @property
    def oldest(self) -> int | None:
        """When the session that would go next was last used; None where there is none."""
        for session in self._sessions.values():
            return session.used
        return None

    def put(self, chain: Chain, state: Any) -> str:
        """Keep ``state`` under the chain's handle, instead of an older state of the same prefix."""
        self.put_all([chain], [state])
        return chain.handle

    def put_all(self, chains: Sequence[Chain], states: Sequence[Any]) -> None:
        """:meth:`put` for each of them, in this order."""
        sessions, holding, tick = self._sessions, self._holding, self.tick
        for chain, state in zip(chains, states, strict=True):
            handle = chain.handle
            older = sessions.pop(handle, None)
            if older is not None:
                if older.held_candidates and state.scored is None:
                    state = older.state  # a prediction in between must not cost the next step its promotion
                self._forget_candidates(handle)
            tick[0] += 1
            sessions[handle] = Session(state, chain, tick[0])
            scored = state.scored
            if scored is not None and (held := len(scored.ids)):
                holding[handle] = held
                self._held += held
        while self._held > self.max_candidates and len(holding) > 1:
            oldest = next(iter(holding))
            self._forget_candidates(oldest)
            sessions[oldest].state.scored = None
        while len(sessions) > self.max_sessions:
            self.evict()

    def evict(self) -> bool:
        """Let go of the session that was used longest ago; False where there is none.

        The state is dropped, not closed: a batch that is using it keeps its blocks until it is done.
        """
        if not self._sessions:
            return False
        handle, _ = self._sessions.popitem(last=False)
        self._forget_candidates(handle)
        self.evicted += 1
        return True

    def clear(self) -> None:
        """Let go of every session."""
        while self.evict():
            pass

    def _forget_candidates(self, handle: str) -> None:
        self._held -= self._holding.pop(handle, 0)
