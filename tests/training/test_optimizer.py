"""Schedules against torch and closed formulas; AdamW against torch; Muon against a float64 reference and torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minimind_jax.config.sections import OptimizerConfig
from minimind_jax.errors import UserError
from minimind_jax.training.optimizer import decay_mask, make_optimizer, make_schedule, muon_mask

L, D, F, V, E = 3, 8, 12, 20, 4


def rates(total_steps, **settings):
    config = OptimizerConfig(learning_rate=2e-3, **settings)
    return np.asarray(jax.vmap(make_schedule(config, total_steps))(jnp.arange(total_steps)))


def toy_params(rng):
    """The names and ranks of a MoE model's parameters, with one dense kernel beside the experts."""
    shapes = {
        "embed": {"embedding": (V, D)},
        "layers": {
            "input_norm": {"scale": (L, D)},
            "attention": {"q_proj": {"kernel": (L, D, D)}, "q_norm": {"scale": (L, 4)}},
            "mlp": {
                "down_proj": {"kernel": (L, F, D)},
                "router": {"kernel": (L, D, E)},
                "experts": {"up_proj": {"kernel": (L, E, D, F)}},
            },
        },
        "norm": {"scale": (D,)},
        "lm_head": {"kernel": (D, V)},
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def names_where(mask):
    flat, _ = jax.tree_util.tree_flatten_with_path(mask)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, value in flat if value}


MUON_NAMES = {
    "layers/attention/q_proj/kernel",
    "layers/mlp/down_proj/kernel",
    "layers/mlp/experts/up_proj/kernel",
}


def train(config, params, grads_of_steps):
    optimizer = make_optimizer(config, len(grads_of_steps))
    update = jax.jit(lambda g, s, p, step: optimizer.update(g, s, p, step=step))
    state = optimizer.init(params)
    for step, grads in enumerate(grads_of_steps):
        updates, state = update(grads, state, params, step)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("accumulation", [1, 4])
