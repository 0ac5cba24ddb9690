"""The shared engine of optimisation attacks."""
