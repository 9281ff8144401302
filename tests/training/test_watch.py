"""Which evaluation is the best, and after which steps there is one."""

import math

import pytest

from minimind_jax.config.sections import CheckpointConfig, LoopConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.training.watch import Timetable, Watch, unwatched


@pytest.mark.parametrize(
    ("watch", "best", "since"), [("min loss", 3, 2), ("max loss", 2, 3)], ids=["the lowest", "the highest"]
)
def test_the_best_is_the_first_of_equals_and_what_is_not_finite_is_the_worst(watch, best, since):
    watch = Watch(watch)
    for step, loss in ((0, 0.1), (1, math.nan), (2, 3.0), (3, 1.0), (4, 1.0)):  # the start is no result
        watch.add(step, {"loss": loss, "accuracy": -loss})
    watch.add_rows([{"step": 5, "val_loss": None}, {"step": 6, "loss": 0.0}])
    assert watch.best([1, 2, 3, 4, 5]) == best and watch.since_best() == since
    assert watch.best([1]) == 1 and watch.best([6]) is None


def test_a_watch_of_no_number_or_direction_is_refused():
    for wrong in ("accuracy", "best loss", "min", "max a b", ""):
        with pytest.raises(ValueError, match="it must be min or max and a name, such as min loss"):
            LoopConfig(watch=wrong)
    assert Watch.of_run({"training": {"watch": "max accuracy"}}, ()).key == "val_accuracy"
    assert Watch.of_run({"training": None}, ()).key == Watch.of_run(None, ()).key == "val_loss"


@pytest.mark.parametrize(("stride", "saved"), [(1, [0, 3, 6, 9, 10]), (2, [0, 4, 6, 10]), (4, [0, 4, 8, 10])])
def test_what_falls_into_a_stride_waits_for_its_end(stride, saved):
    table = Timetable(PretrainConfig(checkpoint=CheckpointConfig(every=3)), 10, stride)
    assert [step for step in range(11) if table.saves(step)] == saved


def test_a_watch_without_validation_is_told():
    told = unwatched(LoopConfig(watch="max accuracy"), has_validation=False)
    assert told.startswith("training.watch max accuracy is without effect: there is no validation (data.val")
    assert unwatched(LoopConfig(watch="max accuracy"), has_validation=True) is None
    assert unwatched(LoopConfig(), has_validation=False) is None
