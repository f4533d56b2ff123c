"""The page's style sheet: system fonts, the colours of the token view, light and dark."""

from __future__ import annotations

from lenvm.evaluation.figures.token_view import LONG_RGB, SHORT_RGB

__all__ = ["CSS", "MONO", "SANS"]

SANS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")

CSS = f"""
.gradio-container {{ --lv-long: {LONG_RGB}; --lv-short: {SHORT_RGB}; max-width: 76rem !important; }}
.dark .gradio-container, .gradio-container.dark {{ --lv-long: 240, 138, 60; --lv-short: 86, 180, 233; }}
.lv-head h1 {{ font-size: 1.4rem; margin: 0 0 .2rem; }}
.lv-head p, .lv-note, .lv-about {{ color: var(--body-text-color); opacity: .8; }}
.lv-note {{ font-size: .85rem; margin: .5rem 0; }}
.lv-problem {{ border-left: 4px solid rgb(var(--lv-long)); padding: .5rem .8rem; margin: .5rem 0; }}
.lv-facts {{ display: flex; flex-wrap: wrap; gap: .6rem; margin: .4rem 0; }}
.lv-facts > div {{
  flex: 1 1 8rem; border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .5rem .7rem;
}}
.lv-facts dt {{ font-size: .85rem; }}
.lv-facts dd {{ margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }}
.lv-facts dd.lv-about {{ font-size: .75rem; line-height: 1.3; }}
.lv-plot {{ width: 100%; height: auto; display: block; margin: .6rem 0; }}
.lv-bar {{ fill: rgb(var(--lv-short)); }}
.lv-beyond {{ fill: rgb(var(--lv-long)); }}
.lv-tick {{ stroke: currentColor; stroke-width: 1; opacity: .5; }}
.lv-mark {{ stroke: currentColor; stroke-width: 1.2; opacity: .75; }}
.lv-dashed {{ stroke-dasharray: 4 3; }}
.lv-text {{ fill: currentColor; font-size: 11.5px; }}
.lv-scroll {{ overflow-x: auto; }}
.lv-table, .lv-table tr {{ border: 0 !important; }}
.lv-table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
.lv-table th, .lv-table td {{
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; padding: .3rem .6rem;
  text-align: left; white-space: pre;
}}
.lv-tokens, .lv-text-box {{
  border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .6rem; overflow-wrap: anywhere;
  max-height: 34rem; overflow-y: auto;
}}
.lv-text-box {{ white-space: pre-wrap; min-height: 4rem; }}
.lv-t {{
  display: inline-flex; flex-direction: column; vertical-align: bottom; margin: 0 0 .25rem !important;
  border-radius: .2rem; border-bottom: 2px solid transparent; white-space: pre-wrap; line-height: 1.3; max-width: 100%;
}}
.lv-t small {{
  font-size: .6rem; line-height: 1.1; opacity: .75; text-align: center; padding: 0 .12rem;
  font-variant-numeric: tabular-nums;
}}
.lv-t b {{ font-weight: inherit; min-width: .5em; }}
.lv-l {{ background: rgba(var(--lv-long), var(--a)); border-bottom: 2px solid rgb(var(--lv-long)); }}
.lv-s {{ background: rgba(var(--lv-short), var(--a)); border-bottom: 2px dotted rgb(var(--lv-short)); }}
.lv-t:hover {{ outline: 2px solid currentColor; }}
.lv-pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; margin: .8rem 0; }}
.lv-pair h3 {{ font-size: 1rem; margin: 0 0 .4rem; }}
"""
