"""The sections of settings that stages share: frozen dataclasses, validated where they are made.

A stage's YAML file and the command line fill these in (see `settings.py`); the docstrings are the text of `--help`.
"""

import dataclasses
from typing import Any, Literal

from minimind_jax import rules
from minimind_jax.model.config import PRESETS, ModelConfig, RopeScaling
from minimind_jax.rules import ABOVE_0, BELOW_1, SHARE, TEMPERATURE, TOP_P, Rule, Settings, at_least, setting

DType = Literal["float32", "bfloat16", "float16"]

RUN_LENGTHS = ("training.steps", "training.epochs", "training.tokens")  # a run has one of them

DEFAULT_PRESET = "minimind-3"

MINIMIND_CHANCES = {"system_prompt_probability": 0.2, "empty_think_removal": 0.8}


@dataclasses.dataclass(frozen=True)
class ModelSettings(Settings):
    """A preset and what differs from it.

    preset: one of minimind-3, minimind-3-moe, minimind2-small, minimind2, qwen3-0.6b; empty takes init_from's model, or
        minimind-3. null in a field below keeps the preset's value.
    vocab_size: tokens the model knows; at least the tokenizer's. null: as many as the tokenizer has, from scratch; as
        init_from's model has. More than that adds rows to its embedding, drawn around the mean of the others.
    hidden_size: width of the residual stream.
    intermediate_size: width of the feed-forward layer; null derives ceil(hidden_size * pi / 64) * 64.
    num_hidden_layers: number of layers.
    num_attention_heads, num_key_value_heads: query heads, and the key and value heads they share.
    head_dim: width of a head; null derives hidden_size / num_attention_heads.
    max_position_embeddings: context length written into the exported config; null keeps the model's, made longer by a
        rope_scaling that is set: to its original_max_position_embeddings * factor.
    rope_theta: base of the rotary position embedding.
    rms_norm_eps: added to the mean square in RMSNorm.
    tie_word_embeddings: the output layer is the transposed embedding.
    initializer_range: standard deviation of the initial weights.
    zero_init_outputs: the projections that add to the residual stream start at 0.
    dropout: probability, in training only.
    num_experts: experts of a layer; 0 for a dense model.
    num_experts_per_tok: experts that each token goes through.
    moe_intermediate_size: width of an expert; null takes intermediate_size.
    norm_topk_prob: the chosen experts' probabilities are scaled to sum to 1.
    router_gradient: how the language-model loss reaches a renormalised top-1 router: `straight_through` or `none`.
    router_aux_loss_coef: weight of the load-balancing loss.
    """

    preset: str = setting("", must=Rule(["", *PRESETS].__contains__, f"one of {', '.join(PRESETS)}"))
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float | None = None
    tie_word_embeddings: bool | None = None
    initializer_range: float | None = None
    zero_init_outputs: bool | None = None
    dropout: float | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool | None = None
    router_gradient: Literal["straight_through", "none"] | None = None
    router_aux_loss_coef: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self.resolve()

    def resolve(self, **changes) -> ModelConfig:
        """The architecture: the preset, then this object's fields that are set, then `changes`."""
        preset = PRESETS[self.preset or DEFAULT_PRESET]
        context = preset.get("max_position_embeddings", ModelConfig.max_position_embeddings)
        return ModelConfig(**{**preset, **self.changes(context), **changes})

    def changes(self, context: int) -> dict[str, Any]:
        """The fields that are set, for a model of that context, which a rope_scaling alone makes longer."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "preset"}
        own = {name: value for name, value in own.items() if value is not None}
        if self.rope_scaling is not None and self.max_position_embeddings is None:
            scaling = self.rope_scaling
            own["max_position_embeddings"] = max(
                context, int(scaling.original_max_position_embeddings * scaling.factor)
            )
        return own


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingConfig(Settings):
    """How files and records are read.

    encoding: of files of text: utf-8, gb18030, gbk, big5, utf-16, latin-1, ...
    text_field: where records hold their text; empty takes `text`, `content`, `body`, `document` or `raw_content`.
    ignore_fields: fields of records and messages that are left out, where an unknown one is an error otherwise.
    """

    encoding: str = setting("utf-8", late=True, must=rules.ENCODING)
    text_field: str = setting("", late=True)
    ignore_fields: tuple[str, ...] = setting((), late=True)


@dataclasses.dataclass(frozen=True)
class FilesConfig(ReadingConfig):
    """Where the records are and how they become rows of tokens.

    train: files, folders or globs (.jsonl, .json, .csv, .tsv, .txt, .md; .gz and .zst of these; .parquet, .arrow).
    val: held-out files; empty takes `val_fraction` of the training records instead.
    val_fraction: share of the training records held out when `val` is empty; 0 for no validation; null follows from
        how many there are.
    seq_len: tokens in a row.
    on_error: a broken record stops the run before its first step, or is skipped and counted.
    shuffle: redraw the order of the documents every epoch.
    cache_dir: of tokenised data; empty means $MINIMIND_CACHE or ~/.cache/minimind_jax.
    tokenizer_workers: processes that tokenise; 0 means one for each core.
    loader_workers: threads that read rows ahead of the training step.
    """

    train: tuple[str, ...] = setting((), names="place")
    val: tuple[str, ...] = setting((), names="place")
    val_fraction: float | None = setting(None, must=SHARE)
    seq_len: int = setting(512, must=at_least(4))
    on_error: Literal["stop", "skip"] = "stop"
    shuffle: bool = True
    cache_dir: str = setting("", names="place")
    tokenizer_workers: int = setting(0, must=at_least(0))
    loader_workers: int = setting(1, must=at_least(0))


@dataclasses.dataclass(frozen=True)
class TextConfig(FilesConfig):
    """Files of texts, which one row may share.

    packing: `concat` joins documents end to end and drops nothing; `best_fit` puts whole conversations into rows and
        cuts only at turn boundaries; `pad` is one document a row, cut at seq_len, as MiniMind does.
    """

    packing: Literal["concat", "best_fit", "pad"] = "concat"


@dataclasses.dataclass(frozen=True)
class PairsConfig(FilesConfig):
    """Files of pairs of answers, rendered by the chat template and packed by best fit.

    system_prompt_probability: chance that a conversation without system prompt and tools gets one. null: MiniMind's
        0.2 of much data, and 0 of little, which is then learned as `chat` will ask for it.
    empty_think_removal: chance that a conversation's empty think blocks are removed. null: MiniMind's 0.8 of much
        data, and 0 of little.
    redraw_each_epoch: draw these two chances anew for every epoch (the data is then tokenised for each).
    """

    system_prompt_probability: float | None = setting(None, must=SHARE)
    empty_think_removal: float | None = setting(None, must=SHARE)
    redraw_each_epoch: bool = False

    @property
    def chances(self) -> dict[str, float]:
        """system_prompt_probability and empty_think_removal; MiniMind's while they are null."""
        given = {name: getattr(self, name) for name in MINIMIND_CHANCES}
        return {name: MINIMIND_CHANCES[name] if value is None else value for name, value in given.items()}


