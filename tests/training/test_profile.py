"""A trace of a window of steps, with the model's and the step's scopes in it."""

import gzip

import jax
import pytest

from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder


@pytest.mark.slow
def test_a_trace_of_some_steps_names_the_blocks(world, tmp_path, capsys):
    config = world.pretrain(tmp_path / "run", training={"steps": 6, "profile_steps": 2, "profile_start": 2})
    jax.clear_caches()  # what a cache kept from another test may lack its names
    start(config)
    run = RunFolder(config.run)
    (trace,) = (run.path / "profile").rglob("*.xplane.pb")
    names = trace.read_bytes()
    for scope in (b"attention", b"mlp", b"embed", b"head", b"loss", b"clip", b"optimizer"):
        assert b"/" + scope + b"/" in names or b"(" + scope + b")" in names, scope
    (perfetto,) = (run.path / "profile").rglob("perfetto_trace.json.gz")
    steps = gzip.decompress(perfetto.read_bytes()).decode()
    assert [f'"step_num": "{step}"' in steps for step in range(1, 7)] == [False, False, True, True, False, False]
    said = capsys.readouterr().out
    assert "perfetto_trace.json.gz" in said and "step 1, the first here, was done" in said


def test_a_run_that_ends_before_its_trace_begins_says_so(world, tmp_path, capsys):
    config = world.pretrain(tmp_path / "run", training={"steps": 2, "profile_steps": 2, "profile_start": 5})
    start(config)
    assert "no trace was written: the run ended before step 6" in " ".join(capsys.readouterr().out.split())
