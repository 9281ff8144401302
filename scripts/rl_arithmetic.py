"""Learning from reward that can be seen on two cores: arithmetic with a calculator, by 0.65 million parameters.

    python scripts/rl_arithmetic.py --agent_data agent_rl_math.jsonl --out runs/rl_arithmetic
    python scripts/rl_arithmetic.py --only grpo --seeds 1 --out runs/rl_arithmetic

Two tasks. `words`: a sum in words, and the model writes the call of the calculator that gives it. `agent`: the prompts
of a file of MiniMind's agent data (tools, gt), with the real calculator, and the model says what it gave.

For each a model is trained from nothing on demonstrations, most of which are careless where they can be: they write the
operands in the order of reading, leave brackets out, forget the last part of a question. So it answers some questions
right and others not, and reward has something to teach. Then each experiment learns from reward, once a seed, and is
asked all held-out questions, before and after. Prints one JSON line a run; runs that are done are read, not run again.
--picture draws their curves. All is a pure function of the seeds; minutes differ.
"""

import argparse
import functools
import itertools
import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rl_arithmetic_rewards import is_right

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.tools import ToolCallsConfig
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.template import render_segments
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.evaluate.share import Share
from minimind_jax.evaluate.tool_calls import CARRIED_OUT, evaluate_tool_calls
from minimind_jax.inference.load import load_engine
from minimind_jax.inference.request import Request
from minimind_jax.tools.calculator import calculate

CARELESS = 0.7  # of the demonstrations that could be
HELD_OUT = 200  # questions
DRAWS = 8  # answers to each, for pass@8

# Question, expression, and what a careless demonstrator makes of it.
PHRASES = (
    ("What is {a} + {b}?", "{a}+{b}", ""),
    ("What is {a} minus {b}?", "{a}-{b}", ""),
    ("Compute {a} times {b}.", "{a}*{b}", ""),
    ("Add {a}, {b} and {c}.", "{a}+{b}+{c}", ""),
    ("Subtract {a} from {b}.", "{b}-{a}", "{a}-{b}"),
    ("What is {a} less than {b}?", "{b}-{a}", "{a}-{b}"),
    ("Take {a} away from {b}.", "{b}-{a}", "{a}-{b}"),
    ("Add {a} to {b}, then multiply by {c}.", "({a}+{b})*{c}", "{a}+{b}*{c}"),
    ("Multiply {a} by the sum of {b} and {c}.", "{a}*({b}+{c})", "{a}*{b}+{c}"),
    ("What is the difference of {a} and {b}, times {c}?", "({a}-{b})*{c}", "{a}-{b}*{c}"),
)
_EXPRESSION = re.compile(r"[(\d][\d+\-*/()]*[\d)]")
_RESERVED = re.compile(r"<\|im_\w+\|>|</?(?:think|tool_call|tool_response)>|\d")

Record = dict[str, Any]


class Question(NamedTuple):
    """text: of the user. right: expressions that answer it. careless: what a careless demonstrator calculates."""

    text: str
    right: list[str]
    careless: list[str]


# Records --------------------------------------------------------------------------------------------------------------


def demonstration(question: Question, opening: Sequence[Record], draw: random.Random) -> Record:
    """A conversation: the question, the calls, their results, and what they come to."""
    calls = question.careless if draw.random() < CARELESS else question.right
    results = [calculate(expression) for expression in calls]
    written = [{"name": "calculate_math", "arguments": {"expression": expression}} for expression in calls]
    messages = [
        *opening,
        {"role": "user", "content": question.text},
        {"role": "assistant", "content": "", "tool_calls": json.dumps(written)},
        *({"role": "tool", "content": json.dumps({"result": result})} for result in results),
        {"role": "assistant", "content": ", ".join(results)},
    ]
    return {"conversations": messages}


def write_words(folder: Path, demonstrations: int = 8000, prompts: int = 4000) -> None:
    """sft.jsonl, train.jsonl and held_out.jsonl; the numbers of a held-out question are together in no other."""
    draw, held_out = random.Random(0), {}
    while len(held_out) < HELD_OUT:
        question = _drawn(draw)
        held_out[_numbers(question)] = question

    def others(count: int) -> list[Question]:
        found = (_drawn(draw) for _ in itertools.count())
        return list(itertools.islice((one for one in found if _numbers(one) not in held_out), count))

    write(folder / "held_out.jsonl", map(_prompt, held_out.values()))
    write(folder / "train.jsonl", map(_prompt, others(prompts)))
    write(folder / "sft.jsonl", (demonstration(question, [], draw) for question in others(demonstrations)))


