"""What `generation_config.json` says holds where the user says nothing."""

import json
import shutil

import pytest

from minimind_jax.config.generation import ChatConfig, GenerateConfig, SamplingConfig
from minimind_jax.errors import UserError
from minimind_jax.inference.chat import Dialogue
from minimind_jax.inference.generate_command import run
from minimind_jax.inference.generation_config import read_generation_config
from minimind_jax.inference.load import load_engine

MINIMIND = {"do_sample": True, "temperature": 0.85, "top_p": 0.85, "top_k": 50, "eos_token_id": 2}


def write(folder, content):
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("file", "given", "expected"),
    [
        (MINIMIND, {}, SamplingConfig(temperature=0.85, top_p=0.85, top_k=50)),
        (MINIMIND, {"top_k": 0, "temperature": 0}, SamplingConfig(temperature=0, top_p=0.85, top_k=0)),
        ({"repetition_penalty": 1.1, "min_p": None}, {}, SamplingConfig(repetition_penalty=1.1)),
        ({"do_sample": False, "temperature": 0.6}, {}, SamplingConfig(temperature=0)),
        ({"do_sample": False, "top_k": 20}, {"temperature": 0.6}, SamplingConfig(temperature=0.6, top_k=20)),
        ({"max_new_tokens": 9, "max_length": 20}, {"seed": 3}, SamplingConfig(seed=3)),
    ],
)
def test_the_user_comes_before_the_file_and_the_file_before_our_defaults(file, given, expected, tmp_path):
    model = read_generation_config(write(tmp_path, file)).sampling
    assert ChatConfig(model="m", **given).resolve(model) == expected


def test_keys_that_are_not_followed_are_named_once(tmp_path, capsys):
    ignored = {"no_repeat_ngram_size": 3, "num_beams": 4, "max_new_tokens": 9, "bad_words_ids": [[1]]}
    neutral = {
        "num_beam_groups": 1,
        "length_penalty": 1.0,
        "typical_p": 1.0,
        "use_cache": True,
        "suppress_tokens": None,
    }
    read_generation_config(write(tmp_path, {**MINIMIND, **ignored, **neutral, "transformers_version": "4.57"}))
    told = capsys.readouterr()
    assert "not followed: no_repeat_ngram_size 3, num_beams 4, max_new_tokens 9, bad_words_ids [[1]] (" in told.err
    assert told.out == "" and told.err.count("\n") == 1  # answers are printed to the other one
    read_generation_config(write(tmp_path, {**MINIMIND, **neutral}))
    assert capsys.readouterr().err == ""


def test_stop_strings_may_be_escaped_as_a_shell_leaves_them():
    typed = ("\\n", "a\\tb", "\\\\n", "\\d", "\n")
    config = ChatConfig(model="m", stop=typed)
    assert config.stop == typed
    assert config.resolve(SamplingConfig()).stop == ("\n", "a\tb", "\\n", "\\d", "\n")


def test_without_a_file_our_defaults_hold(tmp_path):
    assert read_generation_config(tmp_path) == (SamplingConfig(), frozenset())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, found list"),
        ({"temperature": -1}, "temperature is -1; it must be 0"),
        ({"top_p": "high"}, "generation_config.json: "),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token's id, or a list of ids"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(content, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        read_generation_config(write(tmp_path, content))
    assert str(caught.value).startswith(str(tmp_path / "generation_config.json"))


def test_chat_and_generate_do_what_the_folder_says(model_folder, tmp_path, capsys):
    folder = write(shutil.copytree(model_folder, tmp_path / "model"), {"do_sample": False, "repetition_penalty": 1.5})
    generator = load_engine(str(folder))
    settings = {"model": str(folder), "max_new_tokens": 9, "seed": 5}
    conversation = Dialogue(generator, ChatConfig(**settings))
    conversation.ask("The cat?")
    [*_, last] = conversation.answer()

    def answer(**sampling):
        ids = conversation._prompt([{"role": "user", "content": "The cat?"}])
        return generator.generate([ids], SamplingConfig(9, seed=5, **sampling))[0].text

    expected = answer(temperature=0, repetition_penalty=1.5)
    assert expected not in (answer(temperature=0), answer(repetition_penalty=1.5))
    assert last.answer.text == expected
    run(GenerateConfig(prompt="The cat?", **settings))
    assert capsys.readouterr().out == expected + "\n"
    run(GenerateConfig(prompt=("The cat?", "hi"), **settings))
    assert f"> The cat?\n{expected}\n" in capsys.readouterr().out
    run(GenerateConfig(prompt="The cat?", temperature=0.85, **settings))
    assert capsys.readouterr().out == answer(repetition_penalty=1.5) + "\n"
