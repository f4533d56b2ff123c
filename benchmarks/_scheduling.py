"""Discrete-event simulation of a continuous-batching server, for ``scheduling.py``.

Beside the benchmark and not in a package: it measures policies, nothing that is installed needs it.

The server has ``slots`` places in its batch and serves each of them one step at a time. A request first takes as many
steps as its prompt has chunks of ``CHUNK`` tokens (chunked prefill; the last one gives its first token), then one step
a token. Steps take the same time whatever is in the batch, as they about do where decoding is bound by memory, so that
all times are in steps and every ratio of times is free of the length of a step. A preempted request loses its keys and
values: when it returns, its prompt and what it had generated are prefilled again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CHUNK",
    "Workload",
    "gittins_table",
    "mean_table",
    "prefill_steps",
    "run_preemptive",
    "run_to_completion",
    "survival_table",
]

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]

CHUNK = 512
"""Prompt tokens of one request that a step takes beside the others' decoding."""


@dataclass(frozen=True)
class Workload:
    """n requests in order of arrival: times in steps [n], their prompts' numbers and tokens [n], and the tokens that
    each will generate, EOS included [n]."""

    arrival: FloatArray
    prompt: IntArray
    prompt_tokens: IntArray
    work: IntArray

    @property
    def service(self) -> IntArray:
        """Steps in a slot, without any preemption [n]."""
        return prefill_steps(self.prompt_tokens) - 1 + self.work


