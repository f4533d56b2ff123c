"""Answers for the playground: the value model's own backbone generates, the service's engine guides it.

The sampler runs in a thread of its own, one call at a time; each guided step is a request like any other to the engine,
which batches it with those of other callers.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from lenvm._extras import require
from lenvm.backbones import KNOWN_BACKBONES, cache_root
from lenvm.errors import BackboneError, InvalidRequestError, LenVMError
from lenvm.guidance import Objective
from lenvm_service.api.ports import EngineLike
from lenvm_service.engine.jobs import Job, Result
from lenvm_service.engine.loading import LOADING
from lenvm_service.local import JobScorer
from lenvm_service.ui.asking import Prompted

if TYPE_CHECKING:
    from lenvm.decoding import Candidates, Generation, Guide
    from lenvm.rollouts.sampling import LocalGenerator

__all__ = ["Generators", "Progress", "check_reach"]

_SHOW_EVERY_S = 0.25
_STEP_TIMEOUT_S = 120.0
_CANDIDATES = 16  # as ``lenvm generate``: guided and unguided answers choose among the same tokens


@dataclass(frozen=True)
class Progress:
    """Content tokens of each row so far; ``done`` once all have ended."""

    token_ids: list[list[int]]
    done: list[Generation] | None = None


class _StoppedError(Exception):
    """Nobody waits for this generation any more."""


class Generators:
    """The generators of the models that are served, each loaded when it is first wanted.

    Args:
        device: where they run: that of the engines.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._busy = threading.Lock()  # a sampler is not thread-safe, and two at once would only share the cores
        self._loaded: dict[str, LocalGenerator] = {}

    async def stream(
        self, prompted: Prompted, objectives: Sequence[Objective | None], *, seed: int, max_new_tokens: int
    ) -> AsyncIterator[Progress]:
        """One answer for each objective (None: unguided), all from the same seed, with what is there on the way.

        To close the iterator ends the generation at its next step. Raises LenVMError (no generator here), and
        LenVMClientError where the engine refuses a step for good.
        """
        loop = asyncio.get_running_loop()
        changed, stop = asyncio.Event(), threading.Event()
        rows: list[list[int]] = [[] for _ in objectives]
        outcome: list[list[Generation] | BaseException] = []

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(changed.set)

        def work() -> None:
            try:
                outcome.append(self._generate(prompted, objectives, seed, max_new_tokens, loop, stop, rows, tell))
            except BaseException as error:  # reaches the caller
                outcome.append(error)
            tell()

        # Named as the engines' threads are: where it still runs, the process does not wait for it at the end.
        threading.Thread(target=work, name="lenvm-ui", daemon=True).start()
        try:
            yield Progress([[] for _ in objectives])
            while not outcome:
                await changed.wait()
                changed.clear()
                if not outcome:
                    yield Progress([list(row) for row in rows])
                    await asyncio.sleep(_SHOW_EVERY_S)
        finally:
            stop.set()
        (found,) = outcome
        if isinstance(found, BaseException):
            raise found
        yield Progress([generation.token_ids for generation in found], found)

    def _generate(
        self,
        prompted: Prompted,
        objectives: Sequence[Objective | None],
        seed: int,
        max_new_tokens: int,
        loop: asyncio.AbstractEventLoop,
        stop: threading.Event,
        rows: list[list[int]],
        tell: Callable[[], None],
    ) -> list[Generation]:
        """On the thread."""
        with self._busy:
            if stop.is_set():
                raise _StoppedError
            generator = self._generator(prompted.engine.config.backbone.name)
            from lenvm.decoding import Request, SamplingParams
            from lenvm_service.remote import RemoteGuide

            scorer = JobScorer(_engine_run(prompted.engine, loop), prompted.tenant)
            guide = _WatchedGuide(RemoteGuide(scorer, objectives), stop, rows, tell)
            temperature = prompted.engine.config.generator.temperature
            params = SamplingParams(temperature=temperature, top_k=_CANDIDATES, max_new_tokens=max_new_tokens)
            requests = [Request(prompted.token_ids, seed) for _ in objectives]
            return generator.sampler.generate(requests, params, guide=guide)

    def _generator(self, name: str) -> LocalGenerator:
        if name in self._loaded:
            return self._loaded[name]
        require("serve", "torch", "transformers", "safetensors")  # an engine on ONNX Runtime does without
        if name in KNOWN_BACKBONES and not (cache_root() / "backbones" / name / "config.json").is_file():
            raise BackboneError(f"the backbone {name} is not on this machine: run lenvm pull {name}")
        from lenvm.rollouts.sampling import LocalGenerator

        with LOADING:
            self._loaded[name] = LocalGenerator(name, device=self._device, max_rows=2)
        return self._loaded[name]


def check_reach(objective: Objective, max_new_tokens: int) -> None:
    """Raise InvalidRequestError for a target that the answer's limit does not let it reach."""
    if objective.kind in ("equal_to", "at_least") and objective.target is not None:
        if objective.target >= max_new_tokens:
            raise InvalidRequestError(
                f"{objective.target:,} tokens cannot be reached within {max_new_tokens:,}: raise the longest answer",
                param="target",
            )


def _engine_run(engine: EngineLike, loop: asyncio.AbstractEventLoop) -> Callable[[Sequence[Job]], Sequence[Result]]:
    def run(jobs: Sequence[Job]) -> Sequence[Result]:
        future = asyncio.run_coroutine_threadsafe(engine.submit(jobs), loop)
        try:
            return future.result(_STEP_TIMEOUT_S).results
        except LenVMError as error:  # of the whole call: each row's, so that the decoder waits and sends it again
            return [error] * len(jobs)
        finally:
            future.cancel()

    return run


class _WatchedGuide:
    """A guide that tells of every token, and stops the sampler when nobody waits any more."""

    def __init__(self, inner: Guide, stop: threading.Event, rows: list[list[int]], tell: Callable[[], None]) -> None:
        self._inner, self._stop, self._rows, self._tell = inner, stop, rows, tell
        self.start, self.finish = inner.start, inner.finish

    def log_weights(self, rows: Sequence[int], candidates: Candidates) -> NDArray[Any]:
        if self._stop.is_set():
            raise _StoppedError
        return self._inner.log_weights(rows, candidates)

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        self._inner.advance(rows, tokens)
        for row, token in zip(rows, tokens, strict=True):
            self._rows[row].append(int(token))
        self._tell()
