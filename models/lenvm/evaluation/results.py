"""The tables of ``docs/results.md``, made from reports so that no figure in it is typed by hand.

The document keeps its prose; what stands between ``<!-- begin:NAME -->`` and ``<!-- end:NAME -->`` is replaced by
fragment NAME. A fragment whose report does not exist says which command writes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lenvm.errors import DataError
from lenvm.evaluation.figures import read_metrics
from lenvm.evaluation.results_cells import change, code, dig, interval, number, percent, picture, table
from lenvm.evaluation.results_lifebench import gates, modes, targets

__all__ = ["FRAGMENTS", "difference_in_words", "fill", "fill_file"]

Metrics: TypeAlias = Mapping[str, Any]

# The paper's 1.5B row (its Table of Eq. 13-15), in percent.
PAPER_MRE = {"math": 17, "code": 29, "if": 33}
_DOMAINS = {"math": "math", "code": "code", "if": "instruction"}
_RIVALS = {
    "constant": "constant", "prompt_length": "prompt length", "linear_probe": "linear probe",
    "prompt_encoder": "prompt only",
}  # fmt: skip
_MARK = re.compile(r"<!-- begin:([\w-]+) -->\n.*?<!-- end:\1 -->", re.DOTALL)


def fill_file(document: Path, reports: Path) -> list[str]:
    """Fill every fragment of ``document`` in place; the names filled. DataError as ``fill``, or for a missing file."""
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{document} cannot be read ({error.strerror}): give the document with --out") from None
    filled = fill(text, reports)
    if filled != text:
        document.write_text(filled, encoding="utf-8")
    return _MARK.findall(filled)


def fill(text: str, reports: Path) -> str:
    """``text`` with every fragment made anew from the reports in that folder.

    Raises DataError for a fragment that is unknown or not closed, and for a damaged report.
    """
    opened = re.findall(r"<!-- begin:([\w-]+) -->", text)
    closed = [match.group(1) for match in _MARK.finditer(text)]
    if opened != closed:
        broken = next(name for name in opened if name not in closed or opened.count(name) != closed.count(name))
        raise DataError(f"fragment {broken} is not closed: add <!-- end:{broken} -->")

    def made(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in FRAGMENTS:
            raise DataError(f"there is no fragment {name!r}: choose from {', '.join(FRAGMENTS)}")
        report, render = FRAGMENTS[name]
        path = reports / f"{report}.json"
        command = _COMMANDS.get(report, f"lenvm eval {report}")
        body = render(read_metrics(path)) if path.is_file() else f"*Not measured yet: `{command}`.*"
        return f"<!-- begin:{name} -->\n{body.strip()}\n<!-- end:{name} -->"

    return _MARK.sub(made, text)


# --- fragments --------------------------------------------------------------------------------------------------------


def _prediction(metrics: Metrics) -> str:
    rows = [
        [
            _DOMAINS[name], percent(row["mre"]), interval(row["mre_ci"]), f"{PAPER_MRE[name]} %",
            percent(row["median_error"]), percent(row["noise_floor"]),
            *(percent(dig(row, "baselines", rival)) for rival in _RIVALS),
        ]
        for name, row in metrics.items() if name in _DOMAINS
    ]  # fmt: skip
    head = ["domain", "MRE", "95 %", "paper, 1.5B", "median error", "noise floor", *_RIVALS.values()]  # fmt: skip
    spread = [
        [
            _DOMAINS[name], *(percent(row.get(f"coverage_{level}")) for level in ("p50", "p90", "p95")),
            percent(row.get("saturated_p90")), number(row.get("pinball")), number(row.get("pinball_constant")),
            *([number(row["pinball_own"])] if "pinball_own" in row else []),
        ]
        for name, row in metrics.items() if name in _DOMAINS
    ]  # fmt: skip
    quantiles = ["domain", "p50 covers", "p90 covers", "p95 covers", "p90 saturated", "pinball", "constant quantiles"]
    if len(spread[0]) > len(quantiles):
        quantiles.append("half of the own samples")
    return "\n\n".join([table(head, rows), *_gains(metrics), table(quantiles, spread)])


def _gains(metrics: Metrics) -> list[str]:
    """Share of each baseline's error that is gone; nothing for a report of an earlier release."""
    rows = [
        [_DOMAINS.get(name, name), *(percent(row["gain_over"].get(rival)) for rival in _RIVALS), _probed(row)]
        for name, row in metrics.items() if "gain_over" in row
    ]  # fmt: skip
    head = ["error less than that of", *_RIVALS.values(), "train prompts of the probe"]
    return [table(head, rows)] if rows else []


def _probed(row: Metrics) -> str:
    return number(dig(row, "baseline_fit", "linear_probe_prompts"), ",d")


