"""Runs of the real stages in which something is degenerate: defined, said, and never a number that is none."""

import dataclasses
import json
import math
import shutil

import jax
import psutil
import pytest
import yaml
from kills import finish
from pairs import outputs, start_pair
from run_helpers import cut_back, rows_of
from safetensors.numpy import load_file, save_file
from templates import CHATML
from worlds import ADAPTERS, write_lines

from minimind_jax import stages
from minimind_jax.cli import main
from minimind_jax.config.rl import (
    AgentConfig,
    CriticConfig,
    GRPOConfig,
    HeldOutConfig,
    PolicyConfig,
    PPOConfig,
    RewardsConfig,
    RolloutConfig,
)
from minimind_jax.config.sections import CheckpointConfig, MeshConfig, OptimizerConfig
from minimind_jax.config.settings import load_settings
from minimind_jax.convert.hf import save_hf
from minimind_jax.convert.load import load_merged
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.model.config import ComputeConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.runs.effect import check_effect
from minimind_jax.training.run import RunFolder, plain

SOME = {"training": {"steps": 4}}
OWN = """
import random, time

def same(episodes): return [0.5 for _ in episodes]
def nothing(episodes): return [None for _ in episodes]
def raises(episodes): raise RuntimeError("no judge today")
def hangs(episodes): time.sleep(600)
def brief(episodes): return [float(len(episode.completion) < 8) for episode in episodes]
def length(episodes): return [len(episode.completion) / 10 + len(episode.text) / 100 for episode in episodes]
"""


@pytest.fixture
def grpo(make, tmp_path):
    """grpo(kind, **changes) -> settings of a short run; reward: of OWN. answers: of so many prompts."""
    own = tmp_path / "own.py"
    own.write_text(OWN)

    def grpo(kind=GRPOConfig, *, reward="length", prompts=24, data=(), training=(), rewards=(), rollout=(), **changes):
        records = [{"prompt": f"the {n} cat", "answer": n} for n in range(prompts)]
        wanted = {"prompts": 2, "completions": 4, "max_new_tokens": 8} | dict(rollout)
        changes = {"run": tmp_path / "run", "checkpoint": CheckpointConfig(every=0), **changes}
        return make(
            kind, changes.pop("run"), write_lines(tmp_path / "prompts.jsonl", records), rate=1e-2,
            data={"seq_len": 64, "val_fraction": 0.0, **dict(data)},
            training={"steps": 2, "eval_every": 2, "eval_rows": 2, "batch_tokens": None, **dict(training)},
            rollout=RolloutConfig(**wanted),
            rewards=RewardsConfig(use=(f"{own}:{reward}",), **dict(rewards)),
            held_out=HeldOutConfig(completions=2), **changes,
        )  # fmt: skip

    return grpo


def steps_of(config):
    """The rows of the steps of a run, which is made."""
    found = [row for row in rows_of(stages.start(config)) if "loss" in row]
    assert all(math.isfinite(value) for row in found for value in row.values())
    return found


def weights_of(folder):
    return (RunFolder(folder).model / "model.safetensors").read_bytes()


