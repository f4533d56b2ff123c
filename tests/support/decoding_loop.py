"""One decoding loop for all drivers: a small model generates for several requests by continuous batching, and a
stand-in for each engine calls the driver as its real host does (``engine_interfaces`` holds what those calls are).

Requests wait for a slot, enter in the middle of others, leave when they end; their rows move as the host moves them.
After the driver comes the host's own sampling, with truncation switched on: it must not change what the driver drew.
"""

from __future__ import annotations

import enum
import sys
import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from tests.support.engine_interfaces import RECORD

Objective = Mapping[str, Any] | None


@dataclass(eq=False)
class Request:
    prompt: list[int]
    objective: Objective
    seed: int
    answer: list[int] = field(default_factory=list)
    ended: bool = False


class Host(Protocol):
    """One engine: rows come in and go, and each step draws a token for every row."""

    def enter(self, request: Request) -> None: ...
    def leave(self, request: Request) -> None: ...
    def rows(self) -> list[Request]: ...
    def draw(self, logits: torch.Tensor) -> list[int]: ...


def decode(
    host: Host,
    model: Callable[[Sequence[Sequence[int]]], torch.Tensor],
    requests: Sequence[Request],
    *,
    ends: Sequence[int],
    max_tokens: int,
    slots: int = 3,
) -> list[list[int]]:
    """Answers with the token that ended them. ``model``: prefixes -> logits [R, V]."""
    waiting, running = list(requests), list[Request]()
    while waiting or running:
        for request in [each for each in running if each.ended]:
            host.leave(request)
            running.remove(request)
        while waiting and len(running) < slots:
            running.append(waiting.pop(0))
            host.enter(running[-1])
        if not running:
            continue
        rows = host.rows()
        assert sorted(map(id, rows)) == sorted(map(id, running))
        drawn = host.draw(model([[*row.prompt, *row.answer] for row in rows]))
        for row, token in zip(rows, drawn, strict=True):
            row.answer.append(token)
            row.ended = token in ends or len(row.answer) == max_tokens
    return [request.answer for request in requests]


