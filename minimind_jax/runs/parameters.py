"""The parameters of a run: where they come from, and which of them are trained."""

import jax

from minimind_jax.convert.hf import load_hf, load_labels
from minimind_jax.convert.load import base_folder, load_merged
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter
from minimind_jax.model.heads import SCORE, head_axes, init_head
from minimind_jax.model.transformer import Params
from minimind_jax.model.vocabulary import grow_vocabulary
from minimind_jax.runs.adapters import frozen_dtype, load_with_adapters
from minimind_jax.runs.labels import differing
from minimind_jax.runs.parts import Run
from minimind_jax.seeds import named_key
from minimind_jax.sharding import announce, init_params, param_shardings
from minimind_jax.training.state import Parameters


def run_parameters(run: Run) -> Parameters:
    """What the run trains: the parameters of the model it starts from, or drawn from the seed, or adapters over them;
    and the head of scores of a stage that has one."""
    config, model, mesh = run.config, run.model, run.mesh
    if run.start is None:
        return Parameters.of(model, lambda: init_params(model, named_key(config.seed, "init"), mesh))
    dtype = frozen_dtype(config, model)

    def load() -> Params:
        if run.adapters is None:
            _, params = load_merged(run.start)
            params = grow_vocabulary(params, model.config.vocab_size, named_key(config.seed, "new words"))
        else:
            params = load_with_adapters(config, run.adapters, dtype)
        if SCORE in params and not run.kind.has_head:
            raise UserError(f"init_from {config.init_from} is a classifier or reward model, and cannot write text")
        params = {name: tree for name, tree in params.items() if name in parameters.abstract}
        return jax.device_put(params, param_shardings(mesh, parameters.axes, parameters.abstract))

    parameters = Parameters.of(model, load, dtype)
    return _with_head(run, parameters) if run.kind.has_head else parameters


def _with_head(run: Run, parameters: Parameters) -> Parameters:
    """With a head of the run's labels: the one of the model it starts from if it has the same, or a new one, and then
    what is left out is told."""
    wanted, width = run.labels, run.model.config.hidden_size
    abstract = jax.eval_shape(lambda: init_head(jax.random.key(0), width, len(wanted.names)))[SCORE]
    axes = head_axes()[SCORE]

    def load(_: Params) -> Params:
        folder = base_folder(run.start) if is_adapter(run.start) else run.start
        found = load_labels(folder)
        if found is not None and (other := differing(found, wanted)):
            announce(f"the head of {folder} is left out, and a new one trained: {other}")
        elif found is not None:
            order = [found.names.index(name) for name in wanted.names] if len(wanted.names) > 1 else [0]
            head = {name: array[..., order] for name, array in load_hf(folder)[1][SCORE].items()}
            return jax.device_put(head, param_shardings(run.mesh, axes, abstract))
        head = init_head(named_key(run.config.seed, "head"), width, len(wanted.names))[SCORE]
        return jax.device_put(head, param_shardings(run.mesh, axes, abstract))

    return parameters.adding(SCORE, abstract, axes, load, is_trained=True)
