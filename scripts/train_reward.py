"""`minimind reward` as a script, for a cluster job or a TPU VM: the same arguments, the same function."""

import sys

from minimind_jax.__main__ import program

sys.exit(program("reward"))
