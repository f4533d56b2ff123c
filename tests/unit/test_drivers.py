"""Every driver in the decoding loop of its host: it draws the tokens that ``hf`` draws with the same seeds."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lenvm_client import CandidateInput, GuidedDecoder, GuidedRow, InvalidRequestError, ServiceTimeoutError
from lenvm_client.drivers import hf
from lenvm_client.drivers._host import (
    DeadlineScorer,
    GuidedRequest,
    candidates,
    decoder_from_environment,
    parse_objective,
)
from tests.support import decoding_loop as loops
from tests.support.engine_interfaces import RECORD
from tests.unit.client_fakes import FakeScorer

EOS, STOP = 2, 40
PROMPTS = [[1, 30, 31, 32, 33], [1, 50], [1, 60, 61, 62], [1, 70, 51], [1, 33]]
OBJECTIVES: list[Mapping[str, Any]] = [
    {"kind": "tilt", "lambda": 0.5},
    {"kind": "equal_to", "target": 9},
    {"kind": "at_most", "target": 7},
    {"kind": "scale", "factor": 0.5},
    {"kind": "tilt", "lambda": 0.5},
]
SEEDS = [11, 12, 13, 14, 15]
LENGTH, TOP_K, TEMPERATURE = 20, 6, 0.8
ENDS = (EOS, STOP)


@pytest.fixture(scope="module")
def model(tiny_backbone: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32)


@pytest.fixture(scope="module")
def next_logits(model: Any) -> Callable[[Sequence[Sequence[int]]], torch.Tensor]:
    def run(prefixes: Sequence[Sequence[int]]) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([model(torch.tensor([list(prefix)])).logits[0, -1] for prefix in prefixes])

    return run


@pytest.fixture(scope="module", params=[TEMPERATURE, 0.0], ids=["sampled", "greedy"])
def temperature(request: pytest.FixtureRequest) -> float:
    return float(request.param)


@pytest.fixture(scope="module")
def expected(model: Any, temperature: float) -> list[list[int]]:
    """What ``hf`` generates, each prompt alone."""
    out = []
    for prompt, objective, seed in zip(PROMPTS, OBJECTIVES, SEEDS, strict=True):
        sequences, _ = hf.generate(
            model,
            FakeScorer(),
            torch.tensor([prompt]),
            objectives=objective,
            temperature=temperature,
            top_k=TOP_K,
            seeds=[seed] if temperature else None,
            eos_token_id=EOS,
            stop_token_ids=[STOP],
            max_new_tokens=LENGTH,
            pad_token_id=0,
        )
        out.append(sequences[0, len(prompt) :].tolist())
    assert len({len(answer) for answer in out}) > 2
    assert any(answer[-1] in ENDS for answer in out)
    return out


@pytest.fixture
def scorer() -> FakeScorer:
    return FakeScorer()


@pytest.fixture
def decoder(scorer: FakeScorer) -> GuidedDecoder:
    return GuidedDecoder(scorer, (), on_error="log")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, decoder: GuidedDecoder) -> Iterator[Callable[[str], Any]]:
    """A driver imported anew, beside the stand-ins that are installed, on this test's decoder."""

    def run(name: str) -> Any:
        full = f"lenvm_client.drivers.{name}"
        monkeypatch.delitem(sys.modules, full, raising=False)
        driver = importlib.import_module(full)
        if hasattr(driver, "_decoder"):
            monkeypatch.setattr(driver, "_decoder", lambda: decoder)
        return driver

    before = {name for name in sys.modules if name.startswith("lenvm_client.drivers.")}
    yield run
    for name in {name for name in sys.modules if name.startswith("lenvm_client.drivers.")} - before:
        del sys.modules[name]


def requests() -> list[loops.Request]:
    return [loops.Request(list(p), o, s) for p, o, s in zip(PROMPTS, OBJECTIVES, SEEDS, strict=True)]


def vllm_params(temperature: float, **changes: Any) -> Callable[[loops.Request], loops.VllmParams]:
    def make(request: loops.Request) -> loops.VllmParams:
        fields: dict[str, Any] = {
            "temperature": temperature,
            "top_k": TOP_K,
            "seed": request.seed,
            "stop_token_ids": [STOP],
            "all_stop_token_ids": {EOS, STOP},
            "extra_args": None if request.objective is None else {"lenvm": request.objective},
        }
        return loops.VllmParams(**{**fields, **changes})

    return make


