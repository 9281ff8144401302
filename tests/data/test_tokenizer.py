"""Tokenizers: MiniMind's ids, training, files that transformers loads, streaming."""

import dataclasses
import json
import random
import re
import resource
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from talk import TEXT

from minimind_jax.config.stages import TokenizerConfig
from minimind_jax.convert.identity import tokenizer_hash
from minimind_jax.data.jsonl import Record
from minimind_jax.data.template import CHAT_TEMPLATE
from minimind_jax.data.tokenizer import RESERVED_TOKENS, StreamDecoder, Tokenizer, train_bpe
from minimind_jax.errors import UserError
from minimind_jax.stages.tokenizer import ORIGIN, _cut_words, _draw, text_of, train_tokenizer

CORPUS = [
    "the cat sat on the mat. 猫坐在垫子上。\n\n\nnext 12345",
    "hello world, 你好世界 🙂 def f(x):\n    return x",
] * 3


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return train_bpe(CORPUS, tmp_path_factory.mktemp("tokenizer") / "small", 340)


@pytest.fixture
def minimind(shared_dir):
    return Tokenizer.load(shared_dir / "data" / "minimind-tokenizer")


def test_minimind_ids(minimind, shared_dir):
    rows = [json.loads(line) for line in open(shared_dir / "fixtures" / "tokenizer_ids.jsonl", encoding="utf-8")]
    assert [minimind.encode(row["text"]) for row in rows] == [row["ids"] for row in rows]
    assert minimind.encode_batch([row["text"] for row in rows]) == [row["ids"] for row in rows]
    assert (minimind.vocab_size, minimind.bos_id, minimind.eos_id, minimind.pad_id) == (6400, 1, 2, 0)


def test_reserved_tokens_are_minimind_s(minimind, small):
    added = minimind._backend.get_added_tokens_decoder()
    assert [added[i].content for i in range(36)] == list(RESERVED_TOKENS) and len(added) == 36
    assert small._backend.get_added_tokens_decoder() == added
    assert small.special_ids == minimind.special_ids == frozenset(range(21))


def test_trained_tokenizer_has_minimind_s_construction(minimind, small):
    ours, theirs = (json.loads((t.folder / "tokenizer.json").read_text()) for t in (small, minimind))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding", "added_tokens"):
        assert ours[part] == theirs[part]
    assert {k: v for k, v in ours["model"].items() if k not in ("vocab", "merges")} == {
        k: v for k, v in theirs["model"].items() if k not in ("vocab", "merges")
    }
    assert small.vocab_size == 340
    assert sorted(ours["model"]["vocab"].values())[:292] == list(range(292))


@given(TEXT)
@settings(max_examples=150, deadline=None)
def test_every_text_survives(small, text):
    ids = small.encode(text)
    assert small.decode(ids, skip_special_tokens=False) == text
    assert sum(small.token_bytes()[i] for i in ids if i not in small.special_ids) == len(
        re.sub("|".join(map(re.escape, RESERVED_TOKENS[:21])), "", text).encode()
    )


def test_special_tokens_are_left_out_and_tags_stay(small):
    ids = small.encode("<|im_start|>a<think>b</think><tool_call><|im_end|>")
    assert small.decode(ids) == "a<think>b</think><tool_call>"
    assert small.token_bytes().shape == (small.vocab_size,) and small.token_bytes()[:21].sum() == 0
    assert small.token_bytes()[25] == len("<think>")


@given(TEXT)
@settings(max_examples=150, deadline=None)
def test_streaming_gives_whole_characters(small, text):
    decoder = StreamDecoder(small, skip_special_tokens=False)
    pieces = [decoder.push(i) for i in small.encode(text)]
    assert "".join(pieces) == text and decoder.flush() == ""


@given(st.lists(st.integers(0, 339), max_size=40))
@settings(max_examples=150, deadline=None)
def test_streaming_equals_decoding_for_any_ids(small, ids):
    for skip in (True, False):
        decoder = StreamDecoder(small, skip)
        text = "".join(decoder.push(i) for i in ids) + decoder.flush()
        assert text == small.decode(ids, skip_special_tokens=skip)


def test_an_emoji_comes_out_only_when_complete(small):
    decoder = StreamDecoder(small)
    ids = [small.byte_pieces.index(bytes([byte])) for byte in "é🙂🙂".encode()]
    assert [decoder.push(i) for i in ids[:8]] == ["", "é", "", "", "", "🙂", "", ""]
    assert decoder.flush() == "\ufffd"


