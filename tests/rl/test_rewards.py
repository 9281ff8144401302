"""Rewards: entries of rewards.use, their weighted sum, and functions of a user's that are at fault."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minimind_jax.config.rl import RewardsConfig
from minimind_jax.errors import UserError
from minimind_jax.rl.episode import checked
from minimind_jax.rl.reward_worker import own, trl_columns
from minimind_jax.rl.rewards import EACH, MADE, Entry, Rewards, bound, entries
from minimind_jax.tools.toolbox import Observation
from tests.rl.episodes import episode

USER = Path(__file__).with_name("user_rewards.py")


def rewards(*use, on_error="stop", success="", seconds=60.0, seed=0, max_new_tokens=16):
    return Rewards(RewardsConfig(tuple(use), success, on_error, seconds), max_new_tokens, seed)


def values(entry, episodes, **settings):
    with rewards(entry, **settings) as give:
        give(episodes)
        return [each.rewards[give.names[0]] for each in episodes]


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("answer", Entry(1.0, "answer", "answer", False)),
        (" 0.5*length( 20 , 800 ) ", Entry(0.5, "length( 20 , 800 )", "length", False)),
        ("-1e-1 * regex(a*(b)*)", Entry(-0.1, "regex(a*(b)*)", "regex", False)),
        ("2 * my/own file.py:score", Entry(2.0, "my/own file.py:score", "score", True)),
        (r"C:\my.py:score", Entry(1.0, r"C:\my.py:score", "score", True)),
        ("package.module:score", Entry(1.0, "package.module:score", "score", True)),
    ],
)
def test_entries(text, entry):
    assert entries([text]) == [entry]


def test_two_of_one_name_are_named_by_what_they_are():
    names = [entry.name for entry in entries(["regex(a)", "2*regex(b)", "a.py:f", "b.py:f", "answer"])]
    assert names == ["regex(a)", "regex(b)", "a.py:f", "b.py:f", "answer"]
    with pytest.raises(UserError, match=r"has regex\(a\) twice"):
        entries(["regex(a)", "2 * regex(a)"])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("", "there is no such function; there are answer, "),
        ("anwser", r"no such function; there are answer, .*length\(low, high\).* FILE.py:function"),
        ("length(1, 2", "no such function"),
        ("my_rewards.py", "no such function"),
        ("much * answer", "the weight 'much' is no number"),
        ("nan * answer", "the weight 'nan' is no number"),
        ("1e999 * answer", "is no number"),
        ("* answer", "the weight '' is no number"),
        ("answer(5)", r"expected answer; '5' is wrong there"),
        ("length", r"expected length\(low, high\); there is no low"),
        ("length(20)", "there is no high"),
        ("length(20, 1.5)", "'1.5' is wrong there"),
        ("length(20, 30, 40)", "'40' is wrong there"),
        ("length(high=3)", "there is no low"),
        ("length(30, 20)", "expected 0 <= low <= high"),
        ("repetition(0)", "expected at least 1"),
        ("overlong(17)", "at most rollout.max_new_tokens, 16"),
        ("regex((a)", "not a regular expression: .*position 0"),
        (f"{USER}:absent", "absent: it is no function that can be called: AttributeError"),
    ],
)
def test_what_is_wrong_is_refused_before_the_first_step(entry, words):
    with pytest.raises(UserError, match=words):
        rewards("answer", entry)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such.py:f", "FileNotFoundError"),
        ("no.such.module:f", "ModuleNotFoundError"),
        (f"{USER}:number", "TypeError: 5 is not a callable"),
        (f"{USER}:no_episodes", "too many positional arguments"),
    ],
)
def test_functions_of_a_user_that_cannot_be_called(name, words):
    with pytest.raises(UserError, match=rf"it is no function that can be called: .*{words}"):
        own(name)


def test_nothing_to_reward_is_refused():
    with pytest.raises(UserError, match=r"rewards.use 0 \* answer: all weights are 0"):
        rewards("0 * answer")
    with pytest.raises(UserError, match=r"rewards.use is empty"):
        rewards()
    with pytest.raises(UserError, match=r"rewards.success anwser is none of rewards.use: answer, length"):
        rewards("answer", "length(1, 2)", success="anwser")


def test_the_reward_is_the_weighted_sum_and_success_is_of_one_function():
    right, wrong = episode("5", answer="5"), episode("6666", answer="5")
    with rewards("length(2, 9)", "2 * answer", f"-0.25*{USER}:ours", success="answer") as give:
        assert give.names == ["length", "answer", "ours"]
        assert give([right, wrong]) == {f"rewards/{name}/failures": 0 for name in give.names}
        assert right.rewards == {"length": 0, "answer": 1, "ours": 1} and right.reward == 2 - 0.25
        assert wrong.rewards == {"length": 1, "answer": 0, "ours": 4} and wrong.reward == 1 - 1
        assert give.success(right) and not give.success(wrong)
        assert give([]) == {}


def test_named_and_quoted_arguments():
    texts = [episode("a,b"), episode("ab")]
    assert bound("length(high=2, low=1)")(texts) == [0, 1]
    for pattern in ("a,b", '"a,b"', "pattern=a,b", 'pattern="a,b"', "^a=*,b"):
        assert bound(f"regex({pattern})")(texts) == [1, 0]


def test_the_guide_tells_of_each_function():
    guide = "".join(file.read_text("utf-8") for file in sorted(USER.parents[2].glob("docs/*.md")))
    assert not [name for name in [*EACH, *MADE] if not re.search(rf"^\| `{name}[`(]", guide, re.M)]


# The user's own -------------------------------------------------------------------------------------------------------


def test_both_forms_of_a_users_function():
    texts = [episode("5", answer="5", rare=1), episode("abcd", answer="5")]
    found = {"trl": [1, 0], "trl_ids": [1, 4], "trl_later": [1, None], "ours": [1, 4], "scalars": [3, 3]}
    assert {name: own(f"{USER}:{name}")(texts) for name in found} == found
    talk = episode("call", "5", observations=[(Observation("told"),)])
    assert trl_columns([talk])["completions"] == [
        [
            {"role": "assistant", "content": "call"},
            {"role": "tool", "content": "told"},
            {"role": "assistant", "content": "5"},
        ]
    ]


def test_trls_own_functions_are_called():
    trl = pytest.importorskip("trl.rewards")
    texts = ["<think>a</think>b", "a</think>b", "<think>a"]
    expected = trl.think_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    assert own("trl.rewards:think_format_reward")([episode(text) for text in texts]) == expected == [1, 0, 0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("leaves", "3"),
        ("jealous", "one at a time"),
        ("short", "gave 1 values for 2 completions"),
    ],
)
def test_a_function_that_fails_on_all(name, words):
    with pytest.raises(BaseException, match=words):
        own(f"{USER}:{name}")([episode("5"), episode("6")])
    for name, kind in (("numbered", "dict"), ("nothing", "NoneType")):
        told = f"TypeError: gave a {kind}; expected a list of numbers"
        assert own(f"{USER}:{name}")([episode("5")] * 2) == [told] * 2


def test_values_that_are_no_rewards():
    texts = [episode(str(n)) for n in range(9)]
    *wrong, right = [checked(value) for value in own(f"{USER}:odd")(texts)]
    words = ["nan", "inf", "True", "the text '1'", "[1]", "1000", "True", "{}"]
    assert right == 0.5 and all(value.startswith(f"gave {kind}") for value, kind in zip(wrong, words, strict=True))


def test_functions_run_in_processes_of_their_own(capfd):
    texts = [episode("5"), episode("abcd")]
    texts[1].state = {"kept": 3, "lock": threading.Lock()}
    texts[0].state = {"kept": 2}
    uses = [f"{USER}:{name}" for name in ("says", "draws", "trl_ids", "keeps")]
    with rewards(*uses) as give:
        give(texts)
        first = [dict(each.rewards) for each in texts]
        give(texts)
        assert [each.rewards for each in texts] == first
        assert [(each["says"], each["trl_ids"], each["keeps"]) for each in first] == [(1, 1, 2), (1, 4, None)]
        assert first[0]["draws"] != first[1]["draws"] and "aloud" in capfd.readouterr().err
        give([episode("5"), episode("abce")])
        give(others := [episode("5"), episode("abce")])
        assert others[0].rewards["draws"] != first[0]["draws"]
    with rewards(uses[1], seed=1) as give:
        give(texts)
        assert texts[0].rewards["draws"] != first[0]["draws"]


def test_a_function_that_hangs_or_fails_stops_the_run_and_is_named():
    texts = [episode("abc", where="f.jsonl:7", answer="5"), episode("6", answer="5")]
    started = time.monotonic()
    for name, words in {
        "hangs": r"f.jsonl:7: .*took longer than 1 seconds \(2 of 2 completions\).*rewards.seconds",
        "leaves": r"f.jsonl:7: SystemExit: 3 \(2 of 2",
        "picky": r"f.jsonl:7: ZeroDivisionError: division by zero \(1 of 2",
    }.items():
        with rewards("answer", f"{USER}:{name}", seconds=1.0) as give:
            with pytest.raises(UserError, match=rf"{USER}:{name}: {words}"):
                give(texts)
    assert time.monotonic() - started < 20


def test_failures_are_counted_and_the_next_call_works(capfd):
    names = ["sleeps", "crashes", "jealous", "picky"]
    with rewards("length(1, 1)", *(f"{USER}:{name}" for name in names), on_error="count", seconds=1.0) as give:
        for _ in range(2):
            texts = [episode("a"), episode("abc"), episode("abcde")]
            failures = give(texts)
            assert list(failures.values()) == [0, 3, 3, 3, 1]
            assert [each.rewards["picky"] for each in texts] == [-0.5, None, 0.5]
            assert [each.reward for each in texts] == [1 - 0.5, 0, 0.5]
        give([one := episode("a")])
        assert one.rewards == {"length": 1, "sleeps": None, "crashes": None, "jealous": 1, "picky": -0.5}
    told = capfd.readouterr().err
    assert all(told.count(f"{name}: f.jsonl:1: ") == 1 for name in names) and "rewards/picky/failures counts" in told


def test_nothing_is_left_of_a_process_that_is_killed(tmp_path):
    """In the folder for what is read elsewhere, which others remove."""
    code = (
        "import sys, time; sys.path += sys.argv[1:]; from test_rewards import USER, episode, rewards\n"
        "give = rewards(f'{USER}:says')\ngive([episode('5')])\nprint('rewarded', flush=True); time.sleep(60)"
    )
    here = Path(__file__).resolve().parent
    command, place = [sys.executable, "-c", code, here, here.parents[1]], {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=place, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"rewarded\n" and list(tmp_path.iterdir())
        process.kill()
    deadline = time.monotonic() + 10
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def test_what_a_function_fails_on_is_skipped_where_it_counts(capfd):
    texts = [episode("a"), episode("abc"), episode("abcde")]  # of the second of which `picky` fails
    with rewards("length(1, 9)", f"2 * {USER}:picky", on_error="skip") as give:
        assert give(texts)["rewards/picky/failures"] == 1
        assert [each.unjudged for each in texts] == [False, True, False]
    with rewards("length(1, 9)", f"0 * {USER}:picky", on_error="skip") as give:  # it is only logged
        give(texts)
        assert not any(each.unjudged for each in texts)
    told = capfd.readouterr().err
    assert told.count("they are not trained on") == told.count("they go without it") == 1


def test_what_a_terminal_would_obey_is_not_told_to_it():
    with rewards(f"{USER}:escapes") as give, pytest.raises(UserError, match=r"no number in \[2J \[31mb") as caught:
        give([episode("\x1b[31mb")])
    assert "\x1b" not in str(caught.value)


def test_a_pattern_that_explodes_is_ended():
    with rewards(r"regex(^(a+)+$)", seconds=1.0) as give, pytest.raises(UserError, match="took longer than 1 seconds"):
        give([episode("a" * 60 + "b")])


def test_prompts_without_what_an_answer_is_compared_with_are_told_before_anything_is_written():
    right, wrong = (episode("4", where=f"f.jsonl:{line}", **own).task for line, own in ((1, {"answer": 4}), (2, {})))
    with rewards("answer", "length(1, 9)") as give:
        assert give.check([right]) == []
        with pytest.raises(UserError, match=r"answer: f\.jsonl:2: the record has none .*\(1 of 2 prompts\); give"):
            give.check([right, wrong])
    with rewards("tools", on_error="skip") as give:
        assert "f.jsonl:2: the record has none" in give.check([right, wrong])[0]
        with pytest.raises(UserError, match="1 of 1 prompts"):
            give.check([wrong])
    with rewards("length(1, 9)") as give:
        assert give.check([wrong]) == []
