"""Utility: what a defense costs in accuracy, time and upload, by federated training with it from scratch."""
