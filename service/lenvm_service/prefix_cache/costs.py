"""Is it cheaper to fetch a block than to compute it? Measured at the start, and kept current by what really happens."""

from __future__ import annotations

import math
import threading

__all__ = ["TransferCosts"]

_WEIGHT = 0.2  # of the newest measurement


class TransferCosts:
    """Times of both ways to a prefix state. Thread-safe: the engine tells of its work, the event loop of fetches.

    Args:
        block_tokens: tokens a block.
        block_bytes: bytes of a packed block.
    """

    def __init__(self, block_tokens: int, block_bytes: int) -> None:
        self.block_tokens, self.block_bytes = block_tokens, block_bytes
        self._lock = threading.Lock()
        self.tokens_per_s: float | None = None  # of prefill
        self.bytes_per_s: float | None = None  # of a fetch, unpacking and loading included
        self.round_trip_s: float | None = None

    def computed(self, tokens: int, seconds: float) -> None:
        """The engine computed so many tokens of prompts in that time."""
        if tokens > 0 and seconds > 0:
            with self._lock:
                self.tokens_per_s = _mixed(self.tokens_per_s, tokens / seconds)

    def fetched(self, nbytes: int, seconds: float) -> None:
        """So many bytes came in that time, the round trip left out."""
        if nbytes > 0:
            with self._lock:
                self.bytes_per_s = _mixed(self.bytes_per_s, nbytes / max(seconds, 1e-6))

    def probed(self, seconds: float) -> None:
        """A small question was answered after that time."""
        with self._lock:
            self.round_trip_s = _mixed(self.round_trip_s, seconds)

    def forget_transfer(self) -> None:
        """The connection is a new one: measure again."""
        with self._lock:
            self.bytes_per_s = self.round_trip_s = None

    def fetch_s(self, blocks: int) -> float:
        """Seconds that it takes to fetch so many blocks."""
        if self.bytes_per_s is None or self.round_trip_s is None:
            return math.inf
        return 2 * self.round_trip_s + blocks * self.block_bytes / self.bytes_per_s

    def compute_s(self, blocks: int) -> float:
        """Seconds that it takes to compute them."""
        return 0.0 if self.tokens_per_s is None else blocks * self.block_tokens / self.tokens_per_s

    def worth(self, blocks: int) -> bool:
        """True where fetching so many blocks is cheaper."""
        return blocks > 0 and self.fetch_s(blocks) < self.compute_s(blocks)

    def worth_asking(self, tokens: int) -> bool:
        """True where asking for the numbers of so many tokens is cheaper than to compute them."""
        if self.tokens_per_s is None or self.round_trip_s is None:
            return False
        return tokens / self.tokens_per_s > 2 * self.round_trip_s

    @property
    def break_even_tokens(self) -> float:
        """Tokens from which on fetching is cheaper: infinite where it never is, NaN before anything was measured."""
        if self.tokens_per_s is None or self.bytes_per_s is None or self.round_trip_s is None:
            return math.nan
        saved = 1 / self.tokens_per_s - self.block_bytes / self.block_tokens / self.bytes_per_s
        return 2 * self.round_trip_s / saved if saved > 0 else math.inf


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else (1 - _WEIGHT) * old + _WEIGHT * new
