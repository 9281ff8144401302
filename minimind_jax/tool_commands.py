"""The tools of the `minimind` command: all subcommands that are no stage. Each imports what it needs when it runs."""

import argparse
import math
from collections.abc import Sequence

from minimind_jax.config import settings
from minimind_jax.config.generation import ChatConfig, GenerateConfig
from minimind_jax.errors import UserError
from minimind_jax.shell import install_command

DTYPES = ("float32", "bfloat16", "float16")


def _arguments(prog: str, description: str, argv: Sequence[str], *arguments: tuple[str, dict]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    for flag, options in arguments:
        parser.add_argument(flag, **options)
    return parser.parse_args(argv)


def _row_length(text: str) -> int:
    if not text.isdigit() or int(text) < 4:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens; at least 4")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number; 0 or more")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
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


# How files and records are read; the names are those of `data.jsonl.Reading`.
READING = (
    ("--encoding", {"default": "utf-8", "help": "of files of text: utf-8 (the default), gb18030, utf-16, ..."}),
    ("--text_field", {"default": "", "help": "where records hold their text (default: text, or its usual names)"}),
    (
        "--ignore_fields",
        {"nargs": "+", "default": (), "metavar": "NAME", "help": "fields of records and messages that are left out"},
    ),
)


def from_hf_command(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "checks a MiniMind-3, Qwen3 or Qwen3-MoE folder and writes it in the form that training starts from",
        argv,
        ("source", {"help": "a Hugging Face folder, a run, or a name on the hub, such as Qwen/Qwen3-0.6B"}),
        ("output", {"help": "the folder to write"}),
        ("--dtype", {"choices": DTYPES, "help": "of the tensors; the source's unless given"}),
        ("--tokenizer", {"help": "a folder with tokenizer.json; the source's unless given"}),
        SHARDS,
    )
    from minimind_jax.convert.hf import from_hf
    from minimind_jax.folders import resolve_model_folder

    from_hf(resolve_model_folder(args.source, "source"), args.output, args.dtype, args.tokenizer, args.max_shard_bytes)
    print(f"wrote {args.output}")


def to_hf_command(prog: str, argv: Sequence[str]) -> None:
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
        from minimind_jax.runs.export import export_checkpoint

        step = export_checkpoint(args.source, args.output, args.checkpoint, args.dtype, args.max_shard_bytes)
        print(f"wrote {args.output}, step {step} of {args.source}")
        return
    from minimind_jax.convert.hf import stored_dtype, to_hf
    from minimind_jax.convert.load import base_folder, merge_lora
    from minimind_jax.folders import is_adapter, resolve_model_folder

    source = resolve_model_folder(args.source, "source")
    if is_adapter(source):
        merge_lora(source, args.output, dtype=args.dtype or "bfloat16", max_shard_bytes=args.max_shard_bytes)
    else:
        to_hf(source, args.output, args.dtype or "bfloat16", args.max_shard_bytes)
    found = stored_dtype(base_folder(source) if is_adapter(source) else source)
    rounded = not args.dtype and found == "float32"
    print(f"wrote {args.output}{' in bfloat16 (--dtype float32 keeps the precision of the source)' if rounded else ''}")


def from_torch_command(prog: str, argv: Sequence[str]) -> None:
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


def to_torch_command(prog: str, argv: Sequence[str]) -> None:
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


def merge_lora_command(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "writes a low-rank adapter and its base model as one Hugging Face folder",
        argv,
        ("source", {"help": "the folder of an adapter, as a run with lora.rank or peft writes it, or such a run"}),
        ("output", {"help": "the folder to write"}),
        ("--base", {"default": "", "help": "the base model's folder or run, if it is not where the adapter says"}),
        ("--dtype", {"choices": DTYPES, "help": "of the tensors; the base model's unless given"}),
        SHARDS,
    )
    from minimind_jax.convert.load import merge_lora
    from minimind_jax.folders import resolve_model_folder

    source = resolve_model_folder(args.source, "source")
    merge_lora(source, args.output, args.base, args.dtype, args.max_shard_bytes)
    print(f"wrote {args.output}")


