"""FLOPs of the matrix products of a traced function: loops, recomputation and ragged products counted."""

import jax
import jax.numpy as jnp
from products import product_flops

from minimind_jax.config.sections import DataConfig, ModelSettings, TrainingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.model.config import ComputeConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.plan.compile import trace_step
from minimind_jax.sharding import make_mesh
from minimind_jax.training.defaults import filled
from minimind_jax.training.speed import flops_per_token


def flops(function, *shapes):
    return product_flops(jax.make_jaxpr(function)(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]).jaxpr)


def test_a_product_and_its_gradient():
    def product(x, w):
        return jnp.sum((x @ w) ** 2)

    assert flops(lambda x, w: x @ w, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(jax.grad(product, argnums=(0, 1)), (3, 5), (5, 7)) == 3 * 2 * 3 * 5 * 7


def test_a_scan_counts_its_rounds_and_recomputation_is_work():
    def layers(x, w, wrap):
        step = wrap(lambda x, w: jnp.tanh(x @ w))
        return jnp.sum(jax.lax.scan(lambda x, w: (step(x, w), None), x, w)[0])

    one = 4 * 2 * 3 * 5 * 5
    grad = jax.grad(layers, argnums=(0, 1))
    assert flops(lambda x, w: layers(x, w, lambda f: f), (3, 5), (4, 5, 5)) == one
    assert flops(lambda x, w: grad(x, w, lambda f: f), (3, 5), (4, 5, 5)) == 3 * one
    assert flops(lambda x, w: grad(x, w, jax.checkpoint), (3, 5), (4, 5, 5)) == 4 * one


def test_a_ragged_product_takes_each_row_through_one_group():
    sizes = jnp.array([2, 4], jnp.int32)

    def ragged(x, w):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes) ** 2)

    one = 2 * 6 * 5 * 7
    assert flops(ragged, (6, 5), (2, 5, 7)) == one
    assert flops(jax.grad(ragged, argnums=(0, 1)), (6, 5), (2, 5, 7)) == 3 * one


def test_a_training_step_does_what_the_formula_says_and_full_attention():
    settings = ModelSettings(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    training = TrainingConfig(batch_tokens=128, accumulation_steps=2)
    compute, data = ComputeConfig(attention="reference"), DataConfig(seq_len=16)
    config = filled(PretrainConfig(model=settings, compute=compute, data=data, training=training))
    model = LanguageModel(settings.resolve(), config.compute)
    traced, _ = trace_step(config, model, make_mesh(config.mesh, jax.devices()[:1]))
    done = product_flops(traced.jaxpr.jaxpr) / 128
    causal = 6 * 2 * 32 * 16  # the formula's attention; the plain path multiplies the other half, too
    half = model.config.head_dim // 2  # on a CPU a token's cosines and sines are multiplied with the identity
    tables = 2 * 2 * half * half if model.platform == "cpu" else 0
    assert done == flops_per_token(model.config, 16) + causal + tables
