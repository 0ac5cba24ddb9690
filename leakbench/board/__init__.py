"""Boards: ranked views of result rows. DataFrame in, DataFrame or text out; no torch here."""
