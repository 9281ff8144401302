"""Templates and tokenizers of other models: what ends an answer, what is left out, what opens thinking."""

import json

import pytest
from templates import CHATML, DEEPSEEK, QWEN3, TEMPLATES, with_template

from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.kinds import Wanted
from minimind_jax.data.tokenise import Encoder
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import TemplateFault, UserError
from minimind_jax.runs.parts import tell_template

USER = {"role": "user", "content": "How many birds?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "count", "arguments": {"what": 'bird "s"'}}]}
THOUGHT = {"role": "assistant", "content": "Five.", "reasoning_content": "I see five."}
PLAIN = {"role": "assistant", "content": "Five."}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    return train_bpe(["birds sing and cats sit on mats"] * 3, tmp_path_factory.mktemp("small"), 310)


@pytest.fixture
def make(small, tmp_path):
    def make(template, **options):
        return with_template(small.folder, tmp_path / "tokenizer", template, **options)

    return make


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_ends_with_what_the_template_writes_behind_it(name, make):
    added = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>") if name == "llama3" else ()
    tokenizer = make(TEMPLATES[name], added=added)
    end = tokenizer.encode("<|eot_id|>" if added else "<|im_end|>")[0]
    assert (tokenizer.turn_end_id, tokenizer.eos_id, tokenizer.end_ids) == (end, 0, (end, 0))


def test_our_own_template_ends_with_one_token(small):
    assert small.end_ids == (2,)


def test_text_that_is_no_token_ends_nothing(make, capsys):
    tokenizer = make(CHATML.replace("<|im_end|>", "<end>"))
    assert (tokenizer.turn_end_id, tokenizer.end_ids) == (None, (0,))
    tell_template(tokenizer)
    assert "the model will not learn to stop" in capsys.readouterr().out


def test_a_folder_without_a_template_is_told(small, tmp_path, capsys):
    for file in small.folder.iterdir():
        words = json.loads(file.read_text()) if file.name == "tokenizer_config.json" else None
        text = file.read_text() if words is None else json.dumps(words | {"chat_template": None})
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_text(text)
    tell_template(Tokenizer.load(tmp_path))
    assert f"{tmp_path} has no chat template; MiniMind's writes the conversations" in capsys.readouterr().out
    tell_template(small)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("template", "messages", "tools", "lost"),
    [
        (CHATML, [USER, CALL], None, "tool_calls of assistant message 2"),
        (CHATML, [USER, THOUGHT], None, "reasoning_content of assistant message 2"),
        (QWEN3, [USER, CALL], [{"type": "function", "function": {"name": "count"}}], "the tools"),
        (CHATML.replace("<|im_start|>{{", "{% if message.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{"),
         [{"role": "system", "content": "Be brief."}, USER, PLAIN], None, "content of system message 1"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_an_error_that_no_setting_skips(template, messages, tools, lost, make, tmp_path):
    tokenizer = make(template)
    with pytest.raises(TemplateFault, match=f"leaves out the {lost.removeprefix('the ')}.*--tokenizer.*chat_template"):
        tokenizer.segments(messages, tools)
    system = [{"role": "system", "content": "s", "tools": tools}] if tools else []
    line = json.dumps({"conversations": [*system, *messages]}).encode()
    encoder = Encoder("conversation", str(tokenizer.folder), None, skip=True, wanted=Wanted())
    with pytest.raises(TemplateFault, match="leaves out"):
        encoder.encode([(0, tmp_path / "a.jsonl", 1, line)])


def test_a_prompt_is_whole_too(make):
    silent = CHATML.replace(
        "<|im_start|>{{", "{% if message.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{"
    )
    tokenizer = make(silent)
    with pytest.raises(UserError, match="leaves out the content of system message 1; the model would not see it"):
        encode_prompt(tokenizer, [{"role": "system", "content": "Be brief."}, USER])
    with pytest.raises(UserError, match="leaves out the tools"):
        encode_prompt(tokenizer, [USER], [{"name": "count"}])
    assert encode_prompt(tokenizer, [USER, THOUGHT, USER])  # thoughts of earlier answers may go


def test_what_is_written_in_another_form_is_not_left_out(make):
    tokenizer = make(QWEN3)
    for messages in ([USER, THOUGHT], [USER, CALL], [USER, {**PLAIN, "content": " a\n\n b "}]):
        text = "".join(segment.text for segment in tokenizer.segments(messages) if segment.trained)
        assert text.endswith("<|im_end|>\n")


def test_only_a_records_own_fault_is_skipped(make, tmp_path):
    alternate = "{% if loop.index0 and messages[loop.index0 - 1].role == message.role %}{{ raise_exception('twice') }}"
    tokenizer = make(CHATML.replace("<|im_start|>{{", alternate + "{% endif %}<|im_start|>{{"))
    encoder = Encoder("conversation", str(tokenizer.folder), None, skip=True, wanted=Wanted())
    talks = [[USER, USER, PLAIN], [USER, PLAIN]]
    lines = [
        (n, tmp_path / "a.jsonl", n + 1, json.dumps({"conversations": talk}).encode()) for n, talk in enumerate(talks)
    ]
    chunk = encoder.encode(lines)
    assert chunk.arrays["records"].tolist() == [1] and "twice" in chunk.errors[0]
    broken = CHATML.replace("message.content", "message.content + undefined.name")
    (tokenizer.folder / "chat_template.jinja").write_text(broken)
    with pytest.raises(TemplateFault, match=r"a\.jsonl:2: .*every record of this kind fails, so none is skipped"):
        Encoder("conversation", str(tokenizer.folder), None, skip=True, wanted=Wanted()).encode(lines[1:])


def test_our_template_cuts_nothing_from_an_answer(small, tmp_path):
    contents = ["Well <think>t</think> y", "a</think>b</think>c", "<think>\nt\n</think>\n\ny"]
    talks = [[USER, {"role": "assistant", "content": content}] for content in contents]
    lines = [
        (n, tmp_path / "a.jsonl", n + 1, json.dumps({"conversations": talk}).encode()) for n, talk in enumerate(talks)
    ]
    chunk = Encoder("conversation", str(small.folder), None, skip=True, wanted=Wanted()).encode(lines)
    assert chunk.arrays["records"].tolist() == [2]
    assert "a.jsonl:1: message 2: words of its content stand before its thinking" in chunk.errors[0]


@pytest.mark.parametrize(
    ("template", "opens"),
    [(None, (False, True)), (CHATML, (False, False)), (QWEN3, (False, False)), (DEEPSEEK, (True, True))],
)
def test_the_prompt_tells_whether_the_model_is_thinking(template, opens, make, small):
    tokenizer = make(template) if template else small
    talk = [{"role": "user", "content": "Say <think>."}]
    assert tuple(tokenizer.prompt_opens_thinking(talk, open_thinking=on) for on in (False, True)) == opens


def test_words_are_compared_and_not_files(small, make, tmp_path):
    make(CHATML, added=("<|new|>",)).check_same_words(small, "the model m")
    small.check_same_words(Tokenizer.load(tmp_path / "tokenizer"), "the model m")
    other = train_bpe(["zebras quickly xylophone"] * 3, tmp_path / "other", 310)
    with pytest.raises(UserError, match=r"other words than the model m was.* \d+ of 310 ids differ \(id \d+"):
        other.check_same_words(small, "the model m")