def _along(metrics: Metrics) -> str:
    found = {name: row["along"] for name, row in metrics.items() if name in _DOMAINS and "along" in row}
    if not found:
        return "*Not measured yet: `lenvm eval prediction`.*"
    places = list(next(iter(found.values())))
    rows = [[_DOMAINS[name], *(percent(dig(row, place, "error")) for place in places)] for name, row in found.items()]
    return table(["domain", *(f"{100 * float(place):.0f} %" for place in places)], rows)


def _conditional(metrics: Metrics) -> str:
    several = dig(metrics, "sampling", "resample") or 1
    found = [
        (kind, of, row)
        for of in ([1] if several == 1 else [1, several])
        for kind in ("at_most", "at_least", "equal_to")
        if (row := dig(metrics, kind) if of == 1 else dig(metrics, kind, "resampled")) and row.get("pairs")
    ]
    rows = [
        [
            kind.replace("_", " "), str(of), str(row["pairs"]), number(row.get("ks"), ".3f"),
            number(row.get("ks_null_95"), ".3f"), str(round(row["pairs"] * row.get("satisfied_rate", 0.0))),
            number(row.get("ks_satisfied"), ".3f"), number(row.get("logprob_gap"), "+.3f"),
            percent(row.get("natural_end_rate")), percent(row.get("forced_stop_rate")),
        ]
        for kind, of, row in found
    ]  # fmt: skip
    head = ["objective", "drawn from", "pairs", "KS", "KS of an exact sampler, 95 %", "pairs within", "KS within",
            "log-probability gap (nats/token)", "natural ends", "forced stops"]  # fmt: skip
    return table(head, rows)


def _tradeoff(metrics: Metrics) -> str:
    rows = []
    for name, row in metrics.items():
        if not isinstance(row, Mapping) or "unguided_pass" not in row:
            continue
        above = row.get("guided_above_truncation_everywhere")
        rows.append(
            [
                name, str(row.get("prompts", "–")), percent(row["unguided_pass"]),
                "yes" if row.get("qualifies") else "no", number(row.get("area_ratio"), ".2f"),
                "–" if above is None else "yes" if above else "no",
            ]
        )  # fmt: skip
    return table(["set", "prompts", "unguided pass@1", "at least 5 %", "area ratio", "above truncation"], rows)


def _tokens(metrics: Metrics, count: int = 12) -> str:
    parts = []
    for name, title in (("lengthening", "Lengthening"), ("shortening", "Shortening")):
        rows = [
            [
                code(row["text"]), str(row["count"]), str(row["prompts"]), number(row["mean"], "+.4f"),
                number(row["se"], ".4f"), number(row["tokens"], "+.1f"),
            ]
            for row in metrics[name][:count]
        ]  # fmt: skip
        parts.append(f"**{title}**\n\n" + table(["token", "count", "prompts", "mean shift", "SE", "in tokens"], rows))
    return "\n\n".join(parts)


def _token_check(metrics: Metrics) -> str:
    rows = [
        [
            _DOMAINS.get(name, name), str(row["tokens"]), number(row["mean_shift"], "+.5f"),
            number(row["mean_shift_se"], ".5f"), number(row["mean_shift_z"], "+.1f"),
            number(row["rms_shift"], ".4f"), percent(dig(row, "mean_over_rms"), 2),
        ]
        for name, row in [*metrics["by_domain"].items(), ("all", metrics["overall"])]
    ]  # fmt: skip
    return table(["domain", "tokens", "mean shift", "SE", "z", "RMS shift", "mean / RMS"], rows)


def difference_in_words(row: Mapping[str, Any]) -> str | None:
    """Points of MRE against the base of the group, with the interval; None without a base.

    The two figures behind it follow where they are other means than the table's: over the seeds that both have.
    """
    found = next((part for part in row.get("against", {}).values() if part), None)
    if found is None:
        return None
    text = change(found["mre_difference"], 100.0)
    if not found["other_seeds"]:
        return text
    seeds = ", ".join(str(seed) for seed in found["seeds"])
    return f"{text}: {100 * found['mre']:.1f} - {100 * found['base_mre']:.1f}, seed {seeds}"


def _group(group: str) -> Callable[[Metrics], str]:
    def render(metrics: Metrics) -> str:
        names = metrics["groups"].get(group, [])
        if not names:
            return f"*Not measured yet: `lenvm eval ablation --only {group}`.*"
        rows = []
        for name in names:
            row = metrics["variants"][name]
            rows.append(
                [
                    name.replace("_", " "), percent(row["mre"]),
                    ", ".join(f"{100 * value:.1f}" for value in row["mre_by_seed"]),
                    *(percent(dig(row, "domains", domain, "mre")) for domain in _DOMAINS),
                    difference_in_words(row) or "–",
                    number(row["all_states"]["value_rmse"], ".4f"), number(row["all_states"]["mae"], ".0f"),
                ]
            )  # fmt: skip
        head = ["variant", "MRE", "by seed", *_DOMAINS.values(), "against the first (points, 95 %)",
                "RMSE of the return", "mean error (tokens)"]  # fmt: skip
        return table(head, rows)

    return render


