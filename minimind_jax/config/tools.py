"""The settings of the tools: of every command that is neither a stage nor generates text."""

import dataclasses
from typing import Literal

from minimind_jax.config.sections import DType, ReadingConfig
from minimind_jax.rules import ABOVE_0, ENCODING, Rule, Settings, at_least, setting

# What takes the settings of other commands ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PassedOn:
    """Arguments that are read where the command is carried out."""

    arguments: tuple[str, ...] = setting((), rest=True)


class PipelineConfig(PassedOn):
    """Stages in order from one YAML file: minimind pipeline --config FILE

        name: small                     # runs/small/ holds everything the pipeline makes
        shared:                         # settings of every stage that has them
          seed: 1
        stages:
          - tokenizer: {data: [corpus.jsonl]}
          - pretrain:
              data: {train: [corpus.jsonl]}
          - sft:
              data: {train: [dialogues.jsonl]}

    A finished stage is skipped and one that was cut off is resumed, so the same command can be repeated until all is
    done. Unless set, a stage writes to runs/NAME/STAGE, takes the tokenizer of the tokenizer stage, and all but
    `pretrain` start from the language model before them; the tokenizer learns from the other stages' files.
    `--STAGE.key value`, `--shared.key value` and `--name NAME` override the file. Files, names and settings of all
    stages are checked before the first one trains. As a model, runs/NAME means the last stage's.
    """


class DemoConfig(PassedOn):
    """A small model learns from text that comes with Python, answers and is exported, all in runs/demo. --STAGE.key
    value changes configs/quickstart.yaml.
    """


class LMEvalConfig(PassedOn):
    """EleutherAI's lm_eval with a model of ours:

        minimind evaluate lm-eval --model minimind_jax --model_args pretrained=FOLDER --tasks NAME [...]

    FOLDER is a run or a Hugging Face folder. All other arguments are lm_eval's own (lm_eval run --help lists them):
    --num_fewshot, --limit, --include_path, --output_path, ...
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(Settings):
    """What a run needs on a GPU or TPU that need not be there: its real training step goes through the real compiler.

    Everything else is a setting of the stage: --config FILE or NAME, --key value; of a pipeline --stage says which.

      minimind plan --config zero --stage sft --device tpu-v5e --topology 2x4 --data sft.jsonl --price 1.20
      minimind plan --model.preset qwen3-0.6b --device tpu-v5e --topology 4x4 --mesh.data 1 --mesh.fsdp 16

    device: h100, a100, rtx3090, rtx4090, tpu-v4, tpu-v5e, tpu-v5p or tpu-v6e.
    topology: 8 GPUs, or a TPU slice such as 2x4; empty takes the smallest there is.
    stage: which one of a pipeline, or the kind of training.
    data: the training data, to count its tokens.
    tokens, images: that are trained, in place of data.
    mfu: share of the peak FLOP/s that training reaches.
    price: of one device for an hour, in any currency; hours only without.
    json: print JSON.
    """

    device: str = setting()
    topology: str = ""
    stage: Literal["pretrain", "sft", "vlm-pretrain", "vlm-sft"] | None = None
    data: tuple[str, ...] = ()
    tokens: int | None = setting(None, must=at_least(1))
    images: int | None = setting(None, must=at_least(0))
    mfu: float = setting(0.4, must=Rule(lambda share: 0 < share <= 1, "above 0 and at most 1"))
    price: float | None = None
    json: bool = setting(False, alone=True)
    arguments: tuple[str, ...] = setting((), rest=True)


# Data -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig(ReadingConfig):
    """Shows records as the model sees them, the trained tokens coloured, then counts, lengths and packing.

    files: files, folders or globs of records.
    tokenizer: a folder with tokenizer.json.
    kind: of the records; null finds it from the first.
    rows: records shown.
    seq_len: tokens in a row, for the packing.
    image_tokens: of an image, as the model has them that is to see it; MiniMind-V's 64.
    html: a file to write, a page with the records that are shown and their pictures.
    seed: of the template's draws and the packing.
    """

    files: tuple[str, ...] = setting(positional="FILE")
    tokenizer: str = setting()
    kind: Literal["text", "conversation", "preference", "prompt", "images"] | None = None
    rows: int = 3
    seq_len: int = setting(512, must=at_least(4))
    image_tokens: int = setting(64, must=at_least(1))
    html: str = setting("", names="place")
    seed: int = 42


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertDataConfig(ReadingConfig):
    """Writes records of any format that is read (docs/data.md) as JSON lines in MiniMind's.

    files: files, folders or globs of records.
    output: the file to write, a name ending in .jsonl.
    kind: of the records; null finds it from the first.
    rename: fields, and their names in a format, as OLD=NEW.
    label_field: where records hold their label.
    on_error: a broken record stops the command, or is skipped and counted.
    """

    files: tuple[str, ...] = setting(positional="INPUT")
    output: str = setting(positional="OUTPUT")
    kind: Literal["text", "conversation", "preference", "labelled", "images"] | None = None
    rename: tuple[str, ...] = setting((), is_text=True)
    label_field: str = "label"
    on_error: Literal["stop", "skip"] = "stop"


@dataclasses.dataclass(frozen=True)
class DownloadConfig(Settings):
    """Downloads MiniMind's public data; HF_ENDPOINT and MODELSCOPE_ENDPOINT name mirrors.

    what: mini, all, or names of files.
    target: the folder to write.
    source: where from.
    """

    what: tuple[str, ...] = setting(("mini",), positional="WHAT")
    target: str = "data"
    source: Literal["huggingface", "modelscope"] = "huggingface"


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Lists the caches of tokenised data, and of what towers said of pictures, or removes them; one that a run has open
    is never removed.

    clear: remove all (--clear alone), or those whose files have changed or gone.
    days: only those not used for so many days.
    cache_dir: where they are; empty means $MINIMIND_CACHE or ~/.cache/minimind_jax.
    """

    clear: Literal["all", "stale"] | None = setting(None, alone="all")
    days: float = 0
    cache_dir: str = ""


