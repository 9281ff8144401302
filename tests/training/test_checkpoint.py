"""Checkpoints come back bit for bit, the right ones are kept, and a failed save harms nothing."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from minimind_jax.errors import UserError
from minimind_jax.paths import absolute
from minimind_jax.training import checkpoint
from minimind_jax.training.checkpoint import Checkpoints, flatten, load_params
from minimind_jax.training.checkpoint_files import CHECKSUMS, damage
from minimind_jax.training.run import RunFolder
from minimind_jax.training.watch import Watch


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple


def make_state(seed=0, width=64):
    kernel, bias = jax.random.split(jax.random.key(seed))
    params = {"layer": {"kernel": jax.random.normal(kernel, (32, width))}, "bias": jax.random.normal(bias, (width,))}
    return State(jnp.int32(seed), params, (jax.tree.map(jnp.zeros_like, params), ()))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def save_all(folder, steps, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"tokens": step})


def test_state_and_record_come_back_bit_for_bit(tmp_path):
    state = make_state(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {"tokens": 12, "data": {"key": "ä", "rows": [1, 2]}})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [7]
        assert checkpoints.record(7) == {"tokens": 12, "data": {"key": "ä", "rows": [1, 2]}}
        restored = checkpoints.restore(7, abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(restored, state)


def test_training_goes_on_during_a_save_without_changing_what_is_saved(tmp_path):
    add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = make_state(width=200_000)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(10):
            state = add(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        assert_same(checkpoints.restore(1, abstract(state)), expected)


def test_the_newest_and_the_best_are_kept(tmp_path):
    # A run saves before it evaluates: the loss of a checkpoint becomes known after its save.
    watch = Watch("min loss")
    with Checkpoints(tmp_path, keep=2, best=watch.best) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None), (6, 4.0)):
            checkpoints.save(step, make_state(step), {})
            if loss is not None:
                watch.add(step, {"loss": loss})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [2, 5, 6]
        assert_same(checkpoints.restore(2, abstract(make_state())), make_state(2))


def test_what_a_kill_or_the_last_evaluation_leaves_is_made_good_at_the_end(tmp_path):
    """A kill right behind a save: no checksums yet, and the one that it supersedes is still there. A run that goes on
    from there saves nothing more; its last evaluation finds another best."""
    watch = Watch("min loss")
    for step, loss in ((1, 2.0), (2, 3.0)):
        watch.add(step, {"loss": loss})
    save_all(tmp_path, [1, 2, 3], keep=3)
    (tmp_path / "3" / CHECKSUMS).unlink()
    with Checkpoints(tmp_path, keep=1, best=watch.best) as checkpoints:
        watch.add(3, {"loss": 1.0})
        checkpoints.tidy()
        assert checkpoints.steps == [3]
    assert os.listdir(tmp_path) == ["3"] and damage(tmp_path / "3") == ""


def test_checksums_that_cannot_be_written_condemn_no_checkpoint(tmp_path, monkeypatch, capsys):
    save_all(tmp_path, [3])
    (tmp_path / "3" / CHECKSUMS).unlink()

    def full(self, text, **_):
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError("No space left on device")

    with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", full)
        checkpoints.tidy()
    assert "No space left" in capsys.readouterr().out
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() == 3
        checkpoints.tidy()
    assert damage(tmp_path / "3") == ""


def test_one_that_was_taken_away_by_hand_during_the_run_is_no_failure(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {"n": 1})
        checkpoints.wait()
        shutil.rmtree(tmp_path / "1")
        checkpoints.save(2, make_state(2), {"n": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_without_validation_only_the_newest_are_kept(tmp_path):
    save_all(tmp_path, range(1, 5), keep=1)
    assert sorted(os.listdir(tmp_path)) == ["4"]


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {"n": 1})
        checkpoints.save(1, make_state(2), {"n": 2})
        assert checkpoints.record(1) == {"n": 1}


def test_a_half_written_checkpoint_is_removed(tmp_path):
    save_all(tmp_path, [1])
    half = tmp_path / "2.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    (half / "d").write_bytes(b"x" * 100)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
        checkpoints.save(2, make_state(2), {})
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(params={**s.params, "bias": jnp.zeros(65)}), r"params\.bias has shape \(64,\) there and"),
        (lambda s: s._replace(params={**s.params, "head": jnp.zeros(2)}), r"params\.head is not in it and"),
        (lambda s: s._replace(opt_state=()), r"opt_state\.0\.bias has shape \(64,\) there and does not exist here"),
    ],
)
def test_a_checkpoint_of_another_model_names_the_first_tensor_that_differs(tmp_path, change, message):
    save_all(tmp_path, [1])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(1, abstract(change(make_state())))


@pytest.mark.parametrize("emptied", ["_CHECKPOINT_METADATA", "state/manifest.ocdbt", "state/d", "*"])
def test_a_damaged_checkpoint_is_told_with_the_one_before_it(tmp_path, emptied, caplog):
    save_all(tmp_path, [1, 2])
    for path in (tmp_path / "2").glob(emptied):
        for file in [path, *path.rglob("*")]:
            if file.is_file():
                file.write_bytes(b"")
    message = r"2 cannot be read: .*; if it is damaged, remove that folder: the one of step 1 is used$"
    with pytest.raises(UserError, match=message) as told, Checkpoints(tmp_path) as checkpoints:
        checkpoints.record(2)
        checkpoints.restore(2, abstract(make_state()))
    assert "\n" not in str(told.value) and not caplog.text
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(1, abstract(make_state())), make_state(1))


def alter(folder, keep_size=True):
    """Other bytes in the middle of a checkpoint's largest file, as a bad disk leaves them."""
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content if keep_size else content[:-1])


