"""Measures: how much leaks, from which layer, with and without an attacker.

`catalogue` says what there is (no torch); every other module here holds the arithmetic of one idea.
"""