def test_equal_rewards_teach_nothing_and_refilling_finds_nothing(grpo, capsys):
    """Their advantages are 0, and with no divergence in the loss so is the gradient."""
    steps = steps_of(grpo(reward="same", policy=PolicyConfig(refill=2)))
    assert [row["frac_reward_zero_std"] for row in steps] == [1, 1]
    assert [row["refill/kept"] for row in steps] == [0, 0]
    assert [row["refill/prompts"] for row in steps] == [6, 6]
    assert all(row["grad_norm"] == 0 and row["reward_std"] == 0 for row in steps)
    assert capsys.readouterr().out.count("all completions of each prompt got the same reward") == 1


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        pytest.param(GRPOConfig, {}, id="grpo"),
        pytest.param(PPOConfig, {"advantage": "gae", "scale": "batch"}, id="ppo", marks=pytest.mark.slow),
    ],
)
def test_completions_that_are_all_cut_and_masked_move_nothing(grpo, base, capsys, kind, own):
    """No update, of the value model neither, and it is said, though the optimizer has weight decay."""
    policy = PolicyConfig(overlong="mask", beta=0.1, updates=2, **own)
    config = grpo(kind, rollout={"max_new_tokens": 2, "temperature": 0.05}, policy=policy)
    optimizer = dataclasses.replace(config.optimizer, weight_decay=0.1)
    config = dataclasses.replace(config, optimizer=optimizer, training=dataclasses.replace(config.training, steps=4))
    steps = steps_of(config)
    cut = [row["completions/clipped_ratio"] for row in steps if "reward" in row]
    assert cut == [1, 1]  # what is likeliest is never the end
    assert steps[-1]["skipped/nothing"] == 4 and steps[-1]["tokens"] == 0
    assert weights_of(config.run) == weights_of(base)
    assert "1 of 1 updates were skipped so far: no token of the batch is trained" in capsys.readouterr().out


@pytest.mark.slow
def test_a_reward_that_has_nothing_to_say_counts_as_nothing(grpo, capsys):
    steps = steps_of(grpo(reward="nothing", kind=PPOConfig, policy=PPOConfig().policy))
    assert {row["reward"] for row in steps if "reward" in row} == {0}
    assert capsys.readouterr().out.count("all completions got the same reward") == 1


@pytest.mark.parametrize("changes", [{"intermediate_size": 48}, {"vocab_size": 512}])
def test_a_value_model_of_other_sizes_is_refused(grpo, base, tmp_path, changes):
    folder = RunFolder(base).model
    other = LanguageModel(dataclasses.replace(load_merged(folder)[0], **changes))
    save_hf(tmp_path / "other", other.config, other.init(jax.random.key(0)), Tokenizer.load(folder), dtype="float32")
    critic = CriticConfig(init_from=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"critic\.init_from .*other has other sizes"):
        stages.start(grpo(PPOConfig, policy=PPOConfig().policy, critic=critic))


def workers():
    """Processes of tools and rewards that are still there."""
    return [each for each in psutil.Process().children(recursive=True) if "tools.worker" in " ".join(each.cmdline())]


