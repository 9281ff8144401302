"""Log-likelihoods of continuations against the whole forward pass; multiple choice; agreement with lm_eval's hf."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from minimind_jax.config.tools import ChoicesConfig
from minimind_jax.convert.hf import save_hf
from minimind_jax.data.jsonl import Record
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import UserError
from minimind_jax.evaluate.choices import _requests, evaluate_choices, parse_question
from minimind_jax.inference.likelihood import LikelihoodScorer, encode_pair
from minimind_jax.inference.load import load_engine, load_model
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel

TEXTS = ["the cat sat on a mat while dogs run over green hills", "where do birds sing? on a hill, 你好 世界"] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights whose context is 64 tokens."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(TEXTS, place / "tokenizer", 340)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=64,
    )  # fmt: skip
    return save_hf(place / "hf", config, LanguageModel(config).init(jax.random.key(0)), tokenizer, "float32")


def log_probs(folder, ids):
    """log p of each token but the first, by one pass over all."""
    model, params = load_model(folder)
    logits = np.asarray(model.apply(params, np.array([ids]))[0][0], np.float64)[:-1]
    found = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found[np.arange(len(ids) - 1), ids[1:]], logits.argmax(-1) == np.array(ids[1:])


def test_likelihoods_are_those_of_the_whole_pass(folder):
    rng = np.random.default_rng(0)
    sizes = (5, 3), (1, 9), (30, 1), (12, 20)
    requests = [tuple(rng.integers(3, 300, size).tolist() for size in pair) for pair in sizes]
    greedy = load_engine(str(folder)).generate([[7, 8, 9]], _greedy(4))[0].ids
    requests.append(([7, 8, 9], greedy))
    found = LikelihoodScorer(*load_model(folder), batch_size=2).score(requests)
    for (context, continuation), likelihood in zip(requests, found, strict=True):
        expected, likeliest = log_probs(folder, [*context, *continuation])
        assert likelihood.log_prob == pytest.approx(expected[-len(continuation) :].sum(), abs=1e-4)
        assert likelihood.tokens == len(continuation)
        assert likelihood.is_greedy == likeliest[-len(continuation) :].all()
    assert found[-1].is_greedy


def _greedy(count):
    from minimind_jax.config.generation import SamplingConfig

    return SamplingConfig(max_new_tokens=count, temperature=0.0, ignore_eos=True)


def test_what_is_longer_than_the_context_loses_its_beginning(folder):
    rng = np.random.default_rng(1)
    context, continuation = rng.integers(3, 300, 100).tolist(), rng.integers(3, 300, 8).tolist()
    found = LikelihoodScorer(*load_model(folder)).score([(context, continuation)])[0]
    expected, _ = log_probs(folder, [*context, *continuation][-65:])
    assert found.log_prob == pytest.approx(expected[-8:].sum(), abs=1e-4)


@pytest.fixture
def questions(tmp_path):
    first = {"task": "animals", "question": "where does the cat sit?", "choices": ["on a mat", "over green hills"]}
    rows = [
        {**first, "answer": 0},
        {"task": "animals", "question": "who runs?", "choices": ["dogs", "mats", "hills"], "answer": "A"},
        {"task": "zh", "question": "你好", "choices": ["世界", "猫"], "answer": "世界"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return rows, str(file)


def evaluate(folder, file, **settings):
    return evaluate_choices(ChoicesConfig(model=str(folder), files=(str(file),), **settings))


def test_the_likeliest_choice_is_the_answer(folder, questions, monkeypatch, capsys):
    rows, file = questions
    monkeypatch.setattr("minimind_jax.progress.LINE_EVERY", 0.01)
    results = evaluate(folder, file)
    assert "scoring choices, 0 of 7, " in capsys.readouterr().err
    assert [(result.task, len(result.right)) for result in results] == [("animals", 2), ("zh", 1)]
    assert results[0].chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    tokenizer = Tokenizer.load(folder)
    scores = []
    for choice in rows[0]["choices"]:
        prompt = "Question: where does the cat sit?\nAnswer:"
        ids = [tokenizer.bos_id, *tokenizer.encode(f"{prompt} {choice}")]
        own = len(ids) - 1 - len(tokenizer.encode(prompt))
        scores.append(log_probs(folder, ids)[0][-own:].sum())
    assert results[0].right[0] == (np.argmax(scores) == 0)
    by_length = np.array(scores) / [len(choice) for choice in rows[0]["choices"]]
    assert results[0].right_by_length[0] == (np.argmax(by_length) == 0)
    one_by_one = evaluate(folder, file, batch_size=1)
    np.testing.assert_array_equal(one_by_one[0].right, results[0].right)


def test_files_of_another_encoding_take_the_setting_that_their_error_names(folder, questions, tmp_path):
    _, file = questions
    other = tmp_path / "gb18030.jsonl"
    other.write_text(Path(file).read_text("utf-8"), "gb18030")
    with pytest.raises(UserError, match="--encoding"):
        evaluate(folder, other)
    assert repr(evaluate(folder, other, encoding="gb18030")) == repr(evaluate(folder, file))


def test_questions_that_were_cut_are_counted(folder, tmp_path):
    rows = [{"question": "the cat " * count, "choices": ["sat", "ran"], "answer": 0} for count in (1, 100)]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [result] = evaluate(folder, file)
    assert result.cut == 1 and "1 of them longer than the model's context" in result.describe()


def test_examples_are_other_questions(folder, questions):
    _, file = questions
    with pytest.raises(UserError, match="zh: 1 examples are asked for, and there are 0"):
        evaluate(folder, file, shots=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["a"], "answer": 0}, "two or more"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "from 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "answer is 'True'"),
        ({"question": "q", "choices": ["a", " "], "answer": 0}, "a choice is empty"),
        ({"text": "q"}, "expected `question`"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "question is empty"),
        ({"question": "q", "choices": ["a", "\u200b"], "answer": 0}, "a choice is empty"),
        ({"question": "q", "choices": ["a", "a "], "answer": 0}, "all choices are 'a'"),
        ({"question": "\ud800", "choices": ["a", "b"], "answer": 0}, "question has half a surrogate pair"),
        ({"question": "q", "choices": ["a", None], "answer": 0}, "a choice is null"),
        ({"question": "q", "choices": ["a", ["b"]], "answer": 0}, "a choice is a list"),
        ({"question": "q", "choices": "[a, b]", "answer": 0}, "choices is not JSON"),
    ],
)
def test_broken_questions_are_told(row, message, folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"bad.jsonl:1: .*{message}"):
        evaluate(folder, tmp_path / "bad.jsonl")


@pytest.mark.parametrize("spaces", [" ", "\u3000", "\xa0", "\t", "\n", "\u2009", " \n "])
def test_spaces_at_the_prompt_s_end_go_to_the_continuation(spaces, folder):
    encode = Tokenizer.load(folder).encode
    expected = encode("the"), encode(f"the{spaces}cat")[len(encode("the")) :]
    assert encode_pair(encode, f"the{spaces}", "cat", 1, "here") == expected
    assert encode_pair(encode, spaces, "cat", 1, "here") == ([1], encode(f"{spaces}cat"))


def test_stray_spaces_make_no_choice_likelier(folder):
    tokenizer = Tokenizer.load(folder)
    rows = [{"question": "who?", "choices": each, "answer": "dogs"} for each in (["cat", "dogs"], [" cat ", "dogs\n"])]
    for prompt in ("", "{question} ", "{question}\u3000", "{question}\n"):
        tidy, stray = (
            _requests(tokenizer, prompt, parse_question(Record("here", Path(), 1, row)), [], 0) for row in rows
        )
        assert tidy == stray


@pytest.mark.parametrize("answer", ["B", "b", 1, 1.0, "1", "false", "false "])
def test_answers_of_every_form(answer):
    record = Record("here", Path(), 1, {"question": "q", "choices": ["true", "false"], "answer": answer, "task": None})
    assert parse_question(record)[1:] == ("choices", "q", ("true", "false"), 1)
    yes_or_no = {"question": "q", "choices": [True, False], "answer": False}
    assert parse_question(Record("here", Path(), 1, yes_or_no)).answer == 1


def test_equal_choices_are_equally_right(folder, tmp_path):
    rows = [{"question": "who?", "choices": ["dogs", "dogs ", "qqqqqqqqqqqqqqqqqqqqqq"], "answer": 1}]
    rows.append({"question": "who?", "choices": json.dumps(["dogs", "cat"]), "answer": "0"})  # as in a CSV cell
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [result] = evaluate(folder, tmp_path / "twice.jsonl")
    assert result.right[0] and result.chance == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert "1 of them have a choice twice" in result.describe()


def test_a_prompt_s_last_space_changes_no_result(folder, questions):
    _, file = questions
    with_space, without = (evaluate(folder, file, prompt=f"Q: {{question}}\nA:{end}") for end in (" ", ""))
    for a, b in zip(with_space[:1], without[:1], strict=True):  # the Chinese one has no space of its own
        np.testing.assert_array_equal(a.right, b.right)
        np.testing.assert_array_equal(a.right_by_length, b.right_by_length)


def merging(text):
    """Token ids of single characters, but "ab" is one token."""
    return [ord(character) for character in text.replace("ab", "\u0100")]


@pytest.mark.parametrize(("context", "continuation"), [("a", "b"), ("xa", "b"), ("x", ""), ("x ", ""), ("", "")])
def test_a_continuation_without_tokens_is_an_error(context, continuation):
    with pytest.raises(UserError, match="here: nothing is left to score"):
        encode_pair(merging, context, continuation, 1, "here")
    assert encode_pair(merging, "xa", "bc", 1, "here") == ([ord("x"), ord("a")], [ord("c")])


def test_a_scorer_refuses_what_has_no_tokens(folder):
    scorer = LikelihoodScorer(*load_model(folder))
    for request in (([5], []), ([], [5])):
        with pytest.raises(ValueError, match="has no tokens"):
            scorer.score([request])


def test_lm_eval_is_refused_an_empty_continuation(folder):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from minimind_jax.evaluate.lm_eval_adapter import MiniMindJax

    model = MiniMindJax(str(folder))
    cases = [("the cat ", "sat"), ("the cat", " sat"), ("\n", "sat"), ("", "\nsat")]
    instances = [Instance("loglikelihood", {}, pair, 0, ("task", 7, 1)) for pair in cases]
    found = model.loglikelihood(instances)
    assert found[0] == pytest.approx(found[1]) and found[2] == pytest.approx(found[3])
    with pytest.raises(UserError, match="task 8: nothing is left to score"):
        model.loglikelihood([Instance("loglikelihood", {}, ("the cat ", ""), 0, ("task", 8, 1))])


# lm_eval --------------------------------------------------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {output}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
"""
CHOOSING = """
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = "metric_list: [{metric: byte_perplexity}]"
WRITING = """
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(questions, tmp_path):
    """A multiple choice, a rolling and a generating task on local files."""
    _, file = questions
    folder = tmp_path / "tasks"
    folder.mkdir()
    plain = tmp_path / "text.jsonl"
    plain.write_text("".join(json.dumps({"text": text * 6}, ensure_ascii=False) + "\n" for text in TEXTS[:2]))
    one = tmp_path / "one.jsonl"  # answers of one type
    rows = [json.loads(line) for line in open(file, encoding="utf-8")]
    one.write_text("".join(json.dumps({**row, "answer": 0}, ensure_ascii=False) + "\n" for row in rows))
    asked = {"text": "{{question}}", "target": "{{answer}}"}
    texts = {
        "choice": TASK.format(name="choice", file=one, output="multiple_choice", **asked, more=CHOOSING),
        "rolling": TASK.format(
            name="rolling", file=plain, output="loglikelihood_rolling", text="", target="{{text}}", more=ROLLING
        ),
        "writing": TASK.format(name="writing", file=one, output="generate_until", **asked, more=WRITING),
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.oracle
def test_lm_eval_agrees_with_hf_on_every_request(folder, tasks, monkeypatch):
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from minimind_jax.evaluate import lm_eval_adapter  # noqa: F401  registers itself

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = {}
    for name in ("minimind_jax", "hf"):
        found[name] = lm_eval.simple_evaluate(
            model=name, model_args=f"pretrained={folder},dtype=float32", tasks=["choice", "rolling", "writing"],
            task_manager=manager, batch_size=2, device="cpu", log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
    compared = 0
    for task, samples in found["hf"]["samples"].items():
        for theirs, ours in zip(samples, found["minimind_jax"]["samples"][task], strict=True):
            for a, b in zip(theirs["resps"], ours["resps"], strict=True):
                if task == "writing":
                    assert a == b
                    continue
                a, b = (np.ravel(np.array(x, dtype=object)) for x in (a, b))
                assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-3)
                compared += 1
                if task == "choice":
                    assert str(a[1]) == str(b[1])
    assert compared >= 9
