"""Attention of a step in CUDA, on a CPU: the kernel's own source, with another ``hopper.cuh``."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import rms_norm

import lenvm.paged
from lenvm.fused import rotate
from lenvm.paged import hopper

PAGED = Path(lenvm.paged.__file__).parent
EMULATED = Path(__file__).parents[1] / "support" / "emulated_hopper.h"
SIZE = 32


class Shape(NamedTuple):
    dim: int
    group: int
    kv_heads: int
    width: int
    norm: bool
    prefixes: tuple[int, ...]


# Prefixes: none, part of a block, whole blocks, as many passes as the ring holds and more, blocks that not all parts
# have.
SHAPES = [
    Shape(64, 3, 2, 16, False, (0, 513, 1000, 32)),
    Shape(64, 3, 1, 1, True, (31, 65, 96)),
    Shape(64, 4, 1, 24, False, (545, 7)),  # queries of two blocks of threads, the second not full
    Shape(64, 1, 1, 32, False, (100, 600)),
    Shape(128, 6, 2, 16, False, (0, 33, 385)),
    Shape(128, 2, 1, 8, True, (95, 700)),
]


ARGUMENTS = (
    "qkv, pool_k, pool_v, tables, lengths, out, cos, sin, norm_q, norm_k, kept_k, kept_v, scale, eps, block, head,"
    "columns"
)
RUN = f"""
extern "C" void run(int eager, int columns_of_blocks, int rows_of_blocks, int threads, u32 shared, const bf16* qkv,
                    const bf16* pool_k, const bf16* pool_v, const int* tables, const int* lengths, bf16* out,
                    const float* cos, const float* sin, const bf16* norm_q, const bf16* norm_k, bf16* kept_k,
                    bf16* kept_v, float scale, float eps, u64 block, u64 head, int columns) {{
  emulated::eager = eager;
  emulated::late_begin = qkv, emulated::late_end = qkv + columns_of_blocks / GROUPS * WIDTH * LINE;
  emulated::launch(columns_of_blocks, rows_of_blocks, threads, shared, [=] {{ step_attention({ARGUMENTS}); }});
}}
"""
# Prefixes of no pass, of one, of two and of more, for the thread sanitizer: zeros, each block of the prefix the same.
MAIN = """
#include <cstdio>
int main() {
  const int lengths[] = {0, 33, 100, 544, 900}, rows = 5, columns = 32;
  std::vector<bf16> qkv(rows * WIDTH * LINE), pool(2 * KV * SIZE * D), out(rows * WIDTH * HEADS * D);
  std::vector<bf16> kept(2 * rows * WIDTH * KV * D), norm(D);
  std::vector<int> tables(rows * columns, 1);
  std::vector<float> angles(1000 * D / 2);
  for (int eager = 0; eager < 2; eager++)
    run(eager, rows, KV, THREADS, 227 << 10, qkv.data(), pool.data(), pool.data(), tables.data(), lengths, out.data(),
        angles.data(), angles.data(), norm.data(), norm.data(), kept.data(), kept.data() + kept.size() / 2, 0.2f, 1e-5f,
        KV * SIZE * D, SIZE * D, columns);
  std::puts("done");
}
"""


def build(folder: Path, code: str, shape: Shape, *options: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    source, made = folder / "kernel.cc", folder / "kernel"
    source.write_text(f'#include "{EMULATED}"\n#include "{PAGED / "step_attention.cu"}"\n{code}')
    told = hopper.options(*shape[:4], norm=shape.norm)
    macros = [option for option in told if option.startswith("-D")]
    command = [compiler, "-std=c++20", "-pthread", "-w", *macros, *options, "-o", made, source]
    subprocess.run(command, check=True, timeout=300)
    return made


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "-".join(map(str, shape[:5])))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, Shape]:
    folder = tmp_path_factory.mktemp("hopper")
    library = build(folder, RUN, request.param, "-O2", "-shared", "-fPIC")
    return ctypes.CDLL(str(library)), request.param


@pytest.fixture(params=[False, True], ids=["copies late", "copies early"])
def attention(built: tuple[ctypes.CDLL, Shape], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Attention with a driver that launches on this machine."""
    from lenvm.paged import kernels

    def launch(config: Any, function: object, given: tuple[tuple, tuple], _: int) -> tuple[int]:
        assert function == "the kernel"
        assert config.sharedMemBytes <= 227 << 10  # of a block on Hopper
        values = [kind(value) for value, kind in zip(*given, strict=True)]
        built[0].run(
            int(request.param), config.gridDimX, config.gridDimY, config.blockDimX, config.sharedMemBytes, *values
        )
        return (0,)

    parts = ("CUlaunchConfig", "CUlaunchAttribute", "CUlaunchAttributeValue")
    kinds = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    driver = SimpleNamespace(
        **dict.fromkeys(parts, SimpleNamespace), CUlaunchAttributeID=kinds, cuLaunchKernelEx=launch
    )
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(hopper, "suits", hopper.reads)
    monkeypatch.setattr(hopper, "_kernel", lambda *_: "the kernel")
    return kernels.step_attention