def _drawn(draw: random.Random) -> Question:
    numbers = dict(zip("abc", draw.sample(range(10, 100), 3), strict=True))
    text, right, careless = (part.format(**numbers) for part in draw.choice(PHRASES))
    return Question(text, [right], [careless or right])


def _numbers(question: Question) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"\d+", question.text)))


def _prompt(question: Question) -> Record:
    messages = [{"role": "user", "content": question.text}, {"role": "assistant", "content": ""}]
    return {"conversations": messages, "gt": [calculate(expression) for expression in question.right]}


def write_agent(source: Path, folder: Path, short: int = 15000, demonstrations: int = 3000) -> None:
    """The file's prompts, the last ones held out; and demonstrations of the others with numbers of their own: in
    short.jsonl without the long list of tools, and in sft.jsonl. No sum of a held-out
    prompt is in another, but for powers, of which there are few."""
    records = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    train, held_out = records[:-HELD_OUT], records[-HELD_OUT:]
    never = {found for record in held_out for found in _sums(_question(record))}
    train = [record for record in train if not never & _sums(_question(record))]
    draw = random.Random(0)

    def shown(of: list[Record], openings: bool) -> Record:
        record = draw.choice(of)
        while never & _sums((question := _altered(_question(record), draw)).text):
            pass
        return demonstration(question, record["conversations"][:1] if openings else [], draw)

    write(folder / "held_out.jsonl", held_out)
    write(folder / "train.jsonl", train)
    write(folder / "short.jsonl", (shown(train, False) for _ in range(short)))
    write(folder / "sft.jsonl", (shown(train, n % 3 > 0) for n in range(demonstrations)))


def _sums(text: str) -> set[str]:
    return {found for found in _EXPRESSION.findall(text) if "**" not in found}


def _question(record: Record) -> str:
    return record["conversations"][1]["content"]


def _altered(text: str, draw: random.Random) -> Question:
    """The question with other numbers of as many digits, but for exponents; what divides still does."""

    def other(found: re.Match[str]) -> str:
        return str(draw.randrange(10 ** (len(found[0]) - 1), 10 ** len(found[0])))

    def multiple(found: re.Match[str]) -> str:
        divisor = int(found[2])
        return f"{max(2, int(found[1]) // divisor) * divisor}/{divisor}"

    text = re.sub(r"(?<!\*\*)(?<!\d)\d+", other, text)
    right = _EXPRESSION.findall(text := re.sub(r"(\d+)/(\d+)", multiple, text))
    careless = [expression.replace("(", "").replace(")", "") for expression in right]
    return Question(text, right, careless[: max(1, len(right) - 1)])


