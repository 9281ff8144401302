"""Who is answered when, and in which row of the cache: decided on the host, without arrays.

A task waits, first come, first served among those of its priority, until a row is free; then its prompt is read, in
chunks, and then it runs: it gets a token at each step. What a finished task leaves in its row stays there, and a prompt
that begins with the same tokens need not read them again; rows that were used least recently are taken first.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from minimind_jax.inference.request import Answer, Busy

SHORTEST_PREFIX = 16  # tokens of another row that are worth a copy
LOOK_AHEAD = 2  # times as many waiting tasks as slots are looked at for the next row


Sign = int | bytes  # a token, or the digest of the picture that it stands for


@dataclasses.dataclass(eq=False)
class Row:
    """A row of the cache. held: signs of the tokens whose keys and values are in it, by this adapter. used: when it was
    last."""

    number: int
    held: list[Sign] = dataclasses.field(default_factory=list)
    adapter: str = ""
    used: int = -1
    task: "Task | None" = None


@dataclasses.dataclass(eq=False)
class Task:
    """An answer in the making. ids: of its prompt, and of what came. signs: the same, with the digest of a picture for
    each of its markers, which look alike whatever it shows. row: of the cache, once it has one."""

    answer: Answer
    ids: list[int]
    signs: list[Sign]
    row: Row | None = None

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are to be read into the cache; 0 when it runs. The newest token of one that runs is
        not in the cache, and so is the last of a prompt of which another row held all the others, if it is a word."""
        left = len(self.ids) - len(self.row.held)
        is_word = isinstance(self.signs[-1], int)
        return 0 if self.answer.tokens or (left == 1 and self.answer.cached_tokens and is_word) else left

    def add(self, token: int) -> None:
        """The next token of the answer."""
        self.ids.append(token)
        self.signs.append(token)


class Copy(NamedTuple):
    """The first `count` tokens of a row belong into another."""

    source: int
    target: int
    count: int


class Scheduler:
    """slots: most tasks that have a row. rows: of the cache, of which those without a task keep what was in them.
    queue: most tasks that wait for a slot; None for any number. reuses: prompts may take what rows hold."""

    def __init__(self, slots: int, rows: int, queue: int | None = None, reuses: bool = True):
        self.slots, self.queue, self.reuses = slots, queue, reuses
        self.rows = [Row(number) for number in range(rows)]
        self.waiting: deque[Task] = deque()
        self._clock = 0

    @property
    def at_work(self) -> list[Task]:
        """The tasks that have a row, in the order of the rows."""
        return [row.task for row in self.rows if row.task]

    @property
    def running(self) -> list[Task]:
        return [task for task in self.at_work if not task.unread]

    def grow(self, rows: int) -> None:
        self.rows += [Row(number) for number in range(len(self.rows), rows)]

    def add(self, task: Task) -> None:
        """Raises Busy when as many wait as may."""
        ahead = len(self.waiting) + len(self.at_work) - self.slots  # of those that wait, free slots are some's already
        if self.queue is not None and ahead >= self.queue:
            raise Busy(f"all slots are taken, and {ahead} requests wait already; try again later")
        priority = task.answer.request.priority
        behind = (n for n, other in enumerate(self.waiting) if other.answer.request.priority < priority)
        self.waiting.insert(next(behind, len(self.waiting)), task)

    def drop(self, task: Task) -> None:
        """Takes away a task that is finished or cancelled; its row is free at once."""
        if task.row is None:
            self.waiting.remove(task)
        else:
            task.row.task, task.row.used = None, self._tick()
            task.row = None

    def clear(self) -> None:
        """Takes all tasks away; what rows hold is of no use any more."""
        self.waiting.clear()
        self.rows = [Row(row.number) for row in self.rows]

    @property
    def next(self) -> list[Task]:
        """The tasks among which the next to get a row are: those that wait longest."""
        return list(itertools.islice(self.waiting, LOOK_AHEAD * self.slots))

    def admit(self) -> list[Copy]:
        """Gives rows to tasks that wait, and the copies that must be made before anything is read, in this order.

        A task whose prompt begins as one that is being read just now waits for that, and others go first.
        """
        copies: list[Copy] = []
        for task in self.next:
            if len(self.at_work) >= min(self.slots, len(self.rows)):
                break
            source, count, wait = self._best(task)
            if wait:
                continue
            self.waiting.remove(task)
            row, is_worth_it = source, count >= SHORTEST_PREFIX
            if not is_worth_it or source.task is not None or 2 * count < len(source.held):
                row = self._oldest(but=source if is_worth_it else None)
            if row is not source:
                count = count if is_worth_it else 0
                row.held = source.held[:count]
                copies += [Copy(source.number, row.number, count)] if count else []
            del row.held[count:]
            row.task, row.adapter, row.used, task.row = task, task.answer.request.adapter, self._tick(), row
            task.answer.cached_tokens = count
        return copies

    def _best(self, task: Task) -> tuple[Row, int, bool]:
        """The row that holds most of a prompt's beginning, how much that is (not its last token, which must be read to
        know the next), and whether it is worth to wait for a row that will hold more."""
        wanted, adapter = task.signs[:-1], task.answer.request.adapter
        rows = [row for row in self.rows if row.adapter == adapter] if self.reuses else []
        most, _, _, best = max(
            ((common(wanted, row.held), row.task is None, -len(row.held), row) for row in rows),
            key=lambda found: found[:3],
            default=(0, True, 0, None),
        )
        reading = (row.task for row in rows if row.task and row.task.unread)
        to_come = max((common(wanted, task.signs) for task in reading), default=0)
        return best if most else self._oldest(), most, to_come >= most + SHORTEST_PREFIX

    def _oldest(self, but: Row | None = None) -> Row:
        """The free row that was used least recently; not `but`, if there is another."""
        free = [row for row in self.rows if row.task is None]
        return min(free, key=lambda row: (row is but, row.used))

    @property
    def reading(self) -> list[Task]:
        """The tasks whose prompt is not read to its end, those first that have their row longest."""
        return sorted((task for task in self.at_work if task.unread), key=lambda task: task.row.used)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def common(a: Sequence[Sign], b: Sequence[Sign]) -> int:
    """Length of the longest common beginning of two lists."""
    length, size = min(len(a), len(b)), 64
    start = next((i for i in range(0, length, size) if a[i : i + size] != b[i : i + size]), length)
    return next((i for i in range(start, length) if a[i] != b[i]), length)
