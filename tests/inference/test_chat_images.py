"""Pictures in the terminal chat."""

import dataclasses
import io
import itertools

import pytest
from rich.console import Console

from minimind_jax.config.generation import ChatConfig
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.images import open_picture
from minimind_jax.errors import UserError
from minimind_jax.inference.chat import Dialogue, chat
from minimind_jax.inference.load import load_engine

CONFIG = ChatConfig(max_new_tokens=8, temperature=0.0, model="tiny", ignore_eos=True)
IMAGE = "<|image_pad|>" * 4


@pytest.fixture(scope="module")
def engine(seeing_folder):
    return load_engine(str(seeing_folder), slots=1)


def ask(conversation, text):
    conversation.ask(text)
    [*_, last] = conversation.answer()
    conversation.keep(last.answer.text, "")
    return last.answer


def test_the_next_question_shows_them_and_later_ones_remember(engine, photos):
    conversation, pictures = Dialogue(engine, CONFIG), []
    for n in (1, 2):
        assert f"shows: {n}" in conversation.command(f"/image {photos / f'{n}.png'}")
        pictures.append(open_picture(photos / f"{n}.png", engine.model.config.vision.tower, ""))
    first = ask(conversation, "Which?")
    conversation.command(f"/image {photos / '3.png'}")
    second = ask(conversation, "And <image>?")
    pictures.append(open_picture(photos / "3.png", engine.model.config.vision.tower, ""))
    third = ask(conversation, "Why?")
    talk = [f"{IMAGE}\n{IMAGE}\nWhich?", first.text.strip(), f"And {IMAGE}?", second.text.strip(), "Why?"]
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": content} for role, content in zip(roles, talk, strict=False)]
    for answer, said, shown in ((first, 1, 2), (second, 3, 3), (third, 5, 3)):
        ids = encode_prompt(engine.tokenizer, messages[:said], open_thinking=False)
        sampling = dataclasses.replace(CONFIG.resolve(engine.sampling))
        [expected] = engine.generate([ids], sampling, [pictures[:shown]])
        assert answer.ids == expected.ids
    assert second.cached_tokens > 20 and not conversation.pictures


@pytest.mark.parametrize("name", ["a b.png", "[1].png", "it's.png", 'say "x".png', "back\\slash.png", "[bold]~.png"])
def test_paths_are_taken_as_they_are(name, engine, photos, tmp_path):
    (tmp_path / name).write_bytes((photos / "1.png").read_bytes())
    conversation = Dialogue(engine, CONFIG)
    assert "shows: 1" in conversation.command(f"/image {tmp_path / name}")


@pytest.mark.parametrize("typed", ["'{}/a b.png'", '"{}/a b.png"', "{}/a\\ b.png", "file://{}/a b.png"])
def test_paths_may_be_as_terminals_paste_them(typed, engine, photos, tmp_path):
    (tmp_path / "a b.png").write_bytes((photos / "1.png").read_bytes())
    assert "shows: 1" in Dialogue(engine, CONFIG).command(f"/image {typed.format(tmp_path)}")


def test_a_system_prompt_that_spells_the_marker_is_refused(engine):
    conversation = Dialogue(engine, CONFIG)
    conversation.command("/system Be kind.")
    assert "leave it out of the system prompt" in conversation.command("/system See <|image_pad|>")
    assert conversation.system == "Be kind."


def test_what_cannot_be_shown_is_told_and_the_chat_goes_on(engine, photos, tmp_path, model_folder):
    (tmp_path / "broken.png").write_bytes((photos / "1.png").read_bytes()[:40])
    lines = [
        "/image", "/image nowhere.png", f"/image {tmp_path / 'broken.png'}", f"/image {tmp_path}", "/image 'a",
        "/image https://example.org/a.png", "/image " + "x" * 5000, "/image a\0b", f"/image {photos / '1.png'}",
        "<|image_pad|>", "<image> <image>", "What [is] it?", "/clear", "hi",
    ]  # fmt: skip
    console = Console(file=io.StringIO(), width=2000, markup=False, emoji=False, highlight=False)
    chat(engine, CONFIG, console, lines)
    said = [
        "shows: 0", "nowhere.png cannot be read: No such file", "broken.png", "Is a directory", "'a cannot be read",
        "download the picture", "File name too long", "null byte", "shows: 1", "stands for pictures",
        "1 pictures, and 2",
    ]  # fmt: skip
    printed, place = console.file.getvalue(), 0
    for words in said:
        place = printed.find(words, place) + 1
        assert place, words
    assert printed.count("[8 tokens") == 2
    blind = Dialogue(load_engine(str(model_folder), slots=1), CONFIG)
    assert "this model reads words alone" in blind.command(f"/image {photos / '1.png'}") and not blind.pictures


def test_they_are_dropped_and_come_back_with_their_question(engine, photos):
    conversation = Dialogue(engine, CONFIG)
    show = f"/image {photos / '1.png'}"
    for command in ("/clear", "/system Be brief."):
        conversation.command(show)
        conversation.command(command)
        assert not conversation.pictures
    conversation.command(show)
    with pytest.raises(UserError, match="and 1 pictures, which /clear drops"):
        conversation.ask("cat " * 600)
    conversation.ask("What?")
    assert not conversation.pictures
    conversation.keep(" ", "")  # nothing was said
    assert len(conversation.pictures) == 1 and not conversation.messages
