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
for heads, kv_heads, dim, size in ((9, 3, 32, 32), (6, 2, 16, 16), (4, 4, 32, 64)):
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

    # Raw products, every row as wide, and more queries than a tile of them holds: rotated inside, and kept.
    from lenvm.fused import norm, rotate
    from lenvm.paged import kernels
    from lenvm.paged.kernels import Rotation, StepScratch, promote_tokens

    for splits, least in ((1, 4), (3, 4), (3, 1)):  # the last: as many shares as there are tiles
        kernels._LEAST = least
        width = 30
        raw = torch.randn(4 * width, heads + 2 * kv_heads, dim)
        q, k, v = raw.transpose(0, 1).split([heads, kv_heads, kv_heads])
        angle = torch.arange(300)[:, None] * 10000 ** (-torch.arange(dim // 2) / (dim // 2))
        weights = (torch.rand(dim), torch.rand(dim)) if kv_heads == 2 else (None, None)
        kept = torch.zeros(2, 4 * width, kv_heads, dim)
        rotation = Rotation(angle.cos(), angle.sin(), *weights, 1e-5, kept[0], kept[1])
        made = StepScratch.make(4, heads, kv_heads, width, q)
        programs = len(made.counts)
        block = programs and max(16, min(64, 1 << (width * heads // kv_heads - 1).bit_length()))
        places = programs * splits * block
        scratch = StepScratch(splits, torch.empty(places, dim), torch.full((places,), float("nan")), made.counts)
        out = step_attention(
            q, k, v, pool_k, pool_v, tables, lengths, None, width, dim**-0.5, scratch, rotation
        )
        assert not scratch.counts.any()
        full = angle[lengths.repeat_interleave(width)][:, None].repeat(1, 1, 2)
        want_q, want_k = (
            rotate(x.transpose(0, 1) if w is None else norm(x.transpose(0, 1), w, 1e-5), full.cos(), full.sin())
            for x, w in zip((q, k), weights)
        )
        torch.testing.assert_close(kept[0], want_k, atol=2e-5, rtol=0)
        torch.testing.assert_close(kept[1], v.transpose(0, 1), atol=0, rtol=0)
        plain = step_attention(
            want_q.transpose(0, 1), want_k.transpose(0, 1), v, pool_k, pool_v, tables, lengths,
            torch.arange(5) * width, width, dim**-0.5,
        )
        torch.testing.assert_close(out, plain, atol=5e-5, rtol=0)

    kernels._LEAST = 4

    # Of an id that is none the embedding is another's: nothing is read outside the table.
    from lenvm.paged.layer_kernels import Stream, embed

    table, ids = torch.randn(11, dim), torch.tensor([-1, 3, 11, (1 << 31) - 1, -(1 << 31)], dtype=torch.int32)
    stream = Stream.make(len(ids), dim, 1, table)
    embed(ids, table, torch.ones(dim), stream)
    assert torch.equal(stream.hidden, table[[0, 3, 10, 10, 0]])

    # The head from its first product on.
    from lenvm.config import HeadConfig
    from lenvm.distribution import LengthBins
    from lenvm.modeling import ValueHead
    from lenvm.scoring.step_layers import StepHead

    bins = LengthBins(cap=100)
    for made in (HeadConfig(24, bins), HeadConfig(400, bins), HeadConfig(24, None), HeadConfig(0, bins)):
        head, states, out = ValueHead(dim, made), torch.randn(37, dim), torch.zeros(37, 1 + made.num_bins)
        utilities, means = torch.rand(made.num_bins) if made.num_bins else None, torch.zeros(37)
        with torch.no_grad():
            StepHead(head, torch.float32)(states, out, utilities, means)
            want = head(states)
        if utilities is not None:
            expected = (want.bin_logprobs.exp() * utilities).sum(-1)
            torch.testing.assert_close(means, expected, atol=1e-6, rtol=1e-5)
        parts = [want.logits[:, None]] + ([] if want.bin_logprobs is None else [want.bin_logprobs])
        torch.testing.assert_close(out, torch.cat(parts, 1), atol=2e-6, rtol=1e-5)

    # Candidates of several tensors into the pool of all layers; a row without one leaves it as it is.
    one, two = (torch.randn(2, 3, n, kv_heads, dim) for n in (5, 9))
    stack = torch.randn(2, 3, 40, kv_heads, size, dim)
    want = stack.clone()
    want[:, :, 7, :, 2], want[:, :, 8, :, size - 1] = one[:, :, 4], two[:, :, 0]

    def source(x, index):
        first, second = (side.data_ptr() + index * side.stride(1) * 4 for side in x)
        return [first, second, x.stride(1)]

    rows = [[*source(one, 4), 7, 2], [0] * 5, [*source(two, 0), 8, size - 1]]
    promote_tokens(torch.tensor(rows), stack[0], stack[1])
    assert torch.equal(stack, want)

    # Storing tokens: some of the new ones, one place each.
    from lenvm.paged.kernels import store_tokens

    k, v = (torch.randn(1, total, kv_heads, dim).transpose(1, 2)[0] for _ in range(2))
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
        np.testing.assert_allclose(one, other, atol=5e-5)
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

PROMPTS = """
import sys
import numpy as np
import torch
import lenvm.scoring.prompt_graph as prompt_graph
import lenvm.scoring.step_layers as step_layers
from lenvm.cuda_graph import GraphError
from lenvm.errors import PoolExhaustedError
from lenvm.modeling import LengthValueModel
from lenvm.paged import BlockPool, PoolShape
from lenvm.paged.attention import HostPlan
from lenvm.scoring import ScoreRow, TorchScorer

def attention(query, keys, values, starts, width, scaling):
    # FlashAttention is the GPU's: what it computes. Rows that pad the others are empty.
    out = torch.zeros_like(query)
    shared = query.shape[1] // keys.shape[1]
    for first, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        assert end - first <= width
        q = query[first:end].transpose(0, 1)
        k, v = (x[first:end].repeat_interleave(shared, 1).transpose(0, 1) for x in (keys, values))
        mask = torch.ones(end - first, end - first, dtype=torch.bool).tril()
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        out[first:end] = mixed.transpose(0, 1)
    return out

step_layers.fresh_attention = attention
prompt_graph._TOKENS = (64, 192)
model = LengthValueModel.from_pretrained(sys.argv[1])
plain = TorchScorer(model, pool_tokens=2048)
unfused = plain.pool
BlockPool.has_step_kernel = property(lambda self: self is not unfused)
graphed = TorchScorer(LengthValueModel.from_pretrained(sys.argv[1]), pool_tokens=2048)
pool = graphed._pool = BlockPool(PoolShape.of(model.decoder.config), max_blocks=65, initial_blocks=65, block_size=32)
graphed._use_fused(compiled=False)
steps = graphed._steps
graphed._prompts = graphs = prompt_graph.PromptGraphs(steps.layers, steps.head, pool)

def close(a, b):
    for name in ("logits", "bin_logprobs", "candidate_logits", "candidate_bin_logprobs"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.shape == other.shape, (name, one.shape, other.shape)
        np.testing.assert_allclose(one, other, atol=5e-5)
    assert a.cached_tokens == b.cached_tokens and a.state.length == b.state.length

def ask(prompts, **more):
    return [s.score([ScoreRow(append=p) for p in prompts], **more) for s in (plain, graphed)]

prompts = [[5 + (i * 7 + j) % 90 for j in range(n)] for i, n in enumerate((3, 33, 31, 1, 64))]
called = []
first = ask(prompts, meanwhile=lambda: called.append(len(pool._free)))
assert len(called) == 2 and list(graphs._graphs) == [(192, 8, 128)]
# Fewer tokens by the same graph, then another bucket: what pads them is written nowhere.
second = ask([p[::-1] for p in prompts[:4]])
third = ask([[9, 8], [7]])
assert sorted(graphs._graphs) == [(64, 8, 128), (192, 8, 128)]
before = [x.clone() for x in pool.stacked]
graphed.score([ScoreRow(append=[6] * 50)])[0].state.close()
for was, now in zip(before, pool.stacked):
    changed = (was != now).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    assert len(changed) == 2 and 0 not in changed, changed
for found in (first, second, third):
    for a, b in zip(*found):
        close(a, b)
# Keys and values are where later calls look for them.
for found in (first, second, third):
    more = [s.score([ScoreRow(x.state, [11], [12, 13]) for x in got]) for s, got in zip((plain, graphed), found)]
    for a, b in zip(*more):
        close(a, b)
# More than the buckets hold, and what is no whole prompt, goes the plain way.
for call in ([ScoreRow(append=[4] * 100), ScoreRow(append=[5] * 100)], [ScoreRow(append=[4, 5], candidates=[6])],
             [ScoreRow(append=[4, 5, 6], values_from=0)]):
    for a, b in zip(plain.score(call), graphed.score(call)):
        close(a, b)
assert len(graphs._graphs) == 2
# Whole prompts among rows that go on from a prefix keep their graph.
launched, launch = [], graphs.launch
graphs.launch = lambda prompts, blocks: launched.append(len(prompts)) or launch(prompts, blocks)
calls = [
    [ScoreRow(got[0].state, [21] * 3), ScoreRow(append=[4] * 40), ScoreRow(got[1].state, [11], [12]),
     ScoreRow(append=[5, 6])]
    for got in first
]
for a, b in zip(plain.score(calls[0]), graphed.score(calls[1])):
    close(a, b)
assert launched == [2], launched
used = pool.used_blocks
def breaks(works):
    raise ArithmeticError("the rest fails")
forward, graphed._forward = graphed._forward, breaks
try:
    graphed.score(calls[1][:2])
except ArithmeticError:
    assert pool.used_blocks == used
graphed._forward = forward
assert launched == [2, 1], launched
# All values of a row: the hidden states of a plan, by the same graph.
ids = np.array(prompts[1])
host = HostPlan(ids, np.arange(33), np.array([1] * 32 + [2]), np.arange(33) % 32, np.array([0, 33]))
plan = type("Plan", (), {"host": host, "width": 33})()
pool.allocate(2)
with torch.inference_mode():
    hidden = graphs(plan)
    expected = plain.score([ScoreRow(append=prompts[1], values_from=0)])[0]
    np.testing.assert_allclose(graphed.model.head(hidden).logits, expected.logits, atol=5e-5)
# A prompt that has no room leaves nothing behind; a graph that cannot be recorded leaves the plain way.
taken = pool.allocate(pool.free_blocks - 3)
used = pool.used_blocks
try:
    graphed.score([ScoreRow(append=[4] * 40), ScoreRow(append=[4] * 40)])
except PoolExhaustedError:
    assert pool.used_blocks == used
else:
    raise SystemExit("there was room")
pool.release(taken)
def fails(bucket):
    raise GraphError("no")
graphs._graph = fails
for a, b in zip(*ask(prompts[:2])):
    close(a, b)
assert graphed._prompts is None
print("done")
"""

ROTATE = """
import torch
from lenvm.fused import norm, rotate
from lenvm.paged.kernels import rotate_and_store

torch.manual_seed(0)
for heads, kv, dim, norms in ((9, 3, 32, (None, None)), (4, 2, 16, (torch.rand(16), torch.rand(16)))):
    tokens = 37
    qkv = torch.randn(tokens, heads + 2 * kv, dim)
    q, k, v = qkv.clone().split([heads, kv, kv], 1)
    places = torch.randint(0, 200, (tokens,))
    angle = torch.arange(300)[:, None] * 10000 ** (-torch.arange(dim // 2) / (dim // 2))
    keys, values = (torch.zeros(20, kv, 8, dim) for _ in range(2))
    blocks, offsets = 1 + torch.arange(tokens) // 8, torch.arange(tokens) % 8
    qkv[-1], blocks[-1] = torch.nan, 0  # pads a batch
    rotate_and_store(qkv, heads, places, blocks, offsets, keys, values, angle.cos(), angle.sin(), norms, 1e-5)
    assert not keys[0].any() and not values[0].any()
    full = angle[places][:, None].repeat(1, 1, 2)
    want_q, want_k = (
        rotate(x if w is None else norm(x, w, 1e-5), full.cos(), full.sin()) for x, w in zip((q, k), norms)
    )
    made = qkv.split([heads, kv, kv], 1)
    stored = (keys[blocks, :, offsets], values[blocks, :, offsets])
    for found, want in zip((*made, *stored), (want_q, want_k, v, want_k, v)):
        torch.testing.assert_close(found[:-1], want[:-1], atol=2e-5, rtol=0)
print("done")
"""

DEVICE = """
import sys
import torch
from pathlib import Path
from lenvm.modeling import LengthValueModel
from lenvm.paged import BlockPool, PoolShape
from lenvm.backbones import load_backbone
from lenvm_client.errors import LenVMClientError
from lenvm_client.drivers.hf import generate
from lenvm_service.local import LocalScorer

backbone, checkpoint = sys.argv[1:3]
model = load_backbone(Path(backbone), attn_implementation="sdpa").eval()
plain = LocalScorer(checkpoint)
unfused = plain.core.scorer.pool
BlockPool.has_step_kernel = property(lambda self: self is not unfused)
device = LocalScorer(checkpoint)
scorer = device.core.scorer
scorer._pool = BlockPool(PoolShape.of(scorer.model.decoder.config), max_blocks=65, initial_blocks=65, block_size=32)
scorer._use_fused(compiled=False)
assert scorer.has_graphs and not plain.core.scorer.has_graphs
width = 33
prompts = [[5 + (i * 7 + j) % 90 for j in range(n)] for i, n in enumerate((3, 33, 31, 20))]
inputs = {
    "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
    "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
}
equal, most, tilt = {"kind": "equal_to", "target": 9}, {"kind": "at_most", "target": 4}, {"kind": "tilt", "lambda": 0.2}
objectives = [equal, None, most, tilt]
made = []
make = LocalScorer.device_processor
LocalScorer.device_processor = lambda self, *a, **k: made.append(make(self, *a, **k)) or made[-1]
for options in (
    dict(temperature=0.9, seeds=[1, 2, 3, 4]),
    dict(temperature=0.9, seeds=[5, 6, 7, 8]),
    dict(temperature=0.0),
):
    found = []
    for each in (plain, device):
        found.append(
            generate(
                model, each, inputs, objectives=objectives, top_k=6, max_new_tokens=11, eos_token_id=[2, 3],
                pad_token_id=0, on_error="raise", **options,
            )
        )
    (a, one), (b, two) = found
    assert torch.equal(a, b), (a, b)
    for x, y in zip(one.rows, two.rows):
        assert (x.steps, x.guided_steps, x.forced_stop) == (y.steps, y.guided_steps, y.forced_stop), (x, y)
        assert x.text_cost != x.text_cost or abs(x.text_cost - y.text_cost) < 1e-3, (x, y)
    assert made[-1] is not None and made[-2] is None
    assert scorer.pool.used_blocks == 0
    if options["temperature"]:
        assert any(row.text_cost for row in one.rows), "guidance did nothing"
assert len(scorer._device_graphs) == 2  # draws by itself or not
# transformers draws: the law is that of the plain processor.
tables = []
for each in (plain, device):
    torch.manual_seed(3)
    tables.append(generate(model, each, inputs, objectives=objectives, top_k=6, max_new_tokens=11, eos_token_id=[2, 3],
                           pad_token_id=0, on_error="raise", temperature=0.9))
(a, one), (b, two) = tables
assert torch.equal(a, b), (a, b)
assert abs(one.text_cost - two.text_cost) < 1e-3
# Nobody is guided: the same sampler, and no value model.
a, b = (generate(model, each, inputs, objectives=None, top_k=6, max_new_tokens=6, eos_token_id=[2, 3], pad_token_id=0,
                 seeds=[1, 2, 3, 4])[0] for each in (plain, device))
assert torch.equal(a, b), (a, b)
# What does not fit goes step by step.
for kwargs in (dict(objectives={"kind": "scale", "factor": 0.5}), dict(objectives=objectives, max_new_tokens=3000)):
    made.clear()
    try:
        generate(model, device, inputs, top_k=6, eos_token_id=[2, 3], pad_token_id=0, **{"max_new_tokens": 4, **kwargs})
    except LenVMClientError:
        assert "max_new_tokens" in kwargs  # the context is full
    assert made == [None], made
print("done")
"""


def run(script: str, *arguments: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, timeout=900
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


def test_graphed_scoring_by_the_library_s_products(tiny_checkpoint: Path) -> None:
    shorter = SCORER.replace("range(4)", "range(1)")
    run("import lenvm.scoring.step_layers as layers\nlayers._SMALL = 0\n" + shorter, str(tiny_checkpoint))


def test_generate_guided_on_the_device_equals_guided_by_the_host(tiny_backbone: Path, tiny_checkpoint: Path) -> None:
    run(DEVICE, str(tiny_backbone), str(tiny_checkpoint))


def test_graphed_prompts_equal_the_plain_scorer(tiny_checkpoint: Path) -> None:
    run(PROMPTS, str(tiny_checkpoint))


def test_prompts_are_rotated_and_stored_in_place() -> None:
    run(ROTATE)