def test_as_softmax_over_prefix_and_oneself(built: tuple[ctypes.CDLL, Shape], attention: Any) -> None:
    from lenvm.paged.kernels import Rotation

    dim, group, kv_heads, width, norm, prefixes = built[1]
    torch.manual_seed(0)
    rows, heads = len(prefixes), group * kv_heads
    columns = max(prefixes) // SIZE + 2
    pool = torch.randn(2, rows * columns + 1, kv_heads, SIZE, dim).bfloat16()
    lengths = torch.tensor(prefixes, dtype=torch.int32)
    tables = (1 + torch.randperm(rows * columns)).view(rows, columns).int()
    qkv = torch.randn(rows * width, heads + 2 * kv_heads, dim).bfloat16()
    angle = torch.arange(1100)[:, None] * 10000 ** (-torch.arange(dim // 2) / (dim // 2))
    kept = torch.full((2, rows * width, kv_heads, dim), float("nan")).bfloat16()
    norms = torch.rand(2, dim).bfloat16() * 3 if norm else (None, None)
    rotation = Rotation(angle.cos(), angle.sin(), *norms, 1e-2, *kept)
    query, keys, values = qkv.transpose(0, 1).split([heads, kv_heads, kv_heads])
    out = attention(query, keys, values, *pool, tables, lengths, None, width, dim**-0.5, rotation=rotation)

    full = angle[lengths.long().repeat_interleave(width)][:, None].repeat(1, 1, 2)
    query, keys, values = qkv.float().split([heads, kv_heads, kv_heads], 1)
    if norm:
        query, keys = (
            rms_norm(x, (dim,), weight.float(), 1e-2) for x, weight in zip((query, keys), norms, strict=True)
        )
    query, keys = (rotate(x, full.cos(), full.sin()).bfloat16().float() for x in (query, keys))
    torch.testing.assert_close(kept[0].float(), keys, atol=0, rtol=2**-7)  # a rounding apart where sums differ
    assert torch.equal(kept[1], values.bfloat16())
    for row, length in enumerate(prefixes):
        past = pool[:, tables[row].long()].float().transpose(1, 2).flatten(2, 3)[:, :, :length]
        for token in range(row * width, (row + 1) * width):
            own = torch.stack([keys[token], values[token]])[:, :, None]
            k, v = torch.cat([past, own], 2).repeat_interleave(group, 1)
            weights = torch.softmax(query[token][:, None] @ k.transpose(1, 2) * dim**-0.5, -1)
            torch.testing.assert_close(out[token].float(), (weights @ v)[:, 0], atol=0.015, rtol=0.015)


@pytest.mark.parametrize("dim", [64, 128])
def test_no_thread_reads_what_another_may_still_write(dim: int, tmp_path: Path) -> None:
    options = ["-O1", "-g", "-fsanitize=thread"]
    checked = build(tmp_path, RUN + MAIN, Shape(dim, 3, 1, 4, True, ()), *options)
    done = subprocess.run([checked], capture_output=True, text=True, check=False, timeout=300)
    if "FATAL: ThreadSanitizer" in done.stderr:
        pytest.skip(f"the thread sanitizer does not run here: {done.stderr.splitlines()[0]}")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[:3000]


def test_it_reads_no_layout_but_its_own() -> None:
    from lenvm.paged.kernels import Rotation

    dim = 64
    raw = torch.zeros(4 * 16, 15, dim).bfloat16()
    query, keys, values = raw.transpose(0, 1).split([9, 3, 3])
    angle, kept = torch.zeros(100, dim // 2), torch.zeros(2, 4 * 16, 3, dim).bfloat16()
    own = {
        "query": query, "keys": keys, "values": values, "pool_keys": torch.zeros(9, 3, SIZE, dim).bfloat16(),
        "pool_values": torch.zeros(9, 3, SIZE, dim).bfloat16(), "tables": torch.zeros(4, 5, dtype=torch.int32),
        "prefix_lens": torch.zeros(4, dtype=torch.int32), "width": 16,
        "rotation": Rotation(angle, angle, None, None, 1e-5, *kept),
    }  # fmt: skip
    assert hopper.reads(hopper.Given(**own))
    norm = torch.zeros(dim + 8).bfloat16()
    own["rotation"] = replace(own["rotation"], q_norm=norm[8:], k_norm=norm[:dim])
    assert hopper.reads(hopper.Given(**own))
    others = {
        "query": [query.float(), query.contiguous()],
        "keys": [keys.clone(), query[:3]],
        "values": [keys],
        "pool_keys": [own["pool_keys"].float(), torch.zeros(9, 3, 16, dim).bfloat16()],
        "pool_values": [torch.zeros(9, SIZE, 3, dim).bfloat16().transpose(1, 2)],
        "tables": [
            own["tables"].long(),
            torch.zeros(5, 4, dtype=torch.int32).t(),
            torch.zeros(3, 5, dtype=torch.int32),
        ],
        "prefix_lens": [own["prefix_lens"].long()],
        "width": [15],
        "rotation": [
            replace(own["rotation"], **change)
            for change in (
                {"q_norm": norm[8:].float()},
                {"q_norm": norm[4:-4]},
                {"k_norm": None},
                {"cos": angle.bfloat16()},
                {"sin": angle.t()},
                {"kept_keys": kept[0].float()},
            )
        ],
    }
    for name, wrong in others.items():
        for value in wrong:
            assert not hopper.reads(hopper.Given(**{**own, name: value})), name


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU on this machine")
@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_gpu_as_triton(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    from lenvm.paged import kernels

    dim, group, kv_heads, width, norm, prefixes = shape
    torch.manual_seed(0)
    rows, heads = len(prefixes), group * kv_heads
    columns = max(prefixes) // SIZE + 2
    like = {"device": "cuda", "dtype": torch.bfloat16}
    pool = torch.randn(2, rows * columns + 1, kv_heads, SIZE, dim, **like)
    lengths = torch.tensor(prefixes, dtype=torch.int32, device="cuda")
    tables = (1 + torch.randperm(rows * columns, device="cuda")).view(rows, columns).int()
    qkv = torch.randn(rows * width, heads + 2 * kv_heads, dim, **like)
    angle = torch.rand(1100, dim // 2, device="cuda") * 6
    norms = torch.rand(2, dim, **like) * 3 if norm else (None, None)
    query, keys, values = qkv.transpose(0, 1).split([heads, kv_heads, kv_heads])
    found = []
    for fast in (True, False):
        kept = torch.zeros(2, rows * width, kv_heads, dim, **like)
        rotation = kernels.Rotation(angle.cos(), angle.sin(), *norms, 1e-5, *kept)
        if fast:
            monkeypatch.setattr(hopper, "_LONG", 1 << 20)  # also where Triton's would be taken
            assert hopper.suits(hopper.Given(query, keys, values, *pool, tables, lengths, width, rotation))
        else:
            monkeypatch.setattr(hopper, "suits", lambda *_: False)
        out = kernels.step_attention(
            query, keys, values, *pool, tables, lengths, None, width, dim**-0.5, rotation=rotation
        )
        found.append((out.float(), kept))
    torch.testing.assert_close(found[0][0], found[1][0], atol=0.015, rtol=0.015)
    assert torch.equal(found[0][1], found[1][1])
