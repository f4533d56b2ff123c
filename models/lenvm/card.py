"""The checkpoint's ``eval.json`` and its ``README.md`` card, written from figures that commands measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lenvm.config import LenVMConfig
from lenvm.errors import ArtifactError

__all__ = ["EVAL_FILE", "update_card"]

EVAL_FILE = "eval.json"
_COLUMNS = (
    ("MRE", "mre"),
    ("median error", "median_error"),
    ("noise floor", "noise_floor"),
    ("constant", "baselines.constant"),
    ("prompt length", "baselines.prompt_length"),
    ("p50 covers", "coverage_p50"),
    ("p90 covers", "coverage_p90"),
)


def update_card(folder: Path, section: str, figures: Mapping[str, Any]) -> None:
    """Put ``figures`` under ``section`` of ``eval.json`` and write the card anew.

    Raises:
        ArtifactError: the folder is no checkpoint, or its ``eval.json`` is damaged.
    """
    config = LenVMConfig.load(folder)
    path = folder / EVAL_FILE
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}): delete it and evaluate again") from None
    found[section] = figures
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(config, found), encoding="utf-8")


def _card(config: LenVMConfig, found: Mapping[str, Any]) -> str:
    head, made = config.head, config.generator
    kind = f"{head.num_bins} length bins up to {head.bins.cap} tokens" if head.bins else "no length bins"
    parts = [
        f"# {config.name}\n",
        "A Length Value Model (arXiv 2604.27039): at every token it says how much of the answer is still to come.\n",
        "| | |\n|---|---|",
        f"| backbone | `{config.backbone.name}`, weights sha256 `{config.backbone.sha256[:16]}` |",
        f"| head | two-layer SiLU MLP of {head.width} units: value logit, {kind} |",
        f"| adapter | {'LoRA, merged at load' if config.lora_scale is not None else 'none'} |",
        f"| discount | gamma = {config.gamma} |",
        f"| generator | `{made.backbone}` at temperature {made.temperature}, top-p {made.top_p}, "
        f"at most {made.max_new_tokens} new tokens |",
        "\nIt is valid for the answers of that generator alone: other sampling parameters, another model or another",
        "prompt format change the lengths. Lengths past the cap are reported as the cap, marked saturated.",
        "Quantiles are those of the network" + ("." if config.calibration else ", not calibrated afterwards.") + "\n",
    ]
    if "training" in found:
        parts += _training(found["training"])
    if "prediction" in found:
        parts += _prediction(found["prediction"])
    return "\n".join(parts)


def _training(row: Mapping[str, Any]) -> list[str]:
    train = row["rollouts"]["train"]
    return [
        "## Training\n",
        f"{train['answers']:,} sampled answers ({train['tokens']:,} tokens, mean {train['mean']:.0f}, "
        f"{100 * train['cut_share']:.1f} % cut and treated as censored), {row['steps']} steps.",
        f"Held-out loss: {row['valid']['value']:.4f} squared error on the return, "
        f"{row['valid']['bins']:.3f} nats on the bins.\n",
        *([f"{row['about']}\n"] if row.get("about") else []),
    ]


def _prediction(metrics: Mapping[str, Any]) -> list[str]:
    """Errors by domain, as fractions of the true mean length."""
    lines = [
        "## Length prediction at the prompt boundary\n",
        "Held-out prompts; truth = mean over sampled answers of min(L, cap); MRE = mean relative error of the horizon.",
        "Baselines are fitted on train prompts. `lenvm eval prediction` measures all of this.\n",
        "| domain | " + " | ".join(name for name, _ in _COLUMNS) + " |",
        "|---|" + "---:|" * len(_COLUMNS),
    ]
    for domain, row in metrics.items():
        cells = []
        for _, key in _COLUMNS:
            value: Any = row
            for part in key.split("."):
                value = value[part]
            cells.append(f"{100 * value:.1f} %")
        lines.append(f"| {domain} | " + " | ".join(cells) + " |")
    return [*lines, ""]