def test_cosine_is_minimind_s_at_the_micro_step_that_acts(accumulation):
    steps = 30
    micro_steps = accumulation * np.arange(1, steps + 1)
    expected = 2e-3 * (0.1 + 0.45 * (1 + np.cos(np.pi * micro_steps / (accumulation * steps))))
    np.testing.assert_allclose(rates(steps, schedule="cosine"), expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_are_torch_s(schedule):
    torch = pytest.importorskip("torch", reason="compares with torch's schedulers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    reference = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=25, eta_min=4e-4),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=25),
    }[schedule]()
    expected = []
    for _ in range(25):
        optimizer.step()
        reference.step()
        expected.append(reference.get_last_lr()[0])
    np.testing.assert_allclose(rates(25, schedule=schedule, final_fraction=0.2), expected, rtol=1e-5)


def test_warm_up_then_stable_then_linear_decay():
    got = rates(10, schedule="wsd", warmup_steps=4, final_fraction=0.0, decay_fraction=0.4)
    np.testing.assert_allclose(got / 2e-3, [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_schedule_to_0_has_a_last_step_that_learns(schedule):
    got = rates(20, schedule=schedule, final_fraction=0.0)
    assert 0 < got[-1] < got[-2]


def test_warm_up_is_a_share_of_the_run_unless_its_steps_are_set():
    np.testing.assert_allclose(rates(40, schedule="constant", warmup_fraction=0.1)[:4] / 2e-3, [0.25, 0.5, 0.75, 1])
    assert np.all(rates(1, schedule="constant", warmup_fraction=0.9) == rates(1, schedule="constant"))
    both = rates(10, schedule="constant", warmup_fraction=0.5, warmup_steps=2)
    np.testing.assert_allclose(both / 2e-3, [0.5, *[1] * 9], rtol=1e-6)


def test_warm_up_is_taken_out_of_the_cosine():
    got = rates(12, schedule="cosine", warmup_steps=2)
    np.testing.assert_allclose(got[:2] / 2e-3, [0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(got[2:], rates(10, schedule="cosine"), rtol=1e-6)


def test_constant():
    np.testing.assert_allclose(rates(5, schedule="constant", warmup_steps=2) / 2e-3, [0.5, 1, 1, 1, 1], rtol=1e-6)


def test_warm_up_longer_than_the_run():
    with pytest.raises(UserError, match=r"warmup_steps 10 is not below the 10 steps"):
        make_schedule(OptimizerConfig(warmup_steps=10), 10)


def test_decay_masks_go_by_name_not_by_rank():
    params = toy_params(np.random.default_rng(0))
    everything = names_where(jax.tree.map(lambda _: True, params))
    assert names_where(decay_mask(params, "all")) == everything
    assert names_where(decay_mask(params, "matrices")) == MUON_NAMES | {"layers/mlp/router/kernel", "lm_head/kernel"}
    assert names_where(muon_mask(params)) == MUON_NAMES


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_adamw_is_torch_s(decay):
    torch = pytest.importorskip("torch", reason="compares with torch.optim.AdamW")
    rng = np.random.default_rng(1)
    params, steps = toy_params(rng), 20
    grads = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(steps)]
    config = OptimizerConfig(learning_rate=5e-3, weight_decay=0.1, decay=decay)
    ours = train(config, params, grads)

    leaves = [torch.nn.Parameter(torch.tensor(p)) for p in jax.tree.leaves(params)]
    decayed = jax.tree.leaves(decay_mask(params, decay))
    groups = [{"params": [p], "weight_decay": 0.1 if d else 0.0} for p, d in zip(leaves, decayed, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    for k, step_grads in enumerate(grads, 1):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * k / steps)))
        for leaf, grad in zip(leaves, jax.tree.leaves(step_grads), strict=True):
            leaf.grad = torch.tensor(grad)
        optimizer.step()
    for got, expected in zip(jax.tree.leaves(ours), leaves, strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), atol=2e-6)


def newton_schulz(matrix):
    """Five quintic iterations with Jordan's coefficients, float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon_reference(matrix, grads, rate, decay, momentum=0.95):
    """Nesterov momentum with bias correction, Newton-Schulz, RMS 0.2: one matrix (in, out), float64."""
    average = np.zeros_like(matrix)
    for t, grad in enumerate(grads, 1):
        average = momentum * average + (1 - momentum) * grad
        ahead = momentum * average / (1 - momentum ** (t + 1)) + (1 - momentum) * grad / (1 - momentum**t)
        update = 0.2 * math.sqrt(max(matrix.shape)) * newton_schulz(ahead)
        matrix = matrix - rate * (update + decay * matrix)
    return matrix


def muon_and_adam():
    """Three Muon steps of the toy parameters, the same with AdamW, and what went in."""
    rng = np.random.default_rng(2)
    params = toy_params(rng)
    grads = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(3)]
    shared = {"learning_rate": 1e-3, "weight_decay": 0.1, "schedule": "constant"}
    muon = OptimizerConfig(name="muon", muon_learning_rate=2e-2, **shared)
    return params, grads, train(muon, params, grads), train(OptimizerConfig(**shared), params, grads)


def test_muon_treats_each_stacked_kernel_as_a_matrix_and_leaves_the_rest_to_adamw():
    params, grads, muon, adam = muon_and_adam()
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    for i, (path, start) in enumerate(flat):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        got = tree.flatten_up_to(muon)[i]
        if name not in MUON_NAMES:
            np.testing.assert_array_equal(got, tree.flatten_up_to(adam)[i], err_msg=name)
            continue
        of_steps = [np.asarray(tree.flatten_up_to(g)[i], np.float64) for g in grads]
        for index in np.ndindex(start.shape[:-2]):
            expected = muon_reference(start[index].astype(np.float64), [g[index] for g in of_steps], 2e-2, 0.1)
            np.testing.assert_allclose(got[index], expected, atol=2e-5, err_msg=f"{name} {index}")


def test_muon_goes_in_torch_s_direction():
    torch = pytest.importorskip("torch", reason="compares with torch.optim.Muon")
    params, grads, muon, _ = muon_and_adam()
    kernels = [tree["layers"]["mlp"]["experts"]["up_proj"]["kernel"][1, 2] for tree in (params, muon, *grads)]
    weight = torch.nn.Parameter(torch.tensor(kernels[0].T.copy()))
    optimizer = torch.optim.Muon([weight], lr=2e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for grad in kernels[2:]:
        weight.grad = torch.tensor(grad.T.copy())
        optimizer.step()
    ours = np.asarray(kernels[1] - kernels[0])
    theirs = weight.detach().numpy().T - kernels[0]
    cosine = (ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs)
    # Not equal: torch iterates in bfloat16 and does not correct the momentum's bias.
    assert cosine > 0.99 and abs(np.linalg.norm(ours) / np.linalg.norm(theirs) - 1) < 0.05


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_cautious_decay_shrinks_only_what_the_step_makes_smaller(name):
    rng = np.random.default_rng(5)
    params, grads = toy_params(rng), toy_params(rng)
    settings = {"name": name, "learning_rate": 1e-2, "schedule": "constant", "decay": "matrices"}
    plain = train(OptimizerConfig(**settings, weight_decay=0.0), params, [grads])
    cautious = train(OptimizerConfig(**settings, weight_decay=0.5, cautious_decay=True), params, [grads])

    def check(w, without, found, masked):
        shrinks = np.abs(np.sign(w) * (w - without)) * (np.sign(w - without) == np.sign(w)) > 0
        expected = without - np.where(shrinks & masked, 1e-2 * 0.5 * w, 0)
        np.testing.assert_allclose(found, expected, atol=1e-6)

    jax.tree.map(check, params, plain, cautious, decay_mask(params, "matrices"))
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(cautious), strict=True))
