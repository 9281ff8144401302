"""Stages in order from one file."""
