"""Does a recovered image point at its original among many? Closed over one gallery, never restricted to a label."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GALLERY = 1_000
"""Most images of the gallery besides the victims."""

_CHUNK = 4_000_000  # pixels of the gallery held as float64 at a time, 32 MB
_TIE = 1e-9  # squared distance below which two images are equally far


class Identification:
    """Ranks originals among a gallery by their pixel L2 distance to what was recovered.

    The gallery of a trial is a fixed part of the private split and the trial's victims; a victim that is in that part
    counts once.

    Args:
        images: uint8 (G, *shape), the fixed part.
        indices: (G,) which examples of the dataset they are.
        victims: (T, N) the same for the true images.
    """

    def __init__(self, images: NDArray[np.uint8], indices: NDArray[np.int64], victims: NDArray[np.int64]) -> None:
        self._images = images.reshape(len(images), -1)
        self._new = torch.from_numpy(~np.isin(victims, indices))
        self.sizes = (len(images) + self._new.sum(dim=1)).tolist()
        """Images in the gallery of each trial."""

    def __call__(self, matched: Tensor, true: Tensor) -> dict[str, Tensor]:
        """Rank every original; intensities (T, N, *shape) that were uint8 values.

        Returns:
            ``identification_rank``, 1 + the number of gallery images that are nearer, and ``identified``, whether that
            is 1; (T, N) float64.
        """
        trials, count = true.shape[:2]
        recovered = matched.double().cpu().flatten(2)
        originals = (true.double().cpu().flatten(2) * 255).round() / 255  # as the gallery has them, to the last bit
        # |g - r|^2 up to |r|^2, which all candidates share.
        own = originals.square().sum(2)[:, None] - 2 * (recovered @ originals.transpose(1, 2))
        limit = own.diagonal(dim1=1, dim2=2) - _TIE
        nearer = ((own < limit[..., None]) & self._new[:, None]).sum(2)
        flat, flat_limit = recovered.flatten(0, 1), limit.reshape(-1, 1)
        if bool((flat == flat[0]).all()):  # a floor such as the mean image: one distance serves all
            flat = flat[:1]
        step = max(1, _CHUNK // self._images.shape[1])
        for start in range(0, len(self._images), step):
            part = torch.from_numpy(self._images[start : start + step]).double() / 255
            distance = part.square().sum(1) - 2 * (flat @ part.T)
            nearer += (distance < flat_limit).sum(1).reshape(trials, count)
        return {"identification_rank": 1 + nearer.double(), "identified": (nearer == 0).double()}
