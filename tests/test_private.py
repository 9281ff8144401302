"""What is taken of other libraries' insides: one that has moved is told by its name, wherever it is needed."""

import jax
import jax.numpy as jnp
import pytest

from minimind_jax.errors import UserError
from minimind_jax.model import fused_attention as fused
from minimind_jax.model.attention import choose_path
from minimind_jax.plan import compile as compiler
from minimind_jax.plan.devices import find_device, parse_topology
from minimind_jax.private import private_module
from minimind_jax.training.stop import Notice

CUDNN = "jax._src.cudnn.fused_attention_stablehlo"


@pytest.mark.parametrize("where", ["jax._src.no_such", "jax._src.distributed"])
def test_a_module_or_a_name_that_has_moved_is_told_with_a_release_that_has_it(where):
    with pytest.raises(UserError) as told:
        private_module(where, "State.client", "no_such.name")
    for words in (f"jax {jax.__version__} has no longer", where, "no_such", "install a release of jax", "0.12.0.1"):
        assert words in str(told.value)
    assert private_module("jax._src.distributed", "State.initialize", "global_state.client").global_state.client is None


def test_only_what_needs_it_fails(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.delattr(private_module(CUDNN), "MaskType")
    shape = (8, 64, 8, 96), 4, jnp.bfloat16, "gpu"
    with pytest.raises(UserError, match=rf"{CUDNN} with .*PADDING_CAUSAL"):
        choose_path("cudnn_packed", *shape)
    assert choose_path("auto", *shape).path == "cudnn"


def test_a_plan_for_a_gpu_needs_the_question_for_what_it_can_do(monkeypatch):
    monkeypatch.delattr(private_module(CUDNN), "check_compute_capability")
    for name, topology in (("h100", "1"), ("tpu-v5e", "1x1")):
        device = find_device(name)
        if device.platform == "cuda":
            with pytest.raises(UserError, match="with check_compute_capability"):
                compiler.emulated_devices(device, parse_topology(device, topology))
        else:
            compiler.emulated_devices(device, parse_topology(device, topology))


def test_rollouts_of_several_processes_need_the_notice_of_one_that_is_to_stop(monkeypatch):
    monkeypatch.delattr(private_module("jax._src.distributed"), "global_state")
    assert not Notice()()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"jax\._src\.distributed with global_state\.client\.key_value_try_get"):
        Notice()


def test_tokamax_is_asked_for_below_its_public_functions(monkeypatch):
    pytest.importorskip("tokamax", reason="needs tokamax (Python 3.12 or newer)")
    monkeypatch.delattr(private_module("tokamax._src.ops.attention.base"), "Mask")
    with pytest.raises(UserError, match=r"tokamax .* with Mask"):
        fused.tokamax_obstacle(96)
