"""`minimind tokenizer` as a script, for a cluster job or a TPU VM: the same arguments, the same function."""

import sys

from minimind_jax.cli import main

sys.exit(main(["tokenizer", *sys.argv[1:]]))
