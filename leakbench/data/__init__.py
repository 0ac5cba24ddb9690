"""leakbench.data."""
