"""Guidance against the exact law, by enumeration of every answer of a small Markov chain.

With exact length distributions, sampling token by token with ``log_weights`` must give ``p(y) u(L(y)) / Z`` to
rounding: total variation under 1e-9. A position or a length that is off by one must not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lenvm.distribution import LengthBins, log_softmax, restricted_mean
from lenvm.guidance import Objective, log_weights, resolve_scale

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TOKENS = 4
EOS = 4  # the last of five candidates
NEVER = -1
GAMMA = 0.9


@dataclass(frozen=True)
class Chain:
    """Nodes in order of depth; node 0 is the prompt boundary.

    probs [S, 5] over four tokens and EOS; after [S, 4]: where a token leads; depth [S]: content tokens so far.
    """

    probs: FloatArray
    after: IntArray
    depth: IntArray

    @property
    def bins(self) -> LengthBins:
        """Width 1 throughout: the length distributions below are exact."""
        longest = int(self.depth.max()) + 1
        return LengthBins(cap=longest, unit=longest)

    def log_lengths(self) -> FloatArray:
        """Exact ``log P(l | node)`` [S, n] by dynamic programming from the deepest node: EOS has l = 1."""
        lengths = np.zeros((len(self.probs), self.bins.size))
        for node in range(len(self.probs) - 1, -1, -1):
            lengths[node, 0] = self.probs[node, EOS]
            for token in range(TOKENS):
                if self.probs[node, token] > 0.0:
                    lengths[node, 1:] += self.probs[node, token] * lengths[self.after[node, token], :-1]
        with np.errstate(divide="ignore"):
            return np.log(lengths)


@dataclass(frozen=True)
class Answers:
    """Every answer of a chain: its probability and its content tokens, in one order for all policies."""

    probs: FloatArray
    lengths: IntArray


def random_chain() -> Chain:
    """Three states by six depths, hazard 1 at depth 6: 5,461 answers of at most 6 content tokens."""
    rng = np.random.default_rng(7)
    depth_max, states = 6, 3
    moves = np.array([[0, 1, 2, 1], [2, 0, 1, 0], [1, 2, 0, 2]])
    hazard = np.array([0.02, 0.15, 0.4])  # by state: what is chosen now decides how long the rest gets
    probs, after, depths = [], [], []
    for depth in range(depth_max + 1):
        for state in range(states):
            stop = 1.0 if depth == depth_max else hazard[state] * rng.uniform(0.5, 1.5)
            words = rng.dirichlet(np.full(TOKENS, 3.0))
            probs.append([*((1.0 - stop) * words), stop])
            after.append(np.full(TOKENS, NEVER) if depth == depth_max else moves[state] + (depth + 1) * states)
            depths.append(depth)
    return Chain(np.array(probs), np.array(after), np.array(depths))


def corridor_chain() -> Chain:
    """Lengths 1, 61 and 121 only, so far apart that a soft target with tolerance 0 is conditioning to 1e-20.

    The first token leads to one of four doors; a door ends, enters the 60-corridor (two ways), or the 120-corridor.
    """
    doors = [
        [0.5, 0.1, 0.1, 0.0, 0.3],
        [0.05, 0.15, 0.5, 0.0, 0.3],
        [0.3, 0.0, 0.0, 0.0, 0.7],
        [0.1, 0.2, 0.6, 0.0, 0.1],
    ]
    end = 1 + 120
    nodes: list[tuple[list[float], list[int], int]] = [([0.4, 0.3, 0.2, 0.1, 0.0], [1, 2, 3, 4], 0)]
    corridors = {(kind, depth): 5 + 2 * (depth - 2) + kind for depth in range(2, end + 1) for kind in (0, 1)}
    nodes += [(door, [corridors[0, 2], corridors[0, 2], corridors[1, 2], NEVER], 1) for door in doors]
    for depth in range(2, end + 1):
        for kind in (0, 1):
            stops = depth >= (61, 121)[kind]
            onward = NEVER if stops else corridors[kind, depth + 1]
            row = [0.0, 0.0, 0.0, 0.0, 1.0] if stops else [1.0, 0.0, 0.0, 0.0, 0.0]
            nodes.append((row, [onward, NEVER, NEVER, NEVER], depth))
    probs, after, depth_column = zip(*nodes, strict=True)
    return Chain(np.array(probs), np.array(after), np.array(depth_column))


def enumerate_answers(chain: Chain, policy: FloatArray) -> Answers:
    """Walk every path that the chain allows, level by level, under the policy [S, 5]."""
    nodes, mass, depth = np.array([0]), np.ones(1), 0
    probs: list[FloatArray] = []
    lengths: list[IntArray] = []
    while len(nodes):
        ends = chain.probs[nodes, EOS] > 0.0
        probs.append((mass * policy[nodes, EOS])[ends])
        lengths.append(np.full(int(ends.sum()), depth))
        goes = chain.probs[nodes, :TOKENS] > 0.0
        mass = (mass[:, None] * policy[nodes, :TOKENS])[goes]
        nodes = chain.after[nodes][goes]
        depth += 1
    return Answers(np.concatenate(probs), np.concatenate(lengths))


def guided_policy(chain: Chain, objective: Objective, *, g_off: int = 0, l_off: int = 0) -> FloatArray:
    """[S, 5]: every node is a row of one log_weights call, every token a candidate, EOS the last."""
    per_node = chain.log_lengths()
    bin_logp = np.zeros((len(chain.probs), TOKENS + 1, chain.bins.size))  # EOS's bins are ignored
    bin_logp[:, :TOKENS] = per_node[chain.after]
    values = np.exp(per_node) @ -(1.0 - GAMMA ** np.arange(1.0, chain.bins.size + 1.0))
    z = np.zeros((len(chain.probs), TOKENS + 1))
    z[:, :TOKENS] = (np.log(-values) - np.log1p(values))[chain.after]
    if l_off:
        bin_logp = shifted(bin_logp, l_off)
    with np.errstate(divide="ignore"):
        logprobs = np.log(chain.probs)
    weights = log_weights(
        [objective] * len(chain.probs),
        z,
        bin_logp,
        np.broadcast_to(np.arange(TOKENS + 1) == EOS, z.shape),
        np.maximum(chain.depth + g_off, 0),
        logprobs,
        bins=chain.bins,
        gamma=GAMMA,
    )
    policy: FloatArray = np.exp(log_softmax(logprobs + weights))
    return policy


def shifted(bin_logp: FloatArray, by: int) -> FloatArray:
    """The distribution of l + by, for by = 1 or -1; what leaves the bins stays in the last one."""
    edge, other = (-1, -2) if by > 0 else (0, 1)
    moved = np.roll(bin_logp, by, axis=-1)
    moved[..., edge] = np.logaddexp(bin_logp[..., edge], bin_logp[..., other])
    moved[..., 0 if by > 0 else -1] = -np.inf
    return moved


def utility(objective: Objective, lengths: IntArray) -> FloatArray:
    """u(L) of the design's table."""
    if objective.kind == "tilt":
        return np.asarray(np.exp(-float(objective.lambda_ or 0.0) * lengths), dtype=np.float64)
    target = objective.target or 0
    decay: FloatArray = np.exp(-np.abs(lengths - target) / max(1.0, objective.tolerance * target))
    if objective.kind == "at_most":
        return np.where(lengths <= target, 1.0, decay)
    if objective.kind == "at_least":
        return np.where(lengths >= target, 1.0, decay)
    return decay


