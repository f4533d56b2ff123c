"""Coverage and drift from realised lengths: calibrated, shifted and censored answers of known distributions."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable

import pytest

from lenvm_service.metrics import Metrics
from lenvm_service.realised import LEVELS, FeedbackWindow, predicted_probability, product_limit

SIZE = 2000
EXPONENTIAL = -0.57722 - math.log(math.log(2))  # mean of ln(x / median) of an exponential distribution


def filled(
    *,
    factor: float = 1.0,
    limit: Callable[[random.Random, float], float] | None = None,
    cap: int | None = None,
    size: int = SIZE,
) -> tuple[FeedbackWindow, dict[float, float]]:
    """A window of answers whose lengths are exponential, with a mean of its own for each prompt; predicted exactly, but
    for ``factor``. ``limit`` cuts them. Also the coverage that those answers show whose side the cut left decided."""
    rng, window = random.Random(0), FeedbackWindow()
    decided: dict[float, list[bool]] = {level: [] for level in LEVELS}
    for _ in range(size):
        mean = math.exp(rng.gauss(5.5, 1.0))
        length = math.ceil(factor * mean * rng.expovariate(1.0))
        bound = math.inf if limit is None else max(1, round(limit(rng, mean)))
        cut = length > bound
        seen = int(min(length, bound))
        quantiles = [math.ceil(-mean * math.log(1 - level)) for level in LEVELS]
        if cap is not None:
            quantiles = [min(cap, quantile) for quantile in quantiles]
        window.add(seen, cut=cut, horizon=1.0, levels=LEVELS, quantiles=quantiles, cap=cap)
        for level, quantile in zip(LEVELS, quantiles, strict=True):
            if not cut or seen >= quantile:
                decided[level].append(not cut and seen <= quantile)
    return window, {level: sum(sides) / len(sides) for level, sides in decided.items()}


def test_calibrated_predictions_have_their_nominal_coverage() -> None:
    window, decided = filled()
    found = window.summary()
    assert found.items == SIZE
    assert found.coverage == pytest.approx(decided)  # nothing is cut: plain counting
    assert found.coverage == pytest.approx({level: level for level in LEVELS}, abs=0.03)
    assert found.log_ratio == pytest.approx(EXPONENTIAL, abs=0.06)


@pytest.mark.parametrize("factor", [0.6, 1.5])
def test_a_shift_is_seen(factor: float) -> None:
    found = filled(factor=factor)[0].summary()
    true = {level: 1 - (1 - level) ** (1 / factor) for level in LEVELS}
    assert found.coverage == pytest.approx(true, abs=0.03)
    assert abs(found.coverage[0.5] - 0.5) > 0.1
    assert found.log_ratio == pytest.approx(EXPONENTIAL + math.log(factor), abs=0.06)


LIMITS: dict[str, Callable[[random.Random, float], float]] = {
    "at random": lambda rng, mean: rng.expovariate(1 / 700),
    "at a limit for all": lambda rng, mean: 600,
    "by the prompt": lambda rng, mean: mean * rng.uniform(0.2, 6.0),
}


@pytest.mark.parametrize("factor", [1.0, 1.5])
@pytest.mark.parametrize("name", LIMITS)
def test_cut_answers_do_not_bias_it(name: str, factor: float) -> None:
    window, decided = filled(limit=LIMITS[name], factor=factor)
    found = window.summary()
    true = {level: 1 - (1 - level) ** (1 / factor) for level in LEVELS}
    assert found.coverage == pytest.approx(true, abs=0.05)
    errors = {level: abs(found.coverage[level] - true[level]) for level in LEVELS}
    naive = {level: abs(decided[level] - true[level]) for level in LEVELS}
    assert max(naive.values()) > max(errors.values())
    assert found.log_ratio == pytest.approx(EXPONENTIAL + math.log(factor), abs=0.15)


def test_a_cap_hides_only_what_is_beyond_it() -> None:
    """p95 is at the cap for a third of the prompts: that an answer is longer does not make its quantile wrong."""
    found = filled(cap=1000)[0].summary()
    assert found.coverage == pytest.approx({level: level for level in LEVELS}, abs=0.03)


def test_where_no_answer_tells_there_is_no_number() -> None:
    window = FeedbackWindow()
    assert window.summary().items == 0
    assert all(map(math.isnan, [window.summary().log_ratio, *window.summary().coverage.values()]))
    for length, cut in ((30, False), (40, True)):
        window.add(length, cut=cut, horizon=9.0, levels=(0.5, 0.9), quantiles=(35, 90), cap=None)
    found = window.summary()
    assert found.coverage[0.5] == 0.5
    assert math.isnan(found.coverage[0.9])  # the one that got so far was cut
    assert math.isnan(found.coverage[0.95])  # nobody asked for it
    assert found.log_ratio == pytest.approx((math.log(30 / 35) + math.log(40 / 35)) / 2)
    bare = FeedbackWindow()
    bare.add(30, cut=False, horizon=10.0, levels=(), quantiles=(), cap=None)
    assert bare.summary().log_ratio == pytest.approx(math.log(3))
    assert math.isnan(bare.summary().coverage[0.5])


def test_the_window_slides() -> None:
    window, fresh = FeedbackWindow(3), FeedbackWindow(3)
    for length in (1, 2, 300, 400, 500):
        for one in (window, fresh) if length > 2 else (window,):
            one.add(length, cut=False, horizon=1.0, levels=(0.5,), quantiles=(100,), cap=None)
    assert window.summary().items == 3
    assert window.summary().coverage[0.5] == fresh.summary().coverage[0.5] == 0.0
    assert window.summary().log_ratio == fresh.summary().log_ratio


@pytest.mark.parametrize(
    ("length", "cut", "cap", "expected"),
    [
        (5, False, None, (0.25, False)),
        (10, False, None, (0.5, False)),
        (10, True, None, (0.5, True)),  # above the median, which ties put right
        (15, True, None, (0.7, True)),
        (20, False, None, (0.9, False)),
        (21, False, None, (1.0, False)),
        (15, False, 20, (0.6, False)),
        (20, False, 20, (0.7, False)),
        (20, True, 20, (0.7, True)),
        (99, False, 20, (0.7, True)),
        (5, False, 10, (0.125, False)),
        (11, False, 10, (0.25, True)),
    ],
)
def test_where_a_length_falls_in_its_prediction(
    length: int, cut: bool, cap: int | None, expected: tuple[float, bool]
) -> None:
    found, beyond = predicted_probability(length, (0.9, 0.5), (20, 10), cut=cut, cap=cap)
    assert (pytest.approx(found), beyond) == expected


def test_equal_quantiles() -> None:
    for length, expected in ((7, 0.5), (8, 1.0)):
        assert predicted_probability(length, (0.5, 0.9), (7, 7), cut=False, cap=None)[0] == expected


def test_the_product_limit_by_hand() -> None:
    """The mass of what was cut goes to what lies above; at a tie it lies above what ended."""
    observed = sorted([(3.0, False), (1.0, False), (2.0, True), (2.0, False), (4.0, True)])
    steps = list(product_limit(observed))
    assert [value for value, _ in steps] == [1.0, 2.0, 3.0]
    assert [mass for _, mass in steps] == pytest.approx([0.2, 0.2, 0.3])
    assert list(product_limit([(1.0, False)])) == [(1.0, 1.0)]
    assert list(product_limit([(1.0, True)])) == []


def test_many_threads() -> None:
    window = FeedbackWindow(500)
    start, problems = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        try:
            for length in range(1, 301):
                window.add(length, cut=length % 3 == 0, horizon=9.0, levels=LEVELS, quantiles=(9, 90, 99), cap=None)
                if length % 50 == 0:
                    assert 0 < window.summary().items <= 500
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert window.summary().items == 500


def test_the_gauges() -> None:
    metrics = Metrics()
    one, _ = metrics.engine("one"), metrics.engine("two")

    def gauge(name: str, **labels: str) -> float:
        value = metrics.registry.get_sample_value(f"lenvm_feedback_{name}", labels)
        assert value is not None
        return value

    for length in (50, 150, 950):
        one.realised(length, cut=False, horizon=80.0, levels=LEVELS, quantiles=(100, 500, 900), cap=2048)
    assert gauge("window_items", model="one") == 3
    assert gauge("window_items", model="two") == 0
    for quantile, expected in (("0.5", 1 / 3), ("0.9", 2 / 3), ("0.95", 2 / 3)):
        assert gauge("coverage_ratio", model="one", quantile=quantile) == pytest.approx(expected)
        assert math.isnan(gauge("coverage_ratio", model="two", quantile=quantile))
    mean = sum(math.log(length / 100) for length in (50, 150, 950)) / 3
    assert gauge("log_ratio", model="one") == pytest.approx(mean)
    assert math.isnan(gauge("log_ratio", model="two"))
