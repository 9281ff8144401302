"""The settings of every stage; what only one stage has stands beside it."""

# ruff: noqa: RUF009 - sections are frozen, so that one may be the default of all

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

from minimind_jax.config import sections
from minimind_jax.model.config import ComputeConfig
from minimind_jax.rules import ABOVE_0, INT64, SHARE, Rule, Settings, at_least, setting

REFERENCE_FREE = ("simpo", "orpo")

NOT_RENDERED = "no record of this stage is rendered by the chat template"
WRITES_NOTHING = "its model writes no text"


class Figures(NamedTuple):
    """What a stage takes where nothing is set; `training.defaults` says what becomes of it where data are few.

    batch_tokens, epochs, eval_every, learning_rate: for much data. val_fraction: of many records.
    few_rate: the learning rate for few data, of a model of 64M parameters. lora_rate: of adapters, however much data.
    scratch_rate: of a model that starts from nothing. most_epochs: of few data, unless they are too few steps.
    """

    batch_tokens: int
    epochs: float
    learning_rate: float
    few_rate: float
    lora_rate: float
    val_fraction: float
    eval_every: int = 200
    scratch_rate: float = 5e-4
    most_epochs: int = 60


@dataclasses.dataclass(frozen=True)
class RunConfig(Settings):
    """What every training stage has.

    run: a name (a folder under runs/) or a path.
    init_from: a Hugging Face folder, a run whose model/ is meant, or a model on the hub (Qwen/Qwen3-0.6B, or
        NAME@REVISION); empty trains from scratch.
    tokenizer: folder with tokenizer.json, or a name on the hub; empty takes the tokenizer of init_from.
    seed: of every random draw.
    resume: `auto` goes on where the run was cut off or starts it, `must` fails if there is nothing to resume,
        `never` starts anew and refuses a run folder that holds checkpoints.
    export_dtype: of the tensors in the run's model/ folder; those of adapters are always float32.
    """

    FIGURES: ClassVar[Figures]
    SHORTEST: ClassVar[int] = 100  # steps; shorter runs are warned about
    of_pictures: ClassVar[bool] = False  # whether records are pictures, without a word that a tokenizer would read
    SMALLER_STEPS: ClassVar[str] = "steps of fewer tokens (--training.batch_tokens {} is the least)"  # how to have them

    # Settings that every stage had once: the value of a stage that ignored them, which is in config.yaml of its runs,
    # and why it has them no longer. Any other value is refused.
    FORMER: ClassVar[dict[str, tuple[Any, str]]] = {
        "data.packing": ("best_fit", "pairs and labelled texts are packed in a way of their own"),
        "data.system_prompt_probability": (None, NOT_RENDERED),
        "data.empty_think_removal": (None, NOT_RENDERED),
        "data.redraw_each_epoch": (False, NOT_RENDERED),
        "training.z_loss": (0.0, "it is of the stages that train by cross entropy alone, pretrain and sft"),
        "training.sample_every": (0, WRITES_NOTHING),
        "samples.prompts": ([], WRITES_NOTHING),
        "samples.from_data": (0, WRITES_NOTHING),
        "samples.max_new_tokens": (48, WRITES_NOTHING),
        "samples.temperature": (0.0, WRITES_NOTHING),
        "samples.top_p": (1.0, WRITES_NOTHING),
    }

    run: str
    init_from: str = setting("", names="model")
    tokenizer: str = setting("", names="tokenizer")
    seed: int = setting(42, must=INT64)
    resume: Literal["auto", "must", "never"] = "auto"
    export_dtype: sections.DType = "bfloat16"
    model: sections.ModelSettings = sections.ModelSettings()
    data: sections.FilesConfig = sections.FilesConfig()
    training: sections.LoopConfig = sections.LoopConfig()
    optimizer: sections.OptimizerConfig = sections.OptimizerConfig()
    lora: sections.LoRAConfig = sections.LoRAConfig()
    checkpoint: sections.CheckpointConfig = sections.CheckpointConfig()
    mesh: sections.MeshConfig = sections.MeshConfig()
    compute: ComputeConfig = ComputeConfig()
    tracking: sections.TrackingConfig = sections.TrackingConfig()

    def __post_init__(self):
        super().__post_init__()
        rows = self.data.seq_len * self.training.accumulation_steps
        if self.training.batch_tokens is not None and self.training.batch_tokens % rows:
            raise ValueError(
                f"training.batch_tokens {self.training.batch_tokens} does not divide by data.seq_len x "
                f"training.accumulation_steps = {rows}; try {max(1, round(self.training.batch_tokens / rows)) * rows}"
            )

    @property
    def unit(self) -> str:
        """What batches are counted in."""
        return "pictures" if self.of_pictures else "tokens"

    @property
    def figures(self) -> Figures:
        """What these settings take for much data where nothing is set."""
        found = self.FIGURES
        if self.lora.rank:
            return found._replace(learning_rate=found.lora_rate, few_rate=found.lora_rate)
        if self.init_from:
            return found
        rate = found.scratch_rate * (6 if self.optimizer.name == "muon" else 1)
        return found._replace(learning_rate=rate, few_rate=rate, most_epochs=60)

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all micro-batches and devices; of much data while batch_tokens is null."""
        return (self.training.batch_tokens or self.figures.batch_tokens) // self.data.seq_len

    def trained_share(self, layers: int) -> float:
        """Of the so many layers of a language model, how many have gradients of their own."""
        return 0.0 if self.lora.rank else 1.0

    @property
    def tower_passes(self) -> int:
        """What a step computes of a tower, in forward passes; backward counts as two."""
        return 0


@dataclasses.dataclass(frozen=True)
class WriterConfig(RunConfig):
    """What the stages have whose models write text."""

    training: sections.WritingLoopConfig = sections.WritingLoopConfig()
    samples: sections.SampleConfig = sections.SampleConfig()


@dataclasses.dataclass(frozen=True)
class PretrainConfig(WriterConfig):
    """Next-token training on plain text, from scratch or from a model."""

    FIGURES = Figures(81920, 2, 5e-4, few_rate=2e-4, lora_rate=5e-4, val_fraction=0.001, most_epochs=10)

    run: str = "pretrain"
    data: sections.TextConfig = sections.TextConfig()
    training: sections.TrainingConfig = sections.TrainingConfig()


@dataclasses.dataclass(frozen=True)
class SFTConfig(WriterConfig):
    """Supervised fine-tuning on conversations; only the assistant's words are trained."""

    FIGURES = Figures(12288, 2, 1e-5, few_rate=2e-4, lora_rate=5e-4, val_fraction=0.001)
    LORA_FIGURES: ClassVar[Figures] = Figures(
        4096, 3, 5e-4, few_rate=5e-4, lora_rate=5e-4, val_fraction=0.05, eval_every=50
    )

    run: str = "sft"
    init_from: str = "pretrain"
    data: sections.DataConfig = sections.DataConfig(packing="best_fit", seq_len=768)
    training: sections.TrainingConfig = sections.TrainingConfig()

    @property
    def figures(self) -> Figures:
        return self.LORA_FIGURES if self.lora.rank else super().figures


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(sections.ReadingConfig):
    """Training of a byte-level BPE tokenizer with MiniMind's 36 reserved tokens.

    data: files, folders or globs of texts, conversations or pairs.
    output: the folder that is written.
    vocab_size: tokens in all, the 36 reserved and 256 bytes included.
    max_records: records used at most, drawn from the beginning to the end of every file; 0 for all.
    on_error: a broken record stops the training, or is skipped and counted.
    overwrite: replace another tokenizer that is at `output`; what was trained with that one cannot be used without it.
    """

    data: tuple[str, ...] = setting((), names="place")
    output: str = setting("runs/tokenizer", names="place")
    vocab_size: int = setting(6400, must=at_least(36 + 256))
    max_records: int = setting(10_000, must=at_least(0))
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(Settings):
    """How pairs of answers train a model; the formulas are in losses/preference.py.

    loss: `sigmoid` (DPO), `robust`, `hinge`, `ipo`, `sigmoid_norm` (of log-probabilities per token), or without a
        reference model `simpo` and `orpo`.
    beta: how strongly log-probabilities count; for orpo the weight of its odds ratio. TRL's default is 0.1, MiniMind's
        0.15; simpo wants about 2.5.
    label_smoothing: chance that a pair is labelled the wrong way round; of sigmoid, robust, sigmoid_norm and simpo.
    gamma: the margin of simpo, subtracted from the score.
    sft_weight: weight of the chosen answer's own negative log-likelihood per token; null is 1 for orpo, 0 for others.
    precompute_reference: compute the reference's log-probabilities of all pairs once, before the first step, and keep
        them in the run's folder: a third less work in each step, and no second model in memory.
    """

    loss: Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"] = "sigmoid"
    beta: float = setting(0.1, must=ABOVE_0)
    label_smoothing: float = setting(0.0, must=Rule(lambda chance: 0 <= chance < 0.5, "at least 0, below 0.5"))
    gamma: float = 1.4
    sft_weight: float | None = setting(None, must=at_least(0))
    precompute_reference: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.precompute_reference and not self.has_reference:
            raise ValueError(f"preference.precompute_reference is set, and the loss {self.loss} has no reference")
        if self.label_smoothing and self.loss in ("hinge", "ipo", "orpo"):
            raise ValueError(f"preference.label_smoothing is set, and the loss {self.loss} has none")

    @property
    def has_reference(self) -> bool:
        return self.loss not in REFERENCE_FREE


