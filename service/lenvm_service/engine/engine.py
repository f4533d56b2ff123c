"""One model with its thread: load, warm up, batch, check after a failure, and remember predictions for feedback."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenvm.config import LenVMConfig
from lenvm.errors import InvalidRequestError
from lenvm.guidance import Objective
from lenvm.scoring import ScoreRow
from lenvm_service.engine.batching import Batcher, is_out_of_memory
from lenvm_service.engine.core import EngineCore
from lenvm_service.engine.jobs import (
    CandidateJob,
    Job,
    PredictJob,
    Prefix,
    Reply,
    Result,
    StepJob,
    TokenScoreJob,
    folded,
    new_tokens,
    rows_of,
)
from lenvm_service.engine.loading import LOADING, EngineOptions, Loaded, load_core
from lenvm_service.engine.queueing import BatcherOptions, Cost, Reservation
from lenvm_service.engine.sharing import ask_shared, leave_shared, offer_shared
from lenvm_service.errors import InternalError, OverloadedError, PrefixUnknownError
from lenvm_service.metrics import EngineMetrics
from lenvm_service.prefix_cache import Codec
from lenvm_service.prefix_cache.redis_tier import RedisTier, TierOptions
from lenvm_service.tracing import Tracing, traced

if TYPE_CHECKING:
    from lenvm_service.metrics import Metrics
    from lenvm_service.settings import Settings

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

_KINDS: dict[type, str] = {
    PredictJob: "predict",
    TokenScoreJob: "tokens",
    CandidateJob: "candidates",
    StepJob: "candidates",
}
_PREDICTIONS_KEPT = 65_536
_MEASURED = 128  # tokens: fewer tell little about the rate of a prefill


@dataclass(frozen=True)
class _Predicted:
    tenant: str
    generated: int
    horizon: float
    quantiles: dict[str, int]


class Engine:
    """One model, one thread (but see :meth:`Batcher.at_once`). Make one with :meth:`load`, then :meth:`start` it;
    ``submit`` from any event loop.

    Args:
        name: what requests call it.
        source: a checkpoint folder or the name of a shipped one.
    """

    def __init__(
        self,
        name: str,
        source: str | Path,
        options: EngineOptions,
        metrics: EngineMetrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self.options = options
        self._metrics, self._tracing = metrics, tracing
        self._loaded: Loaded | None = None
        self.tier: RedisTier | None = None
        self._predicted: OrderedDict[str, _Predicted] = OrderedDict()
        self._lock = threading.Lock()
        self._unnoted: tuple[Sequence[Job], Sequence[Result]] | None = None  # of the last run, not in the metrics yet
        self._held = 0  # tokens that a session's prefix is taken for
        self.loaded_at = 0.0
        self.answers_at_once = True  # decoding steps, on the event loop that asks: see Batcher.at_once
        tokens = options.batch_tokens or (16_384 if options.device.startswith("cuda") else 4_096)
        self.batcher = Batcher(
            self._run,
            self._cost,
            options=BatcherOptions(
                budget_tokens=tokens,
                wait_s=options.batch_wait_s,
                max_queue_tokens=options.max_queue_tokens,
                max_queue_s=options.max_queue_s,
                stall_s=options.stall_s,
            ),
            prepare=self._load,
            check=self._check,
            finish=self._share,
            relieve=self._relieve,
            run_short=self._run_step,
            observer=metrics,
            tracing=tracing,
            name=name,
        )

    @classmethod
    def load(
        cls, name: str, source: str | Path, settings: Settings, metrics: Metrics, tracing: Tracing | None = None
    ) -> Engine:
        """An engine that is not started yet, from the service's settings."""
        secret = settings.secret.get_secret_value().encode() if settings.secret else None
        options = EngineOptions(
            backend=settings.backend,
            device=settings.device,
            dtype=settings.dtype,
            batch_tokens=settings.batch_tokens,
            batch_wait_s=settings.batch_wait_ms / 1000,
            max_queue_tokens=settings.max_queue_tokens,
            max_queue_s=settings.max_queue_s,
            cache_tokens=settings.cache_tokens,
            models=len(settings.model),
            stall_s=settings.stall_s,
            secret=secret,
            tier=_tier_options(settings, secret),
        )
        return cls(name, source, options, metrics.engine(name), tracing)

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the model on the engine's thread; ``state`` tells how far it is."""
        self.batcher.start()

    def close(self) -> None:
        """End the thread after the batch in hand."""
        self.batcher.close()
        if self.tier is not None:
            self.tier.close()

    @property
    def state(self) -> str:
        """loading, ready, recovering, failed or stopped."""
        return self.batcher.state

    @property
    def failure(self) -> Exception | None:
        """Why loading failed."""
        return self.batcher.failure

    @property
    def ready(self) -> bool:
        """Takes work."""
        return self.batcher.ready

    @property
    def alive(self) -> bool:
        """False when only a restart of the process can help."""
        return self.batcher.alive

    @property
    def loaded(self) -> bool:
        """The model is there, whatever the engine's state."""
        return self._loaded is not None

    @property
    def tokenizer_dir(self) -> Path:
        """Where the tokenizer lies; only valid once loaded."""
        assert self._loaded is not None
        return self._loaded.tokenizer_dir

    @property
    def core(self) -> EngineCore:
        """What the thread works with; only valid once loaded."""
        assert self._loaded is not None
        return self._loaded.core

    @property
    def config(self) -> LenVMConfig:
        """The checkpoint's configuration."""
        return self.core.config

    @property
    def model_sha(self) -> str:
        """Digest of everything that an answer depends on."""
        return self.core.sha

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer."""
        return self.core.tokenizer

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return tuple(sorted(self.core.eos_ids))

    @property
    def context(self) -> int:
        """Longest prefix in tokens."""
        return self.core.scorer.context

    @property
    def vocab_size(self) -> int:
        """Ids are in ``[0, vocab_size)``."""
        return self.core.scorer.vocab_size

    def describe(self) -> dict[str, Any]:
        """The model's entry of ``/info``; what is only known after loading is left out before."""
        found: dict[str, Any] = {"name": self.name, "state": self.state, "device": self.options.device}
        if self._loaded is None:
            return {**found, "dtype": self.options.dtype}
        found["dtype"] = self._loaded.dtype
        config, bins = self.config, self.core.scorer.bins
        generator = config.generator
        return {
            **found,
            "model_sha": self.model_sha,
            "backbone": config.backbone.name,
            "backbone_sha256": config.backbone.sha256,
            "tokenizer_sha256": config.backbone.tokenizer_sha256,
            "gamma": config.gamma,
            "num_bins": config.head.num_bins,
            "cap": bins.cap if bins else None,
            "generator": {
                "backbone": generator.backbone,
                "temperature": generator.temperature,
                "top_p": generator.top_p,
                "max_new_tokens": generator.max_new_tokens,
            },
            "eos_ids": list(self.eos_ids),
            "stop_ids": [],
            "context": self.context,
            "vocab_size": self.vocab_size,
        }

    # -- work ----------------------------------------------------------------------------------------------------------

    def reserve(self, tokens: int, *, deadline: float | None = None) -> Reservation:
        """Room in the queue for a request that is still to be tokenised; see :meth:`Batcher.reserve`."""
        return self.batcher.reserve(tokens, deadline=deadline)

    async def submit(
        self,
        jobs: Sequence[Job],
        *,
        deadline: float | None = None,
        priority: int = 0,
        reservation: Reservation | None = None,
    ) -> Reply:
        """Answer a request's jobs; see :meth:`Batcher.submit`. A ``StepJob`` is its request's only job."""
        if len(jobs) == 1 and isinstance(jobs[0], StepJob):
            return await self._submit_step(jobs[0], deadline=deadline, priority=priority, reservation=reservation)
        asked, nbytes, tier = jobs, 0, self.tier
        if tier is not None and self.batcher.ready:
            with traced(self._tracing, "redis lookup"):
                found = await ask_shared(self.core, tier, jobs, deadline)
            asked, nbytes = found.jobs, found.nbytes
            tier.took(nbytes)
        try:
            reply = await self.batcher.submit(asked, deadline=deadline, priority=priority, reservation=reservation)
        finally:
            if tier is not None:
                tier.took(-nbytes)
        for job, result in zip(jobs, reply.results, strict=True):
            if isinstance(job, PredictJob) and isinstance(result, dict):
                self._remember(result, job)
        return reply

    async def _submit_step(
        self, step: StepJob, *, deadline: float | None, priority: int, reservation: Reservation | None
    ) -> Reply:
        """A step as one job where that is quicker, and nothing is to be asked of the shared tier. Else, and where it
        failed as a whole, as its rows: whoever is guilty gets the error, and no other."""
        if self._takes(step):
            late = deadline is not None and deadline <= time.monotonic()
            reply = self.batcher.at_once(step) if self.answers_at_once and reservation is None and not late else None
            if reply is None:
                reply = await self.batcher.submit([step], deadline=deadline, priority=priority, reservation=reservation)
            if not isinstance(reply.results[0], InternalError | OverloadedError):
                return reply
        reply = await self.submit(step.rows(), deadline=deadline, priority=priority, reservation=reservation)
        return replace(reply, results=[folded(reply.results)])

    def _takes(self, step: StepJob) -> bool:
        if not (self.loaded and getattr(self.core.scorer, "has_graphs", False)):
            return False
        if new_tokens(step) > self.batcher.options.budget_tokens:
            return False
        sessions = self.core.sessions
        return self.tier is None or all(session in sessions for session in step.sessions)

    def feedback(
        self,
        prediction_id: str | None,
        token_ids: Sequence[int] | None,
        generated_tokens: int,
        finish_reason: str,
        tenant: str = "",
    ) -> None:
        """Compare an answer's realised length (content tokens, all of them) with what was predicted for it.

        Raises:
            PrefixUnknownError: no prediction of that id, or for that prefix, is remembered.
            InvalidRequestError: the answer is shorter than what was generated when the prediction was made.
        """
        if prediction_id is None:
            ids = list(token_ids or ())
            if not ids or min(ids) < 0 or max(ids) >= self.vocab_size:
                raise InvalidRequestError(f"token_ids must be in [0, {self.vocab_size})", param="token_ids")
            prediction_id = self.core.prefixes.handle_of(ids, tenant)
        with self._lock:
            predicted = self._predicted.get(prediction_id)
        if predicted is None or predicted.tenant != tenant:
            raise PrefixUnknownError("no prediction for this prefix is remembered here", param="prediction_id")
        came = generated_tokens - predicted.generated
        if came < 0:
            raise InvalidRequestError(
                f"generated_tokens must count the whole answer: {predicted.generated} were there at the prediction",
                param="generated_tokens",
            )
        cut = finish_reason == "length"
        bins = self.core.scorer.bins
        if self._metrics is not None and not (cut and came == 0):
            self._metrics.realised(
                came if cut else came + 1,
                cut=cut,
                horizon=predicted.horizon,
                levels=[float(level) for level in predicted.quantiles],
                quantiles=list(predicted.quantiles.values()),
                cap=bins.cap if bins else None,
            )

    def _remember(self, row: dict[str, Any], job: PredictJob) -> None:
        predicted = _Predicted(job.prefix.tenant, job.generated, row["horizon"], row["quantiles"] or {})
        with self._lock:
            self._predicted[row["prediction_id"]] = predicted
            self._predicted.move_to_end(row["prediction_id"])
            while len(self._predicted) > _PREDICTIONS_KEPT:
                self._predicted.popitem(last=False)

    # -- on the engine's thread, or on another that has the batcher's leave --------------------------------------------

    def _load(self) -> None:
        since = time.monotonic()
        with LOADING:
            self._loaded = load_core(self.source, self.options, on_progress=lambda: self.batcher.beat())
        self.core.tracing = self._tracing
        self._held = self.core.scorer.context // 4
        if (warm_up := getattr(self.core.scorer, "warm_up", None)) is not None:
            warm_up(self.batcher.options.budget_tokens)
        self._canary()
        if self.options.tier is not None:
            self.tier = self._start_tier(self.options.tier)
        self.loaded_at = time.time()
        logger.info("model %s is ready after %.1f s", self.name, time.monotonic() - since)

    def _start_tier(self, options: TierOptions) -> RedisTier | None:
        core = self.core
        layout, bins = core.scorer.layout, core.scorer.bins
        if layout is None:
            logger.warning("model %s: prefix states cannot leave this engine's device: none is shared", self.name)
            return None
        if self.options.secret is None:
            logger.warning("no secret is set: replicas share states of prefixes, and no sessions")
        codec = Codec(layout, num_bins=bins.size if bins else 0, secret=options.secret, payload=options.payload)
        tier = RedisTier(codec, options, self._metrics or EngineMetrics.nowhere(), name=self.name)
        token = next(token for token in range(core.scorer.vocab_size) if token not in core.eos_ids)
        for _ in range(2):  # the first one may still allocate
            since = time.perf_counter()
            core.scorer.score([ScoreRow(append=[token] * _MEASURED)])
            seconds = time.perf_counter() - since
        tier.costs.computed(_MEASURED, seconds)
        tier.start()
        return tier

    def _share(self) -> bool:
        self._settle()
        if self.tier is not None:
            return leave_shared(self.core, self.tier)
        self.core.prefixes.begin()  # nobody wants what was added
        return False

    def _relieve(self) -> None:
        """Memory ran out: let go of what only saves time."""
        self.core.clear()
        if self.options.device.startswith("cuda"):
            with contextlib.suppress(ImportError):
                import torch

                torch.cuda.empty_cache()

    def _run(self, jobs: Sequence[Job]) -> list[Result]:
        core = self.core
        self._settle()
        since = time.perf_counter()
        results = core.run(jobs)
        if self.tier is not None and core.counts.computed_tokens >= _MEASURED:
            self.tier.costs.computed(core.counts.computed_tokens, time.perf_counter() - since)
        self._unnoted = jobs, results
        if core.settled:  # or once the sessions are kept
            self._note_work()
        return results

    def _run_step(self, job: Job) -> Result | None:
        """The answer of a decoding step if a graph for it is there; None, with nothing answered, for all else. Runs on
        an event loop's thread: see :meth:`Batcher.at_once`."""
        if not isinstance(job, StepJob):
            return None
        self._settle()
        result = self.core.run_step(job)
        if result is not None:
            self._unnoted = [job], [result]
        return result

    def _settle(self) -> None:
        """Do what the last run has left for later. Its callers have their answers, and no other's job fails for it."""
        try:
            self.core.settle()
        except Exception as error:
            logger.exception("%s: states of a step could not be kept", self.name)
            if is_out_of_memory(error):
                self._relieve()
        self._note_work()
        if self.tier is not None:
            offer_shared(self.core, self.tier)

    def _note_work(self) -> None:
        """What the last run took and answered, for the metrics."""
        core, unnoted, self._unnoted = self.core, self._unnoted, None
        if self._metrics is not None and unnoted is not None:
            answered = Counter[tuple[str, str]]()
            for job, result in zip(*unnoted, strict=True):
                kind = _KINDS[type(job)]
                errors = result["errors"].values() if isinstance(job, StepJob) and isinstance(result, dict) else ()
                answered[kind, "ok" if isinstance(result, dict) else result.code] += rows_of(job) - len(errors)
                for error in errors:
                    answered[kind, error.code] += 1
            for (kind, outcome), count in answered.items():
                self._metrics.rows(kind, outcome, count)
            pool, sessions = core.scorer.pool, core.sessions
            self._metrics.work(
                core.counts,
                sessions=len(sessions),
                evicted=sessions.evicted,
                used=pool.used_blocks,
                free=pool.free_blocks,
            )

    def _check(self, attempt: int) -> None:
        """Is the engine sound? Sessions survive a failure if so; a second try starts with an empty pool."""
        if attempt:
            assert self._loaded is not None
            self.core.clear()
            self.core.scorer = self._loaded.new_scorer()
        self._canary()

    def _canary(self) -> None:
        """One forward of each kind; what it gives must be numbers. Leaves no session behind."""
        core = self.core
        token = next(token for token in range(core.scorer.vocab_size) if token not in core.eos_ids)
        objective = Objective(kind="at_most", target=8) if core.scorer.bins else None
        candidates = CandidateJob(Prefix([token] * 3), [token, core.eos_id], objective=objective)
        jobs: list[Job] = [candidates, TokenScoreJob([token], [token], eos=True)]
        probe = EngineCore(core.config, core.tokenizer, core.scorer, eos_ids=[core.eos_id], secret=bytes(16))
        for result in probe.run(jobs):
            if not isinstance(result, dict):
                raise RuntimeError(f"the canary was refused: {result}")  # a new error: no traceback ties states to it
            if not all(value == value for value in result["values"]):  # NaN differs from itself
                raise ArithmeticError("the model gives NaN: the checkpoint or the device is damaged")

    def _cost(self, job: Job) -> Cost:
        tokens, held = new_tokens(job), 0
        if isinstance(job, StepJob):
            rows = len(job.sessions)
            wide = 1 << max(0, -(-tokens // rows) - 1).bit_length()
            return Cost(tokens, rows * wide * (wide + self._held), rows)
        if not isinstance(job, TokenScoreJob) and job.prefix.session is not None:
            # How long a session's prefix is, only the thread knows; the context bounds it.
            held = self._held
        wide = 1 << max(0, tokens - 1).bit_length()  # rows of like width are padded to the widest of them
        return Cost(tokens, wide * (wide + held))


def _tier_options(settings: Settings, secret: bytes | None) -> TierOptions | None:
    if settings.redis_url is None:
        return None
    return TierOptions(
        settings.redis_url.get_secret_value(),
        lookup_s=settings.redis_lookup_ms / 1000,
        ttl_s=settings.redis_ttl_s,
        queue_bytes=settings.redis_queue_bytes,
        quota_bytes=settings.redis_tenant_bytes,
        payload=settings.redis_payload,
        secret=secret or b"",
    )
