"""Who is answered when, and in which row: without a model."""

import dataclasses

import pytest

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.inference.request import Answer, Busy, Request, Token
from minimind_jax.inference.scheduler import Scheduler, Task, common


def task_of(ids, count=4, adapter=""):
    return Task(
        Answer(Request(tuple(ids), SamplingConfig(max_new_tokens=count), adapter=adapter), (), None),
        list(ids),
        list(ids),
    )


def read(task):
    """As the engine does: the whole prompt, and the first token."""
    task.row.held = list(task.ids)
    task.answer.add(Token(1, 0.0))
    task.add(1)


def finish(scheduler, task):
    read(task)
    scheduler.drop(task)


def added(scheduler, *tasks):
    for task in tasks:
        scheduler.add(task)
    return tasks


def test_rows_go_to_those_that_wait_longest_and_no_more_than_slots():
    scheduler = Scheduler(slots=2, rows=3)
    tasks = added(scheduler, *(task_of([n]) for n in range(4)))
    assert scheduler.admit() == []
    assert scheduler.at_work == list(tasks[:2]) and list(scheduler.waiting) == list(tasks[2:])
    finish(scheduler, tasks[1])
    scheduler.admit()
    assert set(map(id, scheduler.at_work)) == {id(tasks[0]), id(tasks[2])}


def test_a_full_queue_refuses_and_a_cancelled_task_makes_room():
    scheduler = Scheduler(slots=1, rows=1, queue=2)
    added(scheduler, task_of([0]))
    scheduler.admit()
    first, second = added(scheduler, task_of([1]), task_of([2]))
    with pytest.raises(Busy, match="2 requests wait"):
        scheduler.add(task_of([3]))
    scheduler.drop(first)
    third = task_of([3])
    scheduler.add(third)
    assert list(scheduler.waiting) == [second, third]


@pytest.mark.parametrize("queue", [0, 1, 3])
def test_slots_that_are_free_are_no_part_of_the_queue(queue):
    scheduler = Scheduler(slots=2, rows=0, queue=queue)
    added(scheduler, *(task_of([n]) for n in range(2 + queue)))
    with pytest.raises(Busy, match=f"{queue} requests wait"):
        scheduler.add(task_of([9]))


def test_the_next_turn_takes_the_row_of_the_last_in_place():
    scheduler = Scheduler(slots=2, rows=2)
    (first,) = added(scheduler, task_of(range(40)))
    scheduler.admit()
    row = first.row
    finish(scheduler, first)
    (second,) = added(scheduler, task_of([*range(40), 90, 91]))
    assert scheduler.admit() == []
    assert second.row is row and second.answer.cached_tokens == 40 and second.unread == 2


def test_a_prompt_that_is_held_whole_but_for_its_last_token_is_not_read():
    scheduler = Scheduler(slots=1, rows=1)
    for _ in range(2):
        (task,) = added(scheduler, task_of(range(40)))
        scheduler.admit()
        unread = task.unread
        finish(scheduler, task)
    assert unread == 0 and task.answer.cached_tokens == 39


def test_the_beginning_of_a_row_at_work_or_of_a_longer_one_is_copied():
    scheduler = Scheduler(slots=3, rows=3)
    (first,) = added(scheduler, task_of(range(100)))
    scheduler.admit()
    read(first)
    (second,) = added(scheduler, task_of([*range(30), 7, 8]))
    [copy] = scheduler.admit()
    assert copy == (first.row.number, second.row.number, 30) and second.row.held == list(range(30))
    row = first.row
    scheduler.drop(first)
    finish(scheduler, second)
    (third,) = added(scheduler, task_of([*range(20), 5]))
    assert scheduler.admit() == [] and third.row is not row  # 20 of the 32 tokens that the second left
    assert row.held == list(range(100))