def write(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def make_tokenizer(folder: Path) -> None:
    """Of the demonstrations' words without their digits, so that each digit is a token of its own."""

    def texts() -> Iterator[str]:
        for record in read(folder / "sft.jsonl")[:2000]:
            messages = record["conversations"]
            tools = json.loads(messages[0]["tools"]) if "tools" in messages[0] else None
            called = [{**m, "tool_calls": json.loads(m["tool_calls"])} if "tool_calls" in m else m for m in messages]
            yield _RESERVED.sub("", "".join(segment.text for segment in render_segments(called, tools)))

    train_bpe(texts(), folder / "tokenizer", 768)


# Experiments ----------------------------------------------------------------------------------------------------------

SHAPE = {
    "model.hidden_size": 128, "model.intermediate_size": 384, "model.num_hidden_layers": 3,
    "model.num_attention_heads": 4, "model.num_key_value_heads": 2, "model.max_position_embeddings": 1024,
    "init_from": "",
}  # fmt: skip
SFT = {
    "export_dtype": "float32", "checkpoint.every": 0, "checkpoint.keep": 1, "data.val_fraction": 0.02,
    "data.system_prompt_probability": 0, "data.empty_think_removal": 0, "training.eval_every": 100,
    "optimizer.name": "muon", "optimizer.learning_rate": 4e-3, "optimizer.muon_learning_rate": 8e-3,
    "optimizer.schedule": "linear", "optimizer.final_fraction": 0, "optimizer.warmup_steps": 10,
}  # fmt: skip
SFT_OF = {
    "words": {"sft": {"data.seq_len": 256, "training.batch_tokens": 1024, "training.steps": 600}},
    "agent": {
        "short": {"data.seq_len": 256, "training.batch_tokens": 2048, "training.steps": 1400},
        "sft": {
            "data.seq_len": 640,
            "training.batch_tokens": 1280,
            "training.steps": 300,
            "optimizer.learning_rate": 2e-3,
            "optimizer.muon_learning_rate": 4e-3,
        },
    },
}
REWARDS = f"{Path(__file__).resolve().with_name('rl_arithmetic_rewards.py')}"
LEARN = {
    "export_dtype": "float32", "held_out.completions": 0, "checkpoint.every": 0, "checkpoint.keep": 1,
    "training.eval_every": 10, "training.eval_rows": 0, "training.log_every": 1, "optimizer.schedule": "constant",
}  # fmt: skip
WORDS = {
    **LEARN, "data.seq_len": 72, "rollout.prompts": 8, "rollout.completions": 8, "rollout.max_new_tokens": 40,
    "rewards.use": f"{REWARDS}:right_call", "training.steps": 20, "optimizer.learning_rate": 3e-4,
}  # fmt: skip
AGENT = {
    **LEARN, "data.seq_len": 512, "rollout.prompts": 8, "rollout.completions": 8, "rollout.max_new_tokens": 112,
    "agent.tools": "calculator", "agent.turns": 2, "rewards.use": [f"{REWARDS}:share_said", "0 * answer"],
    "rewards.success": "answer", "policy.refill": 1, "training.steps": 24, "training.eval_every": 8,
    "optimizer.learning_rate": 5e-4,
}  # fmt: skip


# Two updates of a rollout: with one the ratio is 1, and CISPO the same as GRPO to the last bit.
CISPO = {"policy.loss": "cispo", "policy.cap": 5.0, "policy.updates": 2, "training.steps": 40}
PPO = {
    "rollout.prompts": 128, "rollout.completions": 1, "policy.updates": 2, "critic.gae_lambda": 1.0,
    "critic.learning_rate": 1e-3, "training.steps": 20,
}  # fmt: skip
SHUFFLED = {"rewards.use": [f"{REWARDS}:shuffled", f"0 * {REWARDS}:right_call"], "rewards.success": "right_call"}


class Experiment(NamedTuple):
    task: str
    stage: str
    settings: dict[str, Any]


EXPERIMENTS = {
    "grpo": Experiment("words", "grpo", WORDS),
    "cispo": Experiment("words", "grpo", {**WORDS, **CISPO}),
    "ppo": Experiment("words", "ppo", {**WORDS, **PPO}),
    "shuffled": Experiment("words", "grpo", {**WORDS, **SHUFFLED}),
    "agent": Experiment("agent", "agent", AGENT),
}


def train(stage: str, run: Path, settings: dict[str, Any]) -> float:
    """The minutes that a run of `minimind` took."""
    words = []
    for name, value in {"run": run, **settings}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "minimind_jax", stage, *words], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) / 60


def prepare(task: str, args: argparse.Namespace) -> Path:
    """The folder of a task: its records, its tokenizer, and the run of the model that demonstrations made."""
    folder = args.out / task
    if not (folder / "tokenizer").is_dir():
        write_words(folder) if task == "words" else write_agent(args.agent_data, folder)
        make_tokenizer(folder)
    start: dict[str, Any] = SHAPE
    for name, settings in SFT_OF[task].items():
        if not (folder / name / "model").is_dir():
            data = {"tokenizer": folder / "tokenizer", "data.train": folder / f"{name}.jsonl"}
            train("sft", folder / name, {**SFT, **settings, **data, **start})
        start = {"init_from": folder / name}
    return folder