@pytest.mark.parametrize("keep_size", [True, False])
def test_altered_bytes_are_told_and_the_checkpoint_before_is_used_until_the_step_is_saved_anew(
    tmp_path, capsys, keep_size
):
    save_all(tmp_path, [1, 2])
    alter(tmp_path / "2", keep_size)
    with pytest.raises(UserError, match=r"2 cannot be read: .* of its file|2 cannot be read: its file .* bytes in pl"):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.restore(2, abstract(make_state()))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() == 1 and checkpoints.steps == [1]
        assert "2 cannot be read: " in capsys.readouterr().out
        assert_same(checkpoints.restore(1, abstract(make_state())), make_state(1))
        checkpoints.save(2, make_state(5), {"n": 5})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() == 2
        assert_same(checkpoints.restore(2, abstract(make_state())), make_state(5))


@pytest.mark.parametrize(("step", "other"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("name", ["state/_METADATA", CHECKSUMS])
def test_a_file_that_cannot_be_opened_is_damage_and_another_checkpoint_is_named(tmp_path, name, step, other):
    save_all(tmp_path, [1, 2])
    (tmp_path / str(step) / name).unlink()
    (tmp_path / str(step) / name).mkdir() if name == CHECKSUMS else (tmp_path / str(step) / name).symlink_to("gone")
    with pytest.raises(UserError, match=rf"{name}: .*; if .* the one of step {other} is used"):
        load_params(tmp_path / str(step), abstract(make_state()).params)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() == (1 if step == 2 else 2)


def test_without_a_sound_checkpoint_nothing_starts_anew(tmp_path):
    save_all(tmp_path, [1, 2])
    for step in "12":
        alter(tmp_path / step)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="there is none before it"):
        checkpoints.newest()


def test_a_checkpoint_without_checksums_is_used_with_a_word(tmp_path, capsys):
    save_all(tmp_path, [1, 2])
    (tmp_path / "2" / CHECKSUMS).unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() == 2
        assert_same(checkpoints.restore(2, abstract(make_state())), make_state(2))
    assert capsys.readouterr().out.count(f"no {CHECKSUMS}") == 1


@pytest.mark.parametrize("name", ["exp[lr=3e-3]", "[a-z]*?/run", "50% #1 é\n漢{x} ...", "-" + "n" * 200])
def test_any_folder_name_holds_checkpoints(tmp_path, name):
    folder = RunFolder(tmp_path / name).create().checkpoints
    save_all(folder, [1, 2], keep=1)
    assert os.listdir(folder) == ["2"]
    with Checkpoints(folder) as checkpoints:
        assert_same(checkpoints.restore(2, abstract(make_state())), make_state(2))


@pytest.mark.parametrize("name", ["a\\b", "a\\b/run", os.fsdecode(b"\xff")])
def test_a_folder_that_cannot_hold_checkpoints_is_refused_before_anything_is_made(tmp_path, name):
    with pytest.raises(UserError, match="checkpoints cannot be saved there; rename"):
        RunFolder(tmp_path / name).create()
    assert not os.listdir(tmp_path)


def test_a_save_that_cannot_be_read_back_removes_no_older_one(tmp_path, monkeypatch):
    folder = tmp_path / "exp[1]"
    save_all(folder, [1], keep=1)
    monkeypatch.setattr(checkpoint, "orbax_path", absolute)  # Orbax alone takes the name for a pattern
    with pytest.raises(UserError, match=r"cannot be read back.*checkpoint"):
        save_all(folder, [2], keep=1)
    monkeypatch.undo()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest() == 1
        assert_same(checkpoints.restore(1, abstract(make_state())), make_state(1))


def test_names_are_dotted_paths():
    assert list(flatten(make_state())) == [
        "step", "params.bias", "params.layer.kernel", "opt_state.0.bias", "opt_state.0.layer.kernel"
    ]  # fmt: skip


RESTORE_ON_EIGHT = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from minimind_jax.training.checkpoint import Checkpoints
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
with Checkpoints(sys.argv[1]) as checkpoints:
    restored = checkpoints.restore(1, {"w": jax.ShapeDtypeStruct((4, 6), np.float32, sharding=sharding)})
    assert len(restored["w"].sharding.device_set) == 8 and restored["w"].addressable_shards[0].data.shape == (4, 3)
    np.testing.assert_array_equal(restored["w"], np.arange(24, dtype=np.float32).reshape(4, 6))
    checkpoints.save(2, {"w": restored["w"] + 1}, {})
"""


def test_restoring_onto_another_number_of_devices_and_back(tmp_path):
    values = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": values}, {})
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", RESTORE_ON_EIGHT, str(tmp_path)], env=environment, check=True, timeout=120)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    sharding = NamedSharding(mesh, PartitionSpec())
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(2, {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=sharding)})
    np.testing.assert_array_equal(restored["w"], values + 1)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_reported_and_the_old_checkpoint_is_intact(tiny_disk, caplog):
    def random_state(seed):  # does not compress
        return {"w": jax.random.normal(jax.random.key(seed), (400, 1000))}

    folder = tiny_disk / "checkpoints"
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(UserError) as failure,
        Checkpoints(folder, keep=1) as checkpoints,
    ):
        checkpoints.save(1, random_state(1), {"n": 1})
        checkpoints.wait()
        checkpoints.save(2, random_state(2), {"n": 2})
        while True:
            checkpoints.poll()  # what the loop does at every step
            time.sleep(0.01)
    assert "No space left on device" in str(failure.value)
    assert "checkpoint 1 is intact" in str(failure.value)
    assert "run the same command again to resume" in str(failure.value)
    assert os.listdir(folder) == ["1"], "what was written of the failed checkpoint is removed"
    with Checkpoints(folder, keep=1) as checkpoints:
        assert checkpoints.record(1) == {"n": 1}
        assert_same(checkpoints.restore(1, abstract(random_state(1))), random_state(1))
