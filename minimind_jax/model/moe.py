"""Mixture of experts as in Qwen3-MoE: a softmax router, the k best experts of each token, no token dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.model.config import ModelConfig


class Routing(NamedTuple):
    """experts_Mk: int32 chosen experts of M tokens, best first. weights_Mk: float32 factors of their outputs.
    loss: load-balancing loss, float32 scalar."""

    experts_Mk: Array
    weights_Mk: Array
    loss: Array


def route(config: ModelConfig, logits_ME: Array, is_token_M: Array | None) -> Routing:
    """Chooses experts from the router's logits.

    Weights are the chosen probabilities, divided by their sum when norm_topk_prob. With one expert a token that is
    always 1, so by default p / stop_gradient(p) stands in for it: 1 in value, with p's gradient.
    Loss: coef * E * sum_e(load_e * mean_probability_e) over the real tokens (is_token_M; None means all), load_e
    being the share of tokens that chose e, summed over the k choices (Switch, arXiv 2101.03961, eq. 4).
    """
    probs_ME = jax.nn.softmax(logits_ME.astype(jnp.float32), axis=-1)
    weights_Mk, experts_Mk = jax.lax.top_k(probs_ME, config.num_experts_per_tok)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        weights_Mk = weights_Mk / jnp.sum(weights_Mk, axis=-1, keepdims=True)
    elif config.norm_topk_prob and config.router_gradient == "straight_through":
        weights_Mk = weights_Mk / jax.lax.stop_gradient(weights_Mk)
    elif config.norm_topk_prob:
        weights_Mk = jnp.ones_like(weights_Mk)
    return Routing(experts_Mk, weights_Mk, _balance_loss(config, probs_ME, experts_Mk, is_token_M))


def _balance_loss(config: ModelConfig, probs_ME, experts_Mk, is_token_M):
    chosen_ME = jnp.sum(jax.nn.one_hot(experts_Mk, config.num_experts, dtype=jnp.float32), axis=1)
    if is_token_M is None:
        is_token_M = jnp.ones(probs_ME.shape[0])
    share_M = is_token_M / jnp.maximum(jnp.sum(is_token_M), 1)
    load_E, mean_probability_E = share_M @ chosen_ME, share_M @ probs_ME
    return config.router_aux_loss_coef * config.num_experts * jnp.sum(load_E * mean_probability_E)


def experts_reference(x_MD: Array, routing: Routing, gate_EDF: Array, up_EDF: Array, down_EFD: Array) -> Array:
    """Every expert on every token, weighted by the routing: E/k times the work, and plainly right. (M, D)"""
    E = gate_EDF.shape[0]
    hidden_EMF = jax.nn.silu(jnp.einsum("MD,EDF->EMF", x_MD, gate_EDF)) * jnp.einsum("MD,EDF->EMF", x_MD, up_EDF)
    out_EMD = jnp.einsum("EMF,EFD->EMD", hidden_EMF, down_EFD)
    weights_ME = jnp.einsum("Mk,MkE->ME", routing.weights_Mk, jax.nn.one_hot(routing.experts_Mk, E))
    return jnp.einsum("ME,EMD->MD", weights_ME.astype(x_MD.dtype), out_EMD)
