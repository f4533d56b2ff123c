"""Every way to run the layers gives the plain one's losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lenvm.errors import InvalidRequestError
from lenvm.training import TrainSettings, train
from lenvm.training.engine import Engine
from tests.support.training import made, one_step, random_model

pytestmark = pytest.mark.usefixtures("single_thread")


VARIANTS: list[dict[str, Any]] = [
    {"adapter_gradient": "dense"},
    {"adapter_gradient": "low"},
    {"adapter_gradient": "low_cat"},
    {"mode": "full"},
    {"mode": "full", "supervise": "prompt"},
    {"lam": 0.9, "boundary_weight": 3.0},
    {"value_weight": 0.0, "alpha": 1.0},
]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_fused_layers_give_the_gradients_of_transformers(kind: str, variant: dict[str, Any]) -> None:
    settings = {"batch_tokens": 512, "micro_tokens": 256, "lora_rank": 3, **variant}
    losses, grads = one_step(kind, TrainSettings(**settings, layers="plain"))
    fused_losses, fused_grads = one_step(kind, TrainSettings(**settings, layers="fused"))
    assert fused_losses == pytest.approx(losses, rel=2e-5)
    assert set(fused_grads) == set(grads)
    assert max(float(grad.abs().max()) for grad in grads.values()) > 1e-3
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, atol=2e-6, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_fused_refuses_what_it_does_not_know() -> None:
    model = random_model("llama")
    model.decoder.config.mlp_bias = True
    with pytest.raises(InvalidRequestError, match="layers"):
        Engine(model, TrainSettings(layers="fused"))
    assert Engine(model, TrainSettings(layers="auto")).fused is None


def test_training_moves_the_modules_that_are_saved() -> None:
    """The stacks and transformers' modules are one storage: what an optimiser changes is what a checkpoint holds."""
    for mode in ("lora", "full"):
        model = random_model("qwen2")
        engine = Engine(model, TrainSettings(mode=mode, lora_rank=2))
        with torch.no_grad():
            for parameter in engine.parameters.values():
                parameter.fill_(0.5)
        moved = [n for n, p in model.named_parameters() if not bool((p == 0.5).all())]
        frozen = [n for n in moved if ".base." not in n]
        assert (frozen == []) if mode == "full" else all("norm" in n or "embed" in n for n in frozen), frozen


def test_one_order_of_adding_is_asked_for_while_it_trains_and_no_longer() -> None:
    seen: list[bool] = []

    def run(**changes: Any) -> dict[str, Any]:
        settings = TrainSettings(epochs=1, batch_tokens=256, micro_tokens=256, log_every=1, lora_rank=2, **changes)
        return train(
            random_model(), made(12), settings,
            on_step=lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()),
        )  # fmt: skip

    exact = run(deterministic=True)
    assert seen
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    seen.clear()
    assert run()["train"]["total"] == exact["train"]["total"]  # a CPU adds in one order anyway
    assert not any(seen)
