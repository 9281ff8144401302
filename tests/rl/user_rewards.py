"""Reward functions of a user, in both forms, most of them at fault."""

import math
import os
import random
import sys
import time

import numpy as np


def trl(completions, answer, **kwargs):
    """TRL's form: a column of the records, and messages."""
    assert kwargs.keys() == {"prompts", "completion_ids", "rare"}
    return [float(each[0]["content"] == right) for each, right in zip(completions, answer, strict=True)]


def trl_ids(completion_ids):
    return [len(ids) for ids in completion_ids]


async def trl_later(prompts, rare=None):
    return [None if value is None else len(messages) for messages, value in zip(prompts, rare, strict=True)]


def ours(episodes):
    return np.array([len(episode.text) for episode in episodes], np.float32)


def scalars(episodes):
    return [np.int64(3) for _ in episodes]


def draws(episodes):
    return [random.random() for _ in episodes]


def keeps(episodes):
    """Of a state that came along."""
    return [episode.state and episode.state["kept"] for episode in episodes]


def picky(episodes):
    return [1 / (len(episode.text) - 3) for episode in episodes]


def hangs(episodes):
    return [9**9**9]


def sleeps(episodes):
    time.sleep(600)


def leaves(episodes):
    sys.exit(3)


def crashes(episodes):
    os._exit(1)


def jealous(episodes):
    if len(episodes) > 1:
        raise RuntimeError("one at a time")
    return [1.0]


def numbered(episodes):
    return dict.fromkeys(range(len(episodes)), 1.0)


def escapes(episodes):
    raise ValueError("no number in \x1b[2J " + episodes[0].text)


def short(episodes):
    return [1.0]


def nothing(episodes):
    return None


def says(episodes):
    print("aloud")
    return [1.0 for _ in episodes]


def odd(episodes):
    values = [math.nan, math.inf, True, "1", [1], 10**400, np.bool_(True), {}, 0.5]
    return [values[int(episode.text)] for episode in episodes]


def no_episodes():
    return []


number = 5
