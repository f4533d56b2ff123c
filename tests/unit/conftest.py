"""Tiny random parts that stand for the real ones: a Length Value Model, a generator, a data folder."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

EOS = 2


@pytest.fixture
def single_thread() -> Iterator[None]:
    """One thread for torch: tiny tensors gain nothing from more, and lose much where tests share a machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_model(tiny_checkpoint: Path) -> Any:
    """The tiny Length Value Model, ready for scoring."""
    from lenvm.modeling import LengthValueModel

    return LengthValueModel.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def full_forward(tiny_backbone: Path, tiny_checkpoint: Path) -> Any:
    """``ids -> (z [T], bin log-probs [T, n])`` by transformers' own attention over all tokens, no cache: the truth."""
    import torch

    from lenvm.backbones import load_backbone
    from lenvm.modeling import LengthValueModel

    head = LengthValueModel.from_pretrained(tiny_checkpoint).head
    decoder = load_backbone(tiny_backbone, attn_implementation="eager").get_decoder()

    def run(ids: Sequence[int]) -> tuple[Any, Any]:
        with torch.no_grad():
            out = head(decoder(torch.tensor([list(ids)])).last_hidden_state[0])
        return out.logits.numpy(), out.bin_logprobs.numpy()

    return run


@pytest.fixture
def tiny_generator(tiny_backbone: Path) -> Any:
    """The tiny backbone as a generator, five rows at a time so that rows must queue."""
    from lenvm.rollouts.sampling import LocalGenerator

    return LocalGenerator(str(tiny_backbone), max_rows=5)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in the format of the real one, with short prompts and LIFEBench-like tasks of our own."""
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    for domain in ("math", "code", "if"):
        for split, count in (("train", 24), ("valid", 4), ("test", 6)):
            rows = [
                {"id": f"{domain}-{split}-{i}", "domain": domain, "source": "own", "prompt": f"{domain} {i} {i * i}?"}
                for i in range(count)
            ]
            write(f"prompts/{domain}_{split}.jsonl.gz", rows)
    tasks = [
        {
            "id": f"task-{i}",
            "lang": "en",
            "category": "create",
            "type": "story",
            "task": f"Tell story {i}.\n[Requirement] It must be {{word_count_type}} {{word_count}} words long.",
        }
        for i in range(6)
    ]
    write("bench/lifebench.jsonl.gz", tasks)
    return folder
