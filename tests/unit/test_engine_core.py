"""Jobs to answers on a tiny model: the numbers, sessions, and one bad row among good ones."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from lenvm.distribution import quantile, restricted_mean, survival
from lenvm.errors import ContextTooLongError, InvalidRequestError
from lenvm.guidance import Objective, log_weights, resolve_scale
from lenvm.modeling import LengthValueModel
from lenvm.returns import horizon_from_logit, length_shift, value_from_logit
from lenvm.scoring import TorchScorer
from lenvm_service.engine import CandidateJob, EngineCore, PredictJob, Prefix, SessionStore, TokenScoreJob, sharing
from lenvm_service.engine.jobs import Shared
from lenvm_service.errors import OverloadedError, PrefixUnknownError
from lenvm_service.prefix_cache import ChainRoot, SessionRecord

EOS = 2
SECRET = b"0123456789abcdef"


def make(model: LengthValueModel, *, secret: bytes = SECRET, **options: Any) -> EngineCore:
    sessions = SessionStore(**options.pop("sessions", {}))
    scorer = TorchScorer(model, **options)
    return EngineCore(model.config, model.tokenizer, scorer, eos_ids=[EOS], secret=secret, sessions=sessions)


@pytest.fixture
def core(tiny_model: LengthValueModel) -> EngineCore:
    return make(tiny_model)


def ids(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 128, count).tolist()


def one(core: EngineCore, job: Any) -> dict[str, Any]:
    (result,) = core.run([job])
    if not isinstance(result, dict):
        raise result
    return result


# -- predictions -------------------------------------------------------------------------------------------------------


def test_a_prediction_is_what_the_model_says(core: EngineCore, full_forward: Any) -> None:
    prompt = ids(0, 20)
    row = one(core, PredictJob(Prefix(prompt), quantiles=[0.5, 0.9], max_tokens=30, generated=10))
    logits, bin_logprobs = full_forward(prompt)
    bins = core.scorer.bins
    assert bins is not None
    assert row["value"] == pytest.approx(value_from_logit(float(logits[-1])), abs=1e-5)
    assert row["horizon"] == pytest.approx(horizon_from_logit(float(logits[-1]), 0.99), rel=1e-4)
    assert row["mean"] == row["rank_key"] == pytest.approx(float(restricted_mean(bin_logprobs[-1], bins)), rel=1e-4)
    lengths, saturated = quantile(bin_logprobs[-1], bins, [0.5, 0.9])
    assert row["quantiles"] == {"0.5": lengths[0], "0.9": lengths[1]}
    assert row["saturated"] == saturated.any()
    # 30 tokens in all, of which 10 are there: will more than 20 come?
    assert row["p_exceeds_max_tokens"] == pytest.approx(float(survival(bin_logprobs[-1], bins, 20)), rel=1e-4)
    assert (row["prompt_tokens"], row["cached_tokens"]) == (20, 0)
    assert row["session"] == row["prediction_id"]


def test_rows_of_other_quantiles_share_a_forward(core: EngineCore) -> None:
    jobs = [PredictJob(Prefix(ids(at, 5 + at)), quantiles=levels) for at, levels in enumerate([(0.5,), (0.9, 0.1)] * 3)]
    together = core.run(jobs)
    assert core.counts.forwards == 1
    assert core.counts.computed_tokens == sum(5 + at for at in range(6))
    for job, row in zip(jobs, together, strict=True):
        assert isinstance(row, dict)
        alone = one(make(core.scorer.model), job)
        assert alone["quantiles"] == row["quantiles"]
        assert alone["mean"] == pytest.approx(row["mean"], rel=1e-5)
        assert alone["session"] == row["session"]


def test_the_same_prefix_again_costs_nothing(core: EngineCore) -> None:
    first = one(core, PredictJob(Prefix(ids(1, 9))))
    again = one(core, PredictJob(Prefix(ids(1, 9))))
    by_session = one(core, PredictJob(Prefix((), first["session"])))
    assert (first["cached_tokens"], again["cached_tokens"], by_session["cached_tokens"]) == (0, 9, 9)
    assert core.scorer.stats.forwards == 1
    assert first | {"cached_tokens": 9} == again == by_session


def test_a_value_head_alone_has_no_distribution(tiny_backbone: Any, tmp_path: Any) -> None:
    from lenvm.config import GeneratorRef, HeadConfig

    model = LengthValueModel.create(
        tiny_backbone,
        name="value-only",
        head=HeadConfig(16, None),
        gamma=0.99,
        generator=GeneratorRef("x", 0.7, 1.0, 64),
    )
    model.save_pretrained(tmp_path / "m")
    core = make(LengthValueModel.from_pretrained(tmp_path / "m"))
    row = one(core, PredictJob(Prefix([5, 6]), max_tokens=3))
    assert {row[name] for name in ("mean", "quantiles", "p_exceeds_max_tokens", "saturated")} == {None}
    assert row["rank_key"] == row["horizon"]
    objective = Objective(kind="equal_to", target=5)
    paper = Objective(kind="equal_to", target=5, method="paper")
    refused, scaled, served = core.run(
        [
            CandidateJob(Prefix([5, 6]), [7, EOS], objective=objective),
            CandidateJob(Prefix([5, 6]), [7, EOS], objective=Objective(kind="scale", factor=0.5)),
            CandidateJob(Prefix([5, 6]), [7, EOS], objective=paper, logprobs=[-0.1, -3.0]),
        ]
    )
    assert isinstance(refused, InvalidRequestError)
    assert refused.param == "objective.method"
    assert isinstance(scaled, InvalidRequestError)
    assert isinstance(served, dict)


# -- token scores ------------------------------------------------------------------------------------------------------


def test_token_scores(core: EngineCore, full_forward: Any) -> None:
    prompt, completion = ids(2, 7), ids(3, 5)
    row = one(core, TokenScoreJob(prompt, completion, eos=True))
    logits, _ = full_forward([*prompt, *completion])
    values = [*value_from_logit(logits[6:].astype(float)), 0.0]
    assert row["values"] == pytest.approx(values, abs=1e-5)
    assert row["length_shifts"] == pytest.approx(list(length_shift(values, 0.99)), abs=1e-5)
    assert row["token_ids"] == [*completion, EOS]
    assert len(row["tokens"]) == 6
    assert row["horizons"][-1] == 0.0
    assert row == one(core, TokenScoreJob(prompt, [*completion, EOS]))
    assert len(one(core, TokenScoreJob(prompt, completion))["values"]) == 6
    assert core.scorer.pool.used_blocks == 0  # nothing is kept of these


# -- candidates --------------------------------------------------------------------------------------------------------


def test_log_weights_are_those_of_the_guidance(core: EngineCore, full_forward: Any) -> None:
    prompt, candidates = ids(4, 6), [10, EOS, 11, 12]
    objectives: list[Objective | None] = [
        Objective(kind="equal_to", target=9),
        None,
        Objective(kind="at_most", target=4, method="paper"),
        Objective(kind="tilt", lambda_=0.05),
        Objective(kind="scale", factor=0.5),
    ]
    logprobs = [-1.0, -2.0, -1.5, -3.0]
    rows = core.run([CandidateJob(Prefix(prompt), candidates, objective=o, logprobs=logprobs) for o in objectives])
    assert core.counts.forwards == 1
    logits, bins = zip(*(full_forward([*prompt, token]) for token in candidates), strict=True)
    last = np.array([row[-1] for row in logits], dtype=float)
    last_bins = np.array([row[-1] for row in bins], dtype=float)
    assert core.scorer.bins is not None
    tilt = resolve_scale(objectives[4], full_forward(prompt)[1][-1], core.scorer.bins)  # type: ignore[arg-type]
    for objective, row in zip(objectives, rows, strict=True):
        assert isinstance(row, dict)
        is_scale = objective is not None and objective.kind == "scale"
        expected = log_weights(
            [tilt if is_scale else objective],
            last[None],
            last_bins[None],
            np.array([[False, True, False, False]]),
            np.array([0]),
            np.array([logprobs]),
            bins=core.scorer.bins,
            gamma=0.99,
        )[0]
        if objective is None:
            assert row["log_weights"] is None
        else:
            assert row["log_weights"] == pytest.approx(list(expected), abs=1e-3)
        assert row["values"] == pytest.approx([*np.where([0, 1, 0, 0], 0.0, value_from_logit(last))], abs=1e-5)
        assert row["horizons"][1] == 0.0
        if is_scale:
            assert row["objective"]["kind"] == "tilt"
            assert row["objective"]["lambda"] == pytest.approx(tilt.lambda_, rel=1e-3)
        else:
            assert row["objective"] is None


def test_values_that_nobody_wants_are_left_out_and_nothing_else_changes(core: EngineCore) -> None:
    objective = Objective(kind="equal_to", target=9)
    prompt, few, many = ids(4, 6), [10, EOS], [10, 11, EOS, 12, 13]

    def rows(*wanted: bool) -> list[Any]:
        jobs = [CandidateJob(Prefix(prompt), few if w else many, 0, objective, return_values=w) for w in wanted]
        return core.run(jobs)

    short, both = rows(False, False), rows(True, False)
    for row in short:
        assert (row["values"], row["horizons"]) == ([], [])
    assert len(both[0]["values"]) == len(both[0]["horizons"]) == len(few)
    assert (both[1]["values"], both[1]["horizons"]) == ([], [])
    assert len(both[0]["log_weights"]) == len(few)
    assert both[1]["log_weights"] == pytest.approx(short[1]["log_weights"], abs=1e-3)
    assert both[0]["value"] == pytest.approx(short[0]["value"], abs=1e-6)


def test_a_guided_step_computes_its_candidates_and_nothing_else(core: EngineCore) -> None:
    objective = Objective(kind="equal_to", target=20)
    prompt = ids(5, 33)
    row = one(core, CandidateJob(Prefix(prompt), [10, 11, EOS], objective=objective))
    assert (row["prefix_tokens"], row["cached_tokens"]) == (33, 0)
    cached = []
    for step in range(1, 6):
        row = one(core, CandidateJob(Prefix([10], row["session"]), [10, 11, EOS], step, objective))
        assert core.counts.forwards == 1
        assert core.counts.computed_tokens == 2
        assert core.counts.promoted_tokens == 1
        cached.append(row["cached_tokens"])
    assert cached == [34, 35, 36, 37, 38]
    # The same numbers as for the whole prefix at once.
    fresh = one(make(core.scorer.model), CandidateJob(Prefix([*prompt, *[10] * 5]), [10, 11, EOS], 5, objective))
    assert fresh["session"] == row["session"]
    assert fresh["log_weights"] == pytest.approx(row["log_weights"], abs=1e-3)


def test_a_prediction_in_between_does_not_cost_the_promotion(core: EngineCore) -> None:
    row = one(core, CandidateJob(Prefix(ids(6, 4)), [10, 11]))
    one(core, PredictJob(Prefix((), row["session"])))
    assert core.counts.forwards == 0
    one(core, CandidateJob(Prefix([11], row["session"]), [12, 13], 1))
    assert core.counts.promoted_tokens == 1


def test_handles_are_immutable_and_repeated_calls_agree(core: EngineCore) -> None:
    root = one(core, CandidateJob(Prefix(ids(7, 5)), [10, 11, 12]))["session"]
    job = CandidateJob(Prefix([10], root), [20, 21], 1, Objective(kind="at_most", target=3))
    sibling = CandidateJob(Prefix([11], root), [20, 21], 1, Objective(kind="at_most", target=3))
    first, other, again = (one(core, j) for j in (job, sibling, job))
    assert first["session"] == again["session"] != other["session"]
    assert first["log_weights"] == pytest.approx(again["log_weights"], abs=1e-4)
    twice = core.run([job, sibling, job])  # the same handle twice in one call
    assert [row["session"] for row in twice] == [first["session"], other["session"], first["session"]]  # type: ignore[index]
    deep = one(core, CandidateJob(Prefix([20, 30, 31], first["session"]), [5], 4))
    assert deep["session"] == core.prefixes.handle_of([*ids(7, 5), 10, 20, 30, 31])


def test_handles_need_the_secret_and_the_model(tiny_model: LengthValueModel) -> None:
    a, b = make(tiny_model), make(tiny_model, secret=b"another-secret--")
    assert a.prefixes.handle_of([5, 6]) == make(tiny_model).prefixes.handle_of([5, 6])
    assert a.prefixes.handle_of([5, 6]) != b.prefixes.handle_of([5, 6])
    roots = [ChainRoot(sha, "layout", 32, tenant, SECRET) for sha, tenant in (("x", ""), ("y", ""), ("x", "t"))]
    assert len({root.extend([5]).handle for root in roots}) == 3
    assert a.prefixes.handle_of([5, 6]) != a.prefixes.handle_of([6, 5])


def test_stop_ids_end_the_answer(core: EngineCore) -> None:
    objective = Objective(kind="at_least", target=50)
    row = one(core, CandidateJob(Prefix(ids(8, 4)), [10, 11, EOS], objective=objective, eos_ids=[11]))
    assert row["values"][1:] == [0.0, 0.0]
    assert row["log_weights"][1] == row["log_weights"][2] < row["log_weights"][0]
    assert core.counts.computed_tokens == 4 + 1


# -- bad rows and a full pool ------------------------------------------------------------------------------------------

BAD = {
    "empty": (PredictJob(Prefix(())), InvalidRequestError, "token_ids"),
    "id too large": (PredictJob(Prefix([128])), InvalidRequestError, "token_ids"),
    "negative id": (PredictJob(Prefix([-1])), InvalidRequestError, "token_ids"),
    "huge id": (PredictJob(Prefix([10**30])), InvalidRequestError, "token_ids"),
    "unknown session": (PredictJob(Prefix((), "s-nope")), PrefixUnknownError, "session"),
    "too long": (PredictJob(Prefix([5] * 513)), ContextTooLongError, "token_ids"),
    "generated beyond the prefix": (PredictJob(Prefix([5]), generated=2), InvalidRequestError, "generated"),
    "no candidates": (CandidateJob(Prefix([5]), []), InvalidRequestError, "candidates"),
    "candidate out of range": (CandidateJob(Prefix([5]), [128]), InvalidRequestError, "candidates"),
    "candidate twice": (CandidateJob(Prefix([5]), [6, 6]), InvalidRequestError, "candidates"),
    "no room for a candidate": (CandidateJob(Prefix([5] * 512), [6]), ContextTooLongError, "token_ids"),
    "logprobs too short": (CandidateJob(Prefix([5]), [6, 7], logprobs=[-1.0]), InvalidRequestError, "logprobs"),
    "infinite logprobs": (
        CandidateJob(Prefix([5]), [6], logprobs=[float("-inf")]),
        InvalidRequestError,
        "logprobs",
    ),
    "paper without logprobs": (
        CandidateJob(Prefix([5]), [6], objective=Objective(kind="at_most", target=4, method="paper")),
        InvalidRequestError,
        "logprobs",
    ),
    "scale in the middle": (
        CandidateJob(Prefix([5, 6]), [6], 1, Objective(kind="scale", factor=2.0)),
        InvalidRequestError,
        "objective.kind",
    ),
    "completion out of range": (TokenScoreJob([5], [128]), InvalidRequestError, "completion_ids"),
    "no completion": (TokenScoreJob([5], []), InvalidRequestError, "completion"),
    "no prompt": (TokenScoreJob([], [5]), InvalidRequestError, "token_ids"),
    "EOS inside": (TokenScoreJob([5], [EOS, 6]), InvalidRequestError, "completion_ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_row_among_good_ones(core: EngineCore, name: str) -> None:
    bad, kind, param = BAD[name]
    good = [PredictJob(Prefix(ids(at, 6))) for at in range(63)]
    results = core.run([*good[:31], bad, *good[31:]])
    assert sum(isinstance(result, dict) for result in results) == 63
    error = results[31]
    assert type(error) is kind
    assert isinstance(error, InvalidRequestError)
    assert error.param == param
    assert core.counts.forwards == 1


def test_bad_rows_keep_no_state_alive(core: EngineCore) -> None:
    """An error's traceback would tie every state of its batch into a cycle, which only the garbage collector ends."""
    gc.disable()
    try:
        good = [PredictJob(Prefix(ids(at, 40))) for at in range(4)]
        results = core.run([*good, *(bad for bad, _, _ in BAD.values())])
        assert sum(not isinstance(result, dict) for result in results) == len(BAD)
        core.prefixes.clear()
        assert core.scorer.pool.used_blocks == 0
    finally:
        gc.enable()


