"""`minimind vlm-pretrain` as a script, for a cluster job or a TPU VM: the same arguments, the same function."""

import sys

from minimind_jax.__main__ import program

if __name__ == "__main__":  # the tokenising processes read this file too
    sys.exit(program("vlm-pretrain"))