# Evaluating -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(ReadingConfig):
    """Scores for the conversations of files by a reward model.

    model: a run of `minimind reward`, or a Hugging Face folder.
    input: files, folders or globs of records.
    output: the file to write; empty prints.
    on_error: a broken record stops the command, or is skipped and counted.
    """

    model: str = setting()
    input: tuple[str, ...] = setting(repeats=True)
    output: str = ""
    on_error: Literal["stop", "skip"] = "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig(ScoreConfig):
    """Labels for the texts or pictures of files, or of the lines of the standard input, by a classifier.

    model: a run of `minimind classify`, or a Hugging Face folder.
    input: files, folders or globs of records, or of pictures; empty reads the standard input.
    top: labels told, with their probabilities.
    seq_len: longer texts are cut there; null as the run was trained.
    """

    input: tuple[str, ...] = setting((), repeats=True)
    top: int = setting(1, must=at_least(1))
    seq_len: int | None = setting(None, must=at_least(4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityConfig(ReadingConfig):
    """Perplexity and bits per byte of a model on text, or on the assistant's words of conversations.

    files: files, folders or globs of records.
    model: a Hugging Face folder, a run whose model/ is meant, or a name on the hub.
    seq_len: tokens in a row; null takes 512, or the model's context if that is less.
    kind: of the records; null finds it from the first.
    max_rows: rows evaluated at most; 0 for all.
    """

    files: tuple[str, ...] = setting(positional="FILE")
    model: str = setting()
    seq_len: int | None = setting(None, must=at_least(4))
    kind: Literal["text", "conversation"] | None = None
    max_rows: int = setting(0, must=at_least(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoicesConfig(Settings):
    """How often a model finds the right choice of a question likeliest.

    files: records with question, choices, answer and maybe task.
    model: a Hugging Face folder, a run whose model/ is meant, or a name on the hub.
    shots: questions of the task shown with their answers.
    shots_from: files where those come from; empty takes FILE.
    prompt: with {question}; empty takes 'Question: ... Answer:' or its Chinese.
    max_questions: of a task at most; 0 for all.
    batch_size: choices scored at once.
    encoding: of files of text: utf-8, gb18030, gbk, big5, utf-16, latin-1, ...
    """

    files: tuple[str, ...] = setting(positional="FILE")
    model: str = setting()
    shots: int = setting(0, must=at_least(0))
    shots_from: tuple[str, ...] = ()
    prompt: str = ""
    max_questions: int = setting(0, must=at_least(0))
    batch_size: int = setting(16, must=at_least(1))
    encoding: str = setting("utf-8", late=True, must=ENCODING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateImagesConfig(ReadingConfig):
    """How a model that sees answers questions about pictures, and how with the pictures of other questions.

    files: records with pictures, and question, choices, answer and maybe task; or conversations, whose last answer is
        the right one.
    model: a Hugging Face folder, a run whose model/ is meant, or a name on the hub.
    output: a file of JSON lines that gets each answer and its marks.
    max_new_tokens: longer answers are cut off.
    max_records: read at most; 0 for all.
    batch_size: answers made or scored at the same time.
    seed: of the shuffle of pictures.
    """

    files: tuple[str, ...] = setting(positional="FILE")
    model: str = setting()
    output: str = ""
    max_new_tokens: int = setting(64, must=at_least(1))
    max_records: int = setting(0, must=at_least(0))
    batch_size: int = setting(16, must=at_least(1))
    seed: int = 42


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCallsConfig(ReadingConfig):
    """How well a model calls tools: valid JSON, the right tools, the right arguments, the right numbers in its answer.

    Every answer of a conversation with tools is asked for anew, behind the record's own messages. Of a record with `gt`
    (MiniMind's agent data) calls are carried out until the model answers with the numbers that it says.

    files: conversations with tools.
    model: a Hugging Face folder, a run whose model/ is meant, or a name on the hub.
    tools: that carry out calls of records with `gt`, as for chat.
    tool_rounds: rounds of such calls before an answer.
    output: a file of JSON lines that gets each answer and its marks.
    max_new_tokens: longer answers are cut off.
    max_records: read at most; 0 for all.
    batch_size: answers made at the same time.
    thinking: let the model think before it answers.
    """

    files: tuple[str, ...] = setting(positional="FILE")
    model: str = setting()
    tools: tuple[str, ...] = ("all",)
    tool_rounds: int = setting(5, must=at_least(1))
    output: str = ""
    max_new_tokens: int = setting(512, must=at_least(1))
    max_records: int = setting(0, must=at_least(0))
    batch_size: int = setting(16, must=at_least(1))
    thinking: bool = False


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Writes report.md and loss.png of a run, finished or not.

    run: a run's name or folder.
    """

    run: str = setting(positional="RUN")


# Converting -----------------------------------------------------------------------------------------------------------

CHECKPOINT = Rule(lambda word: word in ("newest", "best") or word.isdecimal(), "newest, best or a step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenConfig(Settings):
    """What every command has that writes a Hugging Face folder.

    source: a run's folder or a Hugging Face folder.
    output: the folder to write.
    dtype: of the tensors; null takes the source's.
    max_shard_bytes: a larger model is split.
    """

    source: str = setting(positional="SOURCE")
    output: str = setting(positional="OUTPUT")
    dtype: DType | None = None
    max_shard_bytes: float = setting(5e9, must=ABOVE_0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromHFConfig(WrittenConfig):
    """Checks a MiniMind-3, Qwen3 or Qwen3-MoE folder and writes it in the form that training starts from.

    source: a Hugging Face folder, a run, or a name on the hub, such as Qwen/Qwen3-0.6B.
    tokenizer: a folder with tokenizer.json; empty takes the source's.
    vision: of a MiniMind-V, the folder of the SigLIP2 that it was trained with.
    """

    tokenizer: str = ""
    vision: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToHFConfig(WrittenConfig):
    """Writes a run's model, one of its checkpoints, or any model folder as a Hugging Face folder.

    checkpoint: newest, best or a step of the run; null takes its model/.
    dtype: of the tensors; null takes bfloat16, or for a checkpoint the run's export_dtype.
    """

    checkpoint: str | None = setting(None, must=CHECKPOINT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToGGUFConfig(Settings):
    """Writes a model as a GGUF file for llama.cpp, and a Modelfile for ollama beside it. One that sees is two files.

    source: a run's folder or a Hugging Face folder; of an adapter the merged model is written.
    output: the file to write (NAME.gguf), or a folder for model.gguf; tower and projector are mmproj-NAME.gguf.
    checkpoint: newest, best or a step of the run; null takes its model/.
    dtype: of the matrices; null takes what they are stored in, or for a checkpoint the run's export_dtype.
    adapter: write an adapter alone, for llama.cpp's --lora; its dtype is float32 unless given.
    base: the base model's folder or run; empty looks where the adapter says.
    text_only: leave a tower and projector out; the model then reads and writes words alone.
    """

    source: str = setting(positional="SOURCE")
    output: str = setting(positional="OUTPUT")
    checkpoint: str | None = setting(None, must=CHECKPOINT)
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None
    adapter: bool = setting(False, alone=True)
    base: str = ""
    text_only: bool = setting(False, alone=True)

    def __post_init__(self):
        super().__post_init__()
        if self.checkpoint and (self.adapter or self.base):
            raise ValueError("checkpoint writes a whole model of a run; leave adapter and base out")
        if self.adapter and self.text_only:
            raise ValueError("adapter writes what is trained of the words alone; leave text_only out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeLoRAConfig(WrittenConfig):
    """Writes a low-rank adapter and its base model as one Hugging Face folder.

    source: the folder of an adapter, as a run with lora.rank or peft writes it, or such a run.
    base: the base model's folder or run; empty looks where the adapter says.
    dtype: of the tensors; null takes the base model's.
    """

    base: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromTorchConfig(FromHFConfig):
    """Turns a MiniMind .pth into a Hugging Face folder; pickled code in it is never run.

    source: MiniMind's .pth file.
    tokenizer: a folder with tokenizer.json, such as MiniMind's model/.
    dtype: of the tensors; float16 is as stored.
    rope_theta, max_position_embeddings, rms_norm_eps, num_experts_per_tok, norm_topk_prob: what the tensors' shapes do
        not tell; null takes MiniMind's 1e6, 32768, 1e-6, 1 and true.
    inference_rope_scaling: extend the context with YaRN (factor 16), as MiniMind's switch does.
    """

    tokenizer: str = setting()
    dtype: DType = "float16"
    rope_theta: float | None = setting(None, must=ABOVE_0)
    max_position_embeddings: int | None = None
    rms_norm_eps: float | None = setting(None, must=ABOVE_0)
    num_experts_per_tok: int | None = None
    norm_topk_prob: bool | None = None
    inference_rope_scaling: bool = setting(False, alone=True)


@dataclasses.dataclass(frozen=True)
class ToTorchConfig:
    """Writes a model as the .pth that MiniMind's own scripts load.

    source: a run's folder or a Hugging Face folder.
    output: the .pth file to write.
    """

    source: str = setting(positional="SOURCE")
    output: str = setting(positional="OUTPUT")
