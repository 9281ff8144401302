"""The `minimind` command: one subcommand a stage or tool.

Each command imports what it needs when it runs, so that help and mistakes in the arguments answer at once.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from minimind_jax import __version__, compiled, last_resort, shell, signals
from minimind_jax import tool_commands as tools
from minimind_jax.config import settings
from minimind_jax.errors import UserError
from minimind_jax.stages import STAGES

# Flags of every stage that say which of several processes this is, and where `initialize_distributed` looks for them.
PROCESS_FLAGS = {
    "--coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "--num_processes": "JAX_NUM_PROCESSES",
    "--process_id": "JAX_PROCESS_ID",
}

PROFILE = ("--training.profile_steps", "5")  # what --profile stands for


class Command(NamedTuple):
    """What a command does, in a line, and the function that does it with the arguments after its name."""

    summary: str
    run: Callable[[str, Sequence[str]], Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `minimind ARGUMENTS` and returns the exit status: 0, 2 for what the user can mend, 1 for a bug,
    128 + signal for Ctrl-C (130), SIGTERM (143) and SIGHUP (129)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show Chinese gets \u4f60, and the run goes on
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return signals.exit_status(lambda: _dispatch(argv))
    except UserError as error:
        print(f"minimind: {shell.with_program(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has left; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if words := last_resort.explain(error):
            print(f"minimind: {words}", file=sys.stderr)
            return 2
        last_resort.report_bug()
        return 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if argv[0] == "--version":
        print(f"minimind {__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            compiled.keep_programs()
            status = COMMANDS[name].run(f"minimind {name}", argv[words:])
            return status if isinstance(status, int) else 0
    raise UserError(_unknown_command(argv))


def _unknown_command(argv: Sequence[str]) -> str:
    group = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
    if group and (len(argv) == 1 or argv[1].startswith("-")):
        return f"{argv[0]} is a group of commands: {', '.join(group)}"
    asked = " ".join(argv[:2]) if group else argv[0]
    return f"unknown command {asked}; did you mean {settings.nearest(asked, COMMANDS)}? (minimind --help lists them)"


def overview() -> str:
    """The text of `minimind --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "minimind: train a small language model from raw text to a model you can chat with\n\n"
        "usage: minimind COMMAND [--config FILE] [--key value ...]    minimind COMMAND --help    minimind --version\n\n"
        + "\n".join(lines)
        + "\n\nStages in several processes: --coordinator_address HOST:PORT --num_processes N --process_id 0 ... N-1"
        + f"\nWith a trace of some of their steps: --profile ({' '.join(PROFILE)})"
        + f"\n\nConfigs that come with it: {', '.join(settings.config_names())}\n"
    )


# Stages ---------------------------------------------------------------------------------------------------------------


def _stage(name: str) -> Callable[[str, Sequence[str]], None]:
    """A stage's command: its settings from the arguments, then its function."""

    def run(prog: str, argv: Sequence[str]) -> None:
        kind = STAGES[name].config
        flags = {"--profile": PROFILE} if PROFILE[0][2:] in {field.key for field in settings.fields_of(kind)} else {}
        words = [word for given in argv for word in flags.get(given, (given,))]
        config = settings.load_settings(kind, _take_process_flags(words), prog)
        STAGES[name].load()(config)

    return run


def _take_process_flags(argv: Sequence[str]) -> list[str]:
    """The arguments without PROCESS_FLAGS, which go into the environment."""
    left, words = [], iter(argv)
    for word in words:
        flag, given, value = word.partition("=")
        if flag not in PROCESS_FLAGS:
            left.append(word)
        elif value := value if given else next(words, ""):
            os.environ[PROCESS_FLAGS[flag]] = value
        else:
            raise UserError(f"{flag} needs a value")
    return left


def _pipeline(prog: str, argv: Sequence[str]) -> int:
    from minimind_jax.pipeline import read

    if {"-h", "--help"} & set(argv):
        print(read.__doc__)
        return 0
    stages = read.load_pipeline(_take_process_flags(argv))
    from minimind_jax.pipeline.run import run_pipeline

    run_pipeline(stages)
    return 0


def _demo(prog: str, argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(
            f"usage: {prog} [--STAGE.key value ...]\n\nTrains a small model on text that comes with Python, asks it "
            "the questions it learned and exports it, all in runs/demo.\n--STAGE.key changes configs/quickstart.yaml."
        )
        return 0
    from minimind_jax.demo.story import run_demo

    return run_demo(argv)


COMMANDS = {
    "demo": Command("a small model learns from real text on this machine, and answers", _demo),
    "tokenizer": Command("train a byte-level BPE tokenizer", _stage("tokenizer")),
    "pretrain": Command("next-token training on plain text", _stage("pretrain")),
    "sft": Command("supervised fine-tuning on conversations", _stage("sft")),
    "dpo": Command("learn from pairs of answers, chosen and rejected", _stage("dpo")),
    "distill": Command("learn from a larger model's probabilities", _stage("distill")),
    "reward": Command("train a model that scores answers", _stage("reward")),
    "classify": Command("train a classifier of texts", _stage("classify")),
    "pipeline": Command("stages in order from one file; skips what is done, resumes what was cut off", _pipeline),
    "data inspect": Command("records as the model sees them, counts, lengths, packing", tools.inspect_command),
    "data convert": Command("records of other tools' formats in MiniMind's", tools.data_convert_command),
    "data download": Command("MiniMind's public data files", tools.download_command),
    "data cache": Command("caches of tokenised data: list, remove", tools.cache_command),
    "chat": Command("talk with a model in the terminal", tools.chat_command),
    "generate": Command("answers to prompts, or to every record of a file", tools.generate_command),
    "classify predict": Command("labels for the texts of a file or of the standard input", tools.predict_command),
    "score": Command("a reward model's scores for the conversations of a file", tools.score_command),
    "evaluate perplexity": Command("how well a model predicts text or answers", tools.perplexity_command),
    "evaluate choices": Command("multiple choice: how often the right choice is the likeliest", tools.choices_command),
    "evaluate lm-eval": Command("EleutherAI's harness, with --model minimind_jax", tools.lm_eval_command),
    "convert from-hf": Command("a Hugging Face model as a starting point", tools.from_hf_command),
    "convert to-hf": Command("a run's model or checkpoint, in any dtype or shard size", tools.to_hf_command),
    "convert from-torch": Command("a MiniMind .pth as a Hugging Face folder", tools.from_torch_command),
    "convert to-torch": Command("a model as a MiniMind .pth", tools.to_torch_command),
    "convert merge-lora": Command("an adapter and its base model as one model", tools.merge_lora_command),
    "plan": Command("memory, time and price of a run on a GPU or TPU that need not be there", tools.plan_command),
    "report": Command("report.md and loss.png of a run", tools.report_command),
}
