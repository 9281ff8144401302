"""Every setting of every command, and how settings are read; imports no jax."""
