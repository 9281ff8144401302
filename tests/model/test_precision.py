"""What is called float32 is multiplied as float32 on every device: lowered programs say so."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from minimind_jax.config.sections import OptimizerConfig
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.heads import init_head, scores
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.training.optimizer import make_clip, make_rates
from minimind_jax.training.state import create_state
from minimind_jax.training.step import make_eval_step, make_train_step

SIZES = {
    **{"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
}


def products(lowered) -> list[tuple[str, str]]:
    """(dtype of the operands, precision) of every matrix product of a lowered program."""
    found = []
    for line in lowered.as_text().splitlines():
        if "stablehlo.dot_general" in line:
            precision = re.search(r"precision = \[(\w+), (\w+)\]", line)
            dtype = re.search(r": \(tensor<[^>]*?(\w+)>", line)[1].split("x")[-1]
            found.append((dtype, precision[1] if precision else "DEFAULT"))
    return found


def lowered_steps(compute, experts=0):
    model = LanguageModel(ModelConfig(**SIZES, num_experts=experts), compute)
    loss = make_language_model_loss(model)
    optimizer = optax.sgd(1e-3)
    rows = {name: jnp.ones((2, 32), jnp.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch = {**rows, "loss_weights": jnp.ones((2, 32))}
    state = jax.eval_shape(lambda params: create_state(params, optimizer), model.abstract_params())
    rates = make_rates(OptimizerConfig(learning_rate=1e-3), 10)

    class Stepless:
        init, update = optimizer.init, staticmethod(lambda grads, state, params, step: optimizer.update(grads, state))

    step = make_train_step(loss, Stepless, rates, make_clip(), compute=compute)
    return step.lower(state, batch), make_eval_step(loss, compute=compute).lower(state.params, batch)


@pytest.mark.parametrize("experts", [0, 4])
def test_all_products_of_float32_by_name_are_exact_in_both_directions(experts):
    for lowered in lowered_steps(ComputeConfig(dtype="float32", attention="grouped"), experts):
        found = products(lowered)
        assert len(found) >= 10 and set(found) == {("f32", "HIGHEST")}


def test_so_are_router_and_its_loss_below_bfloat16_and_the_rest_is_left_to_the_device():
    dense, _ = lowered_steps(ComputeConfig(dtype="bfloat16", attention="grouped"))
    assert "HIGHEST" not in {precision for _, precision in products(dense)}
    for lowered in lowered_steps(ComputeConfig(dtype="bfloat16", attention="grouped"), experts=4):
        found = products(lowered)
        assert found.count(("f32", "HIGHEST")) >= 3
        assert ("bf16", "DEFAULT") in found and ("bf16", "HIGHEST") not in found


def test_so_are_a_head_of_scores_and_its_gradient():
    params, hidden = init_head(jax.random.key(0), 16, 3), jnp.ones((4, 16), jnp.bfloat16)
    lowered = jax.jit(jax.grad(lambda p: scores(p, hidden).sum())).lower(params)
    both = jax.jit(jax.value_and_grad(lambda p, h: jnp.square(scores(p, h)).sum(), argnums=(0, 1))).lower(
        params, hidden
    )
    assert set(products(lowered) + products(both)) == {("f32", "HIGHEST")} and len(products(both)) == 3