@dataclasses.dataclass(frozen=True)
class DPOConfig(WriterConfig):
    """Learning from pairs of answers, chosen and rejected (DPO and its relatives).

    Both answers of a pair lie in one row of data.seq_len tokens; where they do not fit, the beginning of the prompt is
    cut away on both sides alike. The template's chances are drawn once for a pair.
    """

    FIGURES = Figures(8192, 1, 1e-6, few_rate=2e-5, lora_rate=5e-5, val_fraction=0.05, eval_every=50)

    run: str = "dpo"
    init_from: str = "sft"
    preference: PreferenceConfig = PreferenceConfig()
    data: sections.PairsConfig = sections.PairsConfig(seq_len=2048, system_prompt_probability=0.0)

    def __post_init__(self):
        super().__post_init__()
        if self.preference.precompute_reference and self.data.redraw_each_epoch:
            raise ValueError(
                "preference.precompute_reference computes for one rendering of the pairs, and data.redraw_each_epoch "
                "makes another for every epoch; leave one of them out"
            )


@dataclasses.dataclass(frozen=True)
class RewardConfig(RunConfig):
    """A model that scores conversations, trained on pairs of answers (Bradley-Terry).

    centring: weight of (score of the chosen + score of the rejected)^2, which keeps scores around 0 (TRL's default is
        0, its paper's 0.01).
    export_dtype: float32, for transformers computes scores in the type that it finds.
    """

    FIGURES = Figures(8192, 1, 2e-5, few_rate=1e-4, lora_rate=5e-4, val_fraction=0.05, eval_every=50)

    run: str = "reward"
    init_from: str = "sft"
    export_dtype: sections.DType = "float32"
    centring: float = setting(0.01, must=at_least(0))
    data: sections.PairsConfig = sections.PairsConfig(seq_len=2048, system_prompt_probability=0.0)


