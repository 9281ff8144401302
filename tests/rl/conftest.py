"""Runs that learn from reward, in processes of their own."""

from kills import start  # noqa: F401
