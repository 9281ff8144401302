"""minimind_jax: train a small language model end to end in JAX, and get a Hugging Face folder."""

import time

STARTED = time.perf_counter()  # of the program, all but Python's own start

__version__ = "0.1.0"
