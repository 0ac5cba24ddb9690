"""leakbench.metrics."""
