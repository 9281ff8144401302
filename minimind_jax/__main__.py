"""The `minimind` command, also as `python -m minimind_jax`."""

import sys

from minimind_jax.cli import main
from minimind_jax.huge_pages import use_huge_pages


def program(*arguments: str) -> int:
    """Runs `minimind` with these arguments and those of the command line; returns the exit status."""
    use_huge_pages()
    return main([*arguments, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(program())
