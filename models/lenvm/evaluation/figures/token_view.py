"""Answers coloured token by token: one HTML file that needs nothing else, for the mouse and for the keyboard."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lenvm.returns import horizon, length_shift

__all__ = ["LONG_RGB", "SHORT_RGB", "shift_look", "token_view", "write_token_view"]

LONG_RGB, SHORT_RGB = "213, 94, 0", "0, 114, 178"
"""The colours of longer and shorter on a light ground."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Length shifts, token by token</title>
<style>
:root {{
  color-scheme: light dark;
  --ink: #1f2933; --card: #fff; --rule: #d9e0e6; --long: {long}; --short: {short};
}}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e9ee; --card: #16191d; --rule: #3a434d; --long: 240, 138, 60; --short: 86, 180, 233; }}
}}
body {{
  font: 16px/1.6 system-ui, sans-serif; color: var(--ink); background: var(--card);
  max-width: 46rem; margin: 2rem auto; padding: 0 1rem;
}}
h2 {{ font-size: 1.05rem; margin: 1.6rem 0 .3rem; }}
.answer {{ white-space: pre-wrap; border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem; }}
.answer:focus {{ outline: 2px solid currentColor; }}
i {{ font-style: normal; border-bottom: 2px solid transparent; }}
i.l {{ background: rgba(var(--long), var(--a)); border-bottom-color: rgb(var(--long)); }}
i.s {{ background: rgba(var(--short), var(--a)); border-bottom: 2px dotted rgb(var(--short)); }}
i.on {{ outline: 2px solid currentColor; }}
#say {{
  position: sticky; top: 0; background: var(--card); border-bottom: 1px solid var(--rule);
  padding: .5rem 0; min-height: 1.6em; font-variant-numeric: tabular-nums;
}}
</style>
</head>
<body>
<h1>Length shifts, token by token</h1>
<p>Each answer was sampled; the value model then read it. <i class="l" style="--a:.35">Solid underline</i>: this token
made the rest longer. <i class="s" style="--a:.35">Dotted underline</i>: shorter. The stronger the colour, the larger
the shift; tokens without colour changed little. Point at a token, or click an answer and use the arrow keys.</p>
<p id="say" role="status" aria-live="polite">No token chosen.</p>
{answers}
<script>
"use strict";
const say = document.getElementById("say");
function tell(t) {{
  document.querySelectorAll("i.on").forEach(e => e.classList.remove("on"));
  t.classList.add("on");
  const [v, h, d, k] = t.dataset.x.split(" ");
  const word = t.hasAttribute("data-end") ? "end of the answer" : JSON.stringify(t.textContent);
  say.textContent = `${{word}}: shift ${{d}} (${{k}} tokens), after it V = ${{v}}, horizon ${{h}} tokens`;
}}
document.querySelectorAll(".answer").forEach(a => {{
  const ts = [...a.querySelectorAll("i")];
  let at = -1;
  a.addEventListener("mouseover", e => {{
    if (!e.target.matches("i")) return;
    at = ts.indexOf(e.target);
    tell(e.target);
  }});
  a.addEventListener("keydown", e => {{
    const step = {{ArrowRight: 1, ArrowLeft: -1}}[e.key];
    if (!step) return;
    e.preventDefault();
    at = Math.min(ts.length - 1, Math.max(0, at + step));
    tell(ts[at]);
  }});
}});
</script>
</body>
</html>
"""


def write_token_view(examples: Sequence[Mapping[str, Any]], gamma: float, path: Path) -> Path:
    """Write the page of ``token_view``; returns ``path``."""
    path.write_text(token_view(examples, gamma), encoding="utf-8")
    return path


def token_view(examples: Sequence[Mapping[str, Any]], gamma: float) -> str:
    """A page with one section an example: ``{prompt, domain, tokens [T], values [T + 1], finished}``.

    Texts are escaped. A shift of one hundredth of the value has a third of the colour; the rest follows its root.
    """
    answers = "\n".join(_answer(example, gamma) for example in examples)
    return _PAGE.format(answers=answers, long=LONG_RGB, short=SHORT_RGB)


def shift_look(shift: float) -> tuple[str, float] | None:
    """How a token with this length shift is shown: "l" (made the rest longer) or "s" (shorter), and how strongly, 0 to
    0.75; None where it changed little."""
    if abs(shift) < 0.002:
        return None
    return "l" if shift > 0 else "s", min(0.75, 0.33 * (abs(shift) / 0.01) ** 0.5)


def _answer(example: Mapping[str, Any], gamma: float) -> str:
    values = [*example["values"], *([0.0] if example["finished"] else [])]
    texts = [*example["tokens"], *(["⏹"] if example["finished"] else [])]
    shifts, horizons = length_shift(values, gamma), horizon(values, gamma)
    parts = []
    for at, (text, shift) in enumerate(zip(texts, shifts, strict=True)):
        change = horizons[at + 1] + 1.0 - horizons[at]
        data = f"{values[at + 1]:.3f} {horizons[at + 1]:.0f} {shift:+.4f} {change:+.1f}"
        found = shift_look(shift)
        look = f' class="{found[0]}" style="--a:{found[1]:.2f}"' if found else ""
        end = " data-end" if example["finished"] and at == len(texts) - 1 else ""
        parts.append(f'<i{look} data-x="{data}"{end}>{html.escape(text)}</i>')
    ended = "ended by itself" if example["finished"] else "cut here"
    return (
        f"<h2>{html.escape(str(example['prompt']))}</h2>\n"
        f"<p>Before the first token: V = {values[0]:.3f}, horizon {horizons[0]:.0f} tokens. "
        f"{len(example['tokens'])} tokens, {ended}.</p>\n"
        f'<div class="answer" tabindex="0" role="group" aria-label="answer, arrow keys move from token to token">'
        f"{''.join(parts)}</div>"
    )
