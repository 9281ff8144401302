"""`minimind generate` about pictures: of records in every form, and of prompts on the command line."""

import base64
import dataclasses
import json

import numpy as np
import pytest

from minimind_jax.config.generation import GenerateConfig
from minimind_jax.config.settings import load_settings
from minimind_jax.config.tools import PredictConfig, ScoreConfig
from minimind_jax.data.images import read_image
from minimind_jax.data.jsonl import iter_records
from minimind_jax.data.kinds import KINDS, Wanted
from minimind_jax.data.pictures import marker_of, unpack
from minimind_jax.data.template import unchanged
from minimind_jax.errors import UserError
from minimind_jax.inference.generate_command import _open, _request, run
from minimind_jax.inference.load import load_engine

ANSWER = {"role": "assistant", "content": "the cat"}


def asked(content, **fields):
    return {"conversations": [{"role": "user", "content": content}, ANSWER], **fields}


def records(photos):
    url = "data:image/png;base64," + base64.b64encode((photos / "4.png").read_bytes()).decode()
    image_url = {"type": "image_url", "image_url": {"url": url}}
    return [
        asked("<image>\nWhat is it?", image="1.png", id=7),
        asked("This <image> or <image>?", images=["2.png", {"path": "3.png"}]),
        asked([{"type": "text", "text": "What?"}, image_url]),
        asked([{"type": "image", "image": str(photos / "5.png")}, {"type": "image", "path": "1.png"}]),
        asked("words alone"),
        {"conversations": [*asked("<image>", image="")["conversations"], {"role": "user", "content": "and <image>?"},
                           ANSWER], "images": ["2.png", "1.png"]},
    ]  # fmt: skip


@pytest.fixture(scope="module")
def engine(seeing_folder):
    return load_engine(str(seeing_folder), slots=4)


@pytest.fixture
def config(seeing_folder, photos, tmp_path):
    def make(*values, name="talk.jsonl", **changes):
        file = photos / name
        if values:
            file.write_text("".join(json.dumps(record) + "\n" for record in values))
        settings = {"max_new_tokens": 5, "temperature": 0.0, "batch_size": 4, "ignore_eos": True, **changes}
        return GenerateConfig(model=str(seeing_folder), input=str(file), output=str(tmp_path / "out.jsonl"), **settings)

    return make


def lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_prompts_are_what_training_shows_up_to_the_answer(config, engine, photos):
    config, vision = config(*records(photos)), engine.model.config.vision
    for record in iter_records(config.input):
        prompt = _request(engine, config, record)
        kind = KINDS["images"]
        parsed = kind.parse(record, Wanted(marker=marker_of(engine.tokenizer, vision)))
        trained = kind.encode(engine.tokenizer, parsed, unchanged, print)
        assert prompt.ids == trained.ids[: len(prompt.ids)].tolist() and trained.trained[len(prompt.ids) :].any()
        expected = [read_image(unpack(file), vision.tower, "") for file in trained.pictures]
        np.testing.assert_array_equal([image.pixels for image in _open(engine, prompt)], expected or np.zeros(0))


def test_records_are_answered_and_written_so_that_they_can_be_read_again(config, engine, photos, capsys):
    values = records(photos)
    config = config(*values)
    run(config)
    answered = lines(config.output)
    prompts = [_request(engine, config, record) for record in iter_records(config.input)]
    expected = engine.generate(
        [prompt.ids for prompt in prompts], config.resolve(engine.sampling), [_open(engine, p) for p in prompts]
    )
    assert answered == [
        {**value, "completion": answer.text, "finish_reason": "length"}
        for value, answer in zip(values, expected, strict=True)
    ]
    assert len({line["completion"] for line in answered}) > 3
    again = dataclasses.replace(config, output=config.output.replace("out", "again"), as_conversations=True)
    run(again)
    marker = marker_of(engine.tokenizer, engine.model.config.vision)
    for record, answer in zip(iter_records([again.output]), answered, strict=True):
        seen = KINDS["images"].parse(record, Wanted(marker=marker))  # its pictures are found from any folder
        assert seen.conversation.messages[-1]["content"] == answer["completion"].strip()
        assert len(seen.pictures) == json.dumps(record.value).count("<image>")


def test_pictures_of_a_table_are_answered_and_written_as_text(config, engine, photos):
    pyarrow = pytest.importorskip("pyarrow.parquet", reason="tables need pyarrow")
    import pyarrow as arrow

    content = [(photos / f"{n}.png").read_bytes() for n in (1, 2)]
    talk = json.dumps(asked("<image>\nWhat?")["conversations"])
    pyarrow.write_table(arrow.table({"conversations": [talk, talk], "image_bytes": content}), photos / "talk.parquet")
    config = config(name="talk.parquet")
    run(config)
    first, second = lines(config.output)
    assert first["image_bytes"].endswith(base64.b64encode(content[0]).decode())
    assert first["completion"] != second["completion"]


