"""The report says what the metrics say."""

import json

import pytest

from minimind_jax.config.sections import TrackingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.errors import UserError
from minimind_jax.runs.report import draw_losses, not_default, report_text, smoothed, verdict, write_report
from minimind_jax.stages import STAGES
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import MetricsWriter
from minimind_jax.training.watch import Watch


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "mine").create()
    run.write_config(PretrainConfig(seed=77))
    run.write_environment({"stage": "pretrain", "model": "1.2M parameters", "packing_efficiency": "99.1%"})
    with MetricsWriter(run, TrackingConfig(), start_step=0, settings={}) as writer:
        writer.write(0, val_loss=8.0, val_bits_per_byte=4.0)
        writer.write(0, samples=[{"prompt": "Once", "text": " ```x"}])
        for step in range(1, 41):
            speed = {"tokens_per_second": 100.0 + step, "seconds": float(step)} if step > 1 else {}
            writer.write(step, loss=8 - step / 10, learning_rate=1e-3, tokens=10 * step, **speed)
        writer.write(40, val_loss=4.0, val_bits_per_byte=2.0)
        writer.write(40, samples=[{"prompt": "Once", "text": " upon a time 从前"}])
    return run


def test_the_report_has_figures_settings_samples_and_the_next_command(run):
    text = write_report(run, STAGES).read_text("utf-8")
    for expected in (
        "# Run mine",
        "![loss](loss.png)",
        "| validation bits per byte | 4.0000 → 2.0000 (50.0% of the start) |",
        "| training loss | 7.9000 → 4.0000 |",
        "| trained tokens | 400 |",
        "| speed (median) | 121 tokens/s, padding not counted |",
        "| time | 0:00:40 |",
        "| packing efficiency | 99.1% |",
        "| 40 | 4.0000 | 2.0000 |",
        "upon a time 从前",
        "````\n> Once\n ```x\n````",
        "seed: 77",
        "resume it",
    ):
        assert expected in text
    (run.model).mkdir()
    (run.model / "config.json").write_text("{}")
    assert f"minimind chat --model {run.model}" in write_report(run, STAGES).read_text("utf-8")


def test_the_picture_is_drawn(run):
    write_report(run, STAGES)
    picture = run.loss_picture.read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_a_run_without_validation_has_a_report_too(run):
    rows = [line for line in run.metrics_file.read_text("utf-8").splitlines() if "val_" not in line]
    run.metrics_file.write_text("\n".join(rows) + "\n", "utf-8")
    assert "Validation" not in write_report(run, STAGES).read_text("utf-8")


@pytest.mark.parametrize("gone", ["drop", "null", "only losses"])
def test_any_row_may_lack_any_number(run, gone):
    """Rows of other versions, of a run that was cut off in its first line, or null for what was not finite."""
    rows = [json.loads(line) for line in run.metrics_file.read_text("utf-8").splitlines()]
    rows[0] |= {"val_accuracy": 0.1}
    rows[2] |= {"accuracy": 0.1}
    numbered = [(place, key) for place in (0, 2) for key in rows[place] if key != "step"]
    for place, key in numbered[:1] if gone == "only losses" else numbered:
        less = [dict(row) for row in rows]
        if gone == "only losses":
            less = [{k: v for k, v in row.items() if k in ("step", "loss")} for row in less]
        elif gone == "drop":
            del less[place][key]
        else:
            less[place][key] = None
        train, val = ([r for r in less if r.get(name) is not None] for name in ("loss", "val_loss"))
        draw_losses(train, val, run.loss_picture, ("accuracy",))
        assert "# Run mine" in report_text(run, STAGES["classify"], {}, less, train, val)


def test_what_the_machine_was_is_told_as_far_as_it_is_known(run):
    for known in ({"run": {"stage": "sft"}}, {"versions": {"jax": "0.7"}, "python": "3.12"}):
        run.environment_file.write_text(json.dumps(known), "utf-8")
        text = write_report(run, STAGES).read_text("utf-8")
    assert "| system | Python 3.12 |\n| versions | jax 0.7 |" in text


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        write_report(RunFolder(tmp_path), STAGES)
    run.metrics_file.unlink()
    with pytest.raises(UserError, match="no training step yet"):
        write_report(run, STAGES)


def test_smoothing_keeps_a_constant_and_never_looks_ahead():
    assert smoothed([2.0] * 50) == [2.0] * 50
    assert smoothed([1.0, 2.0, 3.0], share=0.7) == [1.0, 1.5, 2.5]
    falls = smoothed([8.0] * 50 + [1.0] * 50)
    assert falls[:50] == [8.0] * 50 and 1 < falls[50] < 8 and falls[-1] == 1.0


def curve(*losses, every=100):
    return [{"step": every * place, "val_loss": loss} for place, loss in enumerate(losses)]


@pytest.mark.parametrize(
    "steps, val, chosen, said",
    [
        (4, [], {}, "4 steps: nothing can be learned in so few. No validation data"),
        (
            60,
            curve(5.0, 4.0, every=60),
            {},
            "60 steps: little can be learned in so few. The validation loss fell from 5",
        ),
        (400, [], {}, "No validation data"),
        (400, curve(5.0, 3.0, 2.0, 2.5), {}, "rises since step 200 (2.0000 → 2.5000): it is overfitting; fewer epochs"),
        (400, curve(5.0, 3.0, 2.0, 2.5), {"the model": "of step 200"}, "overfitting; the model is that of that step"),
        (400, curve(5.0, 5.1, 5.2), {}, "did not fall (5.0000 → 5.2000)"),
        (400, curve(5.0, 3.0, 2.0), {}, "The validation loss fell from 5.0000 to 2.0000."),
        (400, curve(2.0)[:1], {}, "taken once"),
    ],
)
def test_the_verdict_stands_at_the_top(steps, val, chosen, said):
    watch = Watch("min loss")
    watch.add_rows(val)
    assert said in verdict([{"step": steps, "loss": 1.0}], val, watch, chosen)


def test_the_report_says_when_with_which_command_and_what_is_not_the_default(run):
    run.write_environment({"stage": "pretrain"})
    text = write_report(run, STAGES).read_text("utf-8")
    assert text.splitlines()[2].startswith("40 steps: little can be learned")
    assert "| date | 20" in text and "| command | `" in text
    settings = text.partition("## Settings")[2]
    assert "seed: 77" in settings and "momentum" not in settings and "resume" not in settings
    assert not_default({"a": {"b": 1}, "c": 2}, {}) == {"a": {"b": 1}, "c": 2}


def test_what_an_earlier_version_kept_of_other_stages_is_no_setting_of_the_run(run):
    train = [{"step": 1, "loss": 1.0}]
    config = {"data": {"packing": "best_fit"}, "samples": {"top_p": 1.0, "temperature": 0.5}}
    settings = report_text(run, STAGES["classify"], config, train, train, []).partition("## Settings")[2]
    assert "temperature: 0.5" in settings and "packing" not in settings and "top_p" not in settings
