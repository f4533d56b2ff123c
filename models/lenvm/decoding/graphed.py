"""Continuous batching around ``DeviceStep``: the host keeps the lanes filled while the GPU works.

The host launches a chunk of steps and, while it runs, reads what the chunk before has drawn: it takes finished rows
out, lets waiting ones in (their prompts are stored behind the running chunk) and hands out blocks. So it sees an end
one chunk late; until then the row stands still and costs next to nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lenvm.decoding.device_step import DeviceStep
from lenvm.paged import Row, to_device

if TYPE_CHECKING:
    from lenvm.decoding.sampler import Sampler, _Slot
    from lenvm.decoding.types import Generation, Request, SamplingParams
    from lenvm.device_guidance import Rules

__all__ = ["ChunkStats", "stream_graphed"]


@dataclass(frozen=True)
class ChunkStats:
    """When a chunk's results were read (seconds, ``time.perf_counter``), its content tokens, and what still waited."""

    at: float
    tokens: int
    waiting: int


@dataclass
class _Chunk:
    """A launched chunk: who sat in the lanes, and where its results arrive on the host."""

    slots: list[_Slot | None]
    history: torch.Tensor  # [steps, lanes]
    sums: torch.Tensor  # [3, lanes]
    event: Any

    def wait(self) -> tuple[Any, Any]:
        """Tokens ``[lanes, steps]`` and sums ``[3, lanes]``, once the chunk has run."""
        if self.event is not None:
            self.event.synchronize()
        return np.ascontiguousarray(self.history.numpy().T), self.sums.numpy()


def stream_graphed(
    sampler: Sampler, requests: Sequence[Request], params: SamplingParams, rules: Rules | None = None
) -> Iterator[tuple[int, Generation]]:
    """Yield ``(index, generation)`` as answers end. Unguided over the whole vocabulary, ``logprob`` is NaN and
    ``forced_stop`` False (neither is kept there)."""
    lanes = min(sampler.max_rows, len(requests))
    sampler.chunks.clear()
    run = _Run(sampler, requests, params, rules, lanes)
    try:
        yield from run.stream()
    finally:
        # Reached early when the caller stops iterating: nothing may leak.
        if sampler.device.type == "cuda":
            torch.cuda.synchronize(sampler.device)
        for slot in run.slots:
            if slot is not None:
                sampler.pool.release(slot.blocks)


