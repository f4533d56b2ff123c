"""The playground's HTML: figures, histogram, coloured tokens, comparisons. Nothing that is shown is read as markup."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from lenvm.distribution import LengthBins
from lenvm.errors import ContextTooLongError, InvalidRequestError
from lenvm.evaluation.figures.token_view import shift_look
from lenvm_service.ui.distribution_view import bars, distribution_html, quantile_facts
from lenvm_service.ui.guidance_view import KINDS, METHODS, build_objective, comparison_html, running_html, wish_of
from lenvm_service.ui.html import escape, number, problem, table
from lenvm_service.ui.limits import MAX_CHARACTERS, check_text, check_tokens, whole
from lenvm_service.ui.style import CSS
from lenvm_service.ui.tokens_view import answer_html, tokens_html

BINS = LengthBins(cap=64)
HOSTILE = "<img src=x onerror=alert(1)> ${6*7} {{6*7}} `x` \"quoted\" 'too'"


def prediction(probabilities: list[float], **fields: Any) -> dict[str, Any]:
    return {
        "prompt_tokens": 36, "value": -0.3, "horizon": 35.5, "mean": 20.25, "saturated": False,
        "quantiles": {"0.5": 18, "0.9": 40, "0.95": 50},
        "distribution": {"lo": BINS.lo.tolist(), "hi": BINS.hi.tolist(), "probability": probabilities},
    } | fields  # fmt: skip


def flat() -> list[float]:
    return [1 / BINS.size] * BINS.size


def svg_of(text: str) -> ElementTree.Element:
    found = re.search(r"<svg.*</svg>", text, re.DOTALL)
    assert found
    return ElementTree.fromstring(found[0])


def test_what_a_visitor_types_is_text() -> None:
    shown = escape(HOSTILE)
    assert not set("<>\"'`${") & set(shown)
    assert "&lt;img" in shown
    for page in (problem(HOSTILE), table(["a", HOSTILE], [[HOSTILE, HOSTILE]])):
        assert "<img" not in page
        assert "${" not in page
        assert "{{" not in page


@pytest.mark.parametrize(
    ("value", "spec", "shown"),
    [(1234.56, ",.1f", "1,234.6"), (-0.5, "+.1f", "−0.5"), (-0.001, ",.2f", "0.00"), (-0.001, "+.1f", "+0.0"),
     (None, ".1f", "–"), (math.nan, ".1f", "–"), (math.inf, ".1f", "–")],
)  # fmt: skip
def test_numbers(value: float | None, spec: str, shown: str) -> None:
    assert number(value, spec) == shown


def test_the_area_of_every_bar_is_its_probability() -> None:
    weights = [math.exp(-(((at - 12) / 5) ** 2)) for at in range(BINS.size)]
    shares = [weight / sum(weights) for weight in weights]
    svg = svg_of(distribution_html(prediction(shares), cap=64, generator="G."))
    boxes = svg.findall("rect")
    assert len(boxes) == BINS.size
    assert max(float(box.attrib["height"]) for box in boxes) == pytest.approx(154, abs=1)  # the plot's whole height
    areas = [(float(box.attrib["width"]) + 0.6) * float(box.attrib["height"]) for box in boxes]
    for area, share in zip(areas, shares, strict=True):
        assert area / sum(areas) == pytest.approx(share, abs=0.01)
    edges = [float(box.attrib["x"]) for box in boxes]
    assert edges == sorted(edges)
    assert float(boxes[-1].attrib["x"]) + float(boxes[-1].attrib["width"]) <= 720
    titles = [box.findtext("title") for box in boxes]
    assert titles[0] == f"1 tokens: {100 * shares[0]:.2f} %"
    assert str(titles[-1]).startswith("over 64 tokens")


def test_a_quantile_is_a_number_or_the_model_abstains() -> None:
    page = distribution_html(prediction(flat()), cap=64, generator="Valid for G.")
    assert "abstains" not in page
    assert "Saturated" not in page
    assert [value for _, value, _ in quantile_facts(prediction(flat()), 64)] == ["18", "40", "50"]
    for name in ("p50 18", "p90 40", "p95 50", "mean 20"):
        assert name in page
    assert "Valid for G." in page

    shares = [0.92 / (BINS.size - 1)] * (BINS.size - 1) + [0.08]
    cut = prediction(shares, saturated=True, quantiles={"0.5": 18, "0.9": 40, "0.95": 64})
    facts = quantile_facts(cut, 64)
    assert facts[2] == ("p95", "over 64", "the model abstains: it lies beyond its cap")
    page = distribution_html(cut, cap=64, generator="G.")
    assert "Saturated: 8.0 %" in page
    assert "lower bound" in page
    assert "p95 64" not in page  # no mark where nothing is known
    # A quantile that is the cap and known is a number.
    assert quantile_facts(prediction(flat(), quantiles={"0.5": 1, "0.9": 2, "0.95": 64}), 64)[2][1] == "64"


def test_a_model_without_a_distribution_says_so() -> None:
    page = distribution_html(prediction([], distribution=None, mean=None), cap=None, generator="G.")
    assert "no length distribution" in page
    assert "35.5" in page
    assert "<svg" not in page


def test_the_last_bar_is_what_lies_beyond() -> None:
    found = bars(prediction(flat())["distribution"])
    assert [bar.beyond for bar in found] == [False] * (BINS.size - 1) + [True]
    assert (found[20].lo, found[20].hi) == (int(BINS.lo[20]), int(BINS.hi[20]))


def scores() -> dict[str, Any]:
    return {
        "token_ids": [10, 11, 12, 2], "tokens": ["<b>", " make\n", "\n", "<|im_end|>"],
        "values": [-0.5, -0.6, -0.4, -0.401, 0.0], "horizons": [230.0, 305.2, 170.3, 170.9, 0.0],
        "length_shifts": [0.0982, -0.2012, -0.0003, -0.4],
    }  # fmt: skip


def test_tokens_have_their_colour_their_horizon_and_their_numbers() -> None:
    page = tokens_html(scores(), finished=True)
    boxes = re.findall(r'<span class="lv-t([^"]*)"(?: style="--a:([\d.]+)")? title="([^"]*)">(.*?)</span>', page)
    assert [kind.strip() for kind, *_ in boxes] == ["lv-l", "lv-s", "", "lv-s"]
    assert [float(strength or 0) for _, strength, *_ in boxes] == [
        pytest.approx(look[1] if (look := shift_look(shift)) else 0, abs=0.01) for shift in scores()["length_shifts"]
    ]
    assert [re.findall(r"<small>(\d+)</small><b>(.*)</b>", inner)[0] for *_, inner in boxes] == [
        ("305", "&lt;b&gt;"), ("170", " make⏎"), ("171", "⏎"), ("0", "■"),
    ]  # fmt: skip
    # 230 tokens before, 305.2 after one was used up: 76.2 more.
    assert "length shift +0.0982 (+76.2 tokens); after it value −0.600, horizon 305.2 tokens" in boxes[0][2]
    assert boxes[3][2].startswith("end of the answer: length shift −0.4000")
    assert "3 content tokens, ended by itself" in page
    assert "horizon 230.0 tokens" in page
    assert "<b><b>" not in page
    assert page.count("<tr>") == 5  # the same without a mouse
    assert answer_html(scores(), finished=True).count("<br>") == 2


def test_an_answer_that_was_cut_has_no_end() -> None:
    row = {name: values[:-1] for name, values in scores().items()}
    page = tokens_html(row, finished=False)
    assert "3 content tokens, not ended" in page
    assert "■" not in page
    assert answer_html(row, finished=False).count("<br>") == 1  # none after the last


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_all_controls_make_an_objective(kind: str, method: str) -> None:
    found = build_objective(kind=kind, method=method, target=64, tilt=0.01, beta=-20, tolerance=0.1, strength=0.5)
    assert (found.kind, found.strength) == (kind, 0.5)
    assert found.method == ("posterior" if method == "posterior" else "paper")
    assert found.target == (None if kind == "tilt" else 64)
    assert found.tolerance == (0.1 if method == "posterior" else 0.05)
    assert found.space == ("length" if kind == "equal_to" and method == "paper, in lengths" else "value")
    wish = wish_of(found)
    assert ("64 tokens" in wish) == (kind != "tilt")
    assert found.method in wish


def test_what_guidance_does_not_know_is_refused() -> None:
    for wrong in ({"kind": "longer"}, {"target": 1.5}, {"strength": -1}, {"tolerance": "x"}):
        controls = {
            "kind": "equal_to", "method": "posterior", "target": 64, "tilt": 0.0, "beta": 0.0, "tolerance": 0.05,
            "strength": 1.0,
        } | wrong  # fmt: skip
        with pytest.raises(InvalidRequestError):
            build_objective(**controls)  # type: ignore[arg-type]


def test_guided_beside_unguided() -> None:
    objective = build_objective(
        kind="equal_to", method="posterior", target=64, tilt=0, beta=0, tolerance=0.05, strength=1
    )
    answer = {"content_tokens": 60, "length_score": 73.2, "text_cost": 4.25, "forced_stop": False, "finished": True}
    other = {"content_tokens": 192, "length_score": 1.8, "text_cost": -0.0, "forced_stop": False, "finished": False}
    cut = {name: values[:-1] for name, values in scores().items()}
    page = comparison_html(objective, [answer, other], [scores(), cut], 192)
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert cells == ["60", "73.2", "4.25", "by itself", "192", "1.8", "0.00", "cut at 192"]
    assert page.count('class="lv-tokens"') == 2
    assert "equal to 64 tokens, posterior" in page
    forced = comparison_html(objective, [answer | {"forced_stop": True}, other], [scores(), None], 192)
    assert "forced stop" in forced
    running = running_html(objective, ["so <far>", ""], [3, 0], 192)
    assert "so &lt;far&gt;" in running
    assert "3 of at most 192 tokens" in running


def test_limits() -> None:
    assert check_text("a b", "prompt") == "a b"
    for wrong in ("", "  \n", None, 7, "x" * (MAX_CHARACTERS + 1), "\ud800"):
        with pytest.raises(InvalidRequestError, match="the prompt"):
            check_text(wrong, "prompt")
    check_tokens(5, "prompt", 5)
    with pytest.raises(ContextTooLongError, match="6 tokens"):
        check_tokens(6, "prompt", 5)
    assert whole(3.0, "seed", 0, 9) == 3
    for bad in (None, "3", True, 2.5, -1, 10, math.nan, math.inf):
        with pytest.raises(InvalidRequestError, match="the seed must be a whole number"):
            whole(bad, "seed", 0, 9)


def test_the_style_needs_nothing_from_elsewhere() -> None:
    assert "url(" not in CSS
    assert "@import" not in CSS
    assert CSS.count("{") == CSS.count("}")