@dataclasses.dataclass(frozen=True)
class TeacherConfig(Settings):
    """Whom a model learns from, and how.

    model: the teacher, a Hugging Face folder, a run or a name on the hub, with the student's tokenizer.
    alpha: weight of the cross entropy of the data; the divergence from the teacher has 1 - alpha.
    temperature: both models' logits are divided by it for the divergence, which is then multiplied by its square.
    divergence: `forward` is KL(teacher || student), `reverse` KL(student || teacher), `jsd` their generalised
        Jensen-Shannon divergence (arXiv 2306.13649).
    jsd_beta: weight of the teacher in the mixture of jsd.
    top_k: 0 asks the teacher at every step. Above 0 its so many likeliest words of every token are computed once, kept
        in the run's folder (6 bytes for a word, or 8 above a vocabulary of 65,536) and compared, with all other words
        taken as one; the divergence is that of these k + 1.
    """

    model: str = setting("", names="model")
    top_k: int = setting(0, must=at_least(0))
    alpha: float = setting(0.5, must=SHARE)
    temperature: float = setting(1.5, must=ABOVE_0)
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    jsd_beta: float = setting(0.5, must=Rule(lambda share: 0 < share < 1, "above 0 and below 1"))


@dataclasses.dataclass(frozen=True)
class VisionConfig(Settings):
    """How a model sees, and which of its parts learn.

    tower: the folder of a SigLIP or SigLIP2 model (or its name on the hub), where init_from is a model of texts; leave
        it out, and the next four, where init_from sees already.
    projector: `llava` (linear, GELU, linear; other programs load the model as LLaVA) or `minimind_v` (a norm before).
    pixel_shuffle: patches a side that become one token of the image.
    marker: the tokenizer's token that stands for images.
    train: `projector`; `ends`, the projector and the model's first and last layer; `all` but the tower; or the `tower`,
        too. With lora.rank the adapters alone.
    """

    tower: str = setting("", names="model")
    projector: Literal["llava", "minimind_v"] = "llava"
    pixel_shuffle: int = setting(1, must=at_least(1))
    marker: str = "<|image_pad|>"
    train: Literal["projector", "ends", "all", "tower"] = "ends"