def test_prompts_of_the_command_line_show_pictures(config, engine, photos, capsys):
    paths = [str(photos / "1.png"), str(photos / "2.png")]
    on_line = dataclasses.replace(config(asked("x")), input=(), output="", prompt=("What?",), image=tuple(paths))
    run(on_line)
    printed = capsys.readouterr()
    [record] = iter_records(config({"prompt": "<image>\n<image>\nWhat?", "images": paths}).input)
    prompt = _request(engine, on_line, record)
    [expected] = engine.generate([prompt.ids], on_line.resolve(engine.sampling), [_open(engine, prompt)])
    assert printed.out == expected.text + "\n" and not printed.err
    run(dataclasses.replace(on_line, prompt=("What?", "<image> or <image>?")))
    assert f"> What?\n{expected.text}\n\n> <image> or" in capsys.readouterr().out


def test_pictures_in_fields_of_other_names_are_told(config, capsys):
    others = {"image_path": "1.png", "thumb": {"path": "2.PNG"}, "photos": ["3.png"], "note": "no picture", "id": 3}
    run(config({"prompt": "What?", **others}))
    told = capsys.readouterr().err
    for name in ("image_path", "thumb", "photos"):
        assert f"the picture in `{name}` is not looked at; call the field `image`" in told
    assert "note" not in told and "`id`" not in told
    run(dataclasses.replace(config(), resume="never", ignore_fields=("image_path", "thumb", "photos")))
    assert "not looked at" not in capsys.readouterr().err


def test_pictures_that_fill_the_context_are_counted(config):
    said = r"a prompt of \d+ tokens \(640 of them for 160 pictures\) leaves no room"
    with pytest.raises(UserError, match=said):
        run(config({"prompt": "What?", "images": ["1.png"] * 160}))


def test_prompts_and_pictures_of_the_command_line_add_up_and_pictures_are_names_of_files():
    argv = "--model m --prompt a --prompt b --image 1.png --image".split()
    config = load_settings(GenerateConfig, [*argv, "a, b.png", "[c].png"])
    assert (config.prompt, config.image) == (("a", "b"), ("1.png", "a, b.png", "[c].png"))


@pytest.mark.parametrize("command", [GenerateConfig, ScoreConfig, PredictConfig])
def test_files_that_a_command_reads_add_up(command):
    config = load_settings(command, "--model m --input 1.jsonl --input 2.jsonl 3.jsonl".split())
    assert config.input == ("1.jsonl", "2.jsonl", "3.jsonl")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (asked("<image>", image="9.png"), r"talk.jsonl:2: image 1: the picture .*9.png cannot be read: No such file"),
        (asked("<image>", image="talk.jsonl"), r"talk.jsonl:2: image 1: not a picture that is read"),
        (asked("<image> <image>", image="1.png"), r"talk.jsonl:2: 1 pictures, and 2 times <image>"),
        (asked("<image>", image="http://x/y.png"), r"talk.jsonl:2: image\[0\] is an address .*; download the picture"),
        (asked("<|image_pad|>", image="1.png"), r"talk.jsonl:2: the text has <\|image_pad\|>"),
    ],
)
def test_what_is_wrong_is_told_with_its_record_and_what_came_before_is_kept(record, message, config, photos, capsys):
    first = asked("<image>", image="1.png")
    config = config(first, record)
    with pytest.raises(UserError, match=message):
        run(config)
    assert len(lines(config.output + ".partial")) == 1
    good = asked("<image>", image="2.png")
    (photos / "talk.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (first, good)))
    run(config)
    assert "going on behind 1 records" in capsys.readouterr().out and len(lines(config.output)) == 2


def test_a_blind_model_and_raw_text_say_so(config, model_folder, photos):
    config = config({"prompt": "What?", "image": "1.png"})
    with pytest.raises(UserError, match=r"talk.jsonl:1: it shows pictures, and this model reads words alone"):
        run(dataclasses.replace(config, model=str(model_folder)))
    with pytest.raises(UserError, match="raw continues text alone"):
        run(dataclasses.replace(config, raw=True))
    run(dataclasses.replace(config, model=str(model_folder), ignore_fields=("image",)))
    with pytest.raises(ValueError, match="image is set, and records of a file name their own"):
        dataclasses.replace(config, image=("1.png",))


def test_old_turns_go_with_their_pictures_and_a_question_keeps_its_own(config, engine):
    turns = [{"role": "user", "content": "<image>" + "cat " * 400}, ANSWER, {"role": "user", "content": "<image>?"}]
    config = config({"messages": turns, "images": ["1.png", "2.png"]}, max_new_tokens=300, long_prompts="cut")
    [record] = iter_records(config.input)
    with pytest.raises(UserError, match="shorten it"):
        _request(engine, config, record)
    cut = _request(engine, config, record, cut=True)
    [image] = _open(engine, cut)
    assert image.pixels[0, 0, 0] == 80 and cut.ids.count(engine.model.config.vision.marker_id) == 4
    turns = [{"role": "user", "content": "<image>" + "cat " * 400}]
    record = dataclasses.replace(record, value={"messages": turns, "images": ["1.png"]})
    with pytest.raises(UserError, match="shorten it"):  # its picture would be cut
        _request(engine, config, record, cut=True)
