"""Suites (*.yaml), pinned checkpoints (checkpoints/) and tasks.lock."""
