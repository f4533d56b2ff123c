"""The Triton kernel and the graphed sampler, on the CPU through Triton's interpreter (a process of its own: the switch
is read when a kernel is defined)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")

KERNEL = """
import torch
from lenvm.paged.kernels import step_attention

torch.manual_seed(0)
for heads, kv_heads, dim, size in ((9, 3, 64, 32), (6, 2, 16, 16), (4, 4, 32, 64)):
    pool_k, pool_v = (torch.randn(40, kv_heads, size, dim) for _ in range(2))
    lengths = torch.tensor([0, 5, 3 * size, 4 * size + 3])
    tables = (torch.randperm(39)[:24] + 1).view(4, 6)
    counts = [1, 17, 4, 16]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    total = sum(counts)
    q = torch.randn(1, total, heads, dim).transpose(1, 2)[0]  # strided, as the backbone gives it
    k, v = (torch.randn(1, total, kv_heads, dim).transpose(1, 2)[0] for _ in range(2))
    out = step_attention(q, k, v, pool_k, pool_v, tables, lengths, starts, max(counts), dim**-0.5)
    for row in range(4):
        n = int(lengths[row])
        past_k, past_v = (
            pool[tables[row]].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :n] for pool in (pool_k, pool_v)
        )
        for t in range(int(starts[row]), int(starts[row + 1])):
            keys = torch.cat([past_k, k[:, t : t + 1]], 1).repeat_interleave(heads // kv_heads, 0)
            values = torch.cat([past_v, v[:, t : t + 1]], 1).repeat_interleave(heads // kv_heads, 0)
            want = torch.softmax(q[:, t : t + 1] @ keys.transpose(1, 2) * dim**-0.5, -1) @ values
            torch.testing.assert_close(out[t], want[:, 0], atol=2e-5, rtol=0)

    # Storing tokens: some of the new ones, one place each.
    from lenvm.paged.kernels import store_tokens

    tokens, blocks, offsets = torch.tensor([3, 0]), torch.tensor([5, 39]), torch.tensor([0, size - 1])
    want_k, want_v = pool_k.clone(), pool_v.clone()
    for token, block, offset in zip(tokens, blocks, offsets):
        want_k[block, :, offset], want_v[block, :, offset] = k[:, token], v[:, token]
    store_tokens(k, v, pool_k, pool_v, tokens, blocks, offsets)
    assert torch.equal(pool_k, want_k) and torch.equal(pool_v, want_v)
print("done")
"""

SAMPLER = """
import sys
import torch
from lenvm.decoding import Request, SamplingParams
from lenvm.decoding.graphed import stream_graphed
from lenvm.rollouts.sampling import LocalGenerator

sampler = LocalGenerator(sys.argv[1], max_rows=3).sampler
# Two neighbours with one prompt share it.
requests = [Request(list(range(3, 3 + 7 * (i - i % 2) + 1)), seed=i) for i in range(6)]
params = SamplingParams(max_new_tokens=40)
expected = sampler.generate(requests, params)
# A pool in which three long rows do not fit: rows are put back into the queue and must draw the same tokens again.
for blocks in (None, 8):
    if blocks is not None:
        sampler.pool._free = sampler.pool._free[:blocks]
        sampler.pool.max_blocks = sampler.pool.num_blocks
    with torch.inference_mode():
        graphed = dict(stream_graphed(sampler, requests, params))
    assert len(graphed) == len(requests)
    for index, answer in enumerate(expected):
        assert graphed[index].token_ids == answer.token_ids, (blocks, index)
        assert graphed[index].finished == answer.finished, (blocks, index)
    assert sampler.pool.used_blocks == 0
print("done")
"""


GUIDED = """
import sys
import numpy as np
import torch
from lenvm.decoding import Request, SamplingParams
from lenvm.decoding.graphed import stream_graphed
from lenvm.guidance import Objective
from lenvm.guides import EosGateGuide, ValueGuide
from lenvm.modeling import LengthValueModel
from lenvm.rollouts.sampling import LocalGenerator
from lenvm.scoring import TorchScorer

sampler = LocalGenerator(sys.argv[1], max_rows=3).sampler
model = LengthValueModel.from_pretrained(sys.argv[2])
objectives = [
    Objective("equal_to", target=8), Objective("at_most", target=6), None, Objective("at_least", target=12),
    Objective("tilt", lambda_=0.1), Objective("equal_to", target=9, method="paper"),
    Objective("equal_to", target=9, method="paper", space="length"), Objective("tilt", beta=-3.0, method="paper"),
    Objective("at_least", target=9, method="paper", strength=0.5),
]
# Two neighbours with one prompt share it, one of them of a whole number of blocks.
sizes = [5, 32, 32, 40, 7, 1, 33, 33, 64]
requests = [Request(list(range(3, 3 + size)), seed=i, max_new_tokens=16) for i, size in enumerate(sizes)]
params = SamplingParams(0.9, top_k=8, max_new_tokens=40)
device = torch.device("cpu")
targets = [20] * len(sizes)
guides = [
    lambda: ValueGuide(TorchScorer(model), objectives),
    lambda: EosGateGuide(targets, kinds=["equal_to", "at_most", "at_least"] * 3, threshold=0.01, stop=1.1),
]
for make in guides:
    expected = sampler.generate(requests, params, guide=make())
    rules = make().device_rules(device)
    with torch.inference_mode():
        graphed = dict(stream_graphed(sampler, requests, params, rules))
    assert len(graphed) == len(requests)
    for index, answer in enumerate(expected):
        found = graphed[index]
        assert found.token_ids == answer.token_ids, (index, found, answer)
        assert (found.finished, found.forced_stop) == (answer.finished, answer.forced_stop), (index, found, answer)
        assert abs(found.text_cost - answer.text_cost) < 2e-3 * max(1, abs(answer.text_cost)), (index, found, answer)
        assert abs(found.logprob - answer.logprob) < 1e-3 * max(1, abs(answer.logprob)), (index, found, answer)
    assert sampler.pool.used_blocks == 0
    assert any(answer.text_cost for answer in expected), "the rules did nothing"
print("done")
"""


SCORER = """
import sys
import numpy as np
from lenvm.modeling import LengthValueModel
from lenvm.paged import BlockPool, PoolShape
from lenvm.scoring import ScoreRow, TorchScorer

model = LengthValueModel.from_pretrained(sys.argv[1])
plain = TorchScorer(model, pool_tokens=2048)
unfused = plain.pool
BlockPool.has_step_kernel = property(lambda self: self is not unfused)
graphed = TorchScorer(LengthValueModel.from_pretrained(sys.argv[1]), pool_tokens=2048)
graphed._pool = BlockPool(PoolShape.of(model.decoder.config), max_blocks=65, initial_blocks=65, block_size=32)
graphed._use_fused(compiled=False)
assert graphed._steps is not None

def close(a, b):
    for name in ("logits", "bin_logprobs", "candidate_logits", "candidate_bin_logprobs"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.shape == other.shape, (name, one.shape, other.shape)
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert a.cached_tokens == b.cached_tokens and a.state.length == b.state.length

prefixes = [list(range(5, 5 + n)) for n in (3, 31, 32, 64, 40)]
answers = [scorer.score([ScoreRow(append=p, candidates=[9, 8, 7]) for p in prefixes]) for scorer in (plain, graphed)]
for round in range(4):
    for a, b in zip(*answers):
        close(a, b)
    # Promoted: some rows go on with a candidate, some twice (siblings), and one is asked again as it is.
    calls = []
    for found in answers:
        rows = []
        for i, x in enumerate(found):
            chosen = x.state.scored.ids[i % len(x.state.scored.ids)]
            rows.append(ScoreRow(x.state, [chosen], [20 + round, 30 + i, 3, 11, 12][: 3 + i % 3]))
        rows += [ScoreRow(found[0].state, [found[0].state.scored.ids[1]], [40]), ScoreRow(found[1].state, (), [41, 42])]
        calls.append(rows)
    answers = [scorer.score(rows) for scorer, rows in zip((plain, graphed), calls)]
assert plain.stats.promoted == graphed.stats.promoted > 0
assert graphed._steps._graphs, "no step went through a graph"
# A handle that outlives its call keeps its own numbers, whatever the graph's buffers hold by then.
old = [scorer.score([ScoreRow(append=[5, 6, 7]), ScoreRow(append=[7, 8])]) for scorer in (plain, graphed)]
first = [scorer.score([ScoreRow(x.state, (), [50, 51]) for x in found]) for scorer, found in zip((plain, graphed), old)]
for scorer, found in zip((plain, graphed), old):
    scorer.score([ScoreRow(x.state, (), [60, 61]) for x in found])
last = [scorer.score([ScoreRow(x.state, [51], [70]) for x in found]) for scorer, found in zip((plain, graphed), first)]
for a, b in zip(*last):
    close(a, b)
    assert b.cached_tokens == b.state.length
print("done")
"""


def run(script: str, *arguments: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.stdout.strip() == "done", done.stderr[-2000:]


def test_step_kernel_equals_plain_attention() -> None:
    run(KERNEL)


def test_graphed_sampling_equals_the_plain_sampler(tiny_backbone: Path) -> None:
    run(SAMPLER, str(tiny_backbone))


def test_graphed_guidance_equals_the_plain_sampler(tiny_backbone: Path, tiny_checkpoint: Path) -> None:
    run(GUIDED, str(tiny_backbone), str(tiny_checkpoint))


def test_graphed_scoring_equals_the_plain_scorer(tiny_checkpoint: Path) -> None:
    run(SCORER, str(tiny_checkpoint))
