"""Templates of models that see: parts of a message become one text, in which an image is one token."""

import pytest
from templates import QWEN3_WHOLE, TEMPLATES, with_template

from minimind_jax.data.template import (
    CHAT_TEMPLATE,
    render_jinja,
    renders_as_ours,
    template_with_images,
    template_without_images,
)
from minimind_jax.data.tokenizer import Tokenizer, train_bpe

MARKER = "<|image_pad|>"
ALL = {"ours": CHAT_TEMPLATE, "qwen3 whole": QWEN3_WHOLE, **TEMPLATES}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

IN_PARTS = [
    {"role": "system", "content": [{"type": "text", "text": " Be brief. "}]},
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}, "and\n", {"text": "?"}],
    },
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": [{"type": "text", "text": "Now "}, {"type": "image", "image": "a.png"}]},
]
AS_TEXTS = [" Be brief. ", f"{MARKER}{MARKER}and\n?", "A cat.", f"Now {MARKER}"]
FLAT = [{**message, "content": text} for message, text in zip(IN_PARTS, AS_TEXTS, strict=True)]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_parts_are_written_as_the_template_writes_their_text(name, prompt):
    source, variables = ALL[name], {**VARIABLES, "add_generation_prompt": prompt}
    expected = render_jinja(source, FLAT, **variables)
    assert expected.count(MARKER) == 3
    for messages in (IN_PARTS, FLAT):
        assert render_jinja(template_with_images(source, MARKER), messages, **variables) == expected


def test_messages_without_content_are_left_as_they_are():
    source = "{% for m in messages %}{{ m.content is defined }} {{ m.content is none }} {{ m.tool_calls }};{% endfor %}"
    messages = [{"role": "assistant", "tool_calls": [1]}, {"role": "assistant", "content": None, "tool_calls": [2]}]
    expected = "False False [1];True True [2];"
    assert render_jinja(source, messages) == render_jinja(template_with_images(source, MARKER), messages) == expected


@pytest.mark.parametrize("name", ALL)
def test_a_tokenizer_of_a_model_that_sees_is_that_of_its_text(name, tmp_path):
    plain = with_template(train_bpe(["abc"], tmp_path / "words").folder, tmp_path / "plain", ALL[name])
    plain.save(tmp_path / "seeing", image_marker=12)
    seeing = Tokenizer.load(tmp_path / "seeing")
    written = (tmp_path / "seeing" / "chat_template.jinja").read_text("utf-8")
    assert written == template_with_images(plain.chat_template, MARKER)
    assert renders_as_ours(written) == plain.own_template == seeing.own_template
    assert (seeing.chat_template, seeing.fingerprint) == (plain.chat_template, plain.fingerprint)
    seeing.save(tmp_path / "again", image_marker=12)
    assert (tmp_path / "again" / "chat_template.jinja").read_text("utf-8") == written
    assert template_without_images(written) == plain.chat_template == template_without_images(plain.chat_template)