def test_a_prefix_of_another_adapter_is_not_used():
    scheduler = Scheduler(slots=1, rows=1)
    (first,) = added(scheduler, task_of(range(40)))
    scheduler.admit()
    finish(scheduler, first)
    (second,) = added(scheduler, task_of(range(40), adapter="mine"))
    scheduler.admit()
    assert second.answer.cached_tokens == 0 and second.unread == 40


def test_without_reuse_every_prompt_is_read_whole():
    scheduler = Scheduler(slots=2, rows=2, reuses=False)
    for _ in range(2):
        (task,) = added(scheduler, task_of(range(40)))
        assert scheduler.admit() == [] and task.unread == 40
        finish(scheduler, task)


def test_the_row_used_least_recently_is_taken():
    scheduler = Scheduler(slots=1, rows=3)
    rows = []
    for start in (0, 100, 200, 0):
        (task,) = added(scheduler, task_of(range(start, start + 40)))
        scheduler.admit()
        rows.append(task.row.number)
        finish(scheduler, task)
    assert rows[3] == rows[0] and len(set(rows)) == 3
    (task,) = added(scheduler, task_of(range(300, 310)))
    scheduler.admit()
    assert task.row.number == rows[1]


def test_equal_prompts_wait_for_the_first_of_them_and_others_pass():
    scheduler = Scheduler(slots=4, rows=4)
    first, second, third, other = added(scheduler, *(task_of(range(40)) for _ in range(3)), task_of(range(500, 540)))
    scheduler.admit()
    assert set(map(id, scheduler.at_work)) == {id(first), id(other)}
    read(first)
    copies = scheduler.admit()
    assert [copy.count for copy in copies] == [39, 39] and {second.unread, third.unread} == {0}


def test_few_of_many_that_wait_are_looked_at_for_a_row():
    scheduler = Scheduler(slots=2, rows=2)
    same = added(scheduler, *(task_of(range(40)) for _ in range(100)))
    (other,) = added(scheduler, task_of(range(500, 540)))
    scheduler.admit()
    assert scheduler.at_work == [same[0]] and other in scheduler.waiting and len(scheduler.next) < 10
    for task in same[:99]:
        finish(scheduler, task)
        scheduler.admit()
    assert other in scheduler.at_work


def test_what_is_cleared_begins_anew():
    scheduler = Scheduler(slots=1, rows=1)
    added(scheduler, task_of(range(40)), task_of(range(40)))
    scheduler.admit()
    read(scheduler.at_work[0])
    scheduler.clear()
    assert not scheduler.at_work and not scheduler.waiting
    (task,) = added(scheduler, task_of(range(40)))
    scheduler.admit()
    assert task.unread == 40


def test_prompts_are_read_in_the_order_they_came():
    scheduler = Scheduler(slots=4, rows=4)
    tasks = added(scheduler, *(task_of(range(n, n + length)) for n, length in ((0, 300), (300, 20), (600, 90))))
    scheduler.admit()
    assert scheduler.reading == list(tasks) and scheduler.running == []
    tasks[1].row.held = tasks[1].ids[:19]
    assert [task.unread for task in scheduler.reading] == [300, 1, 90]
    read(tasks[0])
    assert scheduler.reading == list(tasks[1:]) and scheduler.running == [tasks[0]]


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_common_beginning(length):
    a = list(range(250))
    assert common(a, [*range(length), -1, *range(300)]) == common([*range(length), -1], a) == length
    assert common(a, a[:length]) == length


def test_of_those_that_wait_one_of_a_higher_priority_goes_first():
    scheduler = Scheduler(slots=1, rows=1)
    at_work, low, high, higher, high_too = tasks = [task_of([n]) for n in range(5)]
    for task, priority in zip(tasks, (0, 0, 1, 2, 1), strict=True):
        task.answer.request = dataclasses.replace(task.answer.request, priority=priority)
        scheduler.add(task)
        scheduler.admit()
    assert scheduler.at_work == [at_work] and list(scheduler.waiting) == [higher, high, high_too, low]