def sampled(logits: torch.Tensor, temperature: float) -> list[int]:
    """The host's own sampling, truncated as servers do by default; its randomness is nobody's seed."""
    probs = torch.softmax(logits / temperature, -1)
    best = probs.sort(-1, descending=True)
    best.values[best.values.cumsum(-1) - best.values > 0.8] = 0.0
    return [int(ids[torch.multinomial(p, 1)]) for ids, p in zip(best.indices, best.values, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Modules that stand for the engines' own: base classes with the recorded methods, nothing else.
def abstract(engine: str, path: str, cls: str, concrete: Sequence[str] = ()) -> type:
    """A base class with the recorded methods, abstract but for ``concrete``."""
    (item,) = (item for item in RECORD[engine]["files"] if item["path"] == path)
    names = [name.partition(".")[2] for name in item["methods"] if name.startswith(f"{cls}.")]

    def unimplemented(self: Any, *_: Any) -> Any:
        raise NotImplementedError

    body = {name: abstractmethod(unimplemented) for name in names if name not in concrete}
    return type(cls, (ABC,), body)


def module(monkeypatch: Any, name: str, **members: Any) -> None:
    """Put a module and its parents into ``sys.modules``."""
    parts = name.split(".")
    for at in range(1, len(parts) + 1):
        parent = ".".join(parts[:at])
        if parent not in sys.modules or at == len(parts):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    vars(sys.modules[name]).update(members)


class MoveDirectionality(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


class Group:
    """A tensor-parallel group seen from one of its ranks; ``told`` is what rank 0 broadcast."""

    def __init__(self, rank: int = 0, told: list[Any] | None = None) -> None:
        self.rank_in_group, self.told = rank, [] if told is None else told

    def broadcast_object(self, obj: Any | None = None, src: int = 0) -> Any:
        if self.rank_in_group == src:
            self.told.append(obj)
            return obj
        return self.told.pop(0)


def install_vllm(monkeypatch: Any, *, v2: bool) -> None:
    group = Group()
    module(monkeypatch, "vllm.distributed.parallel_state", get_tp_group=lambda: group)
    v1 = abstract("vllm", "vllm/v1/sample/logits_processor/interface.py", "LogitsProcessor", ["validate_params"])
    module(monkeypatch, "vllm.v1.sample.logits_processor", LogitsProcessor=v1, MoveDirectionality=MoveDirectionality)
    if v2:
        path, kept = "vllm/v1/worker/gpu/sample/logits_processor/interface.py", ["validate_params", "__init__"]
        v2_class = abstract("vllm", path, "LogitsProcessor", [*kept, "add_request", "apply_staged_writes"])
        module(monkeypatch, "vllm.v1.worker.gpu.sample.logits_processor", LogitsProcessor=v2_class)


def install_sglang(monkeypatch: Any, *, disable_overlap_schedule: bool = True) -> None:
    path = "sglang/srt/sampling/custom_logit_processor.py"
    base = abstract("sglang", path, "CustomLogitProcessor", ["to_str", "from_str"])
    base.to_str = classmethod(lambda cls: f"{cls.__module__}:{cls.__name__}")  # type: ignore[attr-defined]
    module(monkeypatch, path[:-3].replace("/", "."), CustomLogitProcessor=base)
    schedule = types.SimpleNamespace(disable_overlap_schedule=disable_overlap_schedule)
    module(monkeypatch, "sglang.srt.runtime_context", get_schedule=lambda: schedule)


def install_llama_cpp(monkeypatch: Any) -> None:
    class LogitsProcessorList(list[Any]):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            for processor in self:
                scores = processor(input_ids, scores)
            return scores

    class StoppingCriteriaList(list[Any]):
        def __call__(self, input_ids: Any, logits: Any) -> bool:
            return any(each(input_ids, logits) for each in self)

    module(
        monkeypatch,
        "llama_cpp",
        LogitsProcessorList=LogitsProcessorList,
        StoppingCriteriaList=StoppingCriteriaList,
    )


# ---------------------------------------------------------------------------------------------------------------------
# vLLM
@dataclass
class VllmParams:
    """The fields of ``SamplingParams`` that the record names."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    all_stop_token_ids: set[int] = field(default_factory=set)
    ignore_eos: bool = False
    extra_args: dict[str, Any] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: Sequence[int]
    added: Sequence[tuple[int, Any, list[int] | None, list[int]]]
    moved: Sequence[tuple[int, int, MoveDirectionality]]


class VllmV1:
    """V1: a dense batch. A row that left is replaced by a new one or by the last row, and now and then two rows swap;
    ``update_state`` comes before every step, then ``apply``."""

    def __init__(self, driver: Any, params: Callable[[Request], VllmParams]) -> None:
        self.processor = driver.LenVMLogitsProcessorV1(None, torch.device("cpu"), False)
        assert not self.processor.is_argmax_invariant()
        self.params, self.batch = params, list[Request | None]()
        self.removed: list[int] = []
        self.added: list[tuple[int, Any, list[int] | None, list[int]]] = []
        self.steps = 0

    def enter(self, request: Request) -> None:
        params = self.params(request)
        self.processor.validate_params(params)
        index = min(self.removed, default=len(self.batch))
        if self.removed:
            self.removed.remove(index)
        self.batch[index : index + 1] = [request]
        self.added.append((index, params, request.prompt, request.answer))

    def leave(self, request: Request) -> None:
        index = self.batch.index(request)
        self.batch[index] = None
        self.removed.append(index)

    def rows(self) -> list[Request]:
        moved = []
        for gap in sorted(self.removed, reverse=True):
            last = len(self.batch) - 1
            if gap < last:
                self.batch[gap] = self.batch[last]
                moved.append((last, gap, MoveDirectionality.UNIDIRECTIONAL))
            self.batch.pop()
        self.steps += 1
        if self.steps % 3 == 0 and len(self.batch) > 1:
            self.batch[0], self.batch[-1] = self.batch[-1], self.batch[0]
            moved.append((0, len(self.batch) - 1, MoveDirectionality.SWAP))
        changed = self.removed or self.added or moved
        update = BatchUpdate(len(self.batch), sorted(self.removed, reverse=True), self.added, moved)
        self.processor.update_state(update if changed else None)
        self.removed, self.added = [], []
        return [row for row in self.batch if row is not None]

    def draw(self, logits: torch.Tensor) -> list[int]:
        return sampled(self.processor.apply(logits), 0.7)


class VllmV2:
    """Model Runner V2: requests keep a slot of a free list, rows come in another order each step, and tokens lie in
    buffers that the runner writes after it has sampled. The first step of a prompt is a chunk that draws nothing."""

    def __init__(self, driver: Any, params: Callable[[Request], VllmParams], slots: int = 4, length: int = 512) -> None:
        tokens = torch.zeros((slots, length), dtype=torch.int32)
        self.states = types.SimpleNamespace(
            all_token_ids=types.SimpleNamespace(gpu=tokens),
            prompt_len=types.SimpleNamespace(np=np.zeros(slots, dtype=np.int32)),
            prefill_len=types.SimpleNamespace(np=np.zeros(slots, dtype=np.int32)),
        )
        config = types.SimpleNamespace(speculative_config=None)
        self.processor = driver.LenVMLogitsProcessorV2(config, self.states)
        self.params, self.free, self.slots = params, list(range(slots)), dict[Request, int]()
        self.order: list[Request] = []

    def enter(self, request: Request) -> None:
        params = self.params(request)
        self.processor.validate_params(params)
        slot = self.slots[request] = self.free.pop()
        self.states.all_token_ids.gpu[slot] = -7  # the last tenant's tokens are no longer anybody's
        self.states.all_token_ids.gpu[slot, : len(request.prompt)] = torch.tensor(request.prompt)
        self.states.prompt_len.np[slot] = self.states.prefill_len.np[slot] = len(request.prompt)
        assert self.processor.add_request(slot, params) == (request.objective is not None)
        self.order.append(request)
        if len(request.prompt) > 1:  # a chunk of the prompt comes first: its row draws nothing
            before = torch.randn(1, 128)
            after = self.processor.apply(before.clone(), self._context([request], [1]))
            assert torch.equal(before, after)

    def leave(self, request: Request) -> None:
        self.free.append(self.slots.pop(request))
        self.order.remove(request)

    def rows(self) -> list[Request]:
        self.order.append(self.order.pop(0))
        self.processor.apply_staged_writes()
        return list(self.order)

    def _context(self, rows: Sequence[Request], lengths: Sequence[int]) -> Any:
        slots = [self.slots[row] for row in rows]
        newest = [[*row.prompt, *row.answer][length - 1] for row, length in zip(rows, lengths, strict=True)]
        return types.SimpleNamespace(
            expanded_idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping_np=np.array(slots, dtype=np.int32),
            input_ids=torch.tensor(newest, dtype=torch.int32),
            pos=torch.tensor(lengths) - 1,
        )

    def draw(self, logits: torch.Tensor) -> list[int]:
        lengths = [len(row.prompt) + len(row.answer) for row in self.order]
        drawn = sampled(self.processor.apply(logits, self._context(self.order, lengths)), 0.7)
        for row, length, token in zip(self.order, lengths, drawn, strict=True):
            self.states.all_token_ids.gpu[self.slots[row], length] = token
        return drawn


# ---------------------------------------------------------------------------------------------------------------------
class Sglang:
    """SGLang: every change of the batch makes a new processor; the rows of guided requests are cut out of the logits,
    handed over with their parameters, and written back. ``__req__`` is a weak reference to the request."""

    class Req:
        def __init__(self, request: Request, sampling: Any, eos: set[int]) -> None:
            self.rid, self.origin_input_ids, self.output_ids = "r", request.prompt, request.answer
            self.eos_token_ids, self.tokenizer, self.sampling_params = eos, None, sampling
            sampling.custom_params = {**sampling.custom_params, "__req__": weakref.proxy(self)}

    def __init__(self, driver: Any, params: Callable[[Request], Any], eos: set[int]) -> None:
        self.driver, self.params, self.eos = driver, params, eos
        self.reqs: dict[Request, Any] = {}
        self.processor: Any = None

    def enter(self, request: Request) -> None:
        sampling = self.params(request)
        self.reqs[request] = self.Req(request, sampling, self.eos)
        self.processor = self.driver.LenVMLogitProcessor()

    def leave(self, request: Request) -> None:
        self.reqs.pop(request)
        self.processor = self.driver.LenVMLogitProcessor()

    def rows(self) -> list[Request]:
        return list(self.reqs)

    def draw(self, logits: torch.Tensor) -> list[int]:
        guided = [at for at, request in enumerate(self.reqs) if request.objective is not None]
        if guided:
            indices = torch.tensor(guided)
            params = [list(self.reqs.values())[at].sampling_params.custom_params for at in guided]
            result = self.processor(logits.index_select(0, indices), params)
            logits.index_copy_(0, indices, result.to(logits.dtype))
        return sampled(logits, 0.7)


class RowByRow:
    """Hosts that hand over one row at a time: ``make(request)`` is its processor, ``call`` hands over a row."""

    def __init__(self, make: Callable[[Request], Any], call: Callable[[Any, list[int], torch.Tensor], None]) -> None:
        self.make, self.call = make, call
        self.processors: dict[Request, Any] = {}

    def enter(self, request: Request) -> None:
        self.processors[request] = self.make(request)

    def leave(self, request: Request) -> None:
        self.processors.pop(request)

    def rows(self) -> list[Request]:
        return list(self.processors)

    def draw(self, logits: torch.Tensor) -> list[int]:
        for (request, processor), row in zip(self.processors.items(), logits, strict=True):
            self.call(processor, [*request.prompt, *request.answer], row)
        return sampled(logits, 0.7)