class TestFolders:
    def copy(self, source, target, **config):
        target.mkdir()
        (target / "tokenizer.json").write_bytes((source.folder / "tokenizer.json").read_bytes())
        if config:
            (target / "tokenizer_config.json").write_text(json.dumps(config))
        return target

    def test_saving_keeps_bytes_and_adds_what_others_read(self, small, tmp_path):
        template = CHAT_TEMPLATE.replace("{#- ChatML", "{#- another text of the same template")
        config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": None, "x": [1]}
        source = self.copy(small, tmp_path / "in", chat_template=template, **config)
        (source / "merges.txt").write_text("kept")
        tokenizer = Tokenizer.load(source)
        assert tokenizer.own_template and tokenizer.pad_id == tokenizer.eos_id == 2
        tokenizer.save(tmp_path / "out")
        out = tmp_path / "out"
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        assert (out / "merges.txt").read_text() == "kept"
        assert json.loads((out / "tokenizer_config.json").read_text()) == {
            **config,
            "chat_template": CHAT_TEMPLATE,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        assert (out / "chat_template.jinja").read_text() == CHAT_TEMPLATE

    def test_saving_twice_changes_nothing(self, small, tmp_path):
        small.save(tmp_path / "out")
        again = Tokenizer.load(tmp_path / "out")
        assert again.fingerprint == small.fingerprint
        before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
        again.save(tmp_path / "out")
        assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
        assert before["tokenizer_config.json"] == (small.folder / "tokenizer_config.json").read_bytes()

    def test_tokenizer_json_alone_is_enough(self, small, tmp_path):
        tokenizer = Tokenizer.load(self.copy(small, tmp_path / "in"))
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
        tokenizer.save(tmp_path / "out")
        assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (
            small.folder / "tokenizer_config.json"
        ).read_bytes()

    def test_a_foreign_template_is_kept_and_put_in_both_places(self, small, tmp_path):
        theirs = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        named = [{"name": "tools", "template": "x"}, {"name": "default", "template": theirs}]
        tokenizer = Tokenizer.load(self.copy(small, tmp_path / "in", eos_token="<|endoftext|>", chat_template=named))
        assert not tokenizer.own_template and tokenizer.bos_id == 1
        tokenizer.save(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == theirs
        assert (tmp_path / "out" / "chat_template.jinja").read_text() == theirs

    def test_the_file_wins_over_the_field(self, small, tmp_path):
        source = self.copy(small, tmp_path / "in", chat_template="field")
        (source / "chat_template.jinja").write_text("file")
        assert Tokenizer.load(source).chat_template == "file"

    def test_fingerprint_follows_the_vocabulary_and_the_template(self, small, tmp_path):
        other = train_bpe(CORPUS, tmp_path / "other", 341)
        foreign = Tokenizer.load(self.copy(small, tmp_path / "in", chat_template="x"))
        assert len({small.fingerprint, other.fingerprint, foreign.fingerprint}) == 3

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("tokenizer_config.json", b"[]", r"tokenizer_config\.json: expected a JSON object, found list"),
            ("special_tokens_map.json", b"null", r"special_tokens_map\.json: expected a JSON object, found NoneType"),
            ("tokenizer_config.json", b'{"bos_token": 3}', r"tokenizer_config\.json: bos_token is no string"),
            ("tokenizer_config.json", b'{"eos_token": {}}', r"tokenizer_config\.json: eos_token is missing"),
            ("tokenizer_config.json", b'{"chat_template": 5}', r"tokenizer_config\.json: chat_template is no string"),
            ("chat_template.jinja", "x".encode("utf-16"), r"chat_template\.jinja is not UTF-8 text"),
        ],
    )
    def test_odd_files_are_named(self, small, tmp_path, file, content, message):
        folder = self.copy(small, tmp_path / "odd")
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        (folder / file).write_bytes(content)
        with pytest.raises(UserError, match=message):
            Tokenizer.load(folder)

    def test_a_run_means_the_tokenizer_of_its_model(self, small, tmp_path):
        (tmp_path / "run").mkdir()
        folder = self.copy(small, tmp_path / "run" / "model")
        assert Tokenizer.load(str(tmp_path / "run")).folder == folder
        assert tokenizer_hash(tmp_path / "run") == tokenizer_hash(folder) != ""

    def test_broken_folders(self, small, tmp_path):
        with pytest.raises(UserError, match=r"tokenizer\.json: no such file; expected a tokenizer folder"):
            Tokenizer.load(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
            Tokenizer.load(tmp_path)
        broken = self.copy(small, tmp_path / "broken")
        (broken / "tokenizer_config.json").write_text("{")
        with pytest.raises(UserError, match=r"tokenizer_config\.json: not JSON"):
            Tokenizer.load(broken)
        with pytest.raises(UserError, match=r"tokenizer_config\.json: eos_token is missing or not in tokenizer\.json"):
            Tokenizer.load(self.copy(small, tmp_path / "eos", eos_token="<nope>"))

    def test_sentencepiece_tokens_have_bytes_too(self, tmp_path):
        vocabulary = {"<unk>": 0, "</s>": 1, "▁a": 2, "<0xE4>": 3, "<0xBD>": 4, "<0xA0>": 5, "b": 6}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        backend.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.Metaspace(), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
        )
        backend.add_special_tokens(["<unk>", "</s>"])
        backend.save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer.load(tmp_path)
        np.testing.assert_array_equal(tokenizer.token_bytes(), [0, 0, 2, 1, 1, 1, 1])
        decoder = StreamDecoder(tokenizer)
        assert [decoder.push(i) for i in (6, 3, 4, 5, 2, 1)] == ["b", "", "", "你", " a", ""]
        assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)


