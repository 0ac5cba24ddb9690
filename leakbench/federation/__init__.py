"""leakbench.federation."""
