"""What the sides of `bench_decode.py` are asked; imports nothing that one of them may lack."""

import numpy as np

SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "unequal": {"temperature": 0.0},
    "sampled": {"temperature": 0.85, "top_k": 50, "top_p": 0.85},
    "plain": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
}
CASES = ("greedy 1", "greedy 16", "sampled 1", "sampled 16", "unequal 16")


def requests(settings: dict, case: str, count: int, call: int) -> tuple[list[tuple[list[int], int]], dict]:
    """Prompts of a case, how many tokens the answer to each has, and how they are sampled. Of two calls the lengths are
    the same and the words are not, so that nobody can have kept them."""
    kind, rows = case.split()
    lengths = [(settings["prompt_len"], count)] * int(rows)
    if kind == "unequal":
        lengths = np.random.default_rng(0).integers(16, 257, (int(rows), 2)).tolist()
        lengths = [(prompt, min(new, 2 * count)) for prompt, new in lengths]
    random = np.random.default_rng(call)
    return [(random.integers(3, 6400, prompt).tolist(), new) for prompt, new in lengths], SAMPLINGS[kind]


def rollout(settings: dict, case: str, count: int, call: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of a rollout, and how many tokens each completion has, prompt by prompt: `full` is all of `count`,
    `unequal` from 16 to that. Of two calls the lengths are the same and the words are not."""
    random, sequences = np.random.default_rng(call), settings["prompts"] * settings["completions"]
    prompts = random.integers(3, 6400, (settings["prompts"], settings["prompt_len"])).tolist()
    if case == "full":
        return prompts, [count] * sequences
    return prompts, np.random.default_rng(0).integers(min(16, count), count + 1, sequences).tolist()


CALL = {"name": "calculate_math", "arguments": {"expression": "12 * 7"}}
RESULT = '{"result": "84"}'


def agent_messages(number: int) -> tuple[list[dict], list[dict]]:
    """The conversation that an agent's episode begins with, and the tool that it may call."""
    parameters = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
    tool = {"name": CALL["name"], "description": "Calculates an expression", "parameters": parameters}
    asks = [{"role": "user", "content": f"A box holds {number + 3} rows of 12 eggs. How many are in 7 boxes?"}]
    return asks, [{"type": "function", "function": tool}]