@dataclasses.dataclass(frozen=True)
class ImagesConfig(PairsConfig):
    """Files of conversations with images, which are rendered and packed by best fit.

    images_per_row: at most; conversations with more are left out, and told. null: as many as there are tokens for.
    cache_features: keep on disk what a frozen tower says of every picture, which it then looks at once.
    """

    images_per_row: int | None = setting(None, must=at_least(1))
    cache_features: bool = False

    def image_room(self, image_tokens: int) -> int:
        """Images that a row may hold, of which each has so many tokens and the last may be cut."""
        return self.images_per_row or -(-self.seq_len // image_tokens)


@dataclasses.dataclass(frozen=True)
class DataConfig(TextConfig, PairsConfig):
    """Files of conversations, which are rendered, and of which one row may hold several."""


@dataclasses.dataclass(frozen=True)
class AnyConfig(DataConfig, ImagesConfig):
    """Files of records of any kind."""


def _is_watchable(text: str) -> bool:
    direction, *names = text.split() or [""]
    return direction in ("min", "max") and len(names) == 1


@dataclasses.dataclass(frozen=True)
class LoopConfig(Settings):
    """How long, how much at once, and what is watched.

    steps, epochs, tokens: the length of the run; set one (tokens counts trained tokens, approximately). If none is set,
        the epochs follow from how much data there is.
    batch_tokens: tokens of one optimizer step over all devices, padding included; a multiple of
        data.seq_len * accumulation_steps. null follows from how much data there is.
    accumulation_steps: micro-batches of one optimizer step, fewer where a device's rows do not divide by it; it changes
        the memory used and not the result (only dropout's draws and a MoE's load-balancing loss are per micro-batch).
    max_grad_norm: the gradient is scaled down to this global norm; 0 for no clipping.
    log_every: steps between two lines of all metrics, here and in trackers; metrics.jsonl has the loss of every step.
    eval_every: steps between two evaluations; 0 for none but the last step's. null makes about ten, and more in long
        runs.
    eval_rows: validation rows used at most; 0 for all.
    watch: which number of an evaluation says how good the model is: `min loss`, or `max` or `min` and the name of
        another one, as metrics.jsonl has it behind val_, such as `max accuracy`.
    patience: evaluations that are not better than the best before them after which the run ends; the model written is
        then that of the best. A checkpoint is saved at every evaluation. 0 for never.
    stop_on_nan: stop with the last good checkpoint kept when the loss or the gradient is not finite.
    profile_steps: steps traced into the run's profile/, for Perfetto and XProf; 0 for none. --profile alone means 5.
    profile_start: steps before the trace; the first compiles.
    """

    steps: int | None = setting(None, either="length", must=ABOVE_0)
    epochs: float | None = setting(None, either="length", must=ABOVE_0)
    tokens: int | None = setting(None, either="length", must=ABOVE_0)
    batch_tokens: int | None = setting(None, must=at_least(1))
    accumulation_steps: int = setting(1, must=at_least(1))
    max_grad_norm: float = setting(1.0, must=at_least(0))
    log_every: int = setting(10, must=at_least(1))
    eval_every: int | None = setting(None, must=at_least(0))
    eval_rows: int = setting(256, must=at_least(0))
    watch: str = setting("min loss", must=Rule(_is_watchable, "min or max and a name, such as min loss"))
    patience: int = setting(0, must=at_least(0))
    stop_on_nan: bool = True
    profile_steps: int = setting(0, flag="profile", alone=5, must=at_least(0))
    profile_start: int = setting(5, must=at_least(0))

    def __post_init__(self):
        super().__post_init__()
        given = [n for n in ("steps", "epochs", "tokens") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"training.{' and training.'.join(given)} are both set; set one of steps, epochs, tokens")


@dataclasses.dataclass(frozen=True)
class WritingLoopConfig(LoopConfig):
    """The loop of a model that writes text.

    sample_every: steps between two rounds of samples; 0 for none but the last step's.
    """

    sample_every: int = setting(0, must=at_least(0))


@dataclasses.dataclass(frozen=True)
class TrainingConfig(WritingLoopConfig):
    """The loop of a model that learns by cross entropy alone.

    z_loss: weight of logsumexp(logits)^2 in the loss.
    """

    z_loss: float = setting(0.0, must=at_least(0))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW or Muon, and the learning rate over the run.

    name: `adamw` (torch's defaults), or `muon` for the matrices inside the layers with AdamW for everything else.
    learning_rate: peak of AdamW's; null follows from how much data there is.
    muon_learning_rate: peak of Muon's (update scaled to RMS 0.2, so AdamW-sized values work); null means learning_rate,
        or 5/3 of it where that is null, too.
    b1, b2, eps: AdamW's.
    momentum: Muon's.
    weight_decay: decoupled; times the learning rate at each step.
    decay: `all` parameters as MiniMind does, or `matrices` only (no norms, no embeddings).
    cautious_decay: a weight decays only in a step that moves it towards 0 anyway (arXiv 2510.12402).
    schedule: `cosine` from the peak to final_fraction (MiniMind: 0.1); `linear` to final_fraction; `wsd` stays at the
        peak and goes linearly to final_fraction over the last decay_fraction of the run; `constant`.
    warmup_steps: linear from 0, before the schedule; null takes warmup_fraction.
    warmup_fraction: warm-up as a share of the run's steps, where warmup_steps is null.
    final_fraction: of the peak, where cosine, linear and wsd end; 0 is reached behind the last step.
    decay_fraction: of the run, over which wsd goes down.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float | None = setting(None, must=at_least(0))
    muon_learning_rate: float | None = None
    b1: float = setting(0.9, must=SHARE)
    b2: float = setting(0.999, must=SHARE)
    eps: float = 1e-8
    momentum: float = setting(0.95, must=SHARE)
    weight_decay: float = setting(0.01, must=at_least(0))
    decay: Literal["all", "matrices"] = "matrices"
    cautious_decay: bool = False
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int | None = setting(None, must=at_least(0))
    warmup_fraction: float = setting(0.0, must=SHARE)
    final_fraction: float = setting(0.1, must=SHARE)
    decay_fraction: float = setting(0.2, must=SHARE)


@dataclasses.dataclass(frozen=True)
class LoRAConfig(Settings):
    """Low-rank adapters (LoRA, arXiv 2106.09685): only they are trained, saved and held in the optimizer.

    rank: of the adapters; 0 trains the model itself.
    alpha: the adapters' output is scaled by alpha / rank; null takes 2 * rank.
    rslora: scaled by alpha / sqrt(rank) instead (arXiv 2312.03732).
    dropout: of the adapters' input, in training only.
    targets: projections that get one: `all-linear`, `minimind` (q_proj and o_proj), names (q_proj,
        layers.3.mlp.up_proj) or regular expressions.
    ranks: other ranks for some of them, as PATTERN=RANK: layers.7=32, or v_proj=4.
    base_dtype: of the matrices that stay as they are; `auto` is bfloat16 where the run computes in it.
    """

    rank: int = setting(0, must=at_least(0))
    alpha: float | None = setting(None, must=ABOVE_0)
    rslora: bool = False
    dropout: float = setting(0.0, must=BELOW_1)
    targets: tuple[str, ...] = setting(("all-linear",), must=Rule(bool, "names of projections, or all-linear"))
    ranks: tuple[str, ...] = ()
    base_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        super().__post_init__()
        self.own_ranks()

    def own_ranks(self) -> dict[str, int]:
        """`ranks` as pattern -> rank."""
        found = {}
        for text in self.ranks:
            pattern, _, rank = text.rpartition("=")
            if not pattern or not rank.isdigit() or not int(rank):
                raise ValueError(f"lora.ranks has {text!r}; expected PATTERN=RANK with a rank of at least 1: v_proj=4")
            found[pattern] = int(rank)
        return found


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Settings):
    """Checkpoints for resuming.

    every: steps between two saves; 0 saves only at the end and when the run is stopped.
    keep: newest checkpoints kept.
    keep_best: of those saved at a step that is evaluated, keep the best one (by training.watch), too.
    """

    every: int = setting(500, must=at_least(0))
    keep: int = setting(2, must=at_least(1))
    keep_best: bool = True


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 (one axis at most) takes the devices that are left.

    data: replicas of the model, each with its share of the rows.
    fsdp: devices over which a replica's parameters and its rows are split.
    tensor: devices over which each matrix product is split.
    expert: devices over which the experts are split.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor, self.expert)
        if sum(s == -1 for s in sizes) > 1 or any(s == 0 or s < -1 for s in sizes):
            raise ValueError(f"mesh sizes {sizes} must be at least 1, with -1 for at most one of them")


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl.

    loggers: any of tensorboard, wandb, swanlab, trackio.
    project: name of the project there.
    """

    loggers: tuple[Literal["tensorboard", "wandb", "swanlab", "trackio"], ...] = ()
    project: str = "minimind_jax"


@dataclasses.dataclass(frozen=True)
class SampleConfig(Settings):
    """Text generated during training and at its end.

    prompts: continued in pretraining, answered as a user's message in SFT.
    from_data: records of data.val or data.train that give the prompts where none are set; 0 for no samples.
    max_new_tokens, temperature, top_p: of the generation; temperature 0 is greedy.
    """

    prompts: tuple[str, ...] = setting((), is_text=True)
    from_data: int = setting(0, must=at_least(0))
    max_new_tokens: int = setting(48, must=at_least(1))
    temperature: float = setting(0.0, must=TEMPERATURE)
    top_p: float = setting(1.0, must=TOP_P)


@dataclasses.dataclass(frozen=True)
class SeeingSampleConfig(SampleConfig):
    """Text generated about pictures, during training and at its end.

    images: pictures that each of the prompts shows: paths of files; they stand in front of it, or where it says
        `<image>`. Records that give prompts show their own.
    """

    images: tuple[str, ...] = setting((), is_text=True)

    def __post_init__(self):
        super().__post_init__()
        if self.images and not self.prompts:
            raise ValueError("images is set without prompts; say what is asked about them")
