"""What ends an answer, how its model is sampled, and whose words the ids are, from a base to every export."""

import dataclasses
import json
import shutil

import pytest
from run_helpers import assembled, export_newest
from safetensors.numpy import load_file
from templates import CHATML, with_template
from worlds import ADAPTERS, write_lines

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.sections import ModelSettings
from minimind_jax.config.stages import SFTConfig
from minimind_jax.convert.hf import load_hf
from minimind_jax.convert.load import from_hf, merge_lora
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.errors import UserError
from minimind_jax.inference.load import load_engine
from minimind_jax.runs.parts import load_tokenizer
from minimind_jax.stages import start

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}


@pytest.fixture(scope="module")
def foreign(base, tmp_path_factory):
    """The base as another project would write it: its texts end with <|endoftext|>, its template is plain ChatML."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    shutil.copytree(f"{base}/model", folder)
    with_template(folder, folder.parent / "tokenizer", CHATML).save(folder)
    for name, values in (("config.json", {"eos_token_id": 0}), ("generation_config.json", SAMPLING)):
        file = folder / name
        kept = json.loads(file.read_text()) if name == "config.json" else {"eos_token_id": 0}
        file.write_text(json.dumps({**kept, **values}))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    talk = [{"role": "user", "content": "birds sing"}, {"role": "assistant", "content": "over the hills"}]
    return write_lines(tmp_path_factory.mktemp("chats") / "chat.jsonl", [{"conversations": talk}] * 40)


def read(folder, name):
    return json.loads((folder / name).read_text())


def assert_ends_twice(folder):
    generation = read(folder, "generation_config.json")
    assert generation["eos_token_id"] == [2, 0]
    assert {name: generation[name] for name in SAMPLING} == SAMPLING
    generator = load_engine(str(folder))
    assert generator.eos_ids == (0, 2)
    assert (generator.sampling.temperature, generator.sampling.top_k, generator.sampling.top_p) == (0.6, 20, 0.9)
    return generator


def test_a_turn_s_end_ends_answers_here_and_in_transformers(make, foreign, chats, tmp_path):
    config = make(
        SFTConfig, tmp_path / "sft", chats, init_from=str(foreign), rate=1e-2,
        data={"val_fraction": 0.0}, training={"steps": 40, "eval_every": 0},
    )  # fmt: skip
    run = start(config)
    generator = assert_ends_twice(run / "model")
    assert read(run / "model", "config.json")["eos_token_id"] == [2, 0]
    ids = encode_prompt(generator.tokenizer, [{"role": "user", "content": "birds sing"}])
    [ours] = generator.generate([ids], SamplingConfig(max_new_tokens=64, temperature=0, top_k=0, top_p=1))
    assert (ours.finish_reason, ours.ids[-1]) == ("stop", 2)

    export_newest(run, tmp_path / "export")
    assert_ends_twice(tmp_path / "export")
    assert read(tmp_path / "export", "config.json")["eos_token_id"] == [2, 0]
    from_hf(run / "model", tmp_path / "again")
    assert read(tmp_path / "again", "config.json") == read(run / "model", "config.json")
    assert_ends_twice(tmp_path / "again")

    torch = pytest.importorskip("torch", reason="the comparison needs torch")
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model", torch_dtype=torch.float32)
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)
    assert answer[0, len(ids) :].tolist() == ours.ids


def test_what_ends_answers_where_the_model_is_served_ends_them_in_training(make, foreign, chats, tmp_path):
    """As of Qwen3, whose generation_config.json alone names a second token."""
    source = shutil.copytree(foreign, tmp_path / "source")
    file = source / "generation_config.json"
    file.write_text(json.dumps({**read(source, file.name), "eos_token_id": [0, 5]}))
    run = assembled("sft", make(SFTConfig, tmp_path / "run", chats, init_from=str(source)))
    assert set(run.model.config.end_ids) == set(load_engine(str(source)).eos_ids) == {0, 2, 5}


def test_an_adapter_ends_its_answers_and_merges_in_the_base_s_precision(make, foreign, chats, tmp_path):
    half = from_hf(foreign, tmp_path / "half", dtype="float16") and tmp_path / "half"
    config = make(
        SFTConfig, tmp_path / "lora", chats, init_from=str(half), lora=ADAPTERS,
        data={"val_fraction": 0.0}, training={"steps": 2, "eval_every": 0},
    )  # fmt: skip
    run = start(config)
    assert_ends_twice(run / "model")
    assert load_engine(str(half), adapters=[str(run)]).eos_ids == (0, 2)
    merge_lora(run / "model", tmp_path / "merged")
    assert_ends_twice(tmp_path / "merged")
    assert read(tmp_path / "merged", "config.json")["eos_token_id"] == [2, 0]
    for folder in (half, tmp_path / "merged"):
        assert {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()} == {"float16"}

    train_bpe(["zebras quickly xylophone"] * 3, tmp_path / "other", 304)
    shutil.copy(tmp_path / "other" / "tokenizer.json", half / "tokenizer.json")  # the base is trained anew
    for meets in (
        lambda: merge_lora(run / "model", tmp_path / "no"),
        lambda: load_engine(str(run)),
        lambda: load_engine(str(half), adapters=[str(run)]),
    ):
        with pytest.raises(UserError, match=r"has other words than the model .*half was trained with"):
            meets()
    assert not (tmp_path / "no").exists()


def test_what_a_model_s_file_says_of_its_ends_survives(foreign, tmp_path):
    source = shutil.copytree(foreign, tmp_path / "source")
    for name in ("config.json", "generation_config.json"):
        (source / name).write_text(json.dumps({**read(source, name), "eos_token_id": [0, 2]}))
    from_hf(source, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert read(tmp_path / "out", name)["eos_token_id"] == [0, 2]
    assert load_hf(tmp_path / "out")[0].eos_token_id == (0, 2)
    from_hf(foreign, tmp_path / "plain")  # nothing was trained, so nothing is added
    assert read(tmp_path / "plain", "config.json")["eos_token_id"] == 0


def test_a_tokenizer_of_other_words_is_refused_where_it_meets_a_model(make, foreign, tmp_path):
    other = str(train_bpe(["zebras quickly xylophone"] * 3, tmp_path / "other", 304).folder)
    config = make(SFTConfig, tmp_path / "run", "sft", init_from=str(foreign), tokenizer=other)
    for meets in (lambda: assembled("sft", config), lambda: from_hf(foreign, tmp_path / "no", tokenizer=other)):
        with pytest.raises(UserError, match=r"other/?.* has other words .* ids differ"):
            meets()
    same = with_template(foreign, tmp_path / "same", CHATML + "{# mine #}", added=("<|new|>",))
    loaded = load_tokenizer(dataclasses.replace(config, tokenizer=str(same.folder)), foreign)
    assert loaded.fingerprint == same.fingerprint
    bare = shutil.copytree(foreign, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"bare has no tokenizer .*give the one that the model was trained with"):
        assembled("sft", dataclasses.replace(config, init_from=str(bare), tokenizer=""))


def test_a_run_whose_tokenizer_was_trained_anew_goes_on_nowhere(make, foreign, chats, tmp_path):
    tokenizer = shutil.copytree(foreign.parent / "tokenizer", tmp_path / "tokenizer")
    config = make(
        SFTConfig, tmp_path / "run", chats, init_from="", tokenizer=str(tokenizer),
        data={"val_fraction": 0.0}, training={"steps": 2, "eval_every": 0}, model=ModelSettings(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
        ),
    )  # fmt: skip
    run = start(config)
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=4))
    template = tokenizer / "chat_template.jinja"
    template.write_text(template.read_text() + "{# the same words #}")
    export_newest(run, tmp_path / "export")
    train_bpe(["zebras quickly xylophone"] * 3, tmp_path / "other", 304)
    shutil.copy(tmp_path / "other" / "tokenizer.json", tokenizer / "tokenizer.json")
    for goes_on in (lambda: start(longer), lambda: export_newest(run, tmp_path / "no")):
        with pytest.raises(UserError, match=r"tokenizer has other words than when .*run was started"):
            goes_on()
