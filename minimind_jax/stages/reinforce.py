"""Stages that learn from reward: by groups of answers (GRPO and its relatives), with a value model (PPO), and in
episodes with tools (agents)."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp

from minimind_jax.config.rl import CRITIC, AgentConfig, RLConfig
from minimind_jax.convert.load import load_merged
from minimind_jax.errors import UserError
from minimind_jax.losses.policy import make_policy_loss
from minimind_jax.model.heads import SCORE, head_axes
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.paths import as_path
from minimind_jax.rl.environment import SingleTurn, load_environment
from minimind_jax.rl.player import Player, Policy
from minimind_jax.rl.policy import LocalPolicy
from minimind_jax.rl.remote import RemotePolicy
from minimind_jax.rl.rewards import Rewards
from minimind_jax.rl.scoring import Scorer
from minimind_jax.rl.source import Rollouts
from minimind_jax.rl.tasks import read_tasks
from minimind_jax.runs.frozen import Reference
from minimind_jax.runs.parts import Run, on_mesh, run_parameters, start_params, tell_template
from minimind_jax.sharding import announce, data_process
from minimind_jax.training.defaults import filled
from minimind_jax.training.optimizer import Group
from minimind_jax.training.source import Recipe
from minimind_jax.training.state import Parameters


def recipe(run: Run) -> Recipe:
    """Data: prompts; the policy writes the answers. Loss: that of `config.policy` (see `losses.policy`) on rewarded
    rollouts. Trained: all parameters, or adapters; and with advantages by `gae` a value model. Written: the policy."""
    with contextlib.ExitStack() as opened:  # closed by the source, or here where something is wrong
        made = _recipe(run, opened)
        opened.pop_all()
    return made


def _recipe(run: Run, opened: contextlib.ExitStack) -> Recipe:
    config, parameters = run.config, run_parameters(run)
    tell_template(run.tokenizer)
    process = data_process(run.mesh)
    check(config, process[1])
    environment = load_environment(config.agent, run.tokenizer) if isinstance(config, AgentConfig) else SingleTurn()
    opened.callback(environment.close)
    tasks = read_tasks(config, run.tokenizer, getattr(environment, "schemas", ()))
    for note in tasks.notes:
        announce(note)
    reference = critic = None
    if config.policy.beta:
        reference = Reference(run.model, has_own=run.adapters is None or run.adapters.stored is not None)
        parameters = reference.add_to(parameters)
    if config.has_critic:
        critic = LanguageModel(run.model.config, run.model.compute)
        parameters = with_critic(run, parameters, critic)
    told = config.rollout.max_new_tokens, config.seed, config.compute.deterministic
    rewards = opened.enter_context(Rewards(config.rewards, *told))
    for note in rewards.check([*tasks.train, *tasks.held_out]):
        announce(note)
    player = Player(config, run.tokenizer, tasks, policy_of(run, process[1]), environment, rewards, process)
    scorer = Scorer(config, run.mesh, run.model, reference, critic)
    own, rollout = config.policy, config.rollout
    loss_fn = make_policy_loss(
        run.model, temperature=rollout.temperature, critic=critic, value_clip=config.critic.clip, loss=own.loss,
        level=own.level, epsilon_low=own.epsilon_low, epsilon_high=own.epsilon_high, cap=own.cap,
        dual_clip=own.dual_clip, kl_estimator=own.kl_estimator, entropy=own.entropy, correction=rollout.correction,
        correction_cap=rollout.correction_cap,
    )  # fmt: skip
    return Recipe(
        Rollouts(config, player, scorer, run.mesh, run.folder.path),
        loss_fn,
        parameters,
        player if tasks.held_out else None,
        skip_above={"approx_kl": own.max_kl} if own.max_kl else None,
        flops_beside=None,
    )


def check(config: RLConfig, processes: int) -> None:
    """Raises UserError for settings that cannot be together; says what does not hold of the figures then."""
    rollout = config.rollout
    if config.model.dropout or config.lora.dropout:
        raise UserError(
            "model.dropout or lora.dropout is set, and the policy that is trained would be another than the one that "
            "wrote; leave it out"
        )
    if rollout.top_k or rollout.top_p < 1:
        announce(
            "warning: rollout.top_k and top_p leave out tokens in the rollout, and the loss does not know of it: its "
            "log-probabilities are of another distribution (sampling/sampling_logp_difference tells by how much)"
        )
    if rollout.ahead and rollout.server and processes > 1:
        raise UserError(
            f"rollout.ahead with rollout.server is of one process, and there are {processes}; set rollout.ahead 0"
        )
    if rollout.ahead and rollout.correction == "none":
        raise UserError(
            "rollout.ahead writes with older parameters than those it trains; set rollout.correction token or sequence"
        )


def policy_of(run: Run, processes: int) -> Policy:
    """Who writes: an engine on this machine, or a server. Raises UserError."""
    rollout, context = run.config.rollout, run.config.data.seq_len
    if rollout.server:
        folder = rollout.server_model
        if run.start and as_path(folder).resolve() == as_path(run.start).resolve():
            raise UserError(
                f"rollout.server_model {folder} is the model that the run starts from, and would be written over; give "
                "the server a copy of it, and that copy's folder here"
            )
        return RemotePolicy(rollout.server, folder, run.model, run.tokenizer, slots=rollout.slots)
    slots = rollout.slots or -(-rollout.prompts // processes) * rollout.completions
    return LocalPolicy(run.model, run.tokenizer, run.mesh, slots=slots, context=context)


def with_critic(run: Run, parameters: Parameters, critic: LanguageModel) -> Parameters:
    """The parameters with those of the value model, which has an optimizer of its own."""
    wanted, start = run.config.critic, run.models.get("critic.init_from") or run.start
    optimizer = filled(run.config).optimizer
    rate = 2 * optimizer.learning_rate if wanted.learning_rate is None else wanted.learning_rate
    abstract = {**critic.abstract_params(), SCORE: jax.eval_shape(lambda: _no_scores(critic))}
    axes = {**critic.logical_axes(), **head_axes()}

    def load(_: Params) -> Params:
        known = start_params(run) if start == run.start else load_merged(start)[1]
        params = {SCORE: _no_scores(critic), **known}
        if (count := params[SCORE]["kernel"].shape[1]) != 1:
            raise UserError(f"critic.init_from {start} has {count} scores; a value model has one")
        shapes, wanted = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (params, abstract))
        if {name: shapes.get(name) for name in wanted} != wanted:
            raise UserError(
                f"critic.init_from {start} has other sizes or words than the policy, and is to have the same"
            )
        return on_mesh(run.mesh, params, abstract, axes)

    own = dataclasses.replace(optimizer, learning_rate=rate)
    group = Group(CRITIC, lambda path: path[0] == CRITIC, own, wanted.max_grad_norm)
    return parameters.adding(CRITIC, abstract, axes, load, is_trained=True)._replace(groups=(group,))


def _no_scores(critic: LanguageModel) -> Params:
    """A head that foresees nothing."""
    return {"kernel": jnp.zeros((critic.config.hidden_size, 1), jnp.float32)}