def inspect_command(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "shows records as the model sees them, the trained tokens coloured, then counts, lengths and packing",
        argv,
        ("files", {"nargs": "+", "metavar": "FILE", "help": "files, folders or globs of records"}),
        ("--tokenizer", {"required": True, "help": "a folder with tokenizer.json"}),
        (
            "--kind",
            {"choices": ("text", "conversation", "preference"), "help": "found from the first record unless given"},
        ),
        ("--rows", {"type": int, "default": 3, "help": "records shown (default: 3)"}),
        ("--seq_len", {"type": _row_length, "default": 512, "help": "tokens in a row, for the packing (default: 512)"}),
        ("--seed", {"type": int, "default": 42, "help": "of the template's draws and the packing (default: 42)"}),
        *READING,
    )
    from minimind_jax.config.sections import DataConfig
    from minimind_jax.data.inspect import inspect
    from minimind_jax.data.tokenizer import Tokenizer

    data = DataConfig(
        seq_len=args.seq_len,
        encoding=args.encoding,
        text_field=args.text_field,
        ignore_fields=tuple(args.ignore_fields),
    )
    inspect(args.files, Tokenizer.load(args.tokenizer), data, args.kind, args.rows, args.seed)


def data_convert_command(prog: str, argv: Sequence[str]) -> None:
    from minimind_jax.data.convert_command import KINDS, convert, parse_renamed

    args = _arguments(
        prog,
        "writes records of any format that is read (docs/data.md) as JSON lines in MiniMind's",
        argv,
        ("files", {"nargs": "+", "metavar": "INPUT", "help": "files, folders or globs of records"}),
        ("output", {"metavar": "OUTPUT", "help": "the file to write, a name ending in .jsonl"}),
        ("--kind", {"choices": KINDS, "help": "found from the first record unless given"}),
        (
            "--rename",
            {"nargs": "+", "default": [], "metavar": "OLD=NEW", "help": "fields, and their names in a format"},
        ),
        ("--label_field", {"default": "label", "help": "where records hold their label (default: label)"}),
        ("--on_error", {"choices": ("stop", "skip"), "default": "stop", "help": "at a broken record (default: stop)"}),
        *READING,
    )
    from minimind_jax.data.jsonl import reading_of

    renamed, skip = parse_renamed(args.rename), args.on_error == "skip"
    convert(args.files, args.output, reading_of(args), args.kind, renamed, args.label_field, skip)


def download_command(prog: str, argv: Sequence[str]) -> None:
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


def cache_command(prog: str, argv: Sequence[str]) -> None:
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


def chat_command(prog: str, argv: Sequence[str]) -> None:
    config = settings.load_settings(ChatConfig, argv, prog)
    from minimind_jax.inference import chat

    chat.run(config)


def generate_command(prog: str, argv: Sequence[str]) -> None:
    config = settings.load_settings(GenerateConfig, argv, prog)
    from minimind_jax.inference import generate_command

    generate_command.run(config)


def predict_command(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "labels for the texts of files, or of the lines of the standard input, by a classifier",
        argv,
        ("--model", {"required": True, "help": "a run of `minimind classify`, or a Hugging Face folder"}),
        INPUT,
        OUTPUT,
        *READING,
        ("--top", {"type": int, "default": 1, "help": "labels told, with their probabilities (default: 1)"}),
        ("--seq_len", {"type": _row_length, "help": "longer texts are cut there (default: as the run was trained)"}),
    )
    from minimind_jax.data.jsonl import reading_of
    from minimind_jax.evaluate.score_command import predict

    count = predict(args.model, args.input, args.output, args.top, args.seq_len, reading=reading_of(args))
    _say_written(count, args.output)


def score_command(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "scores for the conversations of files by a reward model",
        argv,
        ("--model", {"required": True, "help": "a run of `minimind reward`, or a Hugging Face folder"}),
        ("--input", {**INPUT[1], "required": True}),
        OUTPUT,
        *READING,
    )
    from minimind_jax.data.jsonl import reading_of
    from minimind_jax.evaluate.score_command import score

    _say_written(score(args.model, args.input, args.output, reading=reading_of(args)), args.output)


