"""Speed of the step that trains a model that sees, ours and MiniMind-V's in turn, on the same rows.

    python scripts/bench_vlm.py --minimind_v CHECKOUT --pictures emoji_i2t.parquet --texts sft.jsonl
    python scripts/bench_vlm.py --tokenizer FOLDER --pictures emoji_i2t.parquet --texts sft.jsonl        # ours alone

Cases: `mixed`, rows of pictures and of words alone by turns, and `texts`, words alone, to which MiniMind-V's way of
storing them adds a black picture of 8 x 8. Both read one Parquet file inside the time; ours packs, MiniMind-V pads. The
model has random weights: the language model's sizes as given, MiniMind-V's projector, the tower of SigLIP2-B/32 (or one
of --tower_layers). Its freezing is MiniMind-V's `--train`. Prints a JSON line for each case: useful tokens per second
(not padding; an image's among them), ours / theirs pair by pair. --python has torch, transformers and datasets.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import bench_common as bench

FREEZE = {"projector": 2, "ends": 1, "all": 0}  # MiniMind-V's numbers
LEARNING_RATE, MOST_STEPS, RECORDS = 5e-6, 10**5, 2000


def tower_settings(settings: dict) -> dict:
    """Under transformers' names and ours."""
    return {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": settings["tower_layers"],
        "num_attention_heads": 12, "image_size": 256, "patch_size": 32,
    }  # fmt: skip


