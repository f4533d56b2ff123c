"""The page: controls, where they stand, and which handler each one calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from lenvm_service.ui.guidance_view import KINDS, METHODS
from lenvm_service.ui.handlers import Controls, Handlers
from lenvm_service.ui.limits import MAX_CHARACTERS, MAX_NEW_TOKENS, MAX_SEED, MAX_WAITING

__all__ = ["build_page"]

_HEAD = (
    '<div class="lv-head"><h1>LenVM playground</h1><p>How long will the answer be, which tokens made it longer or '
    "shorter, and what does an answer of the length you want cost?</p></div>"
)
_PROMPT = "How do bees make honey?"
_QUICK = 8  # predictions and scores at once: they take one place in a batch of the engine each


def build_page(handlers: Handlers) -> Any:
    """The ``gradio.Blocks`` with the three views. Nothing leaves for anywhere but this service."""
    names = list(handlers.service.engines)
    with gr.Blocks(title="LenVM playground", analytics_enabled=False) as page:
        gr.HTML(_HEAD)
        model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1, elem_id="model")
        with gr.Tabs():
            with gr.Tab("Predict", elem_id="predict"):
                _predict_view(handlers, model)
            with gr.Tab("Explain", elem_id="explain"):
                _explain_view(handlers, model)
            with gr.Tab("Guide", elem_id="guide"):
                _guide_view(handlers, model)
    page.queue(max_size=MAX_WAITING, api_open=False, default_concurrency_limit=_QUICK)
    return page


def _tenant(request: gr.Request) -> str:
    """Whose key came with the request; the middleware has checked it."""
    tenant: str = request.state.context.tenant
    return tenant


def _prompt_box(view: str) -> Any:
    return gr.Textbox(
        _PROMPT, label="Prompt", lines=3, max_lines=12, max_length=MAX_CHARACTERS, elem_id=f"{view}-prompt"
    )


def _seed_and_limit(view: str, limit: int) -> tuple[Any, Any]:
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id=f"{view}-seed")
    longest = gr.Slider(
        16, MAX_NEW_TOKENS, limit, step=16, label="Longest answer (tokens)", elem_id=f"{view}-limit", buttons=[]
    )
    return seed, longest


def _predict_view(handlers: Handlers, model: Any) -> None:
    async def run(model: Any, prompt: Any, request: gr.Request) -> str:
        return await handlers.predict(model, prompt, _tenant(request))

    prompt = _prompt_box("predict")
    button = gr.Button("Predict", variant="primary", elem_id="predict-run")
    out = gr.HTML(elem_id="predict-out")
    button.click(run, [model, prompt], out, api_visibility="private", concurrency_limit=_QUICK)


def _explain_view(handlers: Handlers, model: Any) -> None:
    async def score(model: Any, prompt: Any, completion: Any, ended: Any, request: gr.Request) -> str:
        return await handlers.score(model, prompt, completion, ended, _tenant(request))

    async def generate(
        model: Any, prompt: Any, seed: Any, limit: Any, request: gr.Request
    ) -> AsyncIterator[tuple[str, bool, str]]:
        async for shown in handlers.generate(model, prompt, seed, limit, _tenant(request)):
            yield shown

    prompt = _prompt_box("explain")
    completion = gr.Textbox(
        label="Completion: paste one, or generate it", lines=4, max_lines=12, max_length=MAX_CHARACTERS,
        elem_id="explain-completion",
    )  # fmt: skip
    with gr.Row():
        ended = gr.Checkbox(True, label="The answer ends here (end-of-sequence)", elem_id="explain-ended")
        seed, limit = _seed_and_limit("explain", 128)
    with gr.Row():
        make = gr.Button("Generate", elem_id="explain-generate")
        stop = gr.Button("Stop", elem_id="explain-stop")
        button = gr.Button("Score", variant="primary", elem_id="explain-run")
    out = gr.HTML(elem_id="explain-out")
    button.click(score, [model, prompt, completion, ended], out, api_visibility="private", concurrency_limit=_QUICK)
    running = make.click(
        generate, [model, prompt, seed, limit], [completion, ended, out], api_visibility="private",
        concurrency_limit=1, concurrency_id="generate", show_progress="hidden",
    )  # fmt: skip
    stop.click(None, cancels=[running], api_visibility="private")


def _guide_view(handlers: Handlers, model: Any) -> None:
    async def run(
        model: Any, prompt: Any, kind: Any, method: Any, target: Any, tilt: Any, beta: Any, tolerance: Any,
        strength: Any, seed: Any, limit: Any, request: gr.Request,
    ) -> AsyncIterator[str]:  # fmt: skip
        controls = Controls(kind, method, target, tilt, beta, tolerance, strength)
        async for shown in handlers.guide(model, prompt, controls, seed, limit, _tenant(request)):
            yield shown

    prompt = _prompt_box("guide")
    with gr.Row():
        kind = gr.Radio(list(KINDS), value="equal_to", label="Objective", elem_id="guide-kind")
        method = gr.Radio(list(METHODS), value="posterior", label="Method", elem_id="guide-method")
    with gr.Row():
        target = gr.Slider(4, 400, 64, step=1, label="Target (content tokens)", elem_id="guide-target", buttons=[])
        tilt = gr.Slider(
            -0.05, 0.05, 0.01, step=0.001, label="Tilt λ (nats a token; above 0 shortens)", visible=False,
            elem_id="guide-tilt", buttons=[],
        )  # fmt: skip
        beta = gr.Slider(
            -50, 50, -20, step=1, label="Tilt β (below 0 shortens)", visible=False, elem_id="guide-beta", buttons=[]
        )
        tolerance = gr.Slider(
            0.01, 0.5, 0.05, step=0.01, label="Tolerance (share of the target)", elem_id="guide-tolerance", buttons=[]
        )
        strength = gr.Slider(
            0, 3, 1, step=0.1, label="Strength (factor on the log-weights)", elem_id="guide-strength", buttons=[]
        )
    with gr.Row():
        seed, limit = _seed_and_limit("guide", 192)
    with gr.Row():
        button = gr.Button("Guide", variant="primary", elem_id="guide-run")
        stop = gr.Button("Stop", elem_id="guide-stop")
    out = gr.HTML(elem_id="guide-out")
    choices = [kind, method]
    gr.on(
        [choice.change for choice in choices], _fitting, choices, [target, tilt, beta, tolerance],
        api_visibility="private", concurrency_limit=None, show_progress="hidden",
    )  # fmt: skip
    running = button.click(
        run, [model, prompt, kind, method, target, tilt, beta, tolerance, strength, seed, limit], out,
        api_visibility="private", concurrency_limit=1, concurrency_id="generate", show_progress="hidden",
    )  # fmt: skip
    stop.click(None, cancels=[running], api_visibility="private")


def _fitting(kind: str, method: str) -> list[Any]:
    """Which of target, lambda, beta and tolerance the objective has."""
    posterior, tilt = method == "posterior", kind == "tilt"
    shown = [not tilt, tilt and posterior, tilt and not posterior, posterior and not tilt]
    return [gr.update(visible=visible) for visible in shown]