def _gamma_positions(metrics: Metrics) -> str:
    names = metrics["groups"].get("gamma", [])
    if not names:
        return "*Not measured yet: `lenvm eval ablation --only gamma`.*"
    found = {name: metrics["variants"][name] for name in names}
    ordered = sorted(found, key=lambda name: float(found[name]["spec"]["gamma"]))
    places = list(found[ordered[0]]["by_position"])
    rows = [
        [
            f"{found[name]['spec']['gamma']:g}",
            *(percent(dig(found[name], "by_position", place, "error")) for place in places),
            *(percent(dig(found[name], "by_position", place, "median_remaining")) for place in places),
        ]
        for name in ordered
    ]
    at = [f"{100 * float(place):.0f} %" for place in places]
    return table(["gamma", *(f"at {x}" for x in at), *(f"median, at {x}" for x in at)], rows)


def _scaling(metrics: Metrics) -> str:
    titles = {"depth": "layers", "prompts": "train prompts", "samples": "answers a prompt"}
    parts = []
    for axis, points in metrics["axes"].items():
        rows = [
            [
                f"{row['at']:,.0f}", number(row.get("epochs"), ".2f"), percent(row["mre"]),
                *(percent(dig(row, "domains", domain, "mre")) for domain in _DOMAINS),
                number(dig(row, "losses", "value"), ".5f"), number(dig(row, "losses", "bins"), ".3f"),
            ]
            for row in points
        ]  # fmt: skip
        head = [titles[axis], "epochs", "MRE", *_DOMAINS.values(), "held-out squared error", "held-out bins (nats)"]
        parts.append(table(head, rows))
    seen = [row["epochs"] for points in metrics["axes"].values() for row in points if "epochs" in row]
    if seen and min(seen) < 1.0:
        parts.insert(0, "The budget is less than one epoch of the fullest data (column *epochs*: how often a model saw "
                        "its own answers): those points saw a part of it.")  # fmt: skip
    return "\n\n".join(parts)


def _budget(metrics: Metrics) -> str:
    budget, data = metrics["budget"], metrics["data"]
    return (
        f"Each model: {budget['steps']} steps of {budget['batch_tokens']:,} tokens on {data['train_answers']:,} "
        f"answers to {data['train_prompts']:,} train prompts; measured on {data['test_prompts']:,} test prompts, and "
        f"at every state of {data['test_answers']:,} of their answers."
    )


def _figures(*names: tuple[str, str]) -> Callable[[Metrics], str]:
    return lambda metrics: "\n\n".join(picture(name, text) for name, text in names)


def _token_figures(metrics: Metrics) -> str:
    pictures = _figures(
        ("tokens-clouds", "Two word clouds: tokens that made the rest longer, and shorter"),
        ("tokens-ranking", "The furthest tokens with the error of their mean shift"),
    )(metrics)
    view = "[Three answers, coloured token by token](figures/tokens.html): open it in a browser."
    return f"{pictures}\n\n{view}" if metrics.get("examples") else pictures


_COMMANDS = {"precision": "lenvm eval ablation --only precision --report reports/precision.json"}

# Fragment -> the report that it is made of, and how.
FRAGMENTS: Mapping[str, tuple[str, Callable[[Metrics], str]]] = {
    "prediction": ("prediction", _prediction),
    "prediction-along": ("prediction", _along),
    "lifebench": ("lifebench", modes),
    "lifebench-gates": ("lifebench", gates),
    "lifebench-targets": ("lifebench", targets),
    "conditional": ("conditional", _conditional),
    "tradeoff": ("tradeoff", _tradeoff),
    "tokens": ("tokens", _tokens),
    "tokens-check": ("tokens", _token_check),
    "tokens-figures": ("tokens", _token_figures),
    "ablation-budget": ("ablation", _budget),
    "ablation-figure": ("ablation", _figures(("ablation", "Error of every variant, at the prompt and at every state"))),
    **{f"ablation-{group}": ("ablation", _group(group)) for group in
       ("target", "order", "gamma", "head", "lambda")},
    "ablation-precision": ("precision", lambda metrics: f"{_budget(metrics)}\n\n{_group('precision')(metrics)}"),
    "ablation-positions": ("ablation", _gamma_positions),
    "scaling": ("scaling", _scaling),
    "scaling-budget": ("scaling", _budget),
    "scaling-figure": ("scaling", _figures(("scaling", "Error and loss by layers, train prompts, answers a prompt"))),
}  # fmt: skip