def test_an_impossible_scale_is_an_error_of_its_row(core: EngineCore) -> None:
    impossible = CandidateJob(Prefix([5]), [6, EOS], objective=Objective(kind="scale", factor=1e6))
    bad, good = core.run([impossible, CandidateJob(Prefix([5]), [6, EOS])])
    assert isinstance(bad, InvalidRequestError)
    assert bad.param == "objective.factor"
    assert isinstance(good, dict)


def test_old_sessions_make_room(tiny_model: LengthValueModel) -> None:
    core = make(tiny_model, pool_tokens=8 * 32)
    handles = [one(core, PredictJob(Prefix(ids(at, 40))))["session"] for at in range(12)]
    assert core.sessions.evicted > 0
    assert core.scorer.pool.used_blocks <= 8
    newest = one(core, PredictJob(Prefix((), handles[-1])))
    assert newest["cached_tokens"] == 40
    (gone,) = core.run([PredictJob(Prefix((), handles[0]))])
    assert isinstance(gone, PrefixUnknownError)


def test_a_batch_larger_than_the_pool_is_answered_in_parts(tiny_model: LengthValueModel) -> None:
    core = make(tiny_model, pool_tokens=8 * 32)
    kept = one(core, PredictJob(Prefix(ids(99, 10))))["session"]
    results = core.run([PredictJob(Prefix((), kept)), *(PredictJob(Prefix(ids(at, 100))) for at in range(12))])
    assert all(isinstance(result, dict) for result in results)
    assert core.counts.forwards > 1
    assert core.scorer.pool.used_blocks <= 8


