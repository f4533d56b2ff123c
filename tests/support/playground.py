"""What a visitor does on the playground, for its test and for the screenshots."""

from __future__ import annotations

import re
from typing import Any

from tests.support.browser import Browser

__all__ = ["explain_generated", "explain_pasted", "guide", "predict"]


def predict(page: Browser, prompt: str) -> str:
    """The text of the prediction."""
    page.tab("Predict")
    page.type("#predict-prompt textarea", prompt)
    page.click("#predict-run")
    page.find("#predict-out svg.lv-plot")
    return page.text("#predict-out")


def explain_pasted(page: Browser, prompt: str, completion: str) -> list[tuple[str, str, str]]:
    """(horizon above it, token, what hovering says) of each token."""
    page.tab("Explain")
    page.type("#explain-prompt textarea", prompt)
    page.type("#explain-completion textarea", completion)
    page.click("#explain-run")
    return _tokens(page, "#explain-out", "ended by itself")


def explain_generated(page: Browser, prompt: str, limit: int) -> list[tuple[str, str, str]]:
    """The same of an answer that the backbone generates."""
    page.tab("Explain")
    page.type("#explain-prompt textarea", prompt)
    page.type("#explain-limit input[type=number]", str(limit))
    page.click("#explain-generate")
    return _tokens(page, "#explain-out", "content token")


def guide(page: Browser, prompt: str, *, target: int, limit: int, method: str = "posterior") -> list[list[str]]:
    """The cells of the comparison, a row each for guided and unguided."""
    page.tab("Guide")
    page.type("#guide-prompt textarea", prompt)
    page.choose("#guide-method", method)
    page.type("#guide-target input[type=number]", str(target))
    page.type("#guide-limit input[type=number]", str(limit))
    page.click("#guide-run")
    wish = f"equal to {target} tokens, {method.split(',')[0]}"
    page.until(lambda driver: wish in _head(driver), f"no comparison for {wish!r}")
    rows: list[list[str]] = page.driver.execute_script(
        "return [...document.querySelectorAll('#guide-out .lv-table tr')].slice(1)"
        ".map(row => [...row.children].map(cell => cell.textContent))"
    )
    return rows


def _head(driver: Any) -> str:
    found: str = driver.execute_script(
        "const head = document.querySelector('#guide-out .lv-table th'); return head ? head.textContent : ''"
    )
    return found


def _tokens(page: Browser, out: str, ready: str) -> list[tuple[str, str, str]]:
    page.until(lambda _: re.search(ready, page.text(out)) and page.find(f"{out} .lv-tokens"), "no tokens are shown")
    found: list[list[str]] = page.driver.execute_script(
        "return [...document.querySelectorAll(arguments[0] + ' .lv-tokens .lv-t')]"
        ".map(e => [e.querySelector('small').textContent, e.querySelector('b').textContent, e.title])",
        out,
    )
    return [(above, token, said) for above, token, said in found]
