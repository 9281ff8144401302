"""Answers of the engine: golden ones, cache against none, batch against single, stops, streams, errors, programs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.errors import UserError
from minimind_jax.inference import decode
from minimind_jax.inference import engine as engine_module
from minimind_jax.inference.buckets import bucket
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.load import load_engine, load_model
from minimind_jax.inference.request import Request
from minimind_jax.inference.sampling import SamplingConfig

GOLDEN = ("dense", "dense_untied", "dense_headdim", "moe_k1_norm", "moe_k1_nonorm", "moe_k2")
GREEDY = SamplingConfig(max_new_tokens=24, temperature=0, ignore_eos=True)
DRAWN = SamplingConfig(24, temperature=1.2, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.3, seed=5)
PROMPTS = ([34, 57, 55, 97, 80, 150, 106], [5], list(range(20, 35)))


@pytest.fixture(scope="module")
def dense(golden) -> Engine:
    return golden("dense")


@pytest.fixture(scope="module")
def talker(model_folder) -> Engine:
    return load_engine(str(model_folder))


def without_cache(generator, prompt, count):
    """Greedy tokens and their log-probabilities, the whole text computed anew for every token."""
    apply = jax.jit(lambda params, row: generator.model.apply(params, row)[0][0])
    ids, logprobs = list(prompt), []
    for _ in range(count):
        row = np.zeros((1, 64), np.int32)  # causal: what stands behind the text does not count
        row[0, : len(ids)] = ids
        logits = np.asarray(apply(generator.params, row)[len(ids) - 1], np.float64)
        ids.append(int(logits.argmax()))
        logprobs.append(logits.max() - np.log(np.exp(logits).sum()))
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("name", GOLDEN)
def test_greedy_equals_minimind(golden, fixtures_dir, name):
    numbers = np.load(fixtures_dir / f"{name}.npz")
    prompt = numbers["greedy_prompt"][0].tolist()
    [answer] = golden(name).generate([prompt], GREEDY)
    assert prompt + answer.ids == numbers["greedy"][0].tolist()
    assert (answer.finish_reason, answer.prompt_tokens) == ("length", 7)


@pytest.mark.parametrize("name", ["dense", "moe_k2"])
def test_the_cache_changes_neither_tokens_nor_log_probabilities(golden, name):
    generator = golden(name)
    for prompt, answer in zip(PROMPTS, generator.generate(PROMPTS, GREEDY), strict=True):
        ids, logprobs = without_cache(generator, prompt, 24)
        assert answer.ids == ids
        np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_a_batch_of_unequal_prompts_equals_its_prompts_alone(dense, sampling):
    batch = dense.generate(PROMPTS, sampling)
    for row, prompt in enumerate(PROMPTS):
        [alone] = dense.generate([prompt], dataclasses.replace(sampling, seed=sampling.seed + row))
        assert alone.ids == batch[row].ids
        np.testing.assert_allclose(alone.logprobs, batch[row].logprobs, atol=1e-5)


def test_the_seed_decides_the_draws(dense):
    first, again = (dense.generate([PROMPTS[0]] * 3, DRAWN) for _ in range(2))
    assert [answer.ids for answer in first] == [answer.ids for answer in again]
    assert len({tuple(answer.ids) for answer in first}) == 3
    assert first[0].ids != dense.generate(PROMPTS[:1], dataclasses.replace(DRAWN, seed=9))[0].ids


def test_layers_apart_compute_what_the_scanned_stack_does(golden_folder):
    model, params = load_model(golden_folder("moe_k2"))
    tokens = jnp.asarray([PROMPTS[0]])
    apart = model.unstack(params)
    assert len(apart["layers"]) == 2
    stacked, loose = (jax.jit(model.apply)(p, tokens) for p in (params, apart))
    np.testing.assert_allclose(loose[0], stacked[0], atol=1e-5)
    assert float(loose[1].router_loss) == pytest.approx(float(stacked[1].router_loss))


def test_a_strong_penalty_repeats_no_token_of_prompt_or_answer(dense):
    prompt = list(range(15))
    [answer] = dense.generate([prompt], dataclasses.replace(GREEDY, repetition_penalty=1e6))
    assert len({*prompt, *answer.ids}) == len(prompt) + 24


def test_the_repetition_penalty_equals_transformers_generate(golden_folder):
    torch = pytest.importorskip("torch", reason="compared with transformers, which needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference")
    folder = golden_folder("dense")
    reference = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([PROMPTS[0]])
    options = {"do_sample": False, "repetition_penalty": 1.3, "max_new_tokens": 24, "eos_token_id": None}
    expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)
    sampling = dataclasses.replace(GREEDY, repetition_penalty=1.3)
    [answer] = Engine(*load_model(folder)).generate(PROMPTS[:1], sampling)
    assert PROMPTS[0] + answer.ids == expected[0].tolist()


def test_an_end_of_text_token_ends_its_row_only(dense):
    free = dense.generate(PROMPTS, GREEDY)
    end = free[0].ids[9]  # row 0 makes it; see that it is not everywhere
    stopping = Engine(dense.model, dense.params, eos_ids=[end])
    answers = stopping.generate(PROMPTS, dataclasses.replace(GREEDY, ignore_eos=False))
    for answer, whole in zip(answers, free, strict=True):
        length = whole.ids.index(end) + 1 if end in whole.ids else 24
        assert answer.ids == whole.ids[:length]
        assert answer.logprobs == pytest.approx(whole.logprobs[:length], abs=1e-5)
        assert answer.finish_reason == ("stop" if end in whole.ids else "length")
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


def test_decoding_stops_when_every_row_has_ended(dense, monkeypatch):
    end = dense.generate(PROMPTS[:1], GREEDY)[0].ids[2]
    stopping = Engine(dense.model, dense.params, eos_ids=[end])
    made = []

    def make(*args, **kwargs):
        found = own_make(*args, **kwargs)
        made.append(int(found[1]))
        return found

    own_make = decode.make
    monkeypatch.setattr(decode, "make", make)
    [answer] = stopping.generate(PROMPTS[:1], SamplingConfig(200, 0))
    assert len(answer.ids) == sum(made) + 1 <= 3


def test_buffers_that_grow_do_not_change_the_answer(dense, monkeypatch):
    sampling = dataclasses.replace(GREEDY, max_new_tokens=100)
    whole = dense.generate(PROMPTS, sampling)
    monkeypatch.setattr(engine_module, "FIRST_ROOM", 8)
    monkeypatch.setattr(engine_module, "SHORTEST_CACHE", 16)
    growing = Engine(dense.model, dense.params)
    assert [a.ids for a in growing.generate(PROMPTS, sampling)] == [a.ids for a in whole]


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up(dense):
    engine, shown = Engine(dense.model, dense.params, slots=6, context=200), []
    engine.warm_up(lambda done, total: shown.append((done, total)))
    assert shown[0][0] == 0 and shown[-1][0] == shown[-1][1] > len(shown) - 2
    programs = decode.read, decode.choose, decode.make, decode.copy_row
    compiled = [program._cache_size() for program in programs]
    engine.generate(
        [[1] * length for length in (1, 5, 30, 100, 150, 3, 9, 70, 12, 2)],
        dataclasses.replace(GREEDY, max_new_tokens=40),
    )
    engine.generate([[9] * 16] * 3, SamplingConfig(60, 1.3, 7, 0.5, 0.2, 1.1, seed=3))
    list(engine.stream([4, 5], SamplingConfig(17, 0.2, 9, 0.4, 0.1, 0.9, presence_penalty=0.5, frequency_penalty=0.2)))
    answer = engine.submit(Request((1, 2), DRAWN, (3,), ((5, 2.0),), top_logprobs=4))
    while not answer.finish_reason:
        engine.step()
    assert [program._cache_size() for program in programs] == compiled
    engine.generate([[1]], GREEDY)
    Engine(dense.model, dense.params, slots=5, context=200).generate([[1]], GREEDY)  # the count is not blind
    assert decode.make._cache_size() > compiled[2]


def test_buckets_are_few():
    assert [bucket(n, 16, 1024) for n in (1, 16, 17, 1000, 1024, 1025, 2049)] == [16, 16, 32, 1024, 1024, 2048, 3072]
    assert len({bucket(n, 16, 1024) for n in range(1, 8193)}) == 7 + 7


@pytest.mark.parametrize(
    "prompt, sampling, message",
    [
        ([], GREEDY, "the prompt is empty"),
        ([3, 160], GREEDY, "token id 160; the model's ids are 0 to 159"),
        ([-1], GREEDY, "token id -1"),
        ([1] * 240, GREEDY, "240 tokens and max_new_tokens 24 exceed the model's context of 256"),
        ("text", GREEDY, "without a tokenizer"),
        ([1], SamplingConfig(9, stop="x"), "stop strings need a tokenizer"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(dense, prompt, sampling, message):
    with pytest.raises(UserError, match=message):
        dense.generate([prompt], sampling)


def test_no_prompts_give_no_answers(dense):
    assert dense.generate([]) == []


# ---- text ------------------------------------------------------------------------------------------------------------

SAMPLED = SamplingConfig(max_new_tokens=60, temperature=1.0, top_p=1.0, seed=4)


def test_text_is_the_decoded_answer_without_the_end_token(talker, tokenizer):
    for answer in talker.generate(["The cat", "你好"], SAMPLED):
        ended = answer.ids[-1] in talker.eos_ids
        assert answer.text == tokenizer.decode(answer.ids[:-1] if ended else answer.ids)


@pytest.mark.parametrize("seed", range(2))
def test_a_stream_gives_the_answer_in_whole_characters(talker, seed):
    sampling = dataclasses.replace(SAMPLED, seed=seed)
    [whole] = talker.generate(["The cat"], sampling)
    *pieces, last = talker.stream("The cat", sampling)
    assert "".join(p.text for p in pieces) + last.text == whole.text
    assert sum(len(p.tokens) for p in [*pieces, last]) == len(whole.ids)
    assert last.answer.ids == whole.ids
    assert last.answer.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
    assert last.answer.finish_reason == whole.finish_reason
    assert len(pieces[0].tokens) == 1


@pytest.mark.parametrize("seed", range(2))
def test_a_stop_string_cuts_text_stream_and_tokens(talker, tokenizer, seed):
    sampling = dataclasses.replace(SAMPLED, seed=seed, ignore_eos=True)
    [free] = talker.generate(["The cat"], sampling)
    stop = next(free.text[i : i + 2] for i in range(9, 60) if "�" not in free.text[i : i + 2])
    start = free.text.index(stop)
    sampling = dataclasses.replace(sampling, stop=("never said", stop))
    cut, other = talker.generate(["The cat", "dog"], sampling)
    assert (cut.text, cut.finish_reason) == (free.text[:start], "stop")
    assert cut.ids == free.ids[: len(cut.ids)]
    assert stop in tokenizer.decode(cut.ids) and stop not in tokenizer.decode(cut.ids[:-1])
    assert len(cut.ids) == len(cut.logprobs) < 60
    *pieces, last = talker.stream("The cat", sampling)
    assert "".join(p.text for p in pieces) + last.text == cut.text
    assert last.answer.ids == cut.ids
    assert other.prompt_tokens == len(tokenizer.encode("dog"))


def test_a_model_is_loaded_by_the_name_of_its_run(model_folder, tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "model").symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    [mine], [own] = (load_engine(name).generate(["cat"], GREEDY) for name in ("mine", str(model_folder)))
    assert mine.text == own.text and mine.ids == own.ids


def test_end_tokens_come_from_generation_config_too(model_folder, tmp_path):
    folder = tmp_path / "model"
    folder.symlink_to(model_folder)
    file = model_folder / "generation_config.json"
    before = file.read_text()
    file.write_text(json.dumps({"eos_token_id": [2, 77]}))
    try:
        assert load_engine(str(folder)).eos_ids == (2, 77)
    finally:
        file.write_text(before)


def test_bfloat16_keeps_norms_in_float32(model_folder):
    model, params = load_model(model_folder, "bfloat16")
    assert params["norm"]["scale"].dtype == jnp.float32
    assert params["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16
    [answer] = Engine(model, params).generate([[40, 50, 60]], GREEDY)
    assert len(answer.ids) == 24 and np.isfinite(answer.logprobs).all()


def test_a_tokenizer_larger_than_the_model_is_refused(dense, tokenizer):
    with pytest.raises(UserError, match="do not belong together"):
        Engine(dense.model, dense.params, tokenizer)