def exact_law(chain: Chain, objective: Objective) -> FloatArray:
    answers = enumerate_answers(chain, chain.probs)
    law = answers.probs * utility(objective, answers.lengths)
    return np.asarray(law / law.sum(), dtype=np.float64)


def total_variation(chain: Chain, policy: FloatArray, law: FloatArray) -> float:
    return 0.5 * float(np.abs(enumerate_answers(chain, policy).probs - law).sum())


def kl(chain: Chain, policy: FloatArray) -> float:
    """The text cost: the expected sum over sampled tokens, EOS included, of log q - log p."""
    q, p = enumerate_answers(chain, policy).probs, enumerate_answers(chain, chain.probs).probs
    at = q > 0.0
    return float((q[at] * np.log(q[at] / p[at])).sum())


RANDOM = random_chain()
CORRIDOR = corridor_chain()

TARGETS: list[dict[str, Any]] = [
    {"kind": "equal_to", "target": 0},
    {"kind": "equal_to", "target": 3, "tolerance": 0.0},
    {"kind": "equal_to", "target": 3, "tolerance": 0.3},
    {"kind": "equal_to", "target": 5, "tolerance": 0.3},
    {"kind": "equal_to", "target": 9, "tolerance": 0.3},
    {"kind": "at_most", "target": 2, "tolerance": 0.0},
    {"kind": "at_most", "target": 4},
    {"kind": "at_least", "target": 3, "tolerance": 0.0},
    {"kind": "at_least", "target": 5, "tolerance": 0.5},
]
TILTS: list[dict[str, Any]] = [
    {"kind": "tilt", "lambda": 0.0},
    {"kind": "tilt", "lambda": 0.7},
    {"kind": "tilt", "lambda": -0.7},
    {"kind": "tilt", "lambda": 30.0},
]


def name(fields: dict[str, Any]) -> str:
    return "-".join(str(value) for value in fields.values())


