"""The playground's work on a tiny model: the engine that serves requests predicts, scores and guides."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lenvm.backbones import KNOWN_BACKBONES
from lenvm.decoding import Request, SamplingParams
from lenvm.errors import BackboneError, InvalidRequestError
from lenvm.guidance import Objective
from lenvm.guides import ValueGuide
from lenvm.rollouts.sampling import LocalGenerator
from lenvm.scoring import TorchScorer
from lenvm_service.api.service import Service
from lenvm_service.engine import Engine, EngineOptions, PredictJob, Prefix
from lenvm_service.errors import OverloadedError
from lenvm_service.metrics import Metrics
from lenvm_service.settings import Settings
from lenvm_service.ui.asking import encode, predict, score_ids, score_text
from lenvm_service.ui.generation import Generators, Progress, check_reach
from lenvm_service.ui.handlers import Controls, Handlers
from tests.support.fake_engine import FakeEngine

PROMPT = "how long is a piece of string?"
CONTROLS = Controls("equal_to", "posterior", 12.0, 0.01, -20, 0.05, 1)


@contextmanager
def started(folder: Path) -> Iterator[Engine]:
    engine = Engine("tiny", folder, EngineOptions(secret=b"k" * 16))
    engine.start()
    end = time.monotonic() + 60
    while engine.state == "loading":
        assert time.monotonic() < end
        time.sleep(0.01)
    assert engine.failure is None
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with started(tiny_checkpoint) as engine:
        yield engine


@pytest.fixture
def service(engine: Engine) -> Service:
    return Service({"tiny": engine}, Settings(), Metrics())


@pytest.fixture
def handlers(service: Service) -> Handlers:
    return Handlers(service)


async def everything(parts: Any) -> list[Any]:
    return [part async for part in parts]


def test_the_distribution_is_the_one_that_the_quantiles_are_of(service: Service) -> None:
    async def ask() -> tuple[dict[str, Any], dict[str, Any]]:
        prompted = await encode(service, "", PROMPT, "")
        return await predict(prompted), await score_ids(prompted, [10, 11], eos=True)

    row, scores = asyncio.run(ask())
    found = row["distribution"]
    assert sum(found["probability"]) == pytest.approx(1)
    assert (found["lo"][0], found["hi"][-1]) == (1, 65)
    ends = dict(zip(found["hi"], found["probability"], strict=True))
    median = row["quantiles"]["0.5"]
    below = sum(share for hi, share in ends.items() if hi < median)
    assert below < 0.5 <= below + sum(share for hi, share in ends.items() if hi >= median)
    assert scores["values"][0] == pytest.approx(row["value"], abs=1e-5)
    assert len(scores["length_shifts"]) == 3


def test_a_row_has_the_distribution_only_where_it_was_asked_for(service: Service, engine: Engine) -> None:
    async def ask() -> list[Any]:
        prefix = Prefix((await encode(service, None, PROMPT, "")).token_ids)
        return (await engine.submit([PredictJob(prefix), PredictJob(prefix, distribution=True)])).results

    plain, full = asyncio.run(ask())
    assert set(full) - set(plain) == {"distribution"}


def test_views_of_a_prompt_and_of_a_completion(handlers: Handlers) -> None:
    page = asyncio.run(handlers.predict("tiny", PROMPT, "team"))
    assert 'class="lv-plot"' in page
    assert "at temperature 0.7" in page
    page = asyncio.run(handlers.score("tiny", PROMPT, "as long\nas it is", True, "team"))
    assert page.count("<small>") == len("as long\nas it is") + 1  # a character a token, and the end
    assert "ended by itself" in page
    assert "not ended" in asyncio.run(handlers.score("tiny", PROMPT, "as", False, "team"))


@pytest.mark.parametrize(
    ("model", "prompt", "said"),
    [("other", PROMPT, "no such model"), ("tiny", " ", "the prompt is empty"), ("tiny", "x" * 9000, "shorten it"),
     ("tiny", "x" * 2000, "shorten it")],
)  # fmt: skip
def test_what_cannot_be_served_is_said(handlers: Handlers, model: str, prompt: str, said: str) -> None:
    async def ask() -> list[str]:
        guided = await everything(handlers.guide(model, prompt, CONTROLS, 0, 16, ""))
        generated = await everything(handlers.generate(model, prompt, 0, 16, ""))
        return [
            await handlers.predict(model, prompt, ""),
            await handlers.score(model, prompt, "x", True, ""),
            guided[-1],
            generated[-1][2],
        ]

    for shown in asyncio.run(ask()):
        assert 'role="alert"' in shown
        assert said in shown


def test_a_process_that_shuts_down_takes_nothing(handlers: Handlers) -> None:
    handlers.service.draining = True
    assert "shutting down" in asyncio.run(handlers.predict("tiny", PROMPT, ""))


def test_what_nobody_foresaw_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.fail = RuntimeError("a secret of the inside")
    handlers = Handlers(Service({"fake": engine}, Settings(), Metrics()))
    shown = asyncio.run(handlers.predict("fake", PROMPT, ""))
    assert "its log has the cause" in shown
    assert "secret" not in shown
    assert "a secret of the inside" in caplog.text


def test_the_tenant_goes_along() -> None:
    engine = FakeEngine()
    service = Service({"fake": engine}, Settings(), Metrics())

    async def ask() -> None:
        await predict(await encode(service, "fake", PROMPT, "team"))

    asyncio.run(ask())
    ((jobs, _, _),) = engine.calls
    assert [job.prefix.tenant for job in jobs] == ["team"]  # type: ignore[union-attr]


def test_guided_as_without_the_service(
    service: Service, tiny_checkpoint: Path, tiny_backbone: Path, tiny_model: Any
) -> None:
    """A thread, the engine's queue and a session handle a step: the answers are those of the scorer used directly."""
    objective = Objective(kind="equal_to", target=12)

    async def ask() -> Any:
        prompted = await encode(service, "tiny", PROMPT, "team")
        stream = Generators("cpu").stream(prompted, [objective, None], seed=3, max_new_tokens=40)
        return prompted.token_ids, await everything(stream)

    ids, parts = asyncio.run(ask())
    assert parts[0] == Progress([[], []])
    assert all(part.done is None for part in parts[:-1])
    sampler = LocalGenerator(str(tiny_backbone), max_rows=2).sampler
    expected = sampler.generate(
        [Request(ids, 3), Request(ids, 3)],
        SamplingParams(temperature=0.7, top_k=16, max_new_tokens=40),
        guide=ValueGuide(TorchScorer(tiny_model), [objective, None]),
    )
    assert [answer.token_ids for answer in parts[-1].done] == [answer.token_ids for answer in expected]
    for answer, other in zip(parts[-1].done, expected, strict=True):
        assert answer.text_cost == pytest.approx(other.text_cost, abs=1e-3)
    assert parts[-1].done[0].text_cost != pytest.approx(0, abs=1e-6)
    assert parts[-1].token_ids == [answer.token_ids for answer in expected]


