"""Baseline attacks: every public module here is one entry, named by its file."""
