"""Unguided full-vocabulary sampling in one CUDA graph a step: the rollout path.

The host looks in only every ``CHUNK`` steps, to take finished rows out, let waiting ones in and hand out blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lenvm.decoding.randomness import uniforms
from lenvm.decoding.sampler import draw_token
from lenvm.paged.attention import Plan

if TYPE_CHECKING:
    from lenvm.decoding.sampler import Sampler, _Slot
    from lenvm.decoding.types import Generation, Request, SamplingParams

__all__ = ["stream_graphed"]

CHUNK = 32


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Record ``step`` in a CUDA graph, after warm-up on a side stream, and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


class _GraphedStep:
    """Static buffers for ``rows`` slots and the captured graph that advances all of them by one token."""

    def __init__(self, sampler: Sampler, rows: int, temperature: float, *, compiled: bool) -> None:
        device, pool = sampler.device, sampler.pool
        self.sampler, self.pool, self.temperature = sampler, pool, temperature
        columns = pool.blocks_for(sampler.context + CHUNK + 1)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self.steps = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tables = torch.zeros(rows, columns, dtype=torch.int32, device=device)
        self.history = torch.zeros(CHUNK, rows, dtype=torch.int64, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.eos = torch.tensor(sampler.eos_ids, device=device)
        self.lanes = torch.arange(rows + 1, device=device)
        self.run = torch.compile(self._logits, dynamic=False) if compiled else self._logits
        self.advance = _captured(self._step) if device.type == "cuda" else self._step
        self.column.zero_()

    def _logits(self, tokens: torch.Tensor, positions: torch.Tensor, alive: torch.Tensor, tables: torch.Tensor) -> Any:
        size = self.pool.block_size
        block = tables.gather(1, (positions // size)[:, None])[:, 0].long()
        plan = Plan(
            pool=self.pool,
            input_ids=tokens,
            positions=positions,
            tables=tables,
            # Dead rows read nothing and write into a block of their own, or into the scratch block 0.
            prefix_lens=torch.where(alive, positions, 0),
            write_tokens=self.lanes[:-1],
            write_blocks=block,
            write_offsets=positions % size,
            width=1,
            starts=self.lanes,
        )
        output = self.sampler.model(
            input_ids=tokens.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, plan=plan
        )
        return output.logits[0]

    def _step(self) -> None:
        logits = self.run(self.tokens, self.positions, self.alive, self.tables)
        chosen = draw_token(logits.float(), self.temperature, uniforms(self.seeds, self.steps))
        self.history.index_copy_(0, self.column, chosen[None])
        self.tokens.copy_(torch.where(self.alive, chosen, self.tokens))
        self.positions += self.alive
        self.steps += self.alive
        self.alive &= ~torch.isin(chosen, self.eos)
        self.column.add_(1).remainder_(CHUNK)


def stream_graphed(
    sampler: Sampler, requests: Sequence[Request], params: SamplingParams, *, compiled: bool = False
) -> Iterator[tuple[int, Generation]]:
    """Yield ``(index, generation)``; ``logprob`` is NaN (not kept on this path), the text cost is 0 by definition."""
    pool = sampler.pool
    lanes = min(sampler.max_rows, len(requests))
    graphed = _GraphedStep(sampler, lanes, params.temperature, compiled=compiled)
    waiting = deque(enumerate(requests))
    slots: list[_Slot | None] = [None] * lanes
    free = list(range(lanes - 1, -1, -1))
    try:
        while waiting or len(free) < lanes:
            started = sampler.admit(waiting, lanes - len(free), params, reserve=2 * CHUNK)
            joined = []
            for slot in started:
                lane = free.pop()
                slots[lane] = slot
                slot.result.logprob = float("nan")
                joined.append(lane)
            _grow(sampler, slots, waiting, free)
            _upload(graphed, slots, [lane for lane in joined if slots[lane] is not None], free)
            for _ in range(CHUNK):
                graphed.advance()
            history = graphed.history.cpu().numpy()
            for lane, current in enumerate(slots):
                if current is not None and _collect(current, history[:, lane], sampler.eos_ids):
                    pool.release(current.blocks)
                    slots[lane] = None
                    free.append(lane)
                    yield current.index, current.result
    finally:
        # Reached early when the caller stops iterating: nothing may leak.
        for slot_left in slots:
            if slot_left is not None:
                pool.release(slot_left.blocks)


def _grow(sampler: Sampler, slots: list[_Slot | None], waiting: deque[tuple[int, Request]], free: list[int]) -> None:
    """Every running row gets blocks for the coming chunk; if the pool is empty the youngest rows go back to the queue
    (their random stream is a function of the seed, so they will draw the same tokens again)."""
    pool = sampler.pool
    order = sorted((slot.length, lane) for lane, slot in enumerate(slots) if slot is not None)
    for _, lane in reversed(order):
        slot = slots[lane]
        if slot is None:
            continue
        missing = pool.blocks_for(slot.length + CHUNK + 1) - len(slot.blocks)
        while missing > pool.free_blocks:
            victim = min((s.length, at) for at, s in enumerate(slots) if s is not None)[1]
            evicted = slots[victim]
            assert evicted is not None
            pool.release(evicted.blocks)
            waiting.appendleft((evicted.index, evicted.request))
            slots[victim] = None
            free.append(victim)
            if victim == lane:
                break
        if slots[lane] is not None and missing > 0:
            slot.blocks += pool.allocate(missing)


def _upload(graphed: _GraphedStep, slots: list[_Slot | None], joined: list[int], free: list[int]) -> None:
    device = graphed.tokens.device
    tables = np.zeros(tuple(graphed.tables.shape), dtype=np.int32)
    for lane, slot in enumerate(slots):
        if slot is not None:
            tables[lane, : len(slot.blocks)] = slot.blocks
    graphed.tables.copy_(torch.from_numpy(tables))
    if joined:
        at = torch.tensor(joined, device=device)
        fresh = [slots[lane] for lane in joined]

        def column(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, device=device)

        graphed.tokens[at] = column([s.pending for s in fresh if s])
        graphed.positions[at] = column([s.length for s in fresh if s])
        graphed.seeds[at] = column([s.request.seed for s in fresh if s])
        graphed.steps[at] = 0
        graphed.alive[at] = True
    if free:
        idle = torch.tensor(free, device=device)
        graphed.alive[idle] = False
        graphed.positions[idle] = 0


def _collect(slot: _Slot, tokens: Any, eos_ids: tuple[int, ...]) -> bool:
    """Append a chunk of drawn tokens to the answer; True once it has ended (EOS, or the limit)."""
    result = slot.result
    room = slot.limit - len(result.token_ids)
    ends = np.flatnonzero(np.isin(tokens, eos_ids))
    stop = int(ends[0]) if len(ends) else len(tokens)
    taken = tokens[: min(stop, room)].tolist()
    result.token_ids += taken
    slot.length += len(taken)
    slot.pending = taken[-1] if taken else slot.pending
    result.finished = bool(len(ends)) and stop < room
    return result.finished or len(result.token_ids) >= slot.limit
