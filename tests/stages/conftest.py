"""Runs in processes of their own, which tests kill."""

from kills import start as processes  # noqa: F401