class TestStage:
    def config(self, folder, **changes):
        text = [{"text": text} for text in CORPUS]
        talk = [{"conversations": [{"role": "user", "content": "zqzqzq " * 9}, {"role": "assistant", "content": "ok"}]}]
        for name, rows in (("a.jsonl", text), ("b.jsonl", talk)):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return TokenizerConfig(
            **{"data": (str(folder / "*.jsonl"),), "output": str(folder / "out"), "vocab_size": 330, **changes}
        )

    def test_both_formats_are_read_and_the_result_is_checked(self, tmp_path, capsys):
        tokenizer = train_tokenizer(self.config(tmp_path, max_records=2))
        assert tokenizer.vocab_size == 330 and tokenizer.folder == tmp_path / "out"
        assert len(tokenizer.encode(" zqzqzq")) < 5  # the second file counts although the first holds enough records
        printed = capsys.readouterr().out
        assert "<|im_start|>assistant\n<think>\n\n</think>\n\n" in printed
        assert re.search(r"Chinese: 70 characters, \d+ tokens, [\d.]+ characters per token", printed)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out"]

    def test_another_tokenizer_is_replaced_only_when_asked(self, tmp_path, capsys):
        config = self.config(tmp_path)
        train_tokenizer(config)
        before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        capsys.readouterr()
        (tmp_path / "elsewhere").mkdir()
        moved = [shutil.copy(tmp_path / name, tmp_path / "elsewhere" / name) for name in ("a.jsonl", "b.jsonl")]
        assert train_tokenizer(dataclasses.replace(config, data=tuple(map(str, moved)))).vocab_size == 330
        assert "holds the tokenizer of these settings and records already" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"another tokenizer \(vocab_size\), .* --overwrite true"):
            train_tokenizer(dataclasses.replace(config, vocab_size=310))
        with pytest.raises(UserError, match=r"another tokenizer \(data\)"):
            train_tokenizer(dataclasses.replace(config, data=(str(moved[0]),)))
        assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
        assert train_tokenizer(dataclasses.replace(config, vocab_size=310, overwrite=True)).vocab_size == 310
        (tmp_path / "out" / ORIGIN).unlink()  # as an older version, or another program, leaves it
        with pytest.raises(UserError, match=f"no {ORIGIN} in it"):
            train_tokenizer(dataclasses.replace(config, vocab_size=310))

    def test_a_small_corpus_says_so_and_goes_on(self, tmp_path, capsys):
        tokenizer = train_tokenizer(self.config(tmp_path, vocab_size=6400))
        assert 292 < tokenizer.vocab_size < 6400
        assert f"too few different words for 6400 tokens: {tokenizer.vocab_size} were made" in capsys.readouterr().out

    def test_broken_records_stop_or_are_counted(self, tmp_path, capsys):
        config = self.config(tmp_path)
        with open(tmp_path / "a.jsonl", "a") as file:
            file.write('{"txt": 1}\n{"text"\n')
        with pytest.raises(UserError, match=r"a\.jsonl:7: missing field `text`"):
            train_tokenizer(config)
        assert not (tmp_path / "out").exists()
        train_tokenizer(self.config(tmp_path, on_error="skip"))

    def test_skipped_records_are_counted(self, tmp_path, capsys):
        config = self.config(tmp_path, on_error="skip")
        with open(tmp_path / "a.jsonl", "a") as file:
            file.write('{"txt": 1}\n{"text"\n')
        train_tokenizer(config)
        assert "2 records skipped; the first: " in capsys.readouterr().out
        for name in ("a.jsonl", "b.jsonl"):
            (tmp_path / name).write_text('{"txt": 1}\n')
        with pytest.raises(UserError, match="no usable record in"):
            train_tokenizer(dataclasses.replace(config, overwrite=True))

    def test_an_empty_text_names_the_stage_s_own_flag(self, tmp_path):
        (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
        with pytest.raises(UserError, match="text is empty; remove the line, or pass --on_error skip"):
            train_tokenizer(self.config(tmp_path, data=(str(tmp_path / "empty.jsonl"),)))

    def test_every_file_gives_its_share_and_one_is_open_at_a_time(self, tmp_path):
        config = self.config(tmp_path)
        files = []
        for number, rows in enumerate((1, 5, 0, 9)):
            files.append(tmp_path / f"{number}.jsonl")
            lines = [json.dumps({"text": f"{number}{row}"}) for row in range(rows)]
            files[-1].write_text("".join(f"{line}\n" for line in ["broken", *lines]))
        bad = []
        for limit, expected in ((1, "0"), (3, "013"), (8, "01111333"), (99, None), (0, None)):
            total, drawn = _draw(files, limit, bad.append)
            found = [record.value["text"] for record in drawn]
            assert total == 15 and len(set(found)) == len(found)
            assert "".join(text[0] for text in found) == expected or (expected is None and len(found) == 15)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for number in range(300):
            shutil.copy(tmp_path / "a.jsonl", tmp_path / f"c{number}.jsonl")
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            train_tokenizer(dataclasses.replace(config, data=(str(tmp_path / "c*.jsonl"),)))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_records_are_drawn_from_all_of_a_file(self, tmp_path, capsys):
        file = tmp_path / "two.jsonl"
        texts = ["the cat sat on a mat"] * 300 + ["собака бежит по зелёным холмам"] * 300
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        drawn = [[record.line for record in _draw([file], 60, pytest.fail)[1]] for _ in range(2)]
        assert drawn[0] == drawn[1] == sorted(set(drawn[0])) and len(drawn[0]) == 60
        assert all(10 * n < line <= 10 * n + 10 for n, line in enumerate(drawn[0]))  # one of every ten
        assert len({line % 10 for line in drawn[0]}) > 3  # and not the same of every ten
        config = TokenizerConfig((str(file),), str(tmp_path / "out"), vocab_size=400, max_records=50)
        tokenizer = train_tokenizer(config)
        assert len(tokenizer.encode(texts[-1])) == len(texts[-1].split())
        printed = capsys.readouterr().out
        assert "50 of 600 records used, spread over all files" in printed
        assert "Raise max_records, or lower vocab_size" in printed

    def test_long_words_are_cut_for_the_training_and_told(self, tmp_path, capsys):
        long = "".join(random.Random(0).choices("abcdefgh", k=60_000))  # a minute in one piece
        texts = ["short words only", f"a {long} b", "1" * 1500 + "." * 1500 + "字" * 3000, "a" + " \n" * 30_000]
        assert _cut_words(texts[0]) == [texts[0]]
        for text in texts:
            assert "".join(_cut_words(text)) == text
        assert _cut_words("1" * 1500) == ["1" * 1000, "1" * 500]
        base64 = "ab1+" * 500  # pieces of GPT-2's pattern are short here
        assert _cut_words(base64) == [base64]
        (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train_tokenizer(TokenizerConfig((str(tmp_path / "long.jsonl"),), str(tmp_path / "out"), vocab_size=400))
        printed = capsys.readouterr().out
        assert "4 of 4 records used\n3 records with words of more than 1,000 characters" in printed

    def test_outputs_that_are_refused(self, tmp_path):
        config = self.config(tmp_path)
        with pytest.raises(UserError, match=r"cannot write output .*a\.jsonl/tok: "):
            train_tokenizer(dataclasses.replace(config, output=str(tmp_path / "a.jsonl" / "tok")))
        with pytest.raises(UserError, match="holds other files"):
            train_tokenizer(self.config(tmp_path, output=str(tmp_path)))
        with pytest.raises(UserError, match="is a file"):
            train_tokenizer(self.config(tmp_path, output=str(tmp_path / "a.jsonl")))
        with pytest.raises(UserError, match="data is empty"):
            train_tokenizer(TokenizerConfig(output=str(tmp_path / "out")))


def test_transformers_loads_the_trained_tokenizer(small):
    transformers = pytest.importorskip("transformers", reason="loads our folder with transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(small.folder)
    text = "<|im_start|>user\nthe 猫 <think>x</think><|im_end|>\n"
    encoded = theirs(text)
    assert encoded["input_ids"] == small.encode(text)
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert theirs.decode(encoded["input_ids"], skip_special_tokens=True) == small.decode(small.encode(text))
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 2, 0, small.vocab_size)
    assert theirs.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "value, text",
    [
        ({"text": "one"}, "one"),
        ({"conversations": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}, "one\ntwo"),
        ({"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}, "one\ntwo"),
        ({"instruction": "one", "input": "", "output": "two"}, "one\ntwo"),
    ],
)
def test_a_tokenizer_learns_from_conversations_of_every_format(tmp_path, value, text):
    assert text_of(Record("file:1", tmp_path / "file", 1, value)) == text
