"""Rewards: entries of rewards.use, their weighted sum, and functions of a user's that are at fault."""

import time
from pathlib import Path

import pytest

from minimind_jax.config.rl import RewardsConfig
from minimind_jax.errors import UserError
from minimind_jax.rl.rewards import Entry, Rewards, entries
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
        ("length(20, 30, 40)", "'30, 40' is wrong there"),
        ("length(high=3)", "there is no low"),
        ("length(30, 20)", "expected 0 <= low <= high"),
        ("repetition(0)", "expected at least 1"),
        ("regex", "there is no pattern"),
        ("regex((a)", "not a regular expression: .*position 0"),
        ("no_such.py:f", "no_such.py:f: it is no function that can be called: FileNotFoundError"),
        ("no.such.module:f", "ModuleNotFoundError"),
        (f"{USER}:absent", "AttributeError"),
        (f"{USER}:number", "TypeError: 5 is not a callable"),
        (f"{USER}:no_episodes", "too many positional arguments"),
    ],
)
def test_what_is_wrong_is_refused_before_the_first_step(entry, words):
    with pytest.raises(UserError, match=words):
        rewards(entry)


def test_nothing_to_reward_is_refused():
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
        assert give([]) == {f"rewards/{name}/failures": 0 for name in give.names}


def test_named_and_quoted_arguments():
    texts = [episode("a,b"), episode("ab")]
    assert values("length(high=2, low=1)", texts) == [0, 1]
    assert values("regex(a,b)", texts) == values('regex("a,b")', texts) == values("regex(pattern=a,b)", texts) == [1, 0]


# The user's own -------------------------------------------------------------------------------------------------------


def test_both_forms_of_a_users_function(capfd):
    texts = [episode("5", answer="5", rare=1), episode("abcd", answer="5")]
    assert values(f"{USER}:trl", texts) == [1, 0]
    assert values(f"{USER}:trl_ids", texts) == [1, 4]
    assert values(f"{USER}:trl_later", texts) == [1, None] and texts[1].reward == 0
    assert values(f"{USER}:ours", texts) == [1, 4]
    assert values(f"{USER}:scalars", texts) == [3, 3]
    assert values(f"{USER}:says", texts) == [1, 1] and "aloud" in capfd.readouterr().err


def test_what_a_function_draws_is_of_the_seed_and_the_episodes():
    texts, others = [episode("a"), episode("b")], [episode("a"), episode("c")]
    entry = f"{USER}:draws"
    first = values(entry, texts)
    assert first == values(entry, [episode("a"), episode("b")]) and first[0] != first[1]
    assert first != values(entry, texts, seed=1) and first != values(entry, others)


def test_a_function_that_hangs_is_ended_and_named():
    for name in ("hangs", "sleeps"):
        with rewards("answer", f"{USER}:{name}", seconds=1.0) as give:
            started = time.monotonic()
            with pytest.raises(UserError, match=rf"{name}: f.jsonl:1: .*took longer than 1 seconds \(2 of 2") as error:
                give([episode("5", answer="5"), episode("6", answer="5")])
            assert time.monotonic() - started < 15 and "rewards.seconds" in str(error.value)


def test_a_function_that_hangs_is_counted_and_asked_again():
    with rewards("answer", f"{USER}:sleeps", on_error="count", seconds=0.5) as give:
        for _ in range(2):
            one = episode("5", answer="5")
            assert give([one])["rewards/sleeps/failures"] == 1
            assert one.rewards == {"answer": 1, "sleeps": None} and one.reward == 1


def test_a_pattern_that_explodes_is_ended():
    with rewards(r"regex(^(a+)+$)", seconds=1.0) as give, pytest.raises(UserError, match="took longer than 1 seconds"):
        give([episode("a" * 60 + "b")])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("leaves", "SystemExit: 3"),
        ("crashes", "ended its own process"),
        ("jealous", "RuntimeError: one at a time"),
        ("short", "gave 1 values for 2 completions"),
        ("nothing", "TypeError"),
    ],
)
def test_a_function_that_fails_on_all_stops_or_is_counted(name, words):
    texts = [episode("5", where="f.jsonl:7"), episode("6", where="f.jsonl:8")]
    with rewards(f"{USER}:{name}") as give, pytest.raises(UserError, match=rf"{name}: f.jsonl:7: .*{words}.*2 of 2"):
        give(texts)
    with rewards(f"{USER}:{name}", "length(0, 9)", on_error="count") as give:
        assert give(texts)[f"rewards/{name}/failures"] == 2
        assert [each.rewards for each in texts] == [{name: None, "length": 1}] * 2


def test_a_function_that_fails_on_one_costs_only_that_one():
    texts = [episode("a"), episode("abc", where="f.jsonl:5"), episode("abcde")]
    with rewards(f"{USER}:picky") as give:
        with pytest.raises(UserError, match=r"picky: f.jsonl:5: ZeroDivisionError: division by zero \(1 of 3"):
            give(texts)
    with rewards(f"{USER}:picky", on_error="count") as give:
        assert give(texts) == {"rewards/picky/failures": 1}
        assert [each.reward for each in texts] == [-0.5, 0, 0.5]


def test_values_that_are_no_rewards_are_refused_or_counted():
    texts = [episode(str(n), where=f"f.jsonl:{n}") for n in range(9)]
    with rewards(f"{USER}:odd", on_error="count") as give:
        assert give(texts) == {"rewards/odd/failures": 8}
        assert [each.rewards["odd"] for each in texts] == [None] * 8 + [0.5]
    with rewards(f"{USER}:odd") as give:
        words = ["nan", "inf", "True", "the text '1'", r"\[1\]", "1000.*", "True", r"\{\}"]
        for one, value in zip(texts, words, strict=False):
            with pytest.raises(UserError, match=rf"{one.task.where}: gave {value}; expected a .*\(1 of 1"):
                give([one])