@pytest.mark.parametrize("reward", ["raises", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_reward_that_fails_stops_the_run_or_is_counted(grpo, base, tmp_path, reward):
    before = workers()  # of other tests
    with pytest.raises(UserError, match=r"own.py:\w+: .*prompts.jsonl:\d+: .*rewards.on_error skip"):
        stages.start(grpo(reward=reward, rewards={"seconds": 2.0}))
    with pytest.raises(UserError, match=r"prompts\.jsonl:1"):
        stages.start(grpo(AgentConfig, data={"seq_len": 16}))
    steps = steps_of(grpo(reward=reward, rewards={"seconds": 2.0, "on_error": "count"}, training={"steps": 1}))
    assert not set(workers()) - set(before)
    assert steps[0][f"rewards/{reward}/failures"] == 8 and steps[0]["reward"] == 0
    if reward == "raises":
        data = {"val": (write_lines(tmp_path / "val.jsonl", [{"prompt": "the cat"}]),)}
        config = grpo(reward=reward, rewards={"on_error": "skip"}, run=tmp_path / "skips", data=data)
        steps = steps_of(config)
        assert not any("reward" in row for row in steps)
        assert {row["val_reward"] for row in rows_of(config.run) if "val_reward" in row} == {None}
        assert [row["rewards/raises/failures"] for row in steps] == [8, 8] and steps[-1]["skipped/nothing"] == 2
        assert weights_of(config.run) == weights_of(base)


def test_completions_that_end_at_once(grpo, base, tmp_path):
    """The end token comes first: a text of nothing, which is trained on as any other."""
    folder = shutil.copytree(RunFolder(base).model, tmp_path / "ends")
    tokenizer, weights = Tokenizer.load(folder), load_file(folder / "model.safetensors")
    for name in weights:  # the state is the embedding of the last token, which the end's is made to resemble most
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= 0
    words = weights["model.embed_tokens.weight"]
    last = encode_prompt(tokenizer, [{"role": "user", "content": "the cat"}], None, False)[-1]
    words[tokenizer.end_ids[0]] = 1e3 * words[last] * weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    steps = steps_of(grpo(init_from=str(folder), policy=PolicyConfig(beta=0.1, updates=2, minibatches=2), **SOME))
    told = [row for row in steps if "reward" in row]
    assert {row["completions/max_length"] for row in told} == {1} and {
        row["completions/clipped_ratio"] for row in told
    } == {0}
    assert {row["reward"] for row in told} == {0.1}


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [1, 3])
def test_fewer_prompts_than_a_rollout_asks(grpo, prompts):
    steps = steps_of(grpo(prompts=prompts, rollout={"prompts": 4}, training={"steps": None, "epochs": 2}))
    assert len(steps) == max(1, math.ceil(2 * prompts / 4))
    assert all("reward" in row for row in steps)


@pytest.mark.slow
def test_one_held_out_prompt(grpo, tmp_path):
    val = write_lines(tmp_path / "val.jsonl", [{"prompt": "the cat", "answer": 1}])
    rows = rows_of(stages.start(grpo(data={"val": (val,)})))
    judged = [row for row in rows if "val_reward" in row]
    assert [row["step"] for row in judged] == [0, 2]
    assert judged[0].keys() >= {"val_success", "val_pass@2", "val_drawn_success", "val_length"}


def test_no_held_out_prompt(grpo, capsys):
    rows = rows_of(stages.start(grpo(data={"val_fraction": None}, prompts=2)))
    assert not any("val_reward" in row for row in rows)
    told = capsys.readouterr().out
    assert "2 prompts are too few to hold some out" in told and "watch max reward is without effect" in told


@pytest.mark.slow
def test_adapters_over_a_run_that_is_an_adapter_itself(grpo, tmp_path):
    """The reference of each is what it started from."""
    first = grpo(lora=ADAPTERS, policy=PolicyConfig(beta=0.1, minibatches=2), run=tmp_path / "first", **SOME)
    steps_of(first)
    for name, own in (("adapters", {"lora": ADAPTERS}), ("whole", {})):
        policy = PolicyConfig(beta=0.1, minibatches=2)
        steps = steps_of(grpo(init_from=first.run, run=tmp_path / name, policy=policy, **own, **SOME))
        assert abs(steps[0]["kl"]) < 1e-9 and steps[-1]["kl"] > 0
        assert steps[0]["sampling/sampling_logp_difference/max"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_computing_in_bfloat16(grpo, dtype):
    """Sampler and trainer are still close, and the first update's ratio still 1."""
    steps = steps_of(grpo(compute=ComputeConfig(dtype=dtype, scan_unroll=1), policy=PolicyConfig(updates=2)))
    assert steps[0]["sampling/sampling_logp_difference/mean"] < 0.02
    assert steps[0]["val/ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_a_model_with_another_template(grpo, base, tmp_path):
    folder = shutil.copytree(RunFolder(base).model, tmp_path / "other")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHATML}))
    steps = steps_of(grpo(init_from=str(folder)))
    assert steps[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert "<think>" not in (RunFolder(tmp_path / "run").path / "rollouts/step_000000.md").read_text("utf-8")


@pytest.fixture(scope="module")
def experts(world, tmp_path_factory):
    """A model with experts to start from."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = world.pretrain(tmp_path_factory.mktemp("experts") / "experts", checkpoint=CheckpointConfig(0))
    return stages.start(dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes)))


@pytest.mark.slow
def test_a_model_with_experts(grpo, experts):
    steps = steps_of(grpo(init_from=str(experts), kind=PPOConfig, policy=PPOConfig().policy, **SOME))
    assert steps[0]["router_loss"] > 0
    assert steps[0]["sampling/sampling_logp_difference/max"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("experts_too", [False, True], ids=["dense", "experts"])
def test_eight_devices_do_what_one_does(grpo, start, experts, experts_too, tmp_path):
    """Whole runs, rollouts included, with a value model and a reference."""
    policy = dataclasses.replace(PPOConfig().policy, beta=0.1, minibatches=2)
    meshes = {"one": MeshConfig(), "fsdp": MeshConfig(data=1, fsdp=8), "tensor": MeshConfig(data=2, fsdp=2, tensor=2)}
    rows = {}
    for name, mesh in meshes.items():
        config = grpo(
            PPOConfig, run=tmp_path / name, mesh=mesh, policy=policy, rollout={"prompts": 16, "completions": 1},
            training={"steps": 8, "eval_every": 4}, **({"init_from": str(experts)} if experts_too else {}),
        )  # fmt: skip
        finish(start("ppo", config, 1 if name == "one" else 8), config)
        rows[name] = rows_of(config.run)
    for name in ("fsdp", "tensor"):
        for got, wanted in zip(rows[name], rows["one"], strict=True):
            assert got.keys() == wanted.keys()
            for key in got.keys() & {"loss", "reward", "kl", "val_reward", "completions/mean_length", "loss/value_avg"}:
                assert got[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-5), (name, got["step"], key)


@pytest.mark.slow
def test_two_processes_do_what_one_does(grpo, tmp_path):
    """With prompts that do not divide by two, and others asked in the place of those that teach nothing."""
    policy = PolicyConfig(refill=2, beta=0.1)
    one, two = (
        grpo(run=tmp_path / name, rollout={"prompts": 3}, reward="brief", policy=policy, **SOME) for name in ("1", "2")
    )
    steps = steps_of(one)
    (tmp_path / "two.json").write_text(json.dumps(plain(two)))
    outputs(start_pair(tmp_path, "grpo", "--config", "two.json"), 0)
    assert max(row["refill/prompts"] for row in steps) > 3
    for wanted, got in zip(steps, [row for row in rows_of(two.run) if "loss" in row], strict=True):
        for key in ("loss", "reward", "refill/prompts", "completions/mean_length"):
            assert got[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5), (key, got["step"])


@pytest.mark.slow
def test_a_pipeline_learns_from_reward_behind_fine_tuning(make, base, tmp_path, monkeypatch, capsys):
    """Its records are looked at first; its runs are reported, exported and resumed as all are."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"the {n} cat", "answer": n} for n in range(24)])
    chats = [{"conversations": [{"role": role, "content": "cat"} for role in ("user", "assistant")]} for _ in range(24)]
    write_lines(tmp_path / "chats.jsonl", chats)
    few = {"rollout": {"prompts": 2, "completions": 2, "max_new_tokens": 8}, "rewards": {"use": ["length(1, 4)"]}}
    few |= {"data": {"train": ["prompts.jsonl"]}, "training": {"steps": 4}, "checkpoint": {"every": 2}}
    wide = {"data": {"train": ["prompts.jsonl"], "seq_len": 1024}, "model": {"max_position_embeddings": 1024}}
    stages_of_it = [
        {"sft": {"init_from": base, "data": {"train": ["chats.jsonl"]}, "training": {"steps": 2, "batch_tokens": 128}}},
        {"grpo": few},
        {"ppo": {**few, "policy": {"minibatches": 2}}},
        {"agent": {**few, **wide, "agent": {"tools": ["calculator"]}}},
    ]
    pipeline = {"name": "all", "shared": {"data.seq_len": 64, "data.cache_dir": "cache"}, "stages": stages_of_it}
    (tmp_path / "pipe.yaml").write_text(yaml.safe_dump(pipeline), "utf-8")
    command = ["pipeline", "--config", "pipe.yaml"]
    write_lines(tmp_path / "broken.jsonl", [{"conversations": []}])
    assert main([*command, "--agent.data.train", "broken.jsonl"]) == 2
    assert "stage agent: broken.jsonl:1" in capsys.readouterr().err and not (tmp_path / "runs").exists()
    assert main(["data", "inspect", "prompts.jsonl", "--kind", "prompt", "--tokenizer", f"{base}/model"]) == 0
    assert "packing" not in (told := capsys.readouterr().out) and "⟦user" not in told and "the 0 cat" in told
    assert main(command) == 0
    capsys.readouterr()
    for name in ("grpo", "ppo", "agent"):
        assert main(["report", f"runs/all/{name}"]) == 0
        assert "success" in (tmp_path / f"runs/all/{name}/report.md").read_text("utf-8")
        assert main(["convert", "to-hf", f"runs/all/{name}", name, "--checkpoint", "newest"]) == 0
        assert not any(key.startswith("critic") for key in load_file(tmp_path / name / "model.safetensors"))
    again = ["grpo", "--config", "runs/all/grpo/config.yaml", "--training.steps", "6"]
    assert main([*again, "--rewards.use", "length(1, 5)"]) == 2
    assert "rewards.use ['length(1, 4)'] -> ['length(1, 5)']" in capsys.readouterr().err
    assert main([*again, "--rewards.seconds", "9", "--rollout.slots", "2"]) == 0
    assert "changed since the run was started: rewards.seconds 60.0 -> 9.0" in capsys.readouterr().out
    assert rows_of("runs/all/grpo")[-1]["step"] == 6


@pytest.mark.parametrize(
    "argument, said",
    [
        ("rollout.prompts=0", "at least 1"),
        ("rollout.completions=1", "compares rollout.completions"),
        ("rollout.temperature=0", "above 0"),
        ("rollout.top_p=2", "rollout.top_p"),
        ("rollout.ahead=2", "0 or 1"),
        ("rollout.max_new_tokens=768", "leaves no room"),
        ("rollout.server=http://x", "rollout.server_model"),
        ("rollout.correction_cap=0.5", "at least 1"),
        ("policy.minibatches=3", "do not divide"),
        ("training.batch_tokens=5", "it follows from"),
        ("training.tokens=5", "training.steps or epochs"),
        ("rollout.promts=3", "rollout.prompts"),
    ],
)
def test_wrong_settings_are_refused_by_name(argument, said):
    key, value = argument.split("=")
    with pytest.raises(UserError) as caught:
        load_settings(GRPOConfig, [f"--{key}", value])
    assert said in str(caught.value)


def test_what_nobody_has_set_is_no_change(grpo, capsys):
    """The same command again: in the middle of the run, and when it is done."""
    config = grpo(prompts=2, data={"val_fraction": None}, checkpoint=CheckpointConfig(every=1))
    config = dataclasses.replace(config, optimizer=OptimizerConfig())
    folder = RunFolder(stages.start(config))
    capsys.readouterr()
    stages.start(config)
    assert "is finished" in (told := capsys.readouterr().out) and "changed" not in told
    cut_back(folder, 1)
    stages.start(config)
    assert "resumed" in (told := capsys.readouterr().out) and "changed" not in told


def test_settings_without_effect_are_told(grpo, capsys):
    policy = PolicyConfig(loss="cispo", cap=5.0, epsilon_high=0.3, kl_horizon=5.0, max_kl=0.5)
    rollout = {"correction_cap": 3.0, "server_model": "x"}
    check_effect(grpo(policy=policy, rollout=rollout, critic=CriticConfig(gamma=0.9), data={"loader_workers": 2}))
    told = capsys.readouterr().out
    for words in (
        "rollout.server_model x (rollout.server is empty)", "rollout.correction_cap 3.0 (rollout.correction is none)",
        "critic.gamma 0.9 (policy.advantage is not gae)", "policy.epsilon_high 0.3 (they are of policy.loss clip)",
        "policy.kl_horizon 5.0 (policy.beta is 0)", "policy.max_kl 0.5 (each rollout is trained on in one step",
        "data.loader_workers 2",
    ):  # fmt: skip
        assert f"without effect: {words}" in told or words in told
    check_effect(GRPOConfig())
    check_effect(PPOConfig())
    assert "critic" not in capsys.readouterr().out
