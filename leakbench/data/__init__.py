"""Datasets, their splits and the drawing of victims. Numpy only: importing this loads no torch, datasets or sklearn."""

from __future__ import annotations

from leakbench.data.catalogue import DATASETS, DatasetSpec
from leakbench.data.loading import Dataset, decoder_versions, load_dataset
from leakbench.data.sampling import Candidates, Victims, draw_label_counts, draw_task, draw_victims

__all__ = [
    "DATASETS",
    "Candidates",
    "Dataset",
    "DatasetSpec",
    "Victims",
    "decoder_versions",
    "draw_label_counts",
    "draw_task",
    "draw_victims",
    "load_dataset",
]
