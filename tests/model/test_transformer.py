"""The whole network: parameters, packing, router, dropout, and that settings of computing change no result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.model import layers
from minimind_jax.model.config import PRESETS, ComputeConfig, ModelConfig
from minimind_jax.model.transformer import LanguageModel, count_parameters, scan_unroll

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.01}
FLOAT32 = ComputeConfig(dtype="float32")


@functools.cache
def make(moe=False, **changes):
    """A tiny model and its parameters."""
    model = LanguageModel(ModelConfig(**{**SIZES, **(MOE if moe else {}), **changes}), FLOAT32)
    rng = np.random.default_rng(0)

    def draw(path, leaf):  # quicker than compiling `init`
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.1 * rng.standard_normal(leaf.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, model.abstract_params())


def tokens_of(shape, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, SIZES["vocab_size"])


def read(model):
    """Compiled `read_rows` of tokens."""
    return jax.jit(lambda params, tokens, *rest: model.read_rows(params, model.embed(params, tokens), *rest))


def packed_row():
    """Documents of 9, 6 and 12 tokens and 5 of padding in one row: tokens, positions, segment ids, document bounds."""
    bounds = [(0, 9), (9, 15), (15, 27)]
    positions, segments = np.zeros((1, 32), np.int32), np.zeros((1, 32), np.int32)
    for number, (start, stop) in enumerate(bounds, start=1):
        positions[0, start:stop], segments[0, start:stop] = np.arange(stop - start), number
    return tokens_of((1, 32)), jnp.asarray(positions), jnp.asarray(segments), bounds


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("minimind-3", 63_912_192),
        ("minimind-3-moe", 198_416_640),
        ("minimind2-small", 25_829_888 + 8 * 2 * 64),
        ("minimind2", 104_030_976 + 16 * 2 * 96),
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_presets_have_exactly_their_parameters(preset, count):
    """Of MiniMind2 its own count, which lacks the query and key norms, plus these."""
    assert count_parameters(LanguageModel(ModelConfig(**PRESETS[preset])).abstract_params()) == count


def test_initial_values():
    model, _ = make(moe=True)
    params = jax.jit(model.init)(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == jnp.float32
        if path[-1].key == "scale":
            assert jnp.all(leaf == 1)
        else:
            assert float(jnp.std(leaf)) == pytest.approx(0.1, rel=4 / np.sqrt(leaf.size))
            assert abs(float(jnp.mean(leaf))) < 0.5 / np.sqrt(leaf.size)
    kernel_LDH = params["layers"]["attention"]["q_proj"]["kernel"]
    assert not jnp.allclose(kernel_LDH[0], kernel_LDH[1])


@pytest.mark.parametrize("moe", [False, True])
def test_layers_with_zero_outputs_change_nothing_at_first(moe):
    model, _ = make(moe=moe, zero_init_outputs=True)
    params = jax.jit(model.init)(jax.random.key(0))
    mlp = params["layers"]["mlp"]["experts"] if moe else params["layers"]["mlp"]
    assert not jnp.any(params["layers"]["attention"]["o_proj"]["kernel"]) and not jnp.any(mlp["down_proj"]["kernel"])
    assert jnp.all(jnp.std(mlp["up_proj"]["kernel"], axis=(-2, -1)) > 0.05)
    tokens_BT = tokens_of((2, 8))
    embedded_BTD = params["embed"]["embedding"][tokens_BT]
    rms_BT1 = jnp.sqrt(jnp.mean(embedded_BTD**2, axis=-1, keepdims=True))
    np.testing.assert_allclose(read(model)(params, tokens_BT).hidden_BTD, embedded_BTD / rms_BT1, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"moe": True, "tie_word_embeddings": False}])
def test_logical_axes_name_every_axis(changes):
    model, params = make(**changes)
    axes = model.logical_axes()
    names = jax.tree.map(lambda leaf, names: len(names) == leaf.ndim, params, axes)
    assert all(jax.tree.leaves(names))
    assert axes["layers"]["attention"]["q_proj"]["kernel"] == ("layers", "embed", "heads")
    assert axes["embed"]["embedding"] == ("vocab", "embed")
    if changes:
        assert axes["layers"]["mlp"]["experts"]["down_proj"]["kernel"] == ("layers", "experts", "mlp", "embed")
        assert axes["lm_head"]["kernel"] == ("embed", "vocab")
    else:
        assert "lm_head" not in axes


@pytest.mark.parametrize("moe", [False, True])
def test_packed_rows_equal_their_documents_alone(moe):
    model, params = make(moe=moe)
    tokens, positions, segments, bounds = packed_row()
    logits_BTV, _ = jax.jit(model.apply)(params, tokens, positions, segments)
    assert jnp.all(jnp.isfinite(logits_BTV))
    for start, stop in bounds:
        alone_BTV, _ = jax.jit(model.apply)(params, tokens[:, start:stop])
        np.testing.assert_allclose(logits_BTV[:, start:stop], alone_BTV, atol=1e-5)


@pytest.mark.parametrize("moe", [False, True])
def test_padding_behind_the_only_document_of_a_row_needs_no_mask(moe):
    model, params = make(moe=moe)
    tokens, lengths_B = tokens_of((3, 24)), jnp.array([24, 9, 1])
    is_token_BT = jnp.arange(24) < lengths_B[:, None]

    def total(params, **rows):
        output = model.read_rows(params, model.embed(params, tokens), **rows)
        hidden_BTD = jnp.where(is_token_BT[..., None], output.hidden_BTD, 0)
        return jnp.sum(jnp.sin(hidden_BTD)) + output.router_loss, (hidden_BTD, output.router_loss)

    def compiled(**rows):
        gradient = jax.jit(lambda params: jax.value_and_grad(functools.partial(total, **rows), has_aux=True)(params))
        return gradient(params), gradient.lower(params).as_text()

    (masked, text), (plain, plain_text) = (
        compiled(segment_ids_BT=is_token_BT.astype(jnp.int32)), compiled(lengths_B=lengths_B)
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))
    batch = {"tokens": tokens, "lengths": lengths_B, "segment_ids": is_token_BT, "positions": None}
    read_BTD = jax.jit(model.read_batch)(params, batch).hidden_BTD
    np.testing.assert_allclose(jnp.where(is_token_BT[..., None], read_BTD, 0), plain[0][1][0], atol=1e-5)
    is_mask = "tensor<3x24x24xi1>"  # of the documents; the causal one has no axis of rows
    assert is_mask in text and is_mask not in plain_text


def test_embeddings_may_stand_in_the_place_of_tokens():
    model, params = make()
    tokens = tokens_of((2, 12))
    own = {**params, "embed": {"embedding": params["embed"]["embedding"].at[7].set(3.0)}}
    x_BTD = jnp.where((tokens == 7)[..., None], 3.0, model.embed(params, tokens))
    np.testing.assert_allclose(
        jax.jit(model.read_rows)(params, x_BTD).hidden_BTD, read(model)(own, tokens).hidden_BTD, atol=1e-5
    )


def test_router_loss_ignores_padding_and_matches_its_formula():
    model, params = make(moe=True)
    tokens, positions, segments, _ = packed_row()
    hidden = read(model)
    loss = hidden(params, tokens, positions, segments).router_loss
    np.testing.assert_allclose(hidden(params, tokens.at[:, 27:].set(7), positions, segments).router_loss, loss)
    shorter = hidden(params, tokens[:, :27], positions[:, :27], segments[:, :27]).router_loss
    np.testing.assert_allclose(shorter, loss, rtol=1e-5)
    # Of one layer whose router is 0 all probabilities are 1/4, so the loss is coef * E * sum(load) / E = coef.
    zeros = jax.tree.map(jnp.zeros_like, params["layers"]["mlp"]["router"])
    params = {**params, "layers": {**params["layers"], "mlp": {**params["layers"]["mlp"], "router": zeros}}}
    np.testing.assert_allclose(hidden(params, tokens, positions, segments).router_loss, 2 * 0.01, rtol=1e-5)


def test_all_padding_gives_no_nan():
    model, params = make(moe=True)
    empty = jnp.zeros((2, 8), jnp.int32)

    def total(params):
        output = model.read_rows(params, model.embed(params, empty), empty, empty)
        return jnp.sum(output.hidden_BTD) * 0 + output.router_loss

    loss, gradients = jax.jit(jax.value_and_grad(total))(params)
    assert loss == 0
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


def router_gradient(**changes):
    """Of the language-model loss alone, with the loss itself."""
    model, params = make(moe=True, **changes)
    tokens = tokens_of((2, 16))

    def total(params):
        log_probs_BTV = jax.nn.log_softmax(model.apply(params, tokens)[0])
        return -jnp.mean(jnp.take_along_axis(log_probs_BTV[:, :-1], tokens[:, 1:, None], axis=-1))

    loss, gradients = jax.jit(jax.value_and_grad(total))(params)
    return float(loss), float(jnp.max(jnp.abs(gradients["layers"]["mlp"]["router"]["kernel"])))


def test_straight_through_weight_gives_the_top_1_router_a_gradient_and_changes_no_value():
    loss, gradient = router_gradient()
    loss_none, gradient_none = router_gradient(router_gradient="none")
    loss_raw, gradient_raw = router_gradient(norm_topk_prob=False)
    assert gradient > 1e-4 and gradient_raw > 1e-4 and gradient_none == 0
    assert loss == pytest.approx(loss_none, rel=1e-6) and abs(loss - loss_raw) > 1e-4


def test_dropout_drops_only_with_a_key_and_keeps_the_mean():
    model, params = make(dropout=0.3)
    tokens = tokens_of((2, 16))
    hidden = jax.jit(lambda key: model.read_rows(params, model.embed(params, tokens), dropout_key=key).hidden_BTD)
    same = read(make()[0])(params, tokens).hidden_BTD
    np.testing.assert_allclose(hidden(None), same, atol=1e-5)
    first, again, other = (hidden(jax.random.key(seed)) for seed in (0, 0, 1))
    assert jnp.array_equal(first, again)
    assert float(jnp.mean(jnp.abs(first - other))) > 0.05
    samples = jax.vmap(hidden)(jax.random.split(jax.random.key(2), 400))
    correlation = np.corrcoef(np.ravel(jnp.mean(samples, axis=0)), np.ravel(same))[0, 1]
    assert correlation > 0.9


@pytest.mark.parametrize("moe", [False, True])
def test_remat_and_unrolling_change_no_gradient(moe):
    model, params = make(moe=moe)
    tokens = tokens_of((2, 24))

    def gradients(**settings):
        variant = LanguageModel(model.config, ComputeConfig(dtype="float32", **settings))

        def total(params):
            logits_BTV, output = variant.apply(params, tokens)
            return jnp.mean(jnp.square(logits_BTV)) + output.router_loss

        return jax.jit(jax.grad(total))(params)

    expected = gradients(scan_unroll=1)
    for settings in ({"remat": "full", "scan_unroll": 0}, {"remat": "dots"})[: 1 if moe else 2]:
        for a, b in zip(jax.tree.leaves(gradients(**settings)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()), err_msg=str(settings))


def test_the_experts_path_is_the_one_that_is_set():
    model, params = make(moe=True)
    tokens = tokens_of((2, 48))
    programs = {}
    for path in ("auto", "reference", "ragged", "tiled", "blocked"):
        variant = LanguageModel(model.config, ComputeConfig(dtype="float32", experts=path))
        programs[path] = str(jax.make_jaxpr(lambda tokens, variant=variant: variant.apply(params, tokens)[0])(tokens))
    assert programs["auto"] == programs[{"cpu": "blocked", "tpu": "ragged"}.get(jax.default_backend(), "tiled")]
    assert ["ragged_dot" in programs[path] for path in ("reference", "ragged", "blocked")] == [False, True, False]
    assert len({programs[path] for path in ("reference", "tiled", "blocked")}) == 3


def test_bfloat16_stays_near_float32():
    model, params = make()
    tokens = tokens_of((2, 24))
    exact_BTV, _ = jax.jit(model.apply)(params, tokens)
    low = LanguageModel(model.config, ComputeConfig(dtype="bfloat16"))
    logits_BTV, output = jax.jit(low.apply)(params, tokens)
    assert output.hidden_BTD.dtype == jnp.bfloat16 and logits_BTV.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(logits_BTV - exact_BTV)) / jnp.max(jnp.abs(exact_BTV))) < 0.05


def test_gate_and_up_as_one_product_change_no_value_and_no_gradient(monkeypatch):
    """As a GPU multiplies with many tokens, and with few."""
    config = ModelConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = LanguageModel(config, ComputeConfig(dtype="float32", attention="reference"), platform="gpu")
    params, tokens_BT = model.init(jax.random.key(0)), jax.random.randint(jax.random.key(1), (2, 20), 0, 32)

    def compute(many):
        monkeypatch.setattr(layers, "MANY_TOKENS", many)
        total = lambda params: jnp.sum(jnp.sin(model.apply(params, tokens_BT)[0]))  # noqa: E731
        lowered = jax.jit(jax.value_and_grad(total)).lower(params)
        return lowered.compile()(params), lowered.as_text().count("dot_general")

    (one, one_products), (two, two_products) = compute(40), compute(41)
    assert one_products == two_products - 3  # forward, and backward for x and for the kernels
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(np.asarray(b)).max())


def test_a_model_is_hashable_and_a_static_argument():
    model, params = make()
    apply = jax.jit(lambda model, params, tokens: model.apply(params, tokens)[0], static_argnums=0)
    tokens = tokens_of((1, 4))
    assert apply(model, params, tokens).shape == (1, 4, 60)
    assert apply(LanguageModel(ModelConfig(**SIZES), FLOAT32), params, tokens).shape == (1, 4, 60)
    assert apply._cache_size() == 1


@pytest.mark.parametrize(("layers", "settings", "unrolled"), [
    (32, {}, 32), (33, {}, 1), (8, {"remat": "full"}, 1), (8, {"remat": "dots"}, 8),
    (8, {"remat": "full", "scan_unroll": 0}, 8), (40, {"scan_unroll": 4}, 4),
])  # fmt: skip
def test_layers_are_one_program_unless_many_or_recomputed(layers, settings, unrolled):
    assert scan_unroll(ComputeConfig(**settings), layers) == unrolled


def test_parameters_that_are_not_the_model_s_change_nothing():
    model, params = make(tie_word_embeddings=False)
    beside = {**params, "score": {"kernel": jnp.ones((32, 1))}, "teacher": params}
    batch = dict(zip(("tokens", "positions", "segment_ids"), packed_row(), strict=False), targets=None)

    def total(params):
        return jnp.sum(jnp.sin(model.logits(params, model.read_batch(params, batch).hidden_BTD)))

    gradients = jax.jit(jax.grad(total))(beside)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves((gradients["score"], gradients["teacher"])))
    for a, b in zip(
        jax.tree.leaves(gradients), jax.tree.leaves({**gradients, **jax.jit(jax.grad(total))(params)}), strict=True
    ):
        np.testing.assert_array_equal(a, b)
