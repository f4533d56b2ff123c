"""``lenvm serve`` over a scorer that answers at once: what is left is HTTP, the queue and the engine's own Python.

    python benchmarks/_instant.py LAYER PORT [API_WORKERS]

LAYER: ``app`` is the whole application over an engine of no work at all; ``engine`` the real engine over a scorer of no
work; ``bare`` is uvicorn with the smallest application that reads a body.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lenvm.backbones import load_eos_ids, load_tokenizer, resolve_backbone  # noqa: E402
from lenvm.config import LenVMConfig, find_checkpoint  # noqa: E402
from lenvm.scoring.protocol import RowScore, ScoreRow, ScorerStats, StepScores  # noqa: E402
from lenvm_service.engine.engine import Engine  # noqa: E402
from lenvm_service.engine.jobs import Job, Reply, StepJob, folded, rows_of  # noqa: E402
from lenvm_service.engine.loading import EngineOptions, Loaded, _core  # noqa: E402
from lenvm_service.settings import load_settings  # noqa: E402


class _State:
    """A prefix of which nothing is kept."""

    def __init__(self, length: int, bin_logprobs: Any) -> None:
        self.length, self.logit, self.bin_logprobs, self.scored = length, 0.0, bin_logprobs, None

    def close(self) -> None:
        """Nothing to give back."""


class _Pool:
    block_size, max_blocks, free_blocks, used_blocks = 32, 1 << 30, 1 << 30, 0


class InstantScorer:
    """Implements :class:`lenvm.scoring.Scorer` without a model."""

    def __init__(self, config: LenVMConfig, vocab_size: int) -> None:
        self.stats, self.pool, self.gamma, self.bins = ScorerStats(), _Pool(), config.gamma, config.head.bins
        self.context, self.vocab_size, self.layout = 8192, vocab_size, None
        assert self.bins is not None
        self._bins = np.full(self.bins.size, -np.log(self.bins.size))

    def score(self, rows: Sequence[ScoreRow], meanwhile: Callable[[], None] | None = None) -> list[RowScore]:
        """Zeros."""
        if meanwhile is not None:
            meanwhile()
        found = []
        for row in rows:
            length, count = (row.state.length if row.state else 0) + len(row.append), len(row.candidates)
            bins = np.broadcast_to(self._bins, (count, len(self._bins)))
            state = _State(length, self._bins)
            found.append(RowScore(state, np.zeros(1), self._bins[None], np.zeros(count), bins, 0))
        return found

    has_graphs = True  # as on a GPU: steps come as columns

    def step(
        self,
        before: Sequence[Any],
        appended: Sequence[Sequence[int]],
        ids: Any,
        counts: Sequence[int],
        meanwhile: Callable[[StepScores], None] | None = None,
        *,
        utilities: Any = None,
        record: bool = True,
    ) -> StepScores:
        """Zeros, all rows side by side."""
        lengths = [state.length + len(new) for state, new in zip(before, appended, strict=True)]
        numbers = np.zeros((len(counts), max(counts), 1 + len(self._bins)))
        numbers[..., 1:] = self._bins
        found = StepScores(
            lengths,
            np.zeros(len(counts)),
            numbers,
            None,
            counts,
            lambda: [_State(length, self._bins) for length in lengths],
        )
        if meanwhile is not None:
            meanwhile(found)
        return found

    def token_values(self, prompt: Sequence[int], completion: Sequence[int]) -> RowScore:
        """Not asked here."""
        raise NotImplementedError

    def blocks_needed(self, row: ScoreRow) -> int:
        """None."""
        return 0

    def check(self, row: ScoreRow) -> None:
        """Everything is right."""

    def blocks(self, state: Any, first: int = 0) -> list[Any]:
        """Stand-ins."""
        return [object()] * (state.length // _Pool.block_size - first)


class InstantEngine(Engine):
    """The real engine, batching and all."""

    def _scorer(self, config: LenVMConfig, vocab_size: int) -> Any:
        return InstantScorer(config, vocab_size)

    def _load(self) -> None:
        folder = find_checkpoint("smollm2-135m-instruct")
        config = LenVMConfig.load(folder)
        backbone = resolve_backbone(config.backbone.name)
        tokenizer = load_tokenizer(backbone)

        def scorer() -> Any:
            return self._scorer(config, len(tokenizer))

        core = _core(config, tokenizer, backbone, scorer(), EngineOptions())
        assert load_eos_ids(backbone)
        self._loaded = Loaded(core, scorer, "float32", backbone)


class NoEngine(InstantEngine):
    """Answers without a queue or a thread."""

    async def submit(self, jobs: Sequence[Job], **_: Any) -> Reply:
        """The same numbers for everyone."""
        row = {
            "prompt_tokens": 128, "cached_tokens": 0, "value": -0.5, "horizon": 230.7, "mean": 250.3,
            "quantiles": {"0.5": 201, "0.9": 640, "0.95": 800}, "p_exceeds_max_tokens": None, "rank_key": 250.3,
            "saturated": False, "session": "a" * 43, "prediction_id": "a" * 43,
        }  # fmt: skip
        rows = [folded([row] * rows_of(job)) if isinstance(job, StepJob) else row for job in jobs]
        return Reply(rows, queue_ms=0.1, inference_ms=1.0)


async def _bare(scope: Any, receive: Any, send: Any) -> None:
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"600")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b'"' + b"x" * 598 + b'"'})


def main() -> None:
    from lenvm_service import server

    layer, port, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    if layer.startswith("bare"):
        _, _, kind = layer.partition("-")
        http, loop = (kind or "auto-auto").split("-")
        uvicorn.run(_bare, port=port, http=http, loop=loop, access_log=False, log_level="warning", lifespan="off")
        return
    kind = {"app": NoEngine, "engine": InstantEngine}[layer]

    def load(name: str, source: Any, settings: Any, metrics: Any) -> Engine:
        return kind(name, source, EngineOptions(), metrics.engine(name))

    server.serve(load_settings(port=port, log_level="warning", api_workers=workers), load=load)


if __name__ == "__main__":
    main()
