"""One answer out of several: its law tends to the conditional whatever sampled them, and its text cost is no less than
what the law costs."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

import lenvm_client
from lenvm.decoding import Generation
from lenvm.errors import InvalidRequestError
from lenvm.guidance import Objective, log_utility
from lenvm.resampling import resample, resample_answers

ANSWERS = 12
RNG = np.random.default_rng(3)
P = RNG.dirichlet(np.full(ANSWERS, 3.0))
Q = RNG.dirichlet(np.full(ANSWERS, 3.0))  # what guidance by wrong values samples
LENGTHS = RNG.permutation(ANSWERS) * 5
OBJECTIVE = Objective("equal_to", 30, tolerance=0.2)


def conditional(objective: Objective) -> Any:
    law = P * np.exp(log_utility(objective, LENGTHS))
    return law / law.sum()


def drawn(objective: Objective, of: int, trials: int = 5000) -> tuple[Any, float]:
    """The law of the drawn answers, and their mean text cost."""
    rng = np.random.default_rng(of)
    pools = rng.choice(ANSWERS, (trials, of), p=Q)
    costs = np.log(Q / P)
    counts, cost = np.zeros(ANSWERS), 0.0
    for pool, draw in zip(pools, rng.uniform(size=trials), strict=True):
        found = resample(objective, LENGTHS[pool], costs[pool], draw)
        counts[pool[found.index]] += 1
        cost += found.text_cost / trials
    return counts / trials, cost


@pytest.mark.parametrize(
    "objective",
    [OBJECTIVE, Objective("at_most", 20), Objective("at_least", 35, tolerance=0.1), Objective("tilt", lambda_=0.05)],
    ids=lambda objective: objective.kind,
)
def test_the_law_tends_to_the_conditional(objective: Objective) -> None:
    law = conditional(objective)
    off = [0.5 * float(np.abs(drawn(objective, of)[0] - law).sum()) for of in (1, 4, 16, 128)]
    assert off[0] > 0.1  # values that wrong are far from it alone
    assert off[0] > off[1] > off[2] > off[3]
    assert off[3] < 0.04


def test_the_text_cost_is_that_of_the_draw_and_its_proposals() -> None:
    exact = float(conditional(OBJECTIVE) @ np.log(conditional(OBJECTIVE) / P))
    for of, slack in ((1, 1e-9), (2, 0.4), (8, 0.4), (512, 0.05)):
        law, cost = drawn(OBJECTIVE, of, trials=5000 if of < 512 else 1000)
        kept = law > 0
        kl = float((law[kept] * np.log(law[kept] / P[kept])).sum())
        assert kl - 0.03 <= cost <= kl + slack + 0.03  # 0.03: the error of the simulation
    assert cost == pytest.approx(exact, abs=0.05)


def test_one_answer_stays_what_it_is() -> None:
    found = resample(OBJECTIVE, [17], [3.25], 0.99)
    assert (found.index, found.effective_sample_size) == (0, 1.0)
    assert found.text_cost == pytest.approx(3.25)
    assert found.probabilities == pytest.approx([1.0])


def test_weights_by_hand() -> None:
    # u: 1, 1/e (6 past 30 by a width of 6), 1/e; text costs 1, 0, 2: weights e^-1, e^-1, e^-3.
    found = resample(OBJECTIVE, [30, 36, 24], [1.0, 0.0, 2.0], 0.0)
    weights = np.exp([-1.0, -1.0, -3.0])
    assert found.probabilities == pytest.approx(weights / weights.sum())
    assert found.effective_sample_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert found.text_cost == pytest.approx(0.0 - math.log(weights.mean()))
    edges = np.cumsum(found.probabilities)
    for draw, index in ((0.0, 0), (edges[0] - 1e-9, 0), (edges[0] + 1e-9, 1), (edges[1] + 1e-9, 2), (1 - 1e-12, 2)):
        assert resample(OBJECTIVE, [30, 36, 24], [1.0, 0.0, 2.0], draw).index == index
    # However unlikely all of them are, one is drawn.
    far = resample(OBJECTIVE, [4000, 5000], [900.0, 100.0], 0.5)
    assert far.probabilities.sum() == pytest.approx(1.0)
    assert np.isfinite(far.text_cost)


def test_answers_of_the_sampler() -> None:
    answers = [
        Generation(list(range(30)), True, False, 1.0, -20.0, seed=8),
        Generation(list(range(33)), False, False, 1.0, -50.0, seed=9),
    ]
    for draw in (0.0, 0.99):
        chosen, found = resample_answers(OBJECTIVE, answers, draw)
        assert found.index == round(draw)
        assert (chosen.token_ids, chosen.seed) == (answers[found.index].token_ids, answers[found.index].seed)
        assert chosen.text_cost == found.text_cost == resample(OBJECTIVE, [30, 33], [1.0, 1.0], draw).text_cost
    assert answers[0].text_cost == 1.0  # what was given stays as it is


@pytest.mark.parametrize(
    ("objective", "lengths", "costs", "message"),
    [
        (OBJECTIVE, [], [], "one of each"),
        (OBJECTIVE, [3, 4], [0.0], "one of each"),
        (OBJECTIVE, [[3]], [[0.0]], "one of each"),
        (OBJECTIVE, [3, 4], [0.0, math.nan], "greedy"),
        (OBJECTIVE, [3, 4], [0.0, math.inf], "finite"),
        (Objective("equal_to", 30, method="paper"), [3], [0.0], "posterior"),
        (Objective("scale", factor=0.5), [3], [0.0], "resolve_scale"),
    ],
)
def test_what_cannot_be_weighed(objective: Objective, lengths: Any, costs: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        resample(objective, lengths, costs, 0.5)


WIRE: list[dict[str, Any]] = [
    {"kind": "equal_to", "target": 30, "tolerance": 0.2, "strength": 0.5},
    {"kind": "equal_to", "target": 5, "method": "posterior"},
    {"kind": "at_most", "target": 20, "tolerance": 0.0},
    {"kind": "at_least", "target": 41, "min_eos_prob": 0.01},
    {"kind": "tilt", "lambda": -0.03},
]


@pytest.mark.parametrize("wire", WIRE, ids=lambda wire: "-".join(map(str, wire.values())))
def test_the_client_draws_from_the_same_law(wire: dict[str, Any]) -> None:
    lengths, costs = [0, 5, 19, 20, 30, 33, 41, 200], [0.0, 3.5, 1.0, -0.5, 9.0, 2.0, 1.5, 300.0]
    theirs = lenvm_client.resample(wire, lengths, costs, rng=random.Random(7))
    draws = random.Random(7).random()  # what choices takes
    ours = resample(Objective.from_dict(wire), lengths, costs, draws)
    assert theirs.index == ours.index
    assert theirs.probabilities == pytest.approx(ours.probabilities, abs=1e-12)
    assert theirs.text_cost == pytest.approx(ours.text_cost)
    assert theirs.effective_sample_size == pytest.approx(ours.effective_sample_size)


def test_the_client_refuses_what_cannot_be_weighed() -> None:
    good = {"kind": "at_most", "target": 20}
    for wire, lengths, costs, message in (
        (good, [], [], "one of each"),
        (good, [1], [1.0, 2.0], "one of each"),
        (good, [1], [math.nan], "finite"),
        ({**good, "method": "paper"}, [1], [1.0], "posterior"),
        ({"kind": "scale", "factor": 0.5}, [1], [1.0], "posterior"),
        ({"kind": "at_most"}, [1], [1.0], "target must be a finite number of at least 0, got None"),
        ({"kind": "at_most", "target": -5}, [1], [1.0], "target"),
        ({"kind": "at_most", "target": True}, [1], [1.0], "target"),
        ({**good, "tolerance": math.nan}, [1], [1.0], "tolerance"),
        ({"kind": "tilt"}, [1], [1.0], "lambda must be a finite number, got None"),
    ):
        with pytest.raises(lenvm_client.InvalidRequestError, match=message):
            lenvm_client.resample(wire, lengths, costs)
    assert lenvm_client.resample(good, [3, 900], [1.0, 0.0]).index == 0
