"""Parameters that are trained in a way of their own: groups with their optimizers, single layers of a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.config.sections import OptimizerConfig
from minimind_jax.training.optimizer import Group, make_clip, make_optimizer, make_rates
from minimind_jax.training.state import Parameters, create_state
from minimind_jax.training.step import make_train_step

STEPS, L, D = 4, 4, 3
OWN = OptimizerConfig(learning_rate=1e-1, weight_decay=0.1, decay="all", cautious_decay=True)
THEIRS = OptimizerConfig(learning_rate=1e-3, b1=0.5, schedule="constant")


def toy_params():
    """A stack with both zeros among its values, and a value model beside it."""
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(L, D, D)).astype(np.float32)
    stack[:, 0] = [0.0, -0.0, 1.0]
    return {
        "layers": {"attention": {"q_proj": {"kernel": stack}}, "norm": {"scale": np.ones((L, D), np.float32)}},
        "value": {"kernel": rng.normal(size=(D, D)).astype(np.float32)},
    }


def loss_fn(params, batch, key):
    """Its gradient in a parameter depends on no other one, and on the batch."""
    total = sum(jnp.sum(jnp.sin(leaf * batch["x"][0])) for leaf in jax.tree.leaves(params))
    return total, jnp.float32(1), {}


def train(params, config, max_grad_norm, groups=(), masks=None):
    optimizer = make_optimizer(config, STEPS, groups)
    rates, clip = make_rates(config, STEPS, groups), make_clip(max_grad_norm, groups)
    step = make_train_step(loss_fn, optimizer, rates, clip, masks=masks)
    state, metrics = create_state(params, optimizer), []
    for number in range(STEPS):
        state, found = step(state, {"x": np.array([number - 1.5], np.float32)})
        metrics.append({name: float(value) for name, value in found.items()})
    return state, metrics


def assert_same(got, expected, rtol=1e-6):
    for (path, value), wanted in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=rtol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_group_is_trained_as_if_it_were_alone(name):
    config = OptimizerConfig(name=name, **{k: getattr(OWN, k) for k in ("learning_rate", "decay", "cautious_decay")})
    params = toy_params()
    group = Group("critic", lambda path: path[0] == "value", THEIRS, max_grad_norm=0.5)
    state, metrics = train(params, config, 0.1, [group])
    others, other_metrics = train({"layers": params["layers"]}, config, 0.1)
    alone, alone_metrics = train({"value": params["value"]}, THEIRS, 0.5)
    assert_same(state.params, {**others.params, **alone.params})
    for found, own, its in zip(metrics, other_metrics, alone_metrics, strict=True):
        assert (found["learning_rate"], found["learning_rate/critic"]) == (own["learning_rate"], its["learning_rate"])
        assert found["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-6) and own["grad_norm"] > 0.1
        assert found["grad_norm/critic"] == pytest.approx(its["grad_norm"], rel=1e-6)


def test_a_parameter_is_in_one_group_at_most():
    groups = [Group(name, lambda path: path[0] == "value", THEIRS, 0.0) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"value\.kernel is in the groups a, b"):
        make_optimizer(OWN, STEPS, groups).init(toy_params())


def test_layers_that_are_not_trained_keep_every_bit_and_have_no_moments():
    params, kept, trained = toy_params(), [1, 2], [0, 3]
    layers = {"layers": params["layers"]}
    parameters = Parameters(layers, {}, dict, layers=lambda path: trained if path[0] == "layers" else None)
    state, metrics = train(layers, OWN, 0.1, masks=parameters.layer_masks())
    alone, alone_metrics = train(jax.tree.map(lambda leaf: leaf[trained], layers), OWN, 0.1)
    for got, before, wanted in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(layers), jax.tree.leaves(alone.params), strict=True
    ):
        assert np.asarray(got)[kept].tobytes() == before[kept].tobytes()
        np.testing.assert_allclose(np.asarray(got)[trained], wanted, rtol=1e-6)
        assert (np.asarray(got)[trained] != before[trained]).any()
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 4 and all((np.asarray(leaf)[kept] == 0).all() for leaf in moments)
    assert all((np.asarray(leaf)[trained] != 0).any() for leaf in moments)
    assert [m["grad_norm"] for m in metrics] == pytest.approx([m["grad_norm"] for m in alone_metrics], rel=1e-6)


def test_layers_that_are_not_trained_have_no_gradient_computed():
    def loss_fn(params, batch, key):
        x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), batch["x"], params["kernel"], unroll=8)
        return jnp.sum(x), jnp.float32(1), {}

    params = {"kernel": jnp.ones((8, 32, 32))}
    masks = {"kernel": np.isin(np.arange(8), [0, 7]).reshape(-1, 1, 1)}
    optimizer, batch = make_optimizer(OWN, STEPS), {"x": jnp.ones((256, 32))}

    def flops(masks):
        step = make_train_step(loss_fn, optimizer, make_rates(OWN, STEPS), make_clip(0.0), masks=masks)
        return step.lower(create_state(params, optimizer), batch).compile().cost_analysis()["flops"]

    product = 2 * 256 * 32 * 32
    assert flops(None) - flops(masks) > 5.5 * product  # of six layers' kernels


def test_all_layers_need_no_mask():
    assert Parameters(toy_params(), {}, dict).layer_masks() is None
