"""The live policy as a writer: its tokens, its log-probabilities, and what it forgets between two loads."""

import dataclasses
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.sections import MeshConfig
from minimind_jax.inference.request import Request
from minimind_jax.losses.vocabulary import token_scores
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.lora import init_adapters, join, make_adapter
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.rl.policy import LocalPolicy
from minimind_jax.sharding import init_params, initialize_distributed, make_mesh, param_shardings

DENSE = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=160,
    max_position_embeddings=256, initializer_range=0.3,
)  # fmt: skip
RANKS = {"q_proj": (4, 4), "down_proj": (2, 4)}
MIXTURE = dataclasses.replace(DENSE, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
CONTEXT = 128


@functools.cache  # called once the processes know each other
def model_of(name):
    adapter = make_adapter(RANKS) if name == "adapters" else None
    return LanguageModel(MIXTURE if name == "mixture" else DENSE, ComputeConfig(dtype="float32"), adapter)


def policy_of(model, mesh=None, slots=4):
    return LocalPolicy(
        model, None, mesh or make_mesh(MeshConfig(), jax.local_devices()[:1]), slots=slots, context=CONTEXT
    )


def params_of(model, seed=0, mesh=None):
    """As a run holds them: float32, cut over the mesh, adapters that change something, and other models beside them."""
    mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    params = init_params(model, jax.random.key(seed), mesh)
    if model.adapter:
        base = dataclasses.replace(model, adapter=None)
        adapters = init_adapters(jax.random.key(1), base.abstract_params(), RANKS, 8.0, False)
        adapters = jax.tree.map(lambda x: x + 0.05 if x.ndim == 3 else x, adapters)
        tree = join(init_params(base, jax.random.key(seed), mesh), adapters)
        params = jax.device_put(tree, param_shardings(mesh, model.logical_axes(), model.abstract_params()))
    return {**params, "critic": {"weight": jnp.zeros(3)}, "reference": {"embed": jnp.ones(2)}}


def groups(prompts=4, completions=3, temperature=1.0, new=12, seed=0, longest=60):
    """Requests of a rollout: completions of the same prompts, each with a seed of its own."""
    random, seeds = np.random.default_rng(seed), itertools.count(100 * seed)
    asked = []
    for length in random.integers(1, longest, prompts):
        prompt = tuple(random.integers(3, 160, length).tolist())
        asked += [
            Request(prompt, SamplingConfig(new, temperature, top_k=0, top_p=1.0, seed=next(seeds)))
            for _ in range(completions)
        ]
    return asked


def write(engine, requests, turns=2):
    """The answers, and a second turn behind those that ended first; (prompt, tokens, log-probabilities) of each."""
    answers, further = [engine.submit(request) for request in requests], {}
    while engine.busy:
        for answer in engine.step(patient=True):
            if answer.finish_reason and len(answer.request.prompt) < 70 and turns > 1 and answer not in further:
                prompt = (*answer.request.prompt, *answer.ids, 5, 6, 7)
                further[answer] = engine.submit(dataclasses.replace(answer.request, prompt=prompt))
    every = [*answers, *(further[answer] for answer in answers if answer in further)]
    return [(answer.request.prompt, answer.ids, [t.sampled_logprob for t in answer.tokens]) for answer in every]


def gaps(model, params, written, temperature):
    """The sampler's log-probabilities less those of the trainer, which reads all of each row at once."""
    tokens, starts = np.zeros((len(written), CONTEXT + 1), np.int32), [len(prompt) for prompt, _, _ in written]
    for row, (prompt, ids, _) in zip(tokens, written, strict=True):
        row[: len(prompt) + len(ids)] = *prompt, *ids
    lengths = [start + len(ids) for start, (_, ids, _) in zip(starts, written, strict=True)]

    @jax.jit
    def score(params, batch, targets_BT):
        hidden_BTD = model.read_batch(params, batch).hidden_BTD
        kernel_VD = model.head_kernel(params)
        return token_scores(hidden_BTD, kernel_VD, targets_BT, model.platform, temperature).log_probs_BT

    found_BT = np.asarray(score(params, {"tokens": tokens[:, :-1], "lengths": np.array(lengths)}, tokens[:, 1:]))
    own = [row[start - 1 : length - 1] for row, start, length in zip(found_BT, starts, lengths, strict=True)]
    return np.concatenate(own) - np.concatenate([log_probs for _, _, log_probs in written])


@pytest.mark.slow
@pytest.mark.parametrize("name, temperature", [("dense", 0.7), ("mixture", 1.3), ("adapters", 1.0)])
def test_log_probabilities_are_those_that_the_trainer_finds(name, temperature):
    """Over shared prompts, prompts read in parts, and second turns that follow what the cache holds."""
    model = model_of(name)
    params = params_of(model)
    written = write(policy_of(model).load(params), groups(temperature=temperature, longest=90))
    assert len(written) > 12
    assert np.abs(gaps(model, params, written, temperature)).max() < 1e-4
    assert np.abs(gaps(model, params, written, 1.1 * temperature)).max() > 1e-2


@pytest.mark.slow
def test_answers_do_not_depend_on_what_was_written_before():
    """To the last bit: a run that was killed and goes on must end as one that was not."""
    model, requests = model_of("dense"), groups()
    params, earlier = params_of(model), params_of(model, seed=1)
    fresh = write(policy_of(model).load(params), requests)
    policy = policy_of(model)
    write(policy.load(earlier), groups(prompts=9, seed=1), turns=1)
    engine = policy.load(earlier)
    write(engine, groups(prompts=1, completions=1, seed=2))
    write(engine, requests)
    for request in requests[:5]:
        engine.submit(request)
    engine.step()
    for _ in range(2):
        for answer in list(engine._tasks):
            engine.cancel(answer)
        assert policy.load(params) is engine
        assert write(engine, requests) == fresh
        write(engine, groups(seed=3))


@pytest.mark.slow
def test_the_compiler_of_a_gpu_is_told_of_deterministic_in_all_that_writes_and_scores(tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    script = Path(__file__).with_name("fixed_order.py")
    environ = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": flags}
    subprocess.run([sys.executable, script], env={**os.environ, **environ}, check=True)
    told = {file.name.split(".")[1]: file.read_text() for file in tmp_path.glob("*.debug_options")}
    programs = {"jit_read", "jit_choose", "jit_make", "jit_score"}
    assert programs <= told.keys()
    assert {name for name, text in told.items() if "xla_gpu_deterministic_ops: true" in text} == programs


# Over a mesh, and in two processes: this file is run with what it is to do --------------------------------------------


def started(*arguments, **environ):
    return subprocess.Popen(
        [sys.executable, __file__, *arguments], env={**os.environ, "JAX_PLATFORMS": "cpu", **environ},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def reported(process):
    told, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return json.loads(told.splitlines()[-1])


def main(name: str, **axes: int) -> None:
    """Writes the groups of this process, and prints them with the largest gap to the trainer."""
    initialize_distributed()
    model, mesh = model_of(name), make_mesh(MeshConfig(**axes))
    params, asked = params_of(model, mesh=mesh), groups()
    share = len(asked) // jax.process_count()
    written = write(policy_of(model, mesh, slots=8).load(params), asked[jax.process_index() * share :][:share], turns=1)
    whole = params_of(model)
    print(json.dumps([written, float(np.abs(gaps(model, whole, written, 1.0)).max())]))


def same_as_alone(name, parts):
    alone = write(policy_of(model_of(name)).load(params_of(model_of(name))), groups(), turns=1)
    written = [row for rows, gap in parts for row in rows if gap < 1e-4]
    assert [ids for _, ids, _ in written] == [ids for _, ids, _ in alone]
    for (_, _, own), (_, _, expected) in zip(written, alone, strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-4)


MESHES = [
    ("adapters", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("dense", {"data": 1, "fsdp": 8}),
    ("mixture", {"data": 2, "tensor": 2, "expert": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, axes", MESHES)
def test_eight_devices_write_what_one_does(name, axes):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    same_as_alone(name, [reported(started(name, json.dumps(axes), XLA_FLAGS=flags))])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_write_what_one_does(devices):
    """Each writes half of the groups, with parameters that are cut over both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environ = {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
    }  # fmt: skip
    axes = json.dumps({"data": 1, "fsdp": 2 * devices})
    both = [started("adapters", axes, JAX_PROCESS_ID=str(number), **environ) for number in range(2)]
    same_as_alone("adapters", [reported(process) for process in both])


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
