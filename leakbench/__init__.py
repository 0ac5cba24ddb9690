"""leakbench: benchmark of gradient and model leakage in federated learning."""