def guided_request(request: loops.Request, temperature: float) -> GuidedRequest:
    return GuidedRequest(
        objective=request.objective, end_ids=ENDS, temperature=temperature, top_k=TOP_K, seed=request.seed
    )


def one_call_a_step(scorer: FakeScorer, answers: Sequence[Sequence[int]]) -> bool:
    """Every row after its first is one token on a known session, and rows share calls."""
    rows = [row for call in scorer.calls for row in call]
    first = [row for row in rows if row.session is None]
    later_once = all(len(row.append) == 1 for row in rows if row.session is not None)
    return len(first) == len(PROMPTS) and later_once and len(scorer.calls) < sum(map(len, answers))


class TestTokensAreThoseOfHf:
    @pytest.mark.parametrize("version", ["V1", "V2"])
    def test_vllm(
        self,
        version: str,
        monkeypatch: pytest.MonkeyPatch,
        load: Callable[[str], Any],
        next_logits: Any,
        expected: list[list[int]],
        temperature: float,
        scorer: FakeScorer,
    ) -> None:
        loops.install_vllm(monkeypatch, v2=version == "V2")
        driver = load("vllm")
        host = getattr(loops, f"Vllm{version}")(driver, vllm_params(temperature))
        answers = loops.decode(host, next_logits, requests(), ends=ENDS, max_tokens=LENGTH)
        assert answers == expected
        assert one_call_a_step(scorer, answers)
        assert driver.LenVMLogitsProcessor is getattr(driver, f"LenVMLogitsProcessor{version}")

    def test_vllm_request_form(
        self,
        monkeypatch: pytest.MonkeyPatch,
        load: Callable[[str], Any],
        next_logits: Any,
        expected: list[list[int]],
        temperature: float,
        decoder: GuidedDecoder,
    ) -> None:
        loops.install_vllm(monkeypatch, v2=False)
        driver = load("vllm")

        def make(request: loops.Request) -> Any:
            process = driver.request_logits_processor(decoder, guided_request(request, temperature))
            return lambda row: row.copy_(process(request.prompt, request.answer, row))

        host = loops.RowByRow(make, lambda process, _, row: process(row))
        assert loops.decode(host, next_logits, requests(), ends=ENDS, max_tokens=LENGTH) == expected

    def test_sglang(
        self,
        monkeypatch: pytest.MonkeyPatch,
        load: Callable[[str], Any],
        next_logits: Any,
        expected: list[list[int]],
        temperature: float,
        scorer: FakeScorer,
    ) -> None:
        loops.install_sglang(monkeypatch)
        driver = load("sglang")
        host = loops.Sglang(driver, lambda request: sglang_sampling(driver, request, temperature), {EOS})
        answers = loops.decode(host, next_logits, requests(), ends=ENDS, max_tokens=LENGTH)
        assert answers == expected
        assert one_call_a_step(scorer, answers)

    def test_dynamo(
        self, load: Callable[[str], Any], next_logits: Any, expected: Any, temperature: float, decoder: GuidedDecoder
    ) -> None:
        driver = load("dynamo")
        host = loops.RowByRow(
            lambda request: driver.LenVMLogitsProcessor(decoder, guided_request(request, temperature)),
            lambda processor, ids, row: processor(ids, row),
        )
        assert loops.decode(host, next_logits, requests(), ends=ENDS, max_tokens=LENGTH) == expected

    def test_llama_cpp(
        self,
        monkeypatch: pytest.MonkeyPatch,
        load: Callable[[str], Any],
        next_logits: Any,
        expected: list[list[int]],
        temperature: float,
        decoder: GuidedDecoder,
    ) -> None:
        loops.install_llama_cpp(monkeypatch)
        driver = load("llama_cpp")

        def call(processor: Any, ids: list[int], row: torch.Tensor) -> None:
            scores = row.numpy()
            scores[:] = processor(np.array(ids, dtype=np.intc), scores)
            assert processor.stop(np.array(ids, dtype=np.intc), scores) == (int(scores.argmax()) in ENDS)

        host = loops.RowByRow(
            lambda request: driver.LenVMLogitsProcessor(decoder, guided_request(request, temperature)), call
        )
        assert loops.decode(host, next_logits, requests(), ends=ENDS, max_tokens=LENGTH) == expected


