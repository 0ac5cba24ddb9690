"""leakbench.models."""