def test_a_row_larger_than_the_pool_is_an_overload_of_its_own(tiny_model: LengthValueModel) -> None:
    core = make(tiny_model, pool_tokens=8 * 32)
    results = core.run(
        [PredictJob(Prefix(ids(1, 20))), PredictJob(Prefix(ids(2, 300))), PredictJob(Prefix(ids(3, 20)))]
    )
    assert [isinstance(result, dict) for result in results] == [True, False, True]
    assert isinstance(results[1], OverloadedError)
    assert results[1].retry_after_s
    core.prefixes.clear()
    del results
    assert core.scorer.pool.used_blocks == 0


def test_the_store_is_bounded(tiny_model: LengthValueModel) -> None:
    core = make(tiny_model, sessions={"max_sessions": 3, "max_candidates": 4})
    handles = [one(core, CandidateJob(Prefix(ids(at, 4)), [5, 6]))["session"] for at in range(5)]
    assert len(core.sessions) == 3
    assert core.sessions.evicted == 2
    assert [core.sessions.get(handle).held_candidates for handle in handles[2:]] == [0, 2, 2]  # type: ignore[union-attr]
    # A session whose candidates were dropped is continued all the same.
    row = one(core, CandidateJob(Prefix([5], handles[2]), [7], 1))
    assert row["cached_tokens"] == 4
    core.prefixes.clear()
    assert core.scorer.pool.used_blocks == 0


