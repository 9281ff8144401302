"""Tasks: what is read of a record, which are held out and asked, and prompts that are too long."""

import dataclasses
import json

import numpy as np
import pytest
from templates import CHATML, with_template

from minimind_jax.config.rl import GRPOConfig, PromptsConfig, RolloutConfig
from minimind_jax.data.batches import split_records
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.rl.tasks import drawn_tasks, read_tasks, refilling_tasks, thinks
from minimind_jax.tools.toolbox import Toolbox


@pytest.fixture
def config(tmp_path):
    def make(records, val_fraction=0.25, **changes):
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        rollout = RolloutConfig(max_new_tokens=16, **changes)
        data = PromptsConfig(train=(str(file),), seq_len=64, val_fraction=val_fraction)
        return GRPOConfig(data=data, rollout=rollout)

    return make


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer.load(world.folder / "tokenizer")


FORMATS = {
    "text": {"prompt": "the cat", "answer": "2"},
    "messages": {"prompt": [{"role": "user", "content": "the cat"}], "answer": "2"},
    "ours": {
        "conversations": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": ""}],
        "answer": "2",
    },
    "GSM8K": {"question": "the cat", "answer": "2"},
    "MATH": {"problem": "the cat", "level": "Level 5", "type": "Algebra", "answer": "2"},
    "OpenRLHF": {"input": "the cat", "answer": "2"},
    "verl": {"prompt": [{"role": "user", "content": "the cat"}], "answer": "2", "extra_info": {"split": "train"}},
}


@pytest.mark.parametrize("record", FORMATS.values(), ids=FORMATS)
def test_prompts_of_all_formats_are_the_same_task(config, tokenizer, record, capsys):
    (task,) = read_tasks(config([record]), tokenizer).train
    assert [(message["role"], message["content"]) for message in task.messages] == [("user", "the cat")]
    assert task.fields["answer"] == "2" and task.tools is None
    assert "not trained" not in capsys.readouterr().err


@pytest.mark.parametrize("record", [{"prompt": " "}, {"messages": [{"role": "user", "content": ""}]}], ids=str)
def test_a_question_of_nothing_is_refused(config, tokenizer, record):
    with pytest.raises(UserError, match=r"prompts.jsonl:1: .*empty"):
        read_tasks(config([record]), tokenizer)


def test_some_are_held_out_and_all_are_asked_before_one_comes_again(config, tokenizer):
    records = [{"prompt": f"cat {n}", "answer": n} for n in range(40)]
    tasks = read_tasks(config(records), tokenizer)
    train, aside = split_records(np.arange(40), 0.25, 42)  # as of the records of every other stage
    assert [task.fields["answer"] for task in tasks.held_out] == aside.tolist() and 4 <= len(aside) <= 16
    assert [task.fields["answer"] for task in tasks.train] == train.tolist()
    asked = [n for rollout in range(5) for n in drawn_tasks(30, 8, 1, rollout)]
    assert sorted(asked[:30]) == list(range(30)) and len(set(asked[30:])) == 10
    assert drawn_tasks(3, 8, 1, 0) == drawn_tasks(3, 8, 1, 0)
    assert refilling_tasks(30, 4, 1, 0, 0) != refilling_tasks(30, 4, 1, 0, 1)
    assert read_tasks(config(records, val_fraction=None), tokenizer).held_out
    few = read_tasks(config(records[:5], val_fraction=None), tokenizer)
    assert not few.held_out and "too few" in few.notes[0]
    assert len(read_tasks(config(records[:5], val_fraction=0.01), tokenizer).held_out) == 1


@pytest.mark.parametrize(("wanted", "left"), [("skip", 1), ("cut", 2)])
def test_prompts_that_are_too_long(config, tokenizer, wanted, left):
    records = [{"prompt": "the cat"}, {"prompt": "▄██░ 你好 " * 40}]
    with pytest.raises(UserError, match=r"prompts.jsonl:2: the prompt has .*long_prompts"):
        read_tasks(config(records, 0.0), tokenizer)
    tasks = read_tasks(config(records, 0.0, long_prompts=wanted), tokenizer)
    assert len(tasks.train) == left and tasks.notes[0].startswith("data.train: 1 prompts")
    assert all(len(encode_prompt(tokenizer, task.messages, task.tools, True)) <= 48 for task in tasks.train)


def test_thinking_is_drawn_for_a_group_or_said_by_its_record(config, tokenizer, tmp_path):
    records = [{"prompt": "the cat"}, {"prompt": "the cat", "chat_template_kwargs": {"enable_thinking": False}}]
    made = config(records, 0.0, thinking=0.5)
    drawn, said = read_tasks(made, tokenizer).train
    assert {thinks(made, drawn, str(n)) for n in range(20)} == {True, False}
    assert not any(thinks(made, said, str(n)) for n in range(20))
    assert not read_tasks(made, tokenizer).notes
    plain = with_template(tokenizer.folder, tmp_path / "plain", CHATML)
    assert read_tasks(made, plain).notes == [
        "data.train: 2 prompts are the same, thinking or not: the chat template knows no rollout.thinking"
    ]


def test_an_agents_tools_are_offered_where_a_prompt_has_none(config, tokenizer):
    own = {"type": "function", "function": {"name": "rates", "parameters": {"type": "object", "properties": {}}}}
    records = [{"prompt": "the cat"}, {"prompt": "the cat", "tools": [own]}]
    wide = dataclasses.replace(config(records).data, seq_len=2000, val_fraction=0.0)
    wide = dataclasses.replace(config(records), data=wide)
    with Toolbox(["random"]) as tools:
        tasks = read_tasks(wide, tokenizer, tools.schemas)
        assert tasks.train[0].tools == tools.schemas
    assert tasks.train[1].tools[0]["function"]["name"] == "rates"
    assert tasks.notes == [
        "data.train: 1 prompts offer no tools, and get those of agent.tools",
        "data.train: 1 prompts offer rates, which agent.tools does not have: a call of it fails",
    ]


def test_variables_of_a_template_that_nobody_follows_are_refused(config, tokenizer):
    records = [{"prompt": "the cat", "chat_template_kwargs": {"style": "brief"}}]
    with pytest.raises(UserError, match=r"prompts.jsonl:1: chat_template_kwargs has 'style'.*ignore_fields"):
        read_tasks(config(records), tokenizer)


def test_prompts_that_repeat_are_told(config, tokenizer):
    records = [{"prompt": f"cat {n % 6}", "answer": n} for n in range(12)]
    notes = read_tasks(config(records), tokenizer).notes
    assert "data.train: 6 prompts repeat others word for word" in notes
    assert any("held-out prompts are trained on, too" in note for note in notes)
    assert not read_tasks(config(records[:6]), tokenizer).notes


def test_why_no_prompt_is_left_is_told(config, tokenizer):
    with pytest.raises(UserError, match=r"no prompt is left to learn from; 1 prompts are too long and left out"):
        read_tasks(config([{"prompt": "the cat " * 60}], long_prompts="skip"), tokenizer)
