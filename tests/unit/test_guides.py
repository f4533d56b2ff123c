"""The gate on EOS as exact rules, kind by kind, on made-up candidates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lenvm.decoding import Candidates
from lenvm.errors import InvalidRequestError
from lenvm.guidance import LOG_WEIGHT_FLOOR
from lenvm.guides import EosGateGuide


def at(generated: list[int], eos: float | list[float]) -> Candidates:
    """Rows of two words and one EOS of probability ``eos``."""
    count = len(generated)
    logprobs = np.log(np.tile([0.3, 0.2, 0.1], (count, 1)))
    logprobs[:, 2] = np.log(eos)
    is_eos = np.tile([False, False, True], (count, 1))
    ids = np.tile([5, 6, 2], (count, 1))
    return Candidates(ids, logprobs, is_eos, np.ones_like(is_eos), np.array(generated), logprobs)


def actions(guide: EosGateGuide, generated: list[int], eos: float | list[float], rows: list[int] | None = None) -> str:
    """A letter a row: h(olds EOS back), s(tops) or . (leaves alone)."""
    weights = guide.log_weights(rows or [0] * len(generated), at(generated, eos))
    letters = {(0.0, 0.0, LOG_WEIGHT_FLOOR): "h", (LOG_WEIGHT_FLOOR, LOG_WEIGHT_FLOOR, 0.0): "s", (0.0, 0.0, 0.0): "."}
    return "".join(letters[tuple(row)] for row in weights.tolist())


PLACES = [0, 79, 80, 100, 119, 120, 300]


def test_equal_to_holds_seeks_and_stops() -> None:
    guide = EosGateGuide([100], slack=0.2, threshold=0.05)
    assert actions(guide, PLACES, 0.01) == "hh...ss"
    assert actions(guide, PLACES, 0.05) == "hhsssss"
    later = EosGateGuide([100], slack=0.2, threshold=0.05, stop=1.5)
    assert actions(later, [119, 120, 149, 150], 0.01) == "...s"


def test_at_most_never_holds_and_stops_at_the_target() -> None:
    guide = EosGateGuide([100], kinds="at_most", slack=0.2, threshold=0.05)
    assert actions(guide, [0, 79, 80, 99, 100, 101], 0.01) == "....ss"
    assert actions(guide, [0, 79, 80, 99, 100, 101], 0.2) == "..ssss"


def test_at_least_holds_up_to_the_target_and_is_free_then() -> None:
    guide = EosGateGuide([100], kinds="at_least", slack=0.0, threshold=math.inf)
    assert actions(guide, [0, 99, 100, 5000], 0.9) == "hh.."
    seeking = EosGateGuide([100], kinds="at_least", slack=0.0, threshold=0.05)
    assert actions(seeking, [0, 99, 100, 5000], [0.9, 0.9, 0.04, 0.06]) == "hh.s"


@pytest.mark.parametrize("kind", ["equal_to", "at_most", "at_least"])
def test_the_softest_rule_does_nothing(kind: str) -> None:
    guide = EosGateGuide([100], kinds=kind, slack=1.0, threshold=math.inf, stop=math.inf)
    assert actions(guide, PLACES, 1.0) == "." * len(PLACES)


def test_rows_have_rules_of_their_own() -> None:
    guide = EosGateGuide(
        [100, 10, 50], kinds=["at_least", "at_most", "equal_to"], slack=[0.0, 0.5, 0.1], threshold=[math.inf, 0.5, 0.5]
    )
    assert actions(guide, [20, 20, 20], 0.1, rows=[0, 1, 2]) == "hsh"
    assert actions(guide, [20, 9, 46, 7], [0.1, 0.1, 0.1, 0.6], rows=[0, 1, 2, 1]) == "h..s"


def test_any_eos_id_that_is_likely_enough_counts() -> None:
    two = at([90], 0.001)
    is_eos = np.array([[False, True, True]])
    found = EosGateGuide([100], slack=0.2, threshold=0.2).log_weights(
        [0], Candidates(two.ids, two.logprobs, is_eos, two.kept, two.generated, two.raw_logprobs)
    )
    assert found.tolist() == [[LOG_WEIGHT_FLOOR, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"kinds": "exactly"}, "kind"),
        ({"slack": -0.1}, "slack"),
        ({"slack": [math.nan]}, "slack"),
        ({"threshold": 0.0}, "threshold"),
        ({"stop": 0.5}, "stop"),
        ({"stop": math.nan}, "stop"),
    ],
)
def test_rules_that_make_no_sense(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EosGateGuide([100], **changes)
    assert caught.value.param == param