def test_a_failure_of_the_scorer_is_raised_and_leaks_nothing(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = one(core, PredictJob(Prefix(ids(0, 40))))["session"]
    before = core.scorer.pool.used_blocks
    monkeypatch.setattr(core.scorer.model.head, "forward", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        core.run([PredictJob(Prefix(ids(1, 40))), CandidateJob(Prefix([5], kept), [6])])
    monkeypatch.undo()
    assert core.scorer.pool.used_blocks == before
    assert one(core, PredictJob(Prefix((), kept)))["cached_tokens"] == 40


# -- blocks that prefixes share ----------------------------------------------------------------------------------------


def test_prefixes_share_their_blocks(core: EngineCore, full_forward: Any) -> None:
    system = ids(20, 70)  # two blocks of 32 and a rest
    one(core, PredictJob(Prefix(system + ids(21, 5))))
    tokens = core.scorer.stats.tokens
    other = system + ids(22, 9)
    row = one(core, PredictJob(Prefix(other)))
    assert row["cached_tokens"] == 64
    assert core.scorer.stats.tokens - tokens == 79 - 64
    logits, _ = full_forward(other)
    assert row["value"] == pytest.approx(value_from_logit(float(logits[-1])), abs=1e-5)
    step = one(core, CandidateJob(Prefix(system + ids(23, 3)), [5, 6]))
    assert step["cached_tokens"] == 64


def test_a_short_shared_prefix_is_computed_again_where_that_is_sooner(
    core: EngineCore, full_forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(core.scorer), "least_prefix", 64)
    system, longer = ids(26, 40), ids(27, 64)  # a block of 32 and a rest; two blocks
    for prompt in (system, longer):
        one(core, PredictJob(Prefix(prompt + ids(28, 5))))
    again = system + ids(29, 9)
    row = one(core, PredictJob(Prefix(again)))
    assert row["cached_tokens"] == 0
    logits, _ = full_forward(again)
    assert row["value"] == pytest.approx(value_from_logit(float(logits[-1])), abs=1e-5)
    assert one(core, PredictJob(Prefix(longer + ids(30, 9))))["cached_tokens"] == 64
    assert one(core, CandidateJob(Prefix(system + ids(31, 3)), [5, 6]))["cached_tokens"] == 32
    blocks = len(core.prefixes.blocks)
    assert one(core, PredictJob(Prefix(system + ids(32, 9))))["cached_tokens"] == 0
    assert len(core.prefixes.blocks) == blocks  # its first block is held already


def test_a_prefix_that_ends_with_a_block_is_computed_to_its_last_token(core: EngineCore, full_forward: Any) -> None:
    text = ids(24, 96)
    one(core, PredictJob(Prefix([*text, 5])))
    row = one(core, PredictJob(Prefix(text)))
    assert row["cached_tokens"] == 64  # the third block is there; its last token's value is not
    logits, _ = full_forward(text)
    assert row["value"] == pytest.approx(value_from_logit(float(logits[-1])), abs=1e-5)


def test_tenants_share_nothing(core: EngineCore) -> None:
    prompt = ids(25, 80)
    mine = one(core, PredictJob(Prefix(prompt, tenant="a")))
    theirs = one(core, PredictJob(Prefix(prompt, tenant="b")))
    assert theirs["cached_tokens"] == 0
    assert theirs["session"] != mine["session"]
    assert theirs["value"] == mine["value"]
    (stolen,) = core.run([PredictJob(Prefix((), mine["session"], tenant="b"))])
    assert isinstance(stolen, PrefixUnknownError)
    assert one(core, PredictJob(Prefix((), mine["session"], tenant="a")))["cached_tokens"] == 80


def test_blocks_and_sessions_give_way_in_one_order(tiny_model: LengthValueModel) -> None:
    core = make(tiny_model, pool_tokens=12 * 32)
    system = ids(26, 64)
    for at in range(20):  # each needs room; the system prompt is used each time, and stays
        row = one(core, PredictJob(Prefix(system + ids(100 + at, 40))))
        assert row["cached_tokens"] == (64 if at else 0)
    assert core.scorer.pool.used_blocks <= 12


def test_what_the_shared_tier_found_is_loaded(tiny_model: LengthValueModel) -> None:
    here, there = make(tiny_model), make(tiny_model)
    text = ids(27, 110)
    first = one(here, PredictJob(Prefix(text)))
    chain = here.prefixes.root().extend(text)
    assert [block.key for _, block in here.prefixes.fresh] == [block.key for block in chain.blocks]
    held = [here.prefixes.blocks.get(block.key) for block in chain.blocks]
    payloads = here.scorer.dump([block for block in held if block is not None])
    again = one(there, PredictJob(Prefix(text, shared=Shared(0, payloads))))
    assert again["cached_tokens"] == 96
    assert again["session"] == first["session"]
    assert again["mean"] == pytest.approx(first["mean"], rel=1e-5)
    assert there.counts.shared_tokens == 96
    assert there.prefixes.fresh == []  # what came from there need not go back
    # Blocks that do not follow what is held are of no use, and do no harm.
    third = make(tiny_model)
    assert one(third, PredictJob(Prefix(text, shared=Shared(1, payloads[1:]))))["cached_tokens"] == 0


class Tier:
    """Takes what it is offered, as long as it has room."""

    def __init__(self) -> None:
        self.blocks: list[tuple[bytes, bytes]] = []
        self.sessions: list[str] = []
        self.takes_blocks = True

    def offer_block(self, chain: Any, block: Any, payload: Any) -> None:
        self.blocks.append((block.key, payload.tobytes()))

    def offer_session(self, chain: Any, logit: float, bins: Any) -> None:
        self.sessions.append(chain.handle)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_what_is_left_for_the_shared_tier_is_copied_bit_by_bit(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(sharing, "_COPY_S", seconds)
    text, tier = ids(29, 330), Tier()
    row = one(core, PredictJob(Prefix(text)))
    blocks = core.prefixes.root().extend(text).blocks
    held = core.scorer.dump([core.prefixes.blocks.get(block.key) for block in blocks])
    rounds = 1
    sharing.offer_shared(core, tier)  # type: ignore[arg-type]
    while sharing.leave_shared(core, tier):  # type: ignore[arg-type]
        rounds += 1
        assert len(tier.blocks) == sharing._COPIED * (rounds - 1)
    assert rounds == (3 if seconds == 0.0 else 1)
    assert tier.sessions == [row["session"]]
    assert tier.blocks == [(b.key, payload.tobytes()) for b, payload in zip(blocks, held, strict=True)]
    assert not sharing.leave_shared(core, tier)  # type: ignore[arg-type]
    # What comes in between goes behind it; what nobody takes is forgotten.
    one(core, PredictJob(Prefix(ids(30, 330))))
    tier.takes_blocks = False
    sharing.offer_shared(core, tier)  # type: ignore[arg-type]
    assert not sharing.leave_shared(core, tier)  # type: ignore[arg-type]
    assert len(tier.blocks) == 10
    assert not core.prefixes.unshared


def test_numbers_from_the_shared_tier_need_no_model(core: EngineCore) -> None:
    text = ids(28, 12)
    first = one(core, PredictJob(Prefix(text)))
    ((chain, logit, bins),) = core.prefixes.answered
    core.prefixes.clear()
    forwards = core.scorer.stats.forwards
    known = Shared(record=SessionRecord(chain.packed, logit, bins))
    again = one(core, PredictJob(Prefix(text, shared=known)))
    assert again == {**first, "cached_tokens": 12}
    assert core.scorer.stats.forwards == forwards
    assert core.counts.memoised == 1
    # Candidates need the state: they are computed.
    step = one(core, CandidateJob(Prefix(text, shared=known), [5]))
    assert core.scorer.stats.forwards == forwards + 1
    assert step["session"] == first["session"]