def sglang_sampling(driver: Any, request: loops.Request, temperature: float) -> Any:
    """As SGLang holds it: temperature 0 has become top-k 1 at temperature 1."""
    fields = {} if request.objective is None else driver.request_fields(request.objective, top_k=TOP_K)
    assert not fields or fields["custom_logit_processor"].endswith("drivers.sglang:LenVMLogitProcessor")
    return types.SimpleNamespace(
        temperature=temperature or 1.0,
        top_k=(1 << 30) if temperature else 1,
        top_p=1.0,
        min_p=0.0,
        sampling_seed=request.seed,
        stop_token_ids={STOP},
        ignore_eos=False,
        custom_params=fields.get("sampling_params", {}).get("custom_params", {}),
    )


class TestHosts:
    """What a host must be spared."""

    def test_unguided_rows_are_left_alone(
        self, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any], scorer: FakeScorer
    ) -> None:
        loops.install_vllm(monkeypatch, v2=True)
        driver = load("vllm")
        free = loops.Request([1, 5], None, 1)
        for host in (loops.VllmV1(driver, vllm_params(0.8)), loops.VllmV2(driver, vllm_params(0.8))):
            host.enter(free)
            host.rows()
            logits = torch.randn(1, 128)
            if isinstance(host, loops.VllmV1):
                out = host.processor.apply(logits.clone())
            else:
                out = host.processor.apply(logits.clone(), host._context([free], [2]))
            assert torch.equal(out, logits)
        assert scorer.calls == []

    def test_a_bad_objective_is_a_bad_request(
        self, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]
    ) -> None:
        loops.install_vllm(monkeypatch, v2=True)
        driver = load("vllm")
        for cls in (driver.LenVMLogitsProcessorV1, driver.LenVMLogitsProcessorV2):
            cls.validate_params(loops.VllmParams(extra_args=None))
            cls.validate_params(loops.VllmParams(extra_args={"lenvm": '{"kind": "equal_to", "target": 5}'}))
            for bad in ("{", {"kind": "shorter"}, {"kind": "tilt", "lambda": float("nan")}, 7):
                with pytest.raises(ValueError, match="lenvm must"):
                    cls.validate_params(loops.VllmParams(extra_args={"lenvm": bad}))
        penalised = loops.VllmParams(extra_args={"lenvm": OBJECTIVES[0]}, presence_penalty=1.0)
        with pytest.raises(ValueError, match="presence_penalty cannot be used"):
            driver.LenVMLogitsProcessorV1.validate_params(penalised)
        driver.LenVMLogitsProcessorV2.validate_params(penalised)  # there they come before us
        with pytest.raises(ValueError, match="speculative"):
            driver.LenVMLogitsProcessorV2(types.SimpleNamespace(speculative_config=object()), None)

    def test_a_vllm_with_one_interface_alone(self, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> None:
        loops.install_vllm(monkeypatch, v2=True)
        monkeypatch.setitem(sys.modules, "vllm.v1.sample.logits_processor", None)
        assert load("vllm").LenVMLogitsProcessor.__name__ == "LenVMLogitsProcessorV2"

    @pytest.mark.parametrize(("asked", "version"), [(None, "V2"), ("0", "V1"), ("1", "V2")])
    def test_vllm_is_chosen_at_import(
        self, asked: str | None, version: str, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]
    ) -> None:
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
        if asked is not None:
            monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", asked)
        loops.install_vllm(monkeypatch, v2=True)
        driver = load("vllm")
        assert driver.LenVMLogitsProcessor.__name__ == f"LenVMLogitsProcessor{version}"

    def test_the_request_s_truncation_cuts_the_backbone_and_eos_stays(
        self, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any], scorer: FakeScorer
    ) -> None:
        loops.install_vllm(monkeypatch, v2=False)
        driver = load("vllm")
        logits = torch.full((1, 128), -20.0)
        logits[0, [7, 8, 9]] = torch.log(torch.tensor([0.6, 0.3, 0.1]))
        for cut, left in (({"top_p": 0.5}, {7}), ({"min_p": 0.4}, {7, 8}), ({"top_k": 2}, {7, 8})):
            host = loops.VllmV1(driver, vllm_params(1.0, **{"top_k": 0, **cut}))
            host.enter(loops.Request([1, 5], OBJECTIVES[0], 3))
            host.rows()
            host.processor.apply(logits.clone())
            assert set(scorer.calls[-1][0].candidates) == left | {EOS, STOP}

    def test_no_law_no_guidance(self, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> None:
        """NaN in one row neither raises nor touches its neighbour."""
        loops.install_vllm(monkeypatch, v2=False)
        driver = load("vllm")
        host = loops.VllmV1(driver, vllm_params(0.8))
        for prompt in ([1, 5], [1, 6]):
            host.enter(loops.Request(prompt, OBJECTIVES[0], 3))
        host.rows()
        logits = torch.randn(2, 128)
        logits[0, 3] = torch.nan
        out = host.processor.apply(logits.clone())
        assert torch.equal(out[0].nan_to_num(), logits[0].nan_to_num())
        assert torch.isfinite(out[1]).sum() == 1

    def test_a_service_that_is_down_or_refuses_ends_nothing(
        self,
        monkeypatch: pytest.MonkeyPatch,
        load: Callable[[str], Any],
        next_logits: Any,
        scorer: FakeScorer,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        loops.install_vllm(monkeypatch, v2=True)
        driver = load("vllm")
        for trouble in ("down", "refused"):
            scorer.fail = ServiceTimeoutError("late") if trouble == "down" else None
            scorer.refuse = {} if trouble == "down" else {each["kind"]: "invalid_request" for each in OBJECTIVES}
            with caplog.at_level(logging.WARNING, "lenvm_client"):
                host = loops.VllmV2(driver, vllm_params(0.8))
                answers = loops.decode(host, next_logits, requests(), ends=ENDS, max_tokens=6)
            assert all(answers)
        monkeypatch.setattr(scorer, "_row", lambda *_: 1 / 0)  # a bug
        scorer.fail, scorer.refuse = None, {}
        host = loops.VllmV2(driver, vllm_params(0.8))
        monkeypatch.setattr(driver, "_decoder", lambda: GuidedDecoder(scorer, (), on_error="log"))
        assert all(loops.decode(host, next_logits, requests(), ends=ENDS, max_tokens=2))
        assert "a step goes on without guidance" in caplog.text
        said = [record.getMessage() for record in caplog.records]
        assert len([line for line in said if "ServiceTimeoutError" in line]) == 1

    def test_one_rank_asks_and_tells_the_others(
        self,
        monkeypatch: pytest.MonkeyPatch,
        load: Callable[[str], Any],
        decoder: GuidedDecoder,
        scorer: FakeScorer,
    ) -> None:
        loops.install_vllm(monkeypatch, v2=False)
        driver, told = load("vllm"), list[Any]()
        logits, drawn = torch.randn(2, 128), []
        for rank in (0, 1):
            group = loops.Group(rank, told)
            monkeypatch.setattr(driver, "get_tp_group", lambda group=group: group)
            host = loops.VllmV1(driver, vllm_params(0.8, seed=None))  # each rank would make its own seed
            for prompt in ([1, 5], [1, 6]):
                host.enter(loops.Request(prompt, OBJECTIVES[0], 3))
            host.rows()
            drawn.append(host.draw(logits.clone()))
        assert drawn[0] == drawn[1]
        assert len(scorer.calls) == 1

    def test_sglang_refuses_drafts_and_seeds_by_the_request(
        self, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        loops.install_sglang(monkeypatch)
        driver = load("sglang")
        tokens = []
        for _ in range(2):  # two ranks
            request = loops.Request([1, 5], OBJECTIVES[0], 3)
            host = loops.Sglang(driver, lambda each: sglang_sampling(driver, each, 0.8), {EOS})
            host.enter(request)
            params = host.reqs[request].sampling_params
            params.sampling_seed = None
            tokens.append(host.draw(torch.linspace(0, 1, 128)[None].clone()))
        assert tokens[0] == tokens[1]
        logits = torch.randn(2, 128)
        assert torch.equal(host.processor(logits.clone(), [params.custom_params] * 2), logits)
        assert "without speculative decoding" in caplog.text

    def test_sglang_with_overlap_guides_nothing(
        self,
        monkeypatch: pytest.MonkeyPatch,
        load: Callable[[str], Any],
        caplog: pytest.LogCaptureFixture,
        scorer: FakeScorer,
    ) -> None:
        loops.install_sglang(monkeypatch, disable_overlap_schedule=False)
        driver = load("sglang")
        request = loops.Request([1, 5], OBJECTIVES[0], 3)
        host = loops.Sglang(driver, lambda each: sglang_sampling(driver, each, 0.8), {EOS})
        host.enter(request)
        for _ in range(2):
            host.draw(torch.randn(1, 128))
        assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
            "lenvm guides nothing: start SGLang with --disable-overlap-schedule"
        ]
        assert scorer.calls == []

    def test_sglang_takes_no_harm_from_bad_parameters(
        self, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        loops.install_sglang(monkeypatch)
        driver = load("sglang")
        request = loops.Request([1, 5], OBJECTIVES[0], 3)
        host = loops.Sglang(driver, lambda each: sglang_sampling(driver, each, 0.8), {EOS})
        host.enter(request)
        params = host.reqs[request].sampling_params.custom_params
        params["lenvm"] = {"kind": "shorter"}
        logits = torch.randn(1, 128)
        for _ in range(2):
            assert torch.equal(host.processor(logits.clone(), [params]), logits)
        assert "goes on without guidance" in caplog.text
        assert torch.equal(host.processor(logits.clone(), [None]), logits)
        assert torch.equal(host.processor(logits.clone(), None), logits)
        with pytest.raises(InvalidRequestError, match="lenvm must"):
            driver.request_fields({"kind": "shorter"})

    def test_llama_cpp_keeps_the_error_that_c_would_lose(
        self, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any], scorer: FakeScorer
    ) -> None:
        loops.install_llama_cpp(monkeypatch)
        driver = load("llama_cpp")
        scorer.fail = ServiceTimeoutError("late")
        request = guided_request(loops.Request([1, 5], OBJECTIVES[0], 3), 0.8)
        processor = driver.LenVMLogitsProcessor(GuidedDecoder(scorer, ENDS, on_error="raise"), request)
        scores = np.random.default_rng(0).normal(size=128).astype(np.float32)
        assert np.array_equal(processor(np.array([1, 5], dtype=np.intc), scores.copy()), scores)
        with pytest.raises(ServiceTimeoutError, match="late"):
            processor.stop(np.array([1, 5], dtype=np.intc), scores)


class TestInterfaces:
    """The drivers' methods take what the engines give them; the record itself is compared with the engines' own files
    in tests/integration/test_engine_interfaces.py."""

    @pytest.mark.parametrize(
        ("engine", "path", "cls", "ours"),
        [
            ("vllm", "vllm/v1/sample/logits_processor/interface.py", "LogitsProcessor", "LenVMLogitsProcessorV1"),
            (
                "vllm",
                "vllm/v1/worker/gpu/sample/logits_processor/interface.py",
                "LogitsProcessor",
                "LenVMLogitsProcessorV2",
            ),
            ("sglang", "sglang/srt/sampling/custom_logit_processor.py", "CustomLogitProcessor", "LenVMLogitProcessor"),
            ("dynamo", "dynamo/logits_processing/base.py", "BaseLogitsProcessor", "LenVMLogitsProcessor"),
        ],
    )
    def test_methods_have_the_recorded_parameters(
        self, engine: str, path: str, cls: str, ours: str, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]
    ) -> None:
        loops.install_vllm(monkeypatch, v2=True)
        loops.install_sglang(monkeypatch)
        driver = getattr(load(engine), ours)
        (item,) = (item for item in RECORD[engine]["files"] if item["path"] == path)
        checked = 0
        for name, wanted in item["methods"].items():
            owner, _, method = name.partition(".")
            if owner == cls and method in vars(driver):
                static = vars(driver)[method]
                function = static.__func__ if isinstance(static, classmethod) else static
                here = list(inspect.signature(function).parameters)
                # A processor of Dynamo is made by its user: only the call is the engine's.
                assert here == wanted
                checked += 1
        assert checked >= len([name for name in item["methods"] if name.startswith(f"{cls}.")]) - 2

    def test_stand_ins_have_the_recorded_fields(self) -> None:
        fields = {item["path"]: item.get("fields", {}) for item in RECORD["vllm"]["files"]}
        assert set(fields["vllm/sampling_params.py"]["SamplingParams"]) == set(vars(loops.VllmParams()))
        update = fields["vllm/v1/sample/logits_processor/interface.py"]
        assert set(update["BatchUpdate"]) == set(loops.BatchUpdate.__dataclass_fields__)
        assert set(update["MoveDirectionality"]) == set(loops.MoveDirectionality.__members__)

    def test_continuous_batching_of_transformers_is_refused(self) -> None:
        processor = hf.LenVMLogitsProcessor(GuidedDecoder(FakeScorer(), [EOS]), [OBJECTIVES[0]])
        with pytest.raises(InvalidRequestError, match="continuous batching cannot be guided"):
            getattr(processor, "supports_continuous_batching", None)
        from transformers.generation.continuous_batching import cb_logits_processors

        with pytest.raises(InvalidRequestError, match="continuous batching cannot be guided"):
            cb_logits_processors.ContinuousBatchingLogitsProcessorList(
                logits_processor=[processor], per_request_processors=False, drop_unsupported_processors=True
            )


class TestHostParts:
    def test_candidates(self) -> None:
        logs = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
        assert [candidates(logs, 4, p) for p in (0.1, 0.5, 0.6, 0.81, 1.0)] == [1, 1, 2, 3, 4]
        assert candidates(logs, 2) == 2
        assert [candidates(logs, 4, 1.0, p) for p in (0.05, 0.2, 0.5, 1.0)] == [4, 3, 2, 1]

    def test_arguments(self) -> None:
        assert parse_objective(None) == parse_objective({"other": 1}) == (None, 16)
        assert parse_objective({"lenvm": '{"kind": "scale", "factor": 2}', "lenvm_top_k": 4}) == (
            {"kind": "scale", "factor": 2},
            4,
        )
        for bad in (0, 257, "8", True, 2.0):
            with pytest.raises(InvalidRequestError, match="lenvm_top_k"):
                parse_objective({"lenvm": OBJECTIVES[0], "lenvm_top_k": bad})
        words, tokenizer = {**OBJECTIVES[1], "unit": "words"}, {"LENVM_CLIENT_TOKENIZER": "t"}
        assert parse_objective({"lenvm": words}, tokenizer) == (words, 16)
        for bad_unit, environment in (("pages", tokenizer), ("words", {})):
            with pytest.raises(InvalidRequestError, match="unit must be"):
                parse_objective({"lenvm": {**OBJECTIVES[1], "unit": bad_unit}}, environment)

    def test_the_environment_names_the_service(self) -> None:
        environment = {
            "LENVM_CLIENT_URL": "http://scores:1",
            "LENVM_CLIENT_MODEL": "m",
            "LENVM_CLIENT_API_KEY": "k",
            "LENVM_CLIENT_DEADLINE_S": "0.5",
        }
        decoder = decoder_from_environment(environment)
        assert isinstance(decoder.scorer, DeadlineScorer)
        assert decoder.scorer.seconds == 0.5
        assert decoder.on_error == "log"
        for bad in ("0", "-1", "inf"):
            with pytest.raises(InvalidRequestError, match="DEADLINE"):
                decoder_from_environment({"LENVM_CLIENT_DEADLINE_S": bad})

    def test_the_environment_names_tokenizers(self, tiny_backbone: Path) -> None:
        name = str(tiny_backbone)
        assert decoder_from_environment({}).text is None
        same = decoder_from_environment({"LENVM_CLIENT_TOKENIZER": name}).text
        assert same is not None
        assert same.estimates({"kind": "equal_to", "target": 3, "unit": "words"}) == ("words",)
        other = decoder_from_environment({"LENVM_CLIENT_TOKENIZER": name, "LENVM_CLIENT_MODEL_TOKENIZER": name}).text
        assert other is not None
        assert other.estimates(None) == ("tokenizer",)
        # Through text and back: the same ids, and EOS for every end.
        row = GuidedRow(prefix=[20, 30, 31], candidates=[40, 41, STOP], logprobs=[-1.0, -2.0, -3.0], generated=1)
        view = other.view(row, row.candidates, row.logprobs, (STOP,))
        assert (view.prefix, view.generated) == ([20, 30, 31], 1)
        assert (view.candidates, view.end_ids) == ((EOS, 41), (EOS,))

    def test_a_late_answer_is_not_waited_for(self) -> None:
        gate, asked = threading.Event(), []

        def score(rows: Sequence[CandidateInput]) -> list[Any]:
            asked.append(rows)
            assert gate.wait(60)
            return []

        scorer = DeadlineScorer(score, 0.01)
        with pytest.raises(ServiceTimeoutError, match=r"no answer within 0\.01 s"):
            scorer.score_candidates([])
        with pytest.raises(ServiceTimeoutError, match="still late"):
            scorer.score_candidates([])
        late = scorer._late
        assert late is not None
        gate.set()
        assert late.result(60) == []
        patient = DeadlineScorer(score, 60.0)
        assert patient.score_candidates([]) == []
        assert len(asked) == 2

    def test_errors_and_time_outs_of_the_scorer_pass(self) -> None:
        for error in (ServiceTimeoutError("its own"), InvalidRequestError("bad"), TimeoutError("plain")):

            def score(rows: Sequence[CandidateInput], error: Exception = error) -> list[Any]:
                raise error

            with pytest.raises(type(error)) as caught:
                DeadlineScorer(score, 60.0).score_candidates([])
            assert caught.value is error