@dataclasses.dataclass(frozen=True)
class SeeingConfig(WriterConfig):
    """What the stages have that train models to see; only the assistant's words are trained."""

    vision: VisionConfig = VisionConfig()
    samples: sections.SeeingSampleConfig = sections.SeeingSampleConfig()
    data: sections.ImagesConfig = sections.ImagesConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.data.cache_features and self.vision.train == "tower" and not self.lora.rank:
            raise ValueError("data.cache_features is for a tower that stays as it is, and vision.train is tower")
        if self.data.cache_features and self.data.redraw_each_epoch:
            raise ValueError("data.cache_features is for one rendering of the data; leave data.redraw_each_epoch out")

    def trained_share(self, layers: int) -> float:
        few = {"projector": 0.0, "ends": min(1.0, 2 / layers)}
        return few.get(self.vision.train, 1.0) * super().trained_share(layers)

    @property
    def tower_passes(self) -> int:
        if self.data.cache_features:
            return 0
        return 3 if self.vision.train == "tower" and not self.lora.rank else 1


@dataclasses.dataclass(frozen=True)
class VLMPretrainConfig(SeeingConfig):
    """A tower and a model of texts learn to know each other, by pictures and what they show."""

    FIGURES = Figures(8192, 2, 4e-4, few_rate=1e-3, lora_rate=5e-4, val_fraction=0.001)

    run: str = "vlm_pretrain"
    init_from: str = "sft"
    vision: VisionConfig = VisionConfig(train="projector")
    data: sections.ImagesConfig = sections.ImagesConfig(seq_len=512)


@dataclasses.dataclass(frozen=True)
class VLMSFTConfig(SeeingConfig):
    """Fine-tuning on conversations about images."""

    FIGURES = Figures(3072, 2, 5e-6, few_rate=2e-4, lora_rate=5e-4, val_fraction=0.001)

    run: str = "vlm_sft"
    init_from: str = "vlm_pretrain"
    data: sections.ImagesConfig = sections.ImagesConfig(seq_len=768)


@dataclasses.dataclass(frozen=True)
class DistillConfig(WriterConfig):
    """Learning from conversations and from a larger model's probabilities at once."""

    FIGURES = Figures(12288, 1, 5e-6, few_rate=2e-4, lora_rate=5e-4, val_fraction=0.001)

    run: str = "distill"
    init_from: str = "sft"
    teacher: TeacherConfig = TeacherConfig()
    data: sections.DataConfig = sections.DataConfig(packing="best_fit", seq_len=768)
