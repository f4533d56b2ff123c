"""Between the engine and the shared tier: what is asked before a request waits, and what is left after a batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lenvm_service.engine.core import EngineCore
from lenvm_service.engine.jobs import CandidateJob, Job, PredictJob, Shared, StepJob, TokenScoreJob
from lenvm_service.prefix_cache import Chain
from lenvm_service.prefix_cache.redis_tier import Found, RedisTier, Want

__all__ = ["Asked", "ask_shared", "leave_shared", "offer_shared"]

_COPY_S = 0.005  # of the engine's time between two batches
_COPIED = 4  # blocks: a megabyte or two each


@dataclass(frozen=True)
class Asked:
    """The jobs with what was found for them. ``nbytes``: of the blocks, which wait for the engine."""

    jobs: list[Job]
    nbytes: int = 0


async def ask_shared(core: EngineCore, tier: RedisTier, jobs: Sequence[Job], deadline: float | None) -> Asked:
    """Look up what this replica does not hold: sessions first, then the blocks and numbers of prefixes.

    ``deadline``: of time.monotonic. Never raises for what Redis does, and never takes longer than the tier's budget for
    sessions and once more for blocks.
    """
    resolved = list(await asyncio.gather(*(_with_session(core, tier, job, deadline) for job in jobs)))
    wants: list[Want] = []
    places: list[int] = []
    for at, job in enumerate(resolved):
        want = _want(core, tier, job)
        if want is not None:
            wants.append(want)
            places.append(at)
    if not wants:
        return Asked(resolved)
    found = await tier.find(wants, _left(deadline))
    nbytes = 0
    for at, want, one in zip(places, wants, found, strict=True):
        job = resolved[at]
        if isinstance(job, TokenScoreJob | StepJob) or not (one.payloads or one.record):
            continue
        resolved[at] = _with_found(job, want, one)
        nbytes += sum(payload.nbytes for payload in one.payloads)
    return Asked(resolved, nbytes)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _with_found(job: PredictJob | CandidateJob, want: Want, found: Found) -> PredictJob | CandidateJob:
    return replace(job, prefix=replace(job.prefix, shared=Shared(want.first, found.payloads, found.record)))


async def _with_session(core: EngineCore, tier: RedisTier, job: Job, deadline: float | None) -> Job:
    """The job with its whole prefix, where another replica knows the session and this one does not."""
    if isinstance(job, TokenScoreJob | StepJob) or job.prefix.session is None or job.prefix.session in core.sessions:
        return job
    root = core.prefixes.root(job.prefix.tenant)
    record = await tier.session(job.prefix.session, root.digest, _left(deadline))
    if record is None:
        return job
    ids = record.token_ids
    if root.extend(ids).handle != job.prefix.session:  # no key of ours has made this
        return job
    return replace(job, prefix=replace(job.prefix, token_ids=[*ids, *job.prefix.token_ids], session=None))


def _want(core: EngineCore, tier: RedisTier, job: Job) -> Want | None:
    """What to look up for a job; None where it is all held here, or would be computed anyway."""
    if isinstance(job, TokenScoreJob | StepJob) or job.prefix.session is not None:
        return None
    ids = job.prefix.token_ids
    if not len(ids) or len(ids) > core.scorer.context or min(ids) < 0 or max(ids) >= core.scorer.vocab_size:
        return None  # refused by the engine
    chain = core.prefixes.root(job.prefix.tenant).extend(ids)
    if chain.handle in core.sessions:
        return None
    first = _held(core, chain)
    memo = isinstance(job, PredictJob) and tier.costs.worth_asking(chain.length - first * core.prefixes.block_tokens)
    return Want(chain, first, memo) if memo or first < chain.usable else None


def _held(core: EngineCore, chain: Chain) -> int:
    count = 0
    while count < chain.usable and chain.blocks[count].key in core.prefixes.blocks:
        count += 1
    return count


def offer_shared(core: EngineCore, tier: RedisTier) -> None:
    """Offer the sessions of the last batch, and note its blocks for ``leave_shared``: before another batch, which
    forgets them. After its answers were handed out."""
    prefixes = core.prefixes
    for chain, logit, bin_logprobs in prefixes.answered:
        tier.offer_session(chain, logit, bin_logprobs)
    for chains, states in prefixes.stepped:
        for chain, state in zip(chains, states, strict=True):
            tier.offer_session(chain, state.logit, state.bin_logprobs)
    prefixes.unshared.extend(prefixes.fresh)
    prefixes.begin()


def leave_shared(core: EngineCore, tier: RedisTier) -> bool:
    """Offer blocks that were computed, on the engine's thread.

    Copies them for a moment only, since the next batch waits; True where some are left for when nothing waits.
    """
    prefixes, unshared = core.prefixes, core.prefixes.unshared
    end = time.perf_counter() + _COPY_S
    while unshared:
        if not tier.takes_blocks:
            unshared.clear()
            break
        # Few at a time: a copy leaves the pool only where the queue still has room for it.
        some = [unshared.popleft() for _ in range(min(_COPIED, len(unshared)))]
        held = [(chain, block, one) for chain, block in some if (one := prefixes.blocks.get(block.key)) is not None]
        for (chain, block, _), payload in zip(held, core.scorer.dump([one for _, _, one in held]), strict=True):
            tier.offer_block(chain, block, payload)
        if time.perf_counter() >= end:
            break
    return bool(unshared)