def test_the_enumeration_is_complete() -> None:
    for chain, answers_expected in ((RANDOM, sum(4**k for k in range(7))), (CORRIDOR, 4 + 3 + 3 + 1 + 3)):
        answers = enumerate_answers(chain, chain.probs)
        assert answers.probs.sum() == pytest.approx(1.0, abs=1e-12)
        assert len(answers.probs) == answers_expected
        by_length = np.bincount(answers.lengths + 1, weights=answers.probs, minlength=chain.bins.size + 1)[1:]
        np.testing.assert_allclose(np.exp(chain.log_lengths()[0]), by_length, atol=1e-14)  # l = L + 1 at the boundary
    assert set(enumerate_answers(CORRIDOR, CORRIDOR.probs).lengths.tolist()) == {1, 61, 121}


@pytest.mark.parametrize("fields", TARGETS + TILTS, ids=name)
def test_posterior_samples_exactly_from_the_wanted_law(fields: dict[str, Any]) -> None:
    objective = Objective.from_dict(fields)
    law = exact_law(RANDOM, objective)
    assert total_variation(RANDOM, guided_policy(RANDOM, objective), law) < 1e-9


@pytest.mark.parametrize("factor", [0.4, 0.9, 1.0, 1.3])
def test_scale_samples_exactly_from_the_tilted_law(factor: float) -> None:
    boundary = RANDOM.log_lengths()[0]
    objective = resolve_scale(Objective("scale", factor=factor), boundary, RANDOM.bins)
    policy = guided_policy(RANDOM, objective)
    assert total_variation(RANDOM, policy, exact_law(RANDOM, objective)) < 1e-9
    guided = enumerate_answers(RANDOM, policy)
    mean = float(restricted_mean(boundary, RANDOM.bins)) - 1.0
    assert float(guided.probs @ guided.lengths) == pytest.approx(factor * mean, rel=1e-9)


@pytest.mark.parametrize("fields", [fields for fields in TARGETS if 0 < fields["target"] <= 5], ids=name)
@pytest.mark.parametrize(("g_off", "l_off"), [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_an_off_by_one_in_g_or_l_is_seen(fields: dict[str, Any], g_off: int, l_off: int) -> None:
    objective = Objective.from_dict(fields)
    policy = guided_policy(RANDOM, objective, g_off=g_off, l_off=l_off)
    assert total_variation(RANDOM, policy, exact_law(RANDOM, objective)) > 1e-3


@pytest.mark.parametrize("rate", [0.7, -0.7])
def test_an_off_by_one_in_l_is_seen_by_tilt_and_g_cancels(rate: float) -> None:
    objective = Objective("tilt", lambda_=rate)
    law = exact_law(RANDOM, objective)
    for l_off in (1, -1):
        assert total_variation(RANDOM, guided_policy(RANDOM, objective, l_off=l_off), law) > 1e-3
    assert total_variation(RANDOM, guided_policy(RANDOM, objective, g_off=1), law) < 1e-9


@pytest.mark.parametrize(
    ("kind", "target", "wanted"),
    [
        ("equal_to", 1, {1}),
        ("equal_to", 61, {61}),
        ("equal_to", 121, {121}),
        ("at_most", 20, {1}),
        ("at_most", 61, {1, 61}),
        ("at_least", 61, {61, 121}),
        ("at_least", 121, {121}),
    ],
)
def test_conditioning_on_an_event_is_exact_and_costs_its_surprise(kind: Any, target: int, wanted: set[int]) -> None:
    """Where u is 1 on the event and nothing off it, the law is p(y | event), and the text cost is -ln P(event)."""
    answers = enumerate_answers(CORRIDOR, CORRIDOR.probs)
    event = np.isin(answers.lengths, list(wanted))
    chance = float(answers.probs[event].sum())
    policy = guided_policy(CORRIDOR, Objective(kind, target, tolerance=0.0))
    assert total_variation(CORRIDOR, policy, np.where(event, answers.probs, 0.0) / chance) < 1e-9
    assert kl(CORRIDOR, policy) == pytest.approx(-np.log(chance), abs=1e-9)


@pytest.mark.parametrize("fields", TARGETS + TILTS, ids=name)
def test_text_cost_of_a_soft_target(fields: dict[str, Any]) -> None:
    """KL(q || p) = E_q[log u] - log Z, which for a hard event is the -ln P above."""
    objective = Objective.from_dict(fields)
    base = enumerate_answers(RANDOM, RANDOM.probs)
    law = exact_law(RANDOM, objective)
    u = utility(objective, base.lengths)
    expected = float(law @ np.log(u)) - np.log(float(base.probs @ u))
    assert kl(RANDOM, guided_policy(RANDOM, objective)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("beta", [-1.0, -4.0, 4.0])
def test_the_papers_tilt_is_no_tilted_law(beta: float) -> None:
    """beta * E[1 - gamma^l] has the expectation outside the exponential: no lambda gives its law, with exact values."""
    policy = guided_policy(RANDOM, Objective("tilt", beta=beta, method="paper"))
    distances = [
        total_variation(RANDOM, policy, exact_law(RANDOM, Objective("tilt", lambda_=rate)))
        for rate in np.linspace(-3.0, 3.0, 241)
    ]
    assert min(distances) > 1e-2
