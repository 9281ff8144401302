"""Episodes: which tokens they hold, who wrote them, and what ends them."""

import dataclasses
import random
import re
import threading
import time

import pytest
from players import Told, asks, start_of, tiny
from user_environments import Guess

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.data.documents import encode_replies
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.errors import UserError
from minimind_jax.inference.request import Request
from minimind_jax.rl import play as playing
from minimind_jax.rl.environment import SingleTurn
from minimind_jax.rl.play import play
from minimind_jax.seeds import named_seed

DRAWN = SamplingConfig(max_new_tokens=12, temperature=1.0, top_p=1.0)
MORE = [{"role": "user", "content": "More."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(["birds sing and cats sit on mats"] * 3, tmp_path_factory.mktemp("tokenizer"), 310)


@pytest.fixture(scope="module")
def engine(tokenizer):
    return tiny(tokenizer)


@pytest.fixture
def played(engine, tokenizer):
    settings = {"sampling": DRAWN, "seq_len": 256}
    return lambda starts, environment, **others: play(engine, starts, environment, tokenizer, **settings | others)


@pytest.fixture
def told(engine, tokenizer):
    """told(lines): the engine, which says one line after the other in each episode: text, or token ids."""

    def make(*lines):
        said = [tokenizer.encode(line + "<|im_end|>") if isinstance(line, str) else line for line in lines]
        answers = tokenizer.encode("assistant\n")
        return Told(engine, lambda prompt: said[_count(prompt, answers) - 1])

    return make


def _count(ids, part):
    return sum(ids[n : n + len(part)] == part for n in range(len(ids)))


class Talk(SingleTurn):
    """Always has another question, after `wait` seconds; counts who came and who left."""

    def __init__(self, wait=lambda: 0.0):
        self.wait, self.started, self.ended = wait, 0, 0

    def start(self, task, seed):
        self.started += 1
        return {"seed": seed, "turns": 0}

    def step(self, state, turn):
        time.sleep(self.wait())
        state["turns"] += 1
        return MORE

    def end(self, state):
        self.ended += 1


def starts_of(tokenizer, count, **others):
    return [start_of(tokenizer, asks(f"q{n}"), group=n, seed=n, **others) for n in range(count)]


def test_a_single_turn_is_what_the_engine_answers(engine, tokenizer, played):
    starts = [start_of(tokenizer, asks("ab"[n % 2]), group=n // 2, seed=n, thinking=n == 2) for n in range(6)]
    episodes = played(starts, SingleTurn())
    for start, episode in zip(starts, episodes, strict=True):
        drawn = dataclasses.replace(DRAWN, seed=named_seed(start.seed, "turn", 0) % 2**62)
        request = Request(tuple(start.prompt), drawn, stop_ids=tokenizer.end_ids)
        [answer] = engine.answers([request])
        assert episode.completion == answer.ids and episode.tokens[: episode.prompt] == start.prompt
        drawn_from = [token.sampled_logprob for token in answer.tokens]
        assert episode.logprobs[episode.prompt :] == pytest.approx(drawn_from, abs=1e-5)
        assert episode.sampled == [False] * len(start.prompt) + [True] * len(answer.ids)
        [turn] = episode.turns
        assert (turn.start, turn.end) == (episode.prompt, len(episode.tokens))
        assert episode.finish == turn.finish == answer.finish_reason
        assert (episode.group, episode.task, episode.thinking) == (start.group, start.task, start.thinking)
    assert len({tuple(episode.completion) for episode in episodes}) == len(episodes)


def test_an_environment_of_four_functions_is_played_to_its_end(tokenizer, told):
    start = start_of(tokenizer, asks("guess"), answer=3)
    writer = told("5", "<think>\n\n4?</think>3", "3")
    [episode] = play(writer, [start], Guess(), tokenizer, sampling=DRAWN, turns=5, seq_len=256)
    assert episode.finish == "stop" and [turn.text for turn in episode.turns] == ["5", "<think>\n\n4?</think>3", "3"]
    assert [turn.answer for turn in episode.turns] == ["5", "3", "3"]
    assert episode.state == {"number": 3, "tries": 3, "seed": named_seed(0, "environment"), "ended": True}
    ids = list(start.prompt)
    for turn in episode.turns:
        assert episode.tokens[: turn.start] == ids
        ids += tokenizer.encode(turn.text + "<|im_end|>")
        assert episode.tokens[: turn.end] == ids and all(episode.sampled[turn.start : turn.end])
        ids += encode_replies(tokenizer, [{"role": "user", "content": f"Not {turn.text}."}], None, False)
    assert sum(episode.sampled) == sum(turn.end - turn.start for turn in episode.turns)
    assert not any(n for n, sampled in zip(episode.logprobs, episode.sampled, strict=True) if not sampled)


@pytest.mark.parametrize("thinking", [False, True])
def test_thinking_holds_in_later_turns(tokenizer, told, thinking):
    start = start_of(tokenizer, asks("q"), thinking=thinking)
    writer = told("hm</think>a", "hm</think>b", "c")
    [episode] = play(writer, [start], Talk(), tokenizer, sampling=DRAWN, turns=3, seq_len=256)
    opened = tokenizer.encode("<|im_start|>assistant\n<think>\n" + ("" if thinking else "\n</think>\n\n"))
    for turn in episode.turns:
        assert episode.tokens[: turn.start][-len(opened) :] == opened
    assert [turn.answer for turn in episode.turns][:2] == (["a", "b"] if thinking else ["hm</think>a", "hm</think>b"])
    assert episode.answer == ("" if thinking else "c")  # a thought that never ends is no answer


def test_tokens_stay_as_they_were_drawn(tokenizer, told):
    """Also those that no tokenizer would make of their text, and a padding token among them."""
    odd = [*map(tokenizer.encode("b i").__getitem__, (0, 1)), tokenizer.pad_id, *tokenizer.encode("b"), 300, 258]
    end = tokenizer.turn_end_id
    writer = told([*odd, end], "so")
    [episode] = play(writer, starts_of(tokenizer, 1), Talk(), tokenizer, sampling=DRAWN, turns=2, seq_len=256)
    first, second = episode.turns
    assert episode.tokens[first.start : first.end] == [*odd, end] != tokenizer.encode(first.text + "<|im_end|>")
    assert all(episode.sampled[first.start : first.end]) and second.text == "so"
    assert list(writer.answers[1].request.prompt) == episode.tokens[: second.start]


# Limits ---------------------------------------------------------------------------------------------------------------


def test_an_answer_that_is_cut_off_ends_its_episode(tokenizer, told):
    environment = Talk()
    writer = told("word " * 30)
    [episode] = play(writer, starts_of(tokenizer, 1), environment, tokenizer, sampling=DRAWN, turns=3, seq_len=256)
    assert episode.finish == episode.turns[0].finish == "length" and len(episode.turns) == 1 and episode.was_cut
    assert len(episode.completion) == 12 and episode.state == {"seed": named_seed(0, "environment"), "turns": 0}
    assert (environment.started, environment.ended) == (1, 1)


def test_turns_are_limited(tokenizer, told):
    environment = Talk()
    writer = told("a", "b", "c")
    [episode] = play(writer, starts_of(tokenizer, 1), environment, tokenizer, sampling=DRAWN, turns=2, seq_len=256)
    assert episode.finish == "turns" and [turn.text for turn in episode.turns] == ["a", "b"]
    assert episode.sampled[-1] and episode.state["turns"] == 2 and environment.ended == 1


@pytest.mark.parametrize("room", range(4, 60, 5))
def test_tokens_are_limited(tokenizer, told, room):
    """No episode is longer, and one that is cut ends with what the policy wrote."""
    [start] = starts_of(tokenizer, 1)
    writer = told("one two", "three four", "five")
    [episode] = play(writer, [start], Talk(), tokenizer, sampling=DRAWN, turns=3, seq_len=len(start.prompt) + room)
    assert len(episode.tokens) <= len(start.prompt) + room and episode.sampled[-1]
    assert episode.finish in ("tokens", "turns") and (episode.finish == "turns") == (len(episode.turns) == 3)


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer, played):
    [start] = starts_of(tokenizer, 1)
    with pytest.raises(UserError, match=r"talk.jsonl:1: a prompt of \d+ tokens leaves no room"):
        played([start], SingleTurn(), seq_len=len(start.prompt))


def test_seconds_are_limited_for_who_writes_and_for_environments(tokenizer, told, monkeypatch):
    monkeypatch.setattr(playing, "PATIENCE", 0.1)
    hangs = threading.Event()
    environment = Talk()
    environment.step = lambda state, turn: hangs.wait() if state["seed"] == named_seed(1, "environment") else None
    writer = told("a")
    starts = starts_of(tokenizer, 3)
    began = time.monotonic()
    first, hung, third = play(writer, starts, environment, tokenizer, sampling=DRAWN, turns=2, seq_len=256, seconds=0.3)
    assert time.monotonic() - began < 20
    assert (first.finish, hung.finish, third.finish) == ("stop", "seconds", "stop")
    assert hung.turns[0].text == "a" and environment.ended == 2
    hangs.set()

    endless = dataclasses.replace(DRAWN, max_new_tokens=400, ignore_eos=True)
    [cut] = play(tiny(tokenizer), starts[:1], Talk(), tokenizer, sampling=endless, turns=2, seq_len=500, seconds=1e-6)
    assert cut.finish == "seconds" and cut.turns[0].finish == "length" and 0 < len(cut.completion) < 400


# Faults ---------------------------------------------------------------------------------------------------------------


class Faulty(Talk):
    """Fails in one of its functions, in every other episode."""

    def __init__(self, where, error):
        super().__init__()
        self.where, self.error = where, error

    def _fail(self, where, seed):
        if where == self.where and seed in {named_seed(n, "environment") for n in (0, 2, 4)}:
            raise self.error

    def start(self, task, seed):
        self._fail("start", seed)
        return super().start(task, seed)

    def step(self, state, turn):
        self._fail("step", state["seed"])

    def end(self, state):
        super().end(state)
        self._fail("end", state["seed"])


@pytest.mark.parametrize("where", ["start", "step", "end"])
@pytest.mark.parametrize("error", [KeyError("lost"), SystemExit(3)])
def test_an_environment_that_fails_costs_the_episode(tokenizer, told, where, error):
    environment, notes = Faulty(where, error), []
    writer = told("a")
    episodes = play(
        writer, starts_of(tokenizer, 4), environment, tokenizer, sampling=DRAWN, seq_len=256, tell=notes.append
    )
    assert [episode.finish for episode in episodes] == ["error", "stop"] * 2
    assert all(episode.text == "a" for episode in episodes) and environment.started == environment.ended
    [note] = notes
    assert note.startswith("2 of 4 episodes ended by an error of their environment, the first: " + type(error).__name__)
    assert re.search(r"test_play.py:\d+\)$", note)


def test_what_is_no_message_is_named_and_ends_the_run_where_all_fail(tokenizer, told):
    environment = Talk()
    environment.step = lambda state, turn: ["no message"]
    starts, options, notes = starts_of(tokenizer, 2), {"sampling": DRAWN, "turns": 2, "seq_len": 256}, []
    words = r"of \d episodes .* TypeError: step gave 'no message'; expected None or a list of messages such as"
    with pytest.raises(UserError, match="^all " + words):
        play(told("a"), starts, environment, tokenizer, **options)
    [episode] = play(told("a"), starts[:1], environment, tokenizer, **options, tell=notes.append)
    assert episode.finish == "error" and re.search("^1 " + words, notes[0])  # it may be that one task's fault


def test_the_episodes_of_a_prompt_are_of_one_task(tokenizer, told):
    starts = [start_of(tokenizer, asks("q"), group=n // 3, seed=n) for n in range(6)]
    episodes = play(told("a"), starts, Talk(), tokenizer, sampling=DRAWN, seq_len=256)
    assert [episode.state["seed"] for episode in episodes] == [named_seed(n, "environment") for n in (0, 0, 0, 3, 3, 3)]


def test_nothing_is_left_in_work_where_playing_is_stopped(engine, tokenizer, played):
    looks = []

    def stop():
        looks.append(engine.busy)
        if len(looks) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        played(starts_of(tokenizer, 20), SingleTurn(), is_stopping=stop)
    assert all(looks) and not engine.busy


# Time -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brief(tokenizer):
    """A model whose turns soon end."""
    return tiny(tokenizer, eos_ids=range(100))


def test_an_episode_is_the_same_whenever_its_environment_is_done(brief, tokenizer):
    """To the last bit, where the writer begins afresh: beside others, with fewer slots than episodes."""
    rng, found = random.Random(0), []
    for wait in (lambda: 0.0, lambda: rng.random() / 50):
        brief.load(brief.params)
        starts = starts_of(tokenizer, 20)
        found.append(play(brief, starts, Talk(wait), tokenizer, sampling=DRAWN, turns=3, seq_len=256))
    for quick, slow in zip(*found, strict=True):
        assert quick == slow
    assert sum(len(episode.turns) == 3 for episode in found[0]) > 10


def test_later_turns_read_only_what_is_new(brief, tokenizer):
    """Also where more episodes are played than have room at once: who has begun goes on before others begin."""
    brief.load(brief.params)
    writer = Told(brief, lambda prompt: None)
    play(writer, starts_of(tokenizer, 20), Talk(), tokenizer, sampling=DRAWN, turns=3, seq_len=256)
    said = {tuple(answer.request.prompt) + tuple(answer.ids[:-1]) for answer in writer.answers}
    later = [answer for answer in writer.answers if answer.request.priority]
    assert len(later) > 10
    for answer in later:
        assert answer.request.prompt[: answer.cached_tokens] in said


def test_nobody_waits_for_the_slowest(brief, tokenizer, monkeypatch):
    """Once one was too slow; the numbers are then the same but for their last bits."""
    monkeypatch.setattr(playing, "PATIENCE", 0.05)
    slow = threading.Event()
    environment, done = Talk(), []

    def step(state, turn):
        if state["seed"] == named_seed(3, "environment"):
            assert slow.wait(30)
        return MORE

    def end(state):
        done.append(state)
        if len(done) == 11:  # of 12
            slow.set()

    environment.step, environment.end = step, end
    starts = starts_of(tokenizer, 12)
    options = {"sampling": DRAWN, "turns": 3, "seq_len": 256}
    hurried = play(brief, starts, environment, tokenizer, **options)
    assert len(done) == 12 and len(hurried[3].turns) > 1
    for one, other in zip(hurried, play(brief, starts, Talk(), tokenizer, **options), strict=True):
        assert one.tokens == other.tokens and one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
