"""leakbench.runner."""
