"""Lengths rounded up to a few: each is a program that must be compiled."""


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def bucket(count: int, smallest: int, multiple: int) -> int:
    """The next power of two from `smallest` on; above `multiple`, its next multiple."""
    return round_up(count, multiple) if count > multiple else max(smallest, 1 << (count - 1).bit_length())
