"""The `minimind` command: one subcommand a stage or tool.

Each command imports what it needs when it runs, so that help and mistakes in the arguments answer at once.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from minimind_jax import __version__, settings
from minimind_jax.errors import UserError
from minimind_jax.inference.config import ChatConfig, GenerateConfig
from minimind_jax.stages import STAGES

# Flags of every stage that say which of several processes this is, and where `initialize_distributed` looks for them.
PROCESS_FLAGS = {
    "--coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "--num_processes": "JAX_NUM_PROCESSES",
    "--process_id": "JAX_PROCESS_ID",
}

DTYPES = ("float32", "bfloat16", "float16")


class Command(NamedTuple):
    """What a command does, in a line, and the function that does it with the arguments after its name."""

    summary: str
    run: Callable[[str, Sequence[str]], Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `minimind ARGUMENTS` and returns the exit status: 0, 2 for a mistake of the user, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show Chinese gets \u4f60, and the run goes on
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _dispatch(argv)
    except UserError as error:
        print(f"minimind: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has left; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("minimind: stopped", file=sys.stderr)
        return 130


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
        + f"\n\nConfigs that come with it: {', '.join(settings.config_names())}\n"
    )


# Stages ---------------------------------------------------------------------------------------------------------------


def _stage(name: str) -> Callable[[str, Sequence[str]], None]:
    """A stage's command: its settings from the arguments, then its function."""

    def run(prog: str, argv: Sequence[str]) -> None:
        config = settings.load_settings(STAGES[name].config, _take_process_flags(argv), prog)
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
    from minimind_jax.stages import pipeline

    if {"-h", "--help"} & set(argv):
        print(pipeline.__doc__)
        return 0
    pipeline.run_pipeline(pipeline.load_pipeline(_take_process_flags(argv)))
    return 0