def write_records(pictures: Path, texts: Path, folder: Path) -> None:
    """`mixed.parquet` and `texts.parquet`, in MiniMind-V's format."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    black, draw = io.BytesIO(), random.Random(0)
    Image.new("RGB", (8, 8)).save(black, "JPEG")
    with open(texts, encoding="utf-8") as lines:
        talks = [json.loads(line)["conversations"] for _, line in zip(range(RECORDS), lines, strict=False)]
    said = [(json.dumps(talk, ensure_ascii=False), black.getvalue()) for talk in talks]
    table = pyarrow.parquet.read_table(pictures)
    seen = list(zip(table["conversations"].to_pylist(), table["image_bytes"].to_pylist(), strict=True))
    draw.shuffle(seen)
    mixed = [record for pair in zip(seen, said, strict=False) for record in pair]
    for name, records in (("mixed", mixed), ("texts", said)):
        columns = dict(zip(("conversations", "image_bytes"), map(list, zip(*records, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{name}.parquet")


def serve_ours(settings: dict) -> None:
    import jax
    import numpy as np

    from minimind_jax.config.sections import ImagesConfig, OptimizerConfig, TrainingConfig
    from minimind_jax.config.stages import VisionConfig, VLMSFTConfig
    from minimind_jax.data.batches import open_data
    from minimind_jax.data.pictures import Marker
    from minimind_jax.data.pixels import Pixels
    from minimind_jax.data.tokenizer import Tokenizer
    from minimind_jax.losses.language_model import make_language_model_loss
    from minimind_jax.model.config import ModelConfig, TowerConfig, Vision
    from minimind_jax.model.transformer import LanguageModel
    from minimind_jax.runs.vision import with_trained_parts
    from minimind_jax.seeds import named_key
    from minimind_jax.sharding import init_params, make_mesh, shard_batch
    from minimind_jax.training.defaults import filled
    from minimind_jax.training.state import Parameters, create_state
    from minimind_jax.training.step import make_program

    vision = Vision(TowerConfig(**tower_settings(settings), resample=2), 12, "minimind_v")
    sizes = {"hidden_size": settings["hidden_size"], "num_hidden_layers": settings["layers"]}

    def make(case: str):
        config = VLMSFTConfig(
            vision=VisionConfig(train=settings["train"]),
            data=ImagesConfig(train=(f"{settings['folder']}/{case}.parquet",), val_fraction=0,
                              seq_len=settings["seq_len"], cache_dir=f"{settings['folder']}/cache"),
            training=TrainingConfig(batch_tokens=settings["rows"] * settings["seq_len"], steps=MOST_STEPS),
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        )  # fmt: skip
        config = filled(config)
        model, mesh = LanguageModel(ModelConfig(**sizes, vision=vision), config.compute), make_mesh(config.mesh)
        parameters = Parameters.of(model, lambda: init_params(model, named_key(0, "init"), mesh))
        parameters = with_trained_parts(config, model, parameters)
        program = make_program(config, parameters, make_language_model_loss(model), mesh, MOST_STEPS)
        trained, frozen = parameters.split(parameters.load())
        state = create_state(trained, program.optimizer, program.shardings)._replace(frozen=frozen)
        pixels = Pixels(vision.tower, config.data.image_room(vision.image_tokens))
        marker = Marker(tokens=vision.image_tokens)
        data, _ = open_data(
            "images", config, Tokenizer.load(settings["tokenizer"]), marker=marker, annotate=pixels.annotate
        )
        batches = data.iterate(0, MOST_STEPS)

        def train(steps: int) -> dict:
            nonlocal state
            started, useful = time.perf_counter(), 0
            for _ in range(steps):
                batch = next(batches)
                state, metrics = program.step(state, shard_batch(batch, mesh))
                useful += int(np.count_nonzero(batch["segment_ids"]))
            jax.block_until_ready(metrics)
            return {"seconds": time.perf_counter() - started, "useful": useful}

        return train

    bench.serve({case: bench.made_once(make, case) for case in settings["cases"]})


def serve_minimind_v(settings: dict) -> None:
    """The step of its trainer/train_sft_vlm.py without the loop around it, in its checkout."""
    sys.path.insert(0, ".")
    import torch
    from dataset.lm_dataset import VLMDataset
    from model.model_vlm import VLMConfig
    from trainer.trainer_utils import init_vlm_model, vlm_collate_fn
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    tower = f"{settings['folder']}/tower"
    SiglipVisionModel(SiglipVisionConfig(**tower_settings(settings))).save_pretrained(tower)
    SiglipImageProcessor(size={"height": 256, "width": 256}, resample=2).save_pretrained(tower)
    config = VLMConfig(
        hidden_size=settings["hidden_size"], num_hidden_layers=settings["layers"], max_seq_len=settings["seq_len"]
    )

    def make(case: str):
        model, tokenizer, processor = init_vlm_model(
            config, "none", "model", tower, device="cpu", freeze_llm=FREEZE[settings["train"]]
        )
        model.train()
        rows = VLMDataset(
            f"{settings['folder']}/{case}.parquet", tokenizer, processor, config.max_seq_len,
            config.image_special_token, config.image_token_len,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        order = torch.randperm(len(rows)).tolist()
        loader = torch.utils.data.DataLoader(rows, settings["rows"], sampler=order, collate_fn=vlm_collate_fn)
        batches = (batch for _ in range(MOST_STEPS) for batch in loader)

        def train(steps: int) -> dict:
            started, useful = time.perf_counter(), 0
            for _ in range(steps):
                input_ids, labels, pixels = next(batches)
                useful += int((input_ids != tokenizer.pad_token_id).sum())
                result = model(input_ids, labels=labels, pixel_values=pixels)
                (result.loss + result.aux_loss).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return {"seconds": time.perf_counter() - started, "useful": useful}

        return train

    bench.serve({case: bench.made_once(make, case) for case in settings["cases"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimind_v", type=Path, help="a checkout of jingyaogong/minimind-v; without it ours alone")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; MiniMind-V's own by default")
    parser.add_argument("--python", default=sys.executable, help="that has torch, transformers and datasets")
    parser.add_argument("--pictures", type=Path, required=True, help="a Parquet file in MiniMind-V's format")
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines of conversations")
    parser.add_argument("--cases", nargs="+", choices=("mixed", "texts"), default=["mixed", "texts"])
    parser.add_argument("--train", choices=FREEZE, default="ends", help="what learns, as vision.train says it")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tower_layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4, help="of a batch; MiniMind-V's own default")
    parser.add_argument("--seq_len", type=int, default=768)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="of one measurement")
    parser.add_argument("--one_core", action="store_true", help="count processor seconds on one core")
    args = parser.parse_args()
    if not args.minimind_v and not args.tokenizer:
        parser.error("--minimind_v or --tokenizer is missing")
    if args.one_core:
        bench.use_one_core()
    names = ("cases", "train", "hidden_size", "layers", "tower_layers", "rows", "seq_len")
    settings = {name: getattr(args, name) for name in names}
    script, tokenizer = str(Path(__file__).resolve()), args.tokenizer or args.minimind_v / "model"
    with tempfile.TemporaryDirectory() as folder:
        write_records(args.pictures, args.texts, Path(folder))
        told = json.dumps({**settings, "folder": folder, "tokenizer": str(tokenizer.resolve())})
        commands = {
            "ours": [sys.executable, "-c", bench.START % True, script, "--serve", "ours", told],
            "minimind_v": [args.python, script, "--serve", "minimind_v", told],
        }
        if not args.minimind_v:
            del commands["minimind_v"]
        sides = {name: bench.Side(commands[name], None if name == "ours" else args.minimind_v) for name in commands}
        for case in args.cases:
            first, answers = bench.interleave(sides, args.pairs, **{case: args.steps})
            rates = bench.rates(answers, "useful")
            ours, *theirs = (
                sum(a["useful"] for a in found) / sum(a["seconds"] for a in found) for found in answers.values()
            )
            if theirs:
                rates["all of ours / theirs"] = round(ours / theirs[0], 3)  # rows differ in length, which pairs show
            bench.print_result(
                "vlm", {**settings, "case": case}, **{"first seconds": first, "useful per second": rates}
            )
        for side in sides.values():
            side.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        {"ours": serve_ours, "minimind_v": serve_minimind_v}[sys.argv[2]](json.loads(sys.argv[3]))
    else:
        main()