def prefill_steps(tokens: IntArray) -> IntArray:
    """Steps until the first new token after ``tokens`` of prefix, shape kept."""
    return -(-tokens // CHUNK)


def run_to_completion(
    load: Workload, key: FloatArray, slots: int, urgent: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Whenever a slot is free, the waiting request of the lowest ``key`` [n] starts and stays until it is done; from
    its time ``urgent`` [n] on, a request goes before those that are not, the longest urgent first.

    Returns when each started and ended [n], in steps; equal keys start in order of arrival."""
    service, keys = load.service.tolist(), key.tolist()
    start = [-1.0] * len(keys)
    waiting: list[tuple[float, int]] = []
    late: list[tuple[float, int]] = []  # the same requests, by when they are urgent; started ones are dropped late
    busy: list[float] = []  # when each taken slot is free again

    def begin(request: int, now: float) -> None:
        start[request] = now
        heapq.heappush(busy, now + service[request])

    def begin_next(now: float) -> None:
        for queue in (late, waiting):
            while queue and start[queue[0][1]] >= 0.0:
                heapq.heappop(queue)
        if waiting:
            queue = late if late and late[0][0] <= now else waiting
            begin(heapq.heappop(queue)[1], now)

    for request, now in enumerate(load.arrival.tolist()):
        while busy and busy[0] <= now:
            begin_next(heapq.heappop(busy))
        if len(busy) < slots:
            begin(request, now)
            continue
        heapq.heappush(waiting, (keys[request], request))
        if urgent is not None:
            heapq.heappush(late, (float(urgent[request]), request))
    while busy:
        begin_next(heapq.heappop(busy))
    return np.array(start), start + load.service


@dataclass
class _Running:
    request: int
    base: int  # tokens that it had when it (re)started
    since: float  # when its next token began
    rank: float
    epoch: int


def run_preemptive(
    load: Workload, rank: Callable[[int, int], float], slots: int, quantum: int
) -> tuple[FloatArray, FloatArray, int]:
    """The ``slots`` requests of the lowest rank run; a waiting one of lower rank takes the place of the worst.

    ``rank(request, generated)`` is asked at arrival and whenever a request has generated another ``quantum`` tokens.
    Returns when each first started and ended [n], in steps, and how many preemptions there were."""
    work, prompt_tokens, arrival = load.work.tolist(), load.prompt_tokens.tolist(), load.arrival.tolist()
    start, end = np.full(len(work), -1.0), np.zeros(len(work))
    generated = [0] * len(work)
    waiting: list[tuple[float, int]] = []
    running: dict[int, _Running] = {}
    events: list[tuple[float, int, int]] = []  # of a running request: another quantum is full, or it is done
    epochs = preemptions = 0

    def follow(one: _Running) -> None:
        nonlocal epochs
        epochs += 1
        one.epoch = epochs
        stop = min(work[one.request], (generated[one.request] // quantum + 1) * quantum)
        heapq.heappush(events, (one.since + stop - one.base, one.request, one.epoch))

    def begin(request: int, now: float, at: float) -> None:
        if start[request] < 0.0:
            start[request] = now
        prefix = prompt_tokens[request] + generated[request]
        one = running[request] = _Running(request, generated[request], now - (-prefix // CHUNK) - 1, at, 0)
        follow(one)

    def preempt(one: _Running, now: float) -> None:
        nonlocal preemptions
        preemptions += 1
        # A full quantum is noted at its event; tokens since then count, a token half done does not.
        made = one.base + max(0, int(now - one.since))
        generated[one.request] = max(generated[one.request], min(made, work[one.request] - 1))
        del running[one.request]
        heapq.heappush(waiting, (one.rank, one.request))

    def on_event(now: float, request: int, epoch: int) -> None:
        one = running.get(request)
        if one is None or one.epoch != epoch:
            return  # it was preempted since
        generated[request] = min(work[request], (generated[request] // quantum + 1) * quantum)
        if generated[request] == work[request]:
            end[request] = now
            del running[request]
            if waiting:
                at, following = heapq.heappop(waiting)
                begin(following, now, at)
            return
        one.rank = rank(request, generated[request])
        if waiting and waiting[0][0] < one.rank:
            at, following = heapq.heappop(waiting)
            preempt(one, now)
            begin(following, now, at)
        else:
            follow(one)

    for request, now in enumerate(arrival):
        while events and events[0][0] <= now:
            on_event(*heapq.heappop(events))
        at = rank(request, 0)
        if len(running) < slots:
            begin(request, now, at)
            continue
        worst = max(running.values(), key=lambda one: one.rank)
        if at < worst.rank:
            preempt(worst, now)
            begin(request, now, at)
        else:
            heapq.heappush(waiting, (at, request))
    while events:
        on_event(*heapq.heappop(events))
    return start, end, preemptions


# ---------------------------------------------------------------------------------------------------------------------
# Ranks of a request that has generated g = 0, quantum, 2 quantum ... tokens, from the distribution at its prompt alone.
def survival_table(pmf: FloatArray) -> FloatArray:
    """``P(l > n)`` for n = 0 .. cap [prompts, cap + 1], from ``P(l)`` for l = 1 .. cap [prompts, cap]; an answer is cut
    at the cap, so that nothing is longer."""
    below = np.concatenate([np.zeros((len(pmf), 1)), np.cumsum(pmf, axis=1)], axis=1)
    return np.asarray(np.clip(1.0 - below / below[:, -1:], 0.0, 1.0))


def mean_table(survival: FloatArray, quantum: int) -> FloatArray:
    """``E[l - g | l > g]`` [prompts, ages]: what is still to come on average, once g tokens are there."""
    beyond = np.cumsum(survival[:, :-1][:, ::-1], axis=1)[:, ::-1]
    return np.asarray(beyond[:, ::quantum] / np.maximum(survival[:, :-1:quantum], 1e-12))


def gittins_table(survival: FloatArray, quantum: int) -> FloatArray:
    """The inverse of the Gittins index [prompts, ages]: the least, over how long it may run, of the expected tokens
    until then for each expected completion. Optimal for one slot and preemption without cost, and lower is earlier."""
    ages = np.arange(0, survival.shape[1] - 1, quantum)
    stops = np.append(ages[1:], survival.shape[1] - 1)
    spent = np.concatenate([np.zeros((len(survival), 1)), np.cumsum(survival[:, :-1], axis=1)], axis=1)
    table = np.empty((len(survival), len(ages)))
    for column, age in enumerate(ages.tolist()):
        done = survival[:, [age]] - survival[:, stops[column:]]
        tokens = spent[:, stops[column:]] - spent[:, [age]]
        table[:, column] = (tokens / np.maximum(done, 1e-12)).min(axis=1)
    return table
