"""leakbench.board."""
