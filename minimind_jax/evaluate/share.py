"""Shares of marks, and how sure they are."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.96  # of 95 %


class Share(NamedTuple):
    """So many of so many."""

    right: int
    count: int

    @classmethod
    def of(cls, marks: Sequence[bool]) -> "Share":
        return cls(sum(map(bool, marks)), len(marks))

    @property
    def value(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Its interval of 95 %, Wilson's, for marks that do not depend on one another."""
        n, share = self.count, self.value
        middle, half = share + Z * Z / 2 / n, Z * math.sqrt(share * (1 - share) / n + Z * Z / 4 / n / n)
        return max(0.0, (middle - half) / (1 + Z * Z / n)), min(1.0, (middle + half) / (1 + Z * Z / n))

    def describe(self) -> str:
        low, high = self.interval
        return f"{self.right:,} of {self.count:,}, {self.value:.1%} ({low:.1%} to {high:.1%})"