def test_a_guided_answer_is_shown_beside_the_unguided_one(handlers: Handlers) -> None:
    shown = asyncio.run(everything(handlers.guide("tiny", PROMPT, CONTROLS, 3, 40, "")))
    assert 'aria-busy="true"' in shown[0]
    assert "equal to 12 tokens, posterior" in shown[-1]
    assert shown[-1].count('class="lv-tokens"') == 2
    shown = asyncio.run(everything(handlers.generate("tiny", PROMPT, 3, 40, "")))
    text, ended, page = shown[-1]
    assert text
    assert page.count('class="lv-tokens"') == 1
    assert ended == ("ended by itself" in page)


def test_all_views_over_onnx_runtime(handlers: Handlers, tiny_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine needs no torch; without it, generating is refused with the command that brings it."""

    async def ask(handlers: Handlers) -> list[str]:
        guided = await everything(handlers.guide("tiny", PROMPT, CONTROLS, 3, 40, ""))
        scored = await handlers.score("tiny", PROMPT, "as long", True, "")
        return [guided[-1], scored, await handlers.predict("tiny", PROMPT, "")]

    expected = asyncio.run(ask(handlers))
    with started(tiny_export) as engine:
        service = Service({"tiny": engine}, Settings(), Metrics())
        found = asyncio.run(ask(Handlers(service)))
        monkeypatch.setitem(sys.modules, "torch", None)
        without = asyncio.run(ask(Handlers(service)))
    assert "<td>" in found[0]
    assert _text(found[0]) == _text(expected[0])
    assert without[1:] == found[1:]
    assert "pip install &#x27;lenvm[serve]&#x27;" in without[0]


def _text(page: str) -> list[str]:
    """The tokens that are shown: what was generated."""
    return re.findall(r"<b>(.*?)</b>", page)


@pytest.mark.parametrize(
    ("controls", "seed", "limit", "said"),
    [
        (CONTROLS, 0, 12, "cannot be reached within 12"),
        (CONTROLS, 0, 100_000, "the longest answer must be"),
        (CONTROLS, -1, 40, "the seed must be"),
        (CONTROLS, 0.5, 40, "the seed must be"),
        (Controls("equal_to", "posterior", None, 0, 0, 0.05, 1), 0, 40, "the target must be"),
        (Controls("sideways", "posterior", 12, 0, 0, 0.05, 1), 0, 40, "must be one of"),
        (Controls("tilt", "posterior", 12, "much", 0, 0.05, 1), 0, 40, "lambda"),
    ],
)
def test_controls_that_make_no_sense(handlers: Handlers, controls: Controls, seed: Any, limit: Any, said: str) -> None:
    (shown,) = asyncio.run(everything(handlers.guide("tiny", PROMPT, controls, seed, limit, "")))
    assert 'role="alert"' in shown
    assert said in shown


def test_targets_within_reach() -> None:
    check_reach(Objective(kind="at_most", target=100), 40)
    check_reach(Objective(kind="equal_to", target=39), 40)
    with pytest.raises(InvalidRequestError, match="raise the longest answer"):
        check_reach(Objective(kind="at_least", target=40), 40)


def test_nobody_waits_any_more(service: Service) -> None:
    """The sampler's thread ends at its next step, and the next generation is not kept waiting by it."""
    generators = Generators("cpu")

    async def ask() -> Any:
        prompted = await encode(service, "tiny", PROMPT, "")
        async with aclosing(generators.stream(prompted, [None], seed=1, max_new_tokens=400)) as parts:
            async for part in parts:
                assert part.done is None
                break
        return (await everything(generators.stream(prompted, [None], seed=1, max_new_tokens=3)))[-1]

    assert len(asyncio.run(ask()).done) == 1
    end = time.monotonic() + 60
    while any(thread.name == "lenvm-ui" for thread in threading.enumerate()):
        assert time.monotonic() < end, "a sampler still runs"
        time.sleep(0.01)


def test_an_engine_that_is_full_is_asked_again_and_then_said(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from lenvm_client import GuidedDecoder

    waits: list[float] = []
    monkeypatch.setattr(GuidedDecoder, "_sleep", staticmethod(waits.append))
    handlers = Handlers(service)

    async def refuse(*_: Any, **__: Any) -> Any:
        raise OverloadedError("the queue is full", retry_after_s=2.0)

    async def ask() -> list[str]:
        prompted = await encode(service, "tiny", PROMPT, "")
        monkeypatch.setattr(prompted.engine, "submit", refuse)
        return await everything(handlers.guide("tiny", PROMPT, CONTROLS, 0, 40, ""))

    assert "the queue is full" in asyncio.run(ask())[-1]
    assert waits == [2.0, 2.0]


def test_a_backbone_that_is_not_here_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_CACHE", str(tmp_path))
    (name, *_) = KNOWN_BACKBONES
    with pytest.raises(BackboneError, match=f"run lenvm pull {name}"):
        Generators("cpu")._generator(name)


def test_completions_are_bounded(service: Service) -> None:
    async def ask() -> None:
        prompted = await encode(service, "tiny", PROMPT, "")
        await score_text(service, prompted, "x" * 1500, eos=False)

    with pytest.raises(InvalidRequestError, match="the completion has 1,500 tokens"):
        asyncio.run(ask())
