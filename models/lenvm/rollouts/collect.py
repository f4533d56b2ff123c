"""Rollouts from an endpoint: which samples are missing, many requests in flight, answers stored as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lenvm.backbones import encode_chat, load_eos_ids, load_tokenizer, resolve_backbone, tokenizer_sha256
from lenvm.decoding import SamplingParams
from lenvm.errors import (
    DataError,
    EndpointError,
    EndpointUnavailableError,
    InvalidRequestError,
    LenVMError,
    PromptRefusedError,
)
from lenvm.prompts import Prompt
from lenvm.rollouts.endpoint import Answer, Endpoint, EndpointSettings, TokenSource
from lenvm.rollouts.records import Key, Rollout, RolloutSet
from lenvm.rollouts.sampling import stream_seed
from lenvm.rollouts.store import RolloutWriter, completed, read_rollouts, stored_generator

__all__ = ["EndpointGenerator", "EndpointRun", "rollouts_from_endpoint"]

_SOURCES: tuple[TokenSource, ...] = ("server", "server-logprobs", "text")
_REFUSED_AT_FIRST = 16  # prompts refused before any was answered: the request is wrong, not the prompts
_FAILED_IN_A_ROW = 4  # prompts that no retry brought an answer to, with none in between: the server is gone


class EndpointGenerator:
    """A generator behind HTTP, and the tokenizer that reads its prompts and answers.

    Args:
        settings: where and how to ask.
        tokenizer: name, folder or hub id of the backbone whose tokenizer the server's model has.
        token_ids: ``server`` wants them from the server, ``text`` encodes its text again, ``auto`` takes the server's
            where it gives any. Encoding again may give other tokens than were sampled, seldom many.
    """

    def __init__(
        self, settings: EndpointSettings, *, tokenizer: str, token_ids: Literal["auto", "server", "text"] = "auto"
    ) -> None:
        folder = resolve_backbone(tokenizer)
        self.settings = settings
        self.wanted = token_ids
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer_sha256 = tokenizer_sha256(folder)
        self.eos_ids = load_eos_ids(folder)

    def describe(self, params: SamplingParams, source: TokenSource) -> dict[str, Any]:
        """What identifies the policy and how its answers were read; no credentials."""
        return {
            "backbone": self.settings.model,
            "endpoint": self.settings.base,
            "prompt_format": self.settings.api,
            "tokenizer_sha256": self.tokenizer_sha256,
            "token_ids": source,
            "extra": dict(self.settings.extra),
            **asdict(params),
        }

    def sources(self, folder: Path) -> tuple[TokenSource, ...]:
        """Ways to get token ids, best first; one only where the folder was begun with it."""
        allowed = {"auto": _SOURCES, "server": _SOURCES[:2], "text": _SOURCES[2:]}[self.wanted]
        begun = (stored_generator(folder) or {}).get("token_ids")
        if begun is None:
            return allowed
        if begun not in allowed:
            raise DataError(f"{folder} was begun with token ids from {begun!r}, not {self.wanted!r}: choose another")
        return (begun,)


@dataclass
class EndpointRun:
    """What came of a run. ``refused``: prompt id -> why the server (or the chat template) would not have it;
    ``failed``: samples that no retry brought, to be asked for again; ``notes``: what else should be known."""

    rollouts: RolloutSet
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    prompt: Prompt
    prompt_ids: list[int]
    seed: int

    @property
    def key(self) -> Key:
        return self.prompt.id, self.seed


def rollouts_from_endpoint(
    generator: EndpointGenerator,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    samples: int,
    params: SamplingParams,
    seed: int = 0,
    max_prompt_tokens: int = 1024,
    flush_s: float = 30.0,
    about: dict[str, Any] | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> EndpointRun:
    """``samples`` answers of each prompt from an endpoint, into ``folder``; a rerun goes on where one ended or was
    killed, and asks again only for what was not yet durable (``flush_s`` seconds of answers, at most).

    Arguments are those of ``sample_rollouts``. Raises EndpointAuthError or EndpointError where no prompt can be
    answered, EndpointUnavailableError where the server is gone, DataError for a folder of another generator; what was
    answered before stays.
    """
    run = _Run(generator, folder, params, {"seed": seed, **(about or {})}, flush_s, on_done)
    jobs = run.plan(prompts, samples=samples, seed=seed, max_prompt_tokens=max_prompt_tokens)
    try:
        asyncio.run(run.collect(jobs))
    except BaseExceptionGroup as group:
        raise _first(group) from None
    if not completed(folder):
        reason = next(iter(run.refused.values()), "no prompt is left to ask")
        raise EndpointError(f"the endpoint answered none of the prompts ({reason})")
    rollouts = read_rollouts(folder).with_keys(run.wanted)  # not what an earlier call asked for beside it
    return EndpointRun(rollouts, run.refused, run.failed, run.notes())


class _Run:
    """One call of ``rollouts_from_endpoint``."""

    def __init__(
        self,
        generator: EndpointGenerator,
        folder: Path,
        params: SamplingParams,
        about: dict[str, Any],
        flush_s: float,
        on_done: Callable[[int, int], None] | None,
    ) -> None:
        self.generator, self.folder, self.params = generator, folder, params
        self.about, self.flush_s, self.on_done = about, flush_s, on_done
        self.refused: dict[str, str] = {}
        self.failed: dict[Key, str] = {}
        self.wanted: set[Key] = set()
        self.too_long = 0
        self.answered = 0
        self._failing: set[str] = set()
        self._skipped: set[str] = set()
        self._other_prompts: set[str] = set()
        self._other_lengths = 0

    def plan(self, prompts: Sequence[Prompt], *, samples: int, seed: int, max_prompt_tokens: int) -> list[_Job]:
        """Every sample that is wanted, once; prompts that the template refuses or that are too long are set aside.

        The first sample of every prompt comes first: one bad prompt holds nothing up, and a part of a run is a sample.
        """
        encoded: dict[str, tuple[Prompt, list[int]]] = {}
        for prompt in prompts:
            try:
                ids = encode_chat(self.generator.tokenizer, prompt.conversation)
            except InvalidRequestError as error:
                self.refused[prompt.id] = str(error)
                continue
            if len(ids) <= max_prompt_tokens:
                encoded[prompt.id] = prompt, ids
            else:
                self.too_long += 1
        jobs = [
            _Job(prompt, ids, stream_seed(prompt.id, sample, seed))
            for sample in range(samples)
            for prompt, ids in encoded.values()
        ]
        self.wanted = {job.key for job in jobs}
        return jobs

    async def collect(self, jobs: list[_Job]) -> None:
        """Probe for token ids, then ask for everything that the folder lacks."""
        begun = completed(self.folder)
        missing = iter([job for job in jobs if job.key not in begun])
        sources = self.generator.sources(self.folder)
        async with Endpoint(self.generator.settings, self.params) as endpoint:
            first = await self._probe(endpoint, missing, sources) if len(sources) > 1 else None
            if len(sources) > 1 and first is None:
                return
            source = first[2] if first else sources[0]
            with RolloutWriter(self.folder, self._describe(source), flush_s=self.flush_s) as writer:
                if self.on_done:
                    self.on_done(len(begun & self.wanted), 0)
                if first:
                    self._store(writer, first[0], first[1], source)
                async with asyncio.TaskGroup() as workers:
                    flusher = workers.create_task(self._flush(writer))
                    tasks = [
                        workers.create_task(self._work(endpoint, missing, writer, source))
                        for _ in range(self.generator.settings.concurrency)
                    ]
                    await asyncio.wait(tasks)
                    flusher.cancel()

    def _describe(self, source: TokenSource) -> dict[str, Any]:
        return self.generator.describe(self.params, source) | self.about

    async def _probe(
        self, endpoint: Endpoint, jobs: Iterator[_Job], sources: Sequence[TokenSource]
    ) -> tuple[_Job, Answer, TokenSource] | None:
        """The first answer, and the best source of token ids that the server has; None where no prompt was answered.

        A server may ignore fields that it does not know, or refuse them, which looks like a refused prompt.
        """
        for job in jobs:
            if job.prompt.id in self._skipped:
                continue
            reason, answered = "", False
            for source in sources:
                try:
                    answer = await self._ask(endpoint, job, source)
                except PromptRefusedError as error:
                    reason = str(error)
                    continue
                answered = True
                if source == "text" or answer.token_ids is not None:
                    return job, answer, source
            if answered:
                raise EndpointError("the server gives no token ids: let its text be encoded again (token ids: text)")
            self._refuse(job, reason)
        return None

    async def _work(self, endpoint: Endpoint, jobs: Iterator[_Job], writer: RolloutWriter, source: TokenSource) -> None:
        for job in jobs:  # one iterator for all workers: each job is taken once
            if job.prompt.id in self._skipped:
                continue
            try:
                answer = await self._ask(endpoint, job, source)
            except PromptRefusedError as error:
                self._refuse(job, str(error))
            except EndpointUnavailableError as error:
                self.failed[job.key] = str(error)
                self._failing.add(job.prompt.id)
                if len(self._failing) >= _FAILED_IN_A_ROW:
                    raise EndpointUnavailableError(f"{error}; run the same command again to go on") from None
            else:
                self._failing.clear()
                self._store(writer, job, answer, source)

    async def _ask(self, endpoint: Endpoint, job: _Job, source: TokenSource) -> Answer:
        conversation = job.prompt.conversation
        messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
        return await endpoint.sample(messages, job.prompt_ids, job.seed, source)

    async def _flush(self, writer: RolloutWriter) -> None:
        while True:  # answers that are followed by none for long become durable too
            await asyncio.sleep(self.flush_s)
            writer.flush()

    def _refuse(self, job: _Job, reason: str) -> None:
        self.refused.setdefault(job.prompt.id, reason)
        self._skipped.add(job.prompt.id)
        if not self.answered and len(self.refused) >= _REFUSED_AT_FIRST:
            raise EndpointError(f"the endpoint refused the first {len(self.refused)} prompts: {reason}")

    def _store(self, writer: RolloutWriter, job: _Job, answer: Answer, source: TokenSource) -> None:
        read = self._read(answer, source)
        if read is None:
            self.refused.setdefault(job.prompt.id, f"the answer ended for the reason {answer.finish_reason!r}")
            return
        token_ids, finished = read
        self.answered += 1
        prompt_ids = answer.prompt_ids or job.prompt_ids
        if prompt_ids != job.prompt_ids or answer.prompt_tokens not in (None, len(prompt_ids)):
            self._other_prompts.add(job.prompt.id)
        if source == "text" and answer.completion_tokens not in (None, len(token_ids), len(token_ids) + finished):
            self._other_lengths += 1
        writer.add(Rollout(job.prompt.id, job.prompt.domain, prompt_ids, token_ids, finished, job.seed))
        if self.on_done:
            self.on_done(1, len(token_ids))

    def _read(self, answer: Answer, source: TokenSource) -> tuple[list[int], bool] | None:
        """Content tokens, and whether the answer ended by itself; None for an end that is neither stop nor length."""
        if answer.finish_reason not in ("stop", "length"):
            return None
        finished = answer.finish_reason == "stop"
        if source == "text":
            encoded: Any = self.generator.tokenizer.encode(answer.text, add_special_tokens=False)
            return [int(token) for token in encoded], finished
        if answer.token_ids is None:
            raise EndpointError("the server stopped giving token ids: choose another folder, or start it as it was")
        ends = [index for index, token in enumerate(answer.token_ids) if token in self.generator.eos_ids]
        return (answer.token_ids[: ends[0]], True) if ends else (answer.token_ids, finished)

    def notes(self) -> list[str]:
        """What the caller should tell."""
        notes = []
        if self.too_long:
            notes.append(f"{self.too_long} prompts are longer than the limit and were left out")
        if self._other_prompts:
            notes.append(
                f"{len(self._other_prompts)} prompts have other token ids on the server than by this tokenizer: "
                "its chat template is another one"
            )
        if self._other_lengths:
            notes.append(
                f"{self._other_lengths} answers have another length once their text is encoded again: a server that "
                "gives token ids is exact"
            )
        return notes


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended the workers: ours before what it caused."""
    leaves: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack.extend(error.exceptions)
        else:
            leaves.append(error)
    return next((error for error in leaves if isinstance(error, LenVMError)), leaves[0])