def measured(task: str, folder: Path) -> dict[str, Any]:
    """Held-out questions that the model of demonstrations answers right: greedily, and of the words also by some of
    DRAWS answers.

    Nothing of what learns from reward is used here: the engine alone, and for agents `minimind evaluate tools`.
    """
    run, held_out = folder / "sft", folder / "held_out.jsonl"
    if task == "agent":
        asked = {"model": str(run), "tool_rounds": 2, "max_new_tokens": 128, "batch_size": 64}
        return {"greedy": sum(evaluate_tool_calls(ToolCallsConfig(files=(str(held_out),), **asked))[0][CARRIED_OUT])}
    engine, records = load_engine(str(run), "float32"), read(held_out)
    greedy = SamplingConfig(max_new_tokens=40, temperature=0.0)
    drawn = [SamplingConfig(max_new_tokens=40, temperature=1.0, top_p=1.0, seed=seed) for seed in range(DRAWS)]
    prompts = [tuple(encode_prompt(engine.tokenizer, record["conversations"][:-1])) for record in records]
    answers = engine.answers(Request(prompt, sampling) for prompt in prompts for sampling in (greedy, *drawn))
    right = [[is_right(next(answers).text, record["gt"]) for _ in range(1 + DRAWS)] for record in records]
    return {
        "greedy": sum(marks[0] for marks in right),
        "drawn": round(sum(sum(marks[1:]) for marks in right) / DRAWS, 1),
        f"pass@{DRAWS}": sum(any(marks[1:]) for marks in right),
    }


def gain(before: int, after: int, count: int = HELD_OUT) -> list[float]:
    """Points of a hundred, after less before, and its interval of 95 % (Newcombe 1998, method 10: of Wilson's)."""
    (p, low_p, high_p), (q, low_q, high_q) = (
        (share.value, *share.interval) for share in (Share(before, count), Share(after, count))
    )
    low = q - p - math.hypot(q - low_q, high_p - p)
    high = q - p + math.hypot(high_q - q, p - low_p)
    return [round(100 * value, 1) for value in (q - p, low, high)]


def draw(out: Path, picture: Path) -> None:
    """Held-out success of every run over its steps, a colour an experiment."""
    from matplotlib.figure import Figure

    done = {name: sorted(file.parent for file in out.glob(f"{name}-*/result.json")) for name in EXPERIMENTS}
    tasks = list(dict.fromkeys(EXPERIMENTS[name].task for name, runs in done.items() if runs))
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    axes = dict(zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True))
    for number, (name, runs) in enumerate(done.items()):
        for nth, run in enumerate(runs):
            rows = [row for row in read(run / "metrics.jsonl") if "val_success" in row]
            steps, shares = zip(*((row["step"], row["val_success"]) for row in rows), strict=True)
            axes[EXPERIMENTS[name].task].plot(steps, shares, f"C{number}.-", label="" if nth else name)
    for task, ax in axes.items():
        ax.set(title=task, xlabel="step", ylabel="held-out success, greedy", ylim=(0, 1))
        ax.grid(alpha=0.3)
        ax.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in the file, or what `make` gives, which is then there."""
    if not file.is_file():
        file.write_text(json.dumps(make()) + "\n", "utf-8")
    return json.loads(file.read_text("utf-8"))


def started(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the model that an experiment starts from can do."""
    folder = prepare(task, args)
    return kept(folder / "result.json", lambda: {"run": f"{task}/sft", "of": HELD_OUT, **measured(task, folder)})


def experiment(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains; what the run's own evaluations of all held-out questions say, greedily, at its first and last step."""
    task, stage, settings = EXPERIMENTS[name]
    folder, run = args.out / task, args.out / f"{name}-{seed}"
    data = {"init_from": folder / "sft", "data.train": folder / "train.jsonl", "data.val": folder / "held_out.jsonl"}
    minutes = train(stage, run, {**settings, **data, "seed": seed})
    shares = [row["val_success"] for row in read(run / "metrics.jsonl") if "val_success" in row]
    before, after = (round(share * HELD_OUT) for share in (shares[0], shares[-1]))
    points, low, high = gain(before, after)
    return {
        "run": run.name, "before": before, "after": after, "of": HELD_OUT, "points": points, "low": low, "high": high,
        "minutes": round(minutes, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rl_arithmetic"))
    parser.add_argument("--agent_data", type=Path, help="prompts with tools and gt, such as agent_rl_math.jsonl")
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--picture", type=Path, help="draw the curves of all that is done")
    args = parser.parse_args()
    if "agent" in args.only and not (args.agent_data or (args.out / "agent").is_dir()):
        parser.error("agent needs --agent_data; --only names the experiments without it")
    for task in dict.fromkeys(EXPERIMENTS[name].task for name in args.only):
        print(json.dumps(started(task, args)), flush=True)
    for name, seed in itertools.product(args.only, args.seeds):
        result = kept(args.out / f"{name}-{seed}" / "result.json", functools.partial(experiment, name, seed, args))
        print(json.dumps(result), flush=True)
    if args.picture:
        draw(args.out, args.picture)


if __name__ == "__main__":
    main()
