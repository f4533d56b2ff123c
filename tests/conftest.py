"""Shared fixtures. unit, integration and e2e are marked by path, and unit tests get no network."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

# Read by libraries when they are imported, which the fixtures below do late.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest.register_assert_rewrite("tests.support.client_contract")

TESTS = Path(__file__).resolve().parent
KINDS = ("unit", "integration", "e2e")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if kind not in KINDS:
            raise pytest.UsageError(f"{item.path}: tests live in tests/unit, tests/integration or tests/e2e")
        item.add_marker(kind)


@pytest.fixture(autouse=True)
def _no_network_in_unit_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test that reaches for another machine fails at once, with a name to blame."""
    if request.node.get_closest_marker("unit") is None:
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"  # a path is a Unix socket
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"unit tests get no network: {request.node.nodeid} wanted {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def real_parts_required() -> bool:
    """True under CI or LENVM_REQUIRE_REAL: a missing real part is a failure then, never a skip."""
    return any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in ("CI", "LENVM_REQUIRE_REAL"))


@pytest.fixture(scope="session")
def real_backbone_dir(real_parts_required: bool) -> Path:
    """The folder of the real backbone.

    Where it was not pulled: skipped, unless real parts are required; then it is pulled, and a failure fails.
    """
    from lenvm.backbones import DEFAULT_BACKBONE, cache_root, resolve_backbone

    pulled = (cache_root() / "backbones" / DEFAULT_BACKBONE / "config.json").is_file()
    if not real_parts_required and not pulled:
        pytest.skip(f"{DEFAULT_BACKBONE} is not in the cache: run lenvm pull {DEFAULT_BACKBONE}")
    return resolve_backbone(DEFAULT_BACKBONE, progress=False)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random two-layer Llama and a one-character-per-token tokenizer; the same every time.

    Vocabulary 128 (EOS = ``<|im_end|>`` = 2, as in the real backbone), context 512, fp32. Sampled answers
    are some tens of tokens long and differ, so that finished and cut ones both occur.
    """
    folder = tmp_path_factory.mktemp("tiny-backbone")
    _tiny_tokenizer().save_pretrained(folder)
    _tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with an untrained head over the tiny backbone; its bins go up to 64."""
    import torch

    from lenvm.config import GeneratorRef, HeadConfig
    from lenvm.distribution import LengthBins
    from lenvm.modeling import LengthValueModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = LengthValueModel.create(
            tiny_backbone,
            name="tiny",
            head=HeadConfig(16, LengthBins(cap=64)),
            gamma=0.99,
            generator=GeneratorRef(str(tiny_backbone), 0.7, 1.0, 64),
        )
        # An untrained head hardly tells states apart: larger weights make every mistake visible.
        for parameter in model.head.parameters():
            parameter.data.mul_(4.0)
    folder = tmp_path_factory.mktemp("tiny-checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as an ONNX export."""
    from lenvm.export.run import export_model
    from lenvm.modeling import LengthValueModel

    out = tmp_path_factory.mktemp("tiny-export") / "tiny"
    export_model(LengthValueModel.from_pretrained(tiny_checkpoint), out)
    return out


def _tiny_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<|im_start|>", "<|im_end|>"]
    characters = ["\n", "\t", *map(chr, range(0x20, 0x7F)), *map(chr, range(0xE0, 0xFC))]
    vocabulary = {token: index for index, token in enumerate([*specials, *characters])}
    assert len(vocabulary) == 128
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _tiny_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # ten times the usual: states and next-token laws must differ visibly
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20260427)
        model = LlamaForCausalLM(config).to(torch.float32).eval()
        # Random weights would hardly ever end: EOS gets a share of the mean hidden state's direction.
        with torch.no_grad():
            hidden = model.model(torch.randint(3, 128, (16, 64))).last_hidden_state.mean((0, 1))
            model.lm_head.weight[2] += 2.0 * hidden / hidden.dot(hidden)
        return model