class _Run:
    """One call of ``stream_graphed``."""

    def __init__(
        self, sampler: Sampler, requests: Sequence[Request], params: SamplingParams, rules: Rules | None, lanes: int
    ) -> None:
        self.sampler, self.params, self.pool = sampler, params, sampler.pool
        self.rules = rules
        self.step = DeviceStep(sampler, lanes, params, rules)
        self.waiting = deque(enumerate(requests))
        self.slots: list[_Slot | None] = [None] * lanes
        self.free = list(range(lanes - 1, -1, -1))
        self.tables = np.zeros(tuple(self.step.tables.shape), dtype=np.int32)
        self.changed = np.zeros(lanes, dtype=np.bool_)  # rows of ``tables`` that the device has not seen

    def stream(self) -> Iterator[tuple[int, Generation]]:
        """All answers."""
        running: _Chunk | None = None
        while self.waiting or running is not None or len(self.free) < len(self.slots):
            self._fill()
            launched = self._launch() if len(self.free) < len(self.slots) else None
            if running is not None:
                yield from self._collect(running)
            running = launched

    def _fill(self) -> None:
        """Blocks for what runs, then new rows into free lanes."""
        self._grow()
        started = self.sampler.admit(
            self.waiting,
            len(self.slots) - len(self.free),
            self.params,
            reserve=2 * self.step.chunk,
            values=self._prefill_values,
        )
        joined = []
        for slot in started:
            lane = self.free.pop()
            self.slots[lane] = slot
            joined.append(lane)
            self._set_table(lane, slot)
        self._upload(joined)

    def _grow(self) -> None:
        """Every running row gets blocks for the chunk in flight and the next one. If the pool is empty the youngest
        rows go back to the queue (their random stream is a function of the seed: they draw the same tokens again)."""
        ahead = 2 * self.step.chunk + 1
        size = self.pool.block_size
        short = [
            (slot.length, lane)
            for lane, slot in enumerate(self.slots)
            if slot is not None and len(slot.blocks) * size < min(slot.length + ahead, slot.end)
        ]
        for _, lane in sorted(short, reverse=True):
            slot = self.slots[lane]
            if slot is None:
                continue
            missing = self.pool.blocks_for(min(slot.length + ahead, slot.end)) - len(slot.blocks)
            while missing > self.pool.free_blocks:
                victim = min((s.length, at) for at, s in enumerate(self.slots) if s is not None)[1]
                evicted = self.slots[victim]
                assert evicted is not None
                self._vacate(victim)
                self.waiting.appendleft((evicted.index, evicted.request))
                if victim == lane:
                    break
            if self.slots[lane] is not None:
                slot.blocks += self.pool.allocate(missing)
                self._set_table(lane, slot)

    def _prefill_values(self, slots: Sequence[_Slot], copies: list[tuple[int, int]]) -> None:
        """Whole prompts, their last token too: the value model scores what comes after it."""
        from lenvm.decoding.sampler import prefill

        if self.step.values is not None and self.step.model is not None:
            rows = [Row(slot.blocks, 0, list(slot.request.prompt_ids)) for slot in slots]
            prefill(self.step.model.decoder, self.step.values, rows)
            self.step.values.copy(copies)

    def _set_table(self, lane: int, slot: _Slot) -> None:
        self.tables[lane, : len(slot.blocks)] = slot.blocks
        self.changed[lane] = True

    def _vacate(self, lane: int) -> None:
        slot = self.slots[lane]
        assert slot is not None
        self.pool.release(slot.blocks)
        self.slots[lane] = None
        self.free.append(lane)
        self.tables[lane] = 0
        self.changed[lane] = True

    def _upload(self, joined: list[int]) -> None:
        """What changed, behind the chunk in flight."""
        step = self.step
        lanes = np.flatnonzero(self.changed)
        if len(lanes):
            step.tables[self._send(lanes)] = self._send(self.tables[lanes])
            gone = [int(lane) for lane in lanes if self.slots[lane] is None]
            if gone:
                step.alive[self._send(np.asarray(gone))] = False
            self.changed[:] = False
        if not joined:
            return
        at = self._send(np.asarray(joined))
        fresh = [slot for lane in joined if (slot := self.slots[lane]) is not None]
        columns = np.asarray([(s.pending, s.length, s.request.seed, s.limit) for s in fresh], dtype=np.int64)
        sent = self._send(columns)
        step.tokens[at], step.positions[at], step.seeds[at], step.limits[at] = sent.unbind(-1)
        step.steps[at] = 0
        step.sums[:, at] = 0.0
        if self.rules is not None:
            step.rule[at] = self._send(self.rules.table[[slot.index for slot in fresh]])
        step.alive[at] = True

    def _send(self, array: Any) -> torch.Tensor:
        return to_device(array, self.step.tokens.device)

    def _launch(self) -> _Chunk:
        step = self.step
        for _ in range(step.chunk):
            step.advance()
        if step.tokens.device.type != "cuda":
            return _Chunk(list(self.slots), step.history.clone(), step.sums.clone(), None)
        history = torch.empty(step.history.shape, dtype=step.history.dtype, pin_memory=True)
        sums = torch.empty(step.sums.shape, dtype=step.sums.dtype, pin_memory=True)
        history.copy_(step.history, non_blocking=True)
        sums.copy_(step.sums, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _Chunk(list(self.slots), history, sums, event)

    def _collect(self, chunk: _Chunk) -> Iterator[tuple[int, Generation]]:
        """Take a chunk's tokens; yield the answers that ended in it."""
        history, sums = chunk.wait()
        drawn = 0
        is_eos = np.isin(history, self.sampler.eos_ids)
        first_eos = np.where(is_eos.any(axis=1), is_eos.argmax(axis=1), self.step.chunk).tolist()
        ended = []
        for lane, slot in enumerate(chunk.slots):
            # Not the slot that sits there now: it was put back into the queue while the chunk ran.
            if slot is None or self.slots[lane] is not slot:
                continue
            result = slot.result
            room = slot.limit - len(result.token_ids)
            stop = first_eos[lane]
            taken = min(stop, room)
            result.token_ids += history[lane, :taken].tolist()
            slot.length += taken
            drawn += taken
            result.finished = stop < room and stop < self.step.chunk
            if not result.finished and taken < room:
                continue
            self._settle(slot, sums[:, lane])
            self._vacate(lane)
            ended.append((slot.index, result))
        self.sampler.chunks.append(ChunkStats(time.perf_counter(), drawn, len(self.waiting)))
        yield from ended

    def _settle(self, slot: _Slot, sums: Any) -> None:
        from lenvm.decoding.sampler import FORCED_STOP_PROBABILITY

        result = slot.result
        if not self.step.candidates:
            result.logprob = float("nan")
            return
        result.text_cost, result.logprob = float(sums[0]), float(sums[1])
        result.forced_stop = result.finished and bool(sums[2] < np.log(FORCED_STOP_PROBABILITY))
