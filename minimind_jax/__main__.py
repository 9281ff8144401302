"""`python -m minimind_jax` is the `minimind` command."""

import sys

from minimind_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
