"""Reviewed attacks and defenses, one paper a file, written against leakbench's public names only."""