def _demo(prog: str, argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(
            f"usage: {prog} [--STAGE.key value ...]\n\nTrains a small model on text that comes with Python, asks it "
            "the questions it learned and exports it, all in runs/demo.\n--STAGE.key changes configs/quickstart.yaml."
        )
        return 0
    from minimind_jax.stages.demo import run_demo

    return run_demo(argv)


# Tools ----------------------------------------------------------------------------------------------------------------


def _arguments(prog: str, description: str, argv: Sequence[str], *arguments: tuple[str, dict]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    for flag, options in arguments:
        parser.add_argument(flag, **options)
    return parser.parse_args(argv)


def _row_length(text: str) -> int:
    if not text.isdigit() or int(text) < 4:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens; at least 4")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text == "true"


def _checkpoint(text: str) -> str:
    if text not in ("newest", "best") and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is neither newest, best nor a step")
    return text


SHARDS = ("--max_shard_bytes", {"type": _above_zero, "default": 5e9, "help": "a larger model is split (default: 5e9)"})


def _from_hf(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "checks a MiniMind-3, Qwen3 or Qwen3-MoE folder and writes it in the form that training starts from",
        argv,
        ("source", {"help": "a Hugging Face folder"}),
        ("output", {"help": "the folder to write"}),
        ("--dtype", {"choices": DTYPES, "help": "of the tensors; the source's unless given"}),
        ("--tokenizer", {"help": "a folder with tokenizer.json; the source's unless given"}),
        SHARDS,
    )
    from minimind_jax.convert.hf import from_hf

    from_hf(args.source, args.output, args.dtype, args.tokenizer, args.max_shard_bytes)
    print(f"wrote {args.output}")


def _to_hf(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "writes a run's model, one of its checkpoints, or any model folder as a Hugging Face folder",
        argv,
        ("source", {"help": "a run's folder or a Hugging Face folder"}),
        ("output", {"help": "the folder to write"}),
        (
            "--checkpoint",
            {"type": _checkpoint, "metavar": "newest|best|STEP", "help": "of the run, in place of its model/"},
        ),
        (
            "--dtype",
            {"choices": DTYPES, "help": "of the tensors (default: bfloat16; the run's export_dtype for a checkpoint)"},
        ),
        SHARDS,
    )
    if args.checkpoint:
        from minimind_jax.stages.export import export_checkpoint

        step = export_checkpoint(args.source, args.output, args.checkpoint, args.dtype, args.max_shard_bytes)
        print(f"wrote {args.output}, step {step} of {args.source}")
        return
    from minimind_jax.convert.hf import to_hf
    from minimind_jax.folders import resolve_model_folder

    source = resolve_model_folder(args.source, "source")
    to_hf(source, args.output, args.dtype or "bfloat16", args.max_shard_bytes)
    print(f"wrote {args.output}")


def _from_torch(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "turns a MiniMind .pth into a Hugging Face folder; pickled code in it is never run",
        argv,
        ("source", {"help": "MiniMind's .pth file"}),
        ("output", {"help": "the folder to write"}),
        ("--tokenizer", {"required": True, "help": "a folder with tokenizer.json, such as MiniMind's model/"}),
        ("--dtype", {"choices": DTYPES, "default": "float16", "help": "of the tensors (default: float16, as stored)"}),
        SHARDS,
        ("--rope_theta", {"type": _above_zero, "help": "if it is not 1e6"}),
        ("--max_position_embeddings", {"type": int, "help": "if it is not 32768"}),
        ("--rms_norm_eps", {"type": _above_zero, "help": "if it is not 1e-6"}),
        ("--num_experts_per_tok", {"type": int, "help": "if it is not 1"}),
        ("--norm_topk_prob", {"type": _switch, "metavar": "true|false", "help": "if it is not true"}),
        (
            "--inference_rope_scaling",
            {"action": "store_true", "help": "extend the context with YaRN (factor 16), as MiniMind's switch does"},
        ),
    )
    from minimind_jax.convert.hf_config import MINIMIND_YARN
    from minimind_jax.convert.torch_checkpoint import from_torch

    # What the tensors' shapes do not tell.
    unseen = ("rope_theta", "max_position_embeddings", "rms_norm_eps", "num_experts_per_tok", "norm_topk_prob")
    overrides = {name: getattr(args, name) for name in unseen if getattr(args, name) is not None}
    if args.inference_rope_scaling:
        overrides["rope_scaling"] = MINIMIND_YARN
    from_torch(args.source, args.output, args.tokenizer, args.dtype, args.max_shard_bytes, overrides)
    print(f"wrote {args.output}")


def _to_torch(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "writes a model as the .pth that MiniMind's own scripts load",
        argv,
        ("source", {"help": "a run's folder or a Hugging Face folder"}),
        ("output", {"help": "the .pth file to write"}),
    )
    from minimind_jax.convert.torch_checkpoint import to_torch
    from minimind_jax.folders import resolve_model_folder

    to_torch(resolve_model_folder(args.source, "source"), args.output)
    print(f"wrote {args.output}")


def _inspect(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "shows records as the model sees them, the trained tokens coloured, then counts, lengths and packing",
        argv,
        ("files", {"nargs": "+", "metavar": "FILE", "help": "files, folders or globs of records"}),
        ("--tokenizer", {"required": True, "help": "a folder with tokenizer.json"}),
        ("--kind", {"choices": ("text", "conversation"), "help": "found from the first record unless given"}),
        ("--rows", {"type": int, "default": 3, "help": "records shown (default: 3)"}),
        ("--seq_len", {"type": _row_length, "default": 512, "help": "tokens in a row, for the packing (default: 512)"}),
        ("--seed", {"type": int, "default": 42, "help": "of the template's draws and the packing (default: 42)"}),
    )
    from minimind_jax.config import DataConfig
    from minimind_jax.data.inspect import inspect
    from minimind_jax.data.tokenizer import Tokenizer

    data = DataConfig(seq_len=args.seq_len)
    inspect(args.files, Tokenizer.load(args.tokenizer), data, args.kind, args.rows, args.seed)


def _download(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "downloads MiniMind's public data; HF_ENDPOINT and MODELSCOPE_ENDPOINT name mirrors",
        argv,
        ("what", {"nargs": "*", "default": ["mini"], "help": "mini (the default), all, or names of files"}),
        ("--target", {"default": "data", "help": "the folder to write (default: data)"}),
        ("--source", {"choices": ("huggingface", "modelscope"), "default": "huggingface", "help": "where from"}),
    )
    from minimind_jax.data.download import download

    for path in download(args.what, args.target, args.source):
        print(path)


def _cache(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "lists the caches of tokenised data, or removes them; one that a run has open is never removed",
        argv,
        (
            "--clear",
            {
                "nargs": "?",
                "const": "all",
                "choices": ("all", "stale"),
                "help": "remove all (the default), or those whose files have changed or gone",
            },
        ),
        ("--days", {"type": float, "default": 0, "help": "only those not used for so many days (default: 0)"}),
        ("--cache_dir", {"default": "", "help": "where they are, unless $MINIMIND_CACHE or ~/.cache/minimind_jax"}),
    )
    from minimind_jax.data.cache_command import show_caches

    show_caches(args.cache_dir, args.clear, args.days)


def _chat(prog: str, argv: Sequence[str]) -> None:
    config = settings.load_settings(ChatConfig, argv, prog)
    from minimind_jax.inference import chat

    chat.run(config)


def _generate(prog: str, argv: Sequence[str]) -> None:
    config = settings.load_settings(GenerateConfig, argv, prog)
    from minimind_jax.inference import generate_command

    generate_command.run(config)


def _perplexity(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "perplexity and bits per byte of a model on text, or on the assistant's words of conversations",
        argv,
        ("files", {"nargs": "+", "metavar": "FILE", "help": "files, folders or globs of records"}),
        ("--model", {"required": True, "help": "a Hugging Face folder, or a run whose model/ is meant"}),
        ("--seq_len", {"type": _row_length, "help": "tokens in a row (default: 512, or the model's context)"}),
        ("--kind", {"choices": ("text", "conversation"), "default": "text", "help": "of the records (default: text)"}),
        ("--max_rows", {"type": int, "default": 0, "help": "rows evaluated at most; 0 for all (the default)"}),
    )
    from minimind_jax.evaluate.perplexity import evaluate_perplexity

    found = evaluate_perplexity(args.model, args.files, args.seq_len, kind=args.kind, max_rows=args.max_rows)
    print(
        f"{found.tokens:,} tokens: loss {found.nll:.4f}, perplexity {found.perplexity:.3f}, "
        f"bits per byte {found.bits_per_byte:.4f}"
    )


def _plan(prog: str, argv: Sequence[str]) -> None:
    from minimind_jax.plan import command

    command.run(prog, argv)


def _report(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "writes report.md and loss.png of a run, finished or not",
        argv,
        ("run_name", {"metavar": "RUN", "help": "a run's name or folder"}),
    )
    from minimind_jax.folders import resolve_run
    from minimind_jax.training.report import write_report

    print(f"wrote {write_report(resolve_run(args.run_name))}")


COMMANDS = {
    "demo": Command("a small model learns from real text on this machine, and answers", _demo),
    "tokenizer": Command("train a byte-level BPE tokenizer", _stage("tokenizer")),
    "pretrain": Command("next-token training on plain text", _stage("pretrain")),
    "sft": Command("supervised fine-tuning on conversations", _stage("sft")),
    "pipeline": Command("stages in order from one file; skips what is done, resumes what was cut off", _pipeline),
    "data inspect": Command("records as the model sees them, counts, lengths, packing", _inspect),
    "data download": Command("MiniMind's public data files", _download),
    "data cache": Command("caches of tokenised data: list, remove", _cache),
    "chat": Command("talk with a model in the terminal", _chat),
    "generate": Command("answers to prompts, or to every record of a file", _generate),
    "evaluate perplexity": Command("how well a model predicts text or answers", _perplexity),
    "convert from-hf": Command("a Hugging Face model as a starting point", _from_hf),
    "convert to-hf": Command("a run's model or checkpoint, in any dtype or shard size", _to_hf),
    "convert from-torch": Command("a MiniMind .pth as a Hugging Face folder", _from_torch),
    "convert to-torch": Command("a model as a MiniMind .pth", _to_torch),
    "plan": Command("memory, time and price of a run on a GPU or TPU that need not be there", _plan),
    "report": Command("report.md and loss.png of a run", _report),
}