INPUT = ("--input", {"nargs": "+", "default": [], "metavar": "FILE", "help": "files, folders or globs of records"})
OUTPUT = ("--output", {"default": "", "help": "the file to write; printed without it"})


def _say_written(count: int, output: str) -> None:
    if output:
        print(f"{count} records written to {output}")


def perplexity_command(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "perplexity and bits per byte of a model on text, or on the assistant's words of conversations",
        argv,
        ("files", {"nargs": "+", "metavar": "FILE", "help": "files, folders or globs of records"}),
        (
            "--model",
            {"required": True, "help": "a Hugging Face folder, a run whose model/ is meant, or a name on the hub"},
        ),
        ("--seq_len", {"type": _row_length, "help": "tokens in a row (default: 512, or the model's context)"}),
        ("--kind", {"choices": ("text", "conversation"), "help": "found from the first record unless given"}),
        ("--max_rows", {"type": int, "default": 0, "help": "rows evaluated at most; 0 for all (the default)"}),
        *READING,
    )
    from minimind_jax.data.jsonl import reading_of
    from minimind_jax.evaluate.perplexity import evaluate_perplexity

    found = evaluate_perplexity(
        args.model, args.files, args.seq_len, kind=args.kind, max_rows=args.max_rows, reading=reading_of(args)
    )
    print(
        f"{found.tokens:,} tokens: loss {found.nll:.4f}, perplexity {found.perplexity:.3f}, "
        f"bits per byte {found.bits_per_byte:.4f}"
    )


def choices_command(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "how often a model finds the right choice of a question likeliest",
        argv,
        ("files", {"nargs": "+", "metavar": "FILE", "help": "records with question, choices, answer and maybe task"}),
        (
            "--model",
            {"required": True, "help": "a Hugging Face folder, a run whose model/ is meant, or a name on the hub"},
        ),
        (
            "--shots",
            {"type": _natural, "default": 0, "help": "questions of the task shown with their answers (default: 0)"},
        ),
        (
            "--shots_from",
            {"nargs": "+", "default": [], "metavar": "FILE", "help": "where those come from (default: FILE)"},
        ),
        ("--prompt", {"default": "", "help": "with {question}; 'Question: ... Answer:' or its Chinese unless given"}),
        ("--max_questions", {"type": _natural, "default": 0, "help": "of a task at most; 0 for all (the default)"}),
        ("--batch_size", {"type": _count, "default": 16, "help": "choices scored at once (default: 16)"}),
    )
    from minimind_jax.evaluate.choices import evaluate_choices

    results = evaluate_choices(
        args.model, args.files, shots=args.shots_from, shot_count=args.shots, prompt=args.prompt.replace("\\n", "\n"),
        max_questions=args.max_questions, batch_size=args.batch_size,
    )  # fmt: skip
    for result in results:
        print(result.describe())


def lm_eval_command(prog: str, argv: Sequence[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(
            f"usage: {prog} --model minimind_jax --model_args pretrained=FOLDER --tasks NAME [...]\n\nEleutherAI's "
            "lm_eval with a model of ours; FOLDER is a run or a Hugging Face folder. All other arguments are\n"
            "lm_eval's own (lm_eval run --help lists them): --num_fewshot, --limit, --include_path, --output_path, ..."
        )
        raise SystemExit(0)
    try:
        from minimind_jax.evaluate import lm_eval_adapter
    except ImportError as error:
        raise UserError(f"lm_eval cannot be imported ({error}); install it: {install_command('eval')}") from error
    lm_eval_adapter.run(argv)


def plan_command(prog: str, argv: Sequence[str]) -> None:
    from minimind_jax.plan import command

    command.run(prog, argv)


def report_command(prog: str, argv: Sequence[str]) -> None:
    args = _arguments(
        prog,
        "writes report.md and loss.png of a run, finished or not",
        argv,
        ("run_name", {"metavar": "RUN", "help": "a run's name or folder"}),
    )
    from minimind_jax.folders import resolve_run
    from minimind_jax.training.report import write_report

    print(f"wrote {write_report(resolve_run(args.run_name))}")
