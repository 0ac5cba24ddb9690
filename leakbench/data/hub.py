"""Reading the Parquet files of a Hugging Face dataset, from the hub or from a copy of it under LEAKBENCH_DATA."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from leakbench.data.catalogue import DatasetSpec
from leakbench.errors import Unavailable, UserError

Columns = dict[str, npt.NDArray[np.int64]]
Rows = npt.NDArray[np.int64]


def read_split(
    spec: DatasetSpec, split: str, root: Path | None, choose: Callable[[int], Rows]
) -> tuple[npt.NDArray[np.uint8], Columns]:
    """Decode some rows of one source split.

    Args:
        spec: The dataset; it has a ``hub_id``.
        split: Name of the source split.
        root: What LEAKBENCH_DATA names; None reads from the hub (and its cache).
        choose: Given the number of rows of the split, the indices of those to decode.

    Returns:
        The images, uint8 (n, *shape), and every label and attribute column, int64 (n,).

    Raises:
        Unavailable: The dataset or the split is not at hand.
        UserError: Something is truncated, or of another size or type than ``spec`` says.
    """
    files = [] if root is None else _local_files(spec, split, root)
    with _scratch(root) as cache:
        table = _open(spec, split, root, files, cache)
        wanted = tuple(dict.fromkeys((*spec.label_columns, *spec.attribute_columns)))
        missing = [name for name in (spec.image_column, *wanted) if name not in table.column_names]
        if missing:
            raise UserError(
                f"{_where(spec, split, files)}: expected column {missing[0]!r}, got {', '.join(table.column_names)}; "
                f"use the files that {spec.hub_id} has on the hub"
            )
        rows = choose(len(table))
        columns = {name: _integers(table, name, rows, _where(spec, split, files)) for name in wanted}
        return _images(spec, split, files, table, rows), columns


def _local_files(spec: DatasetSpec, split: str, root: Path) -> list[Path]:
    folder = root / str(spec.hub_id) / spec.folder
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        what = f"split {split!r} of dataset" if folder.is_dir() else "dataset"
        raise Unavailable(
            f"{what} {spec.name} ({spec.hub_id}) is not in LEAKBENCH_DATA: expected {folder}/{split}-*.parquet, "
            f"got none; type: {_download(spec, str(root))}"
        )
    return files


def _download(spec: DatasetSpec, root: str) -> str:
    splits = [split for split in (spec.train_split, spec.test_split) if split]
    # One pattern per split: the whole repository may be a hundred times what is read.
    include = " ".join(f"--include '{spec.folder}/{split}-*'" for split in splits)
    return f"hf download --repo-type dataset {spec.hub_id} {include} --local-dir {root}/{spec.hub_id}"


@contextlib.contextmanager
def _scratch(root: Path | None) -> Iterator[str | None]:
    """Yield a cache folder: the library's own for the hub, a temporary one for files that are local anyway."""
    import datasets

    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    cache = None if root is None else tempfile.mkdtemp(prefix="leakbench-")
    try:
        yield cache
    finally:
        if cache:
            shutil.rmtree(cache, ignore_errors=True)
        if not disabled:
            datasets.enable_progress_bars()


def _open(spec: DatasetSpec, split: str, root: Path | None, files: list[Path], cache: str | None) -> Any:
    import datasets

    if root is None and _hub_errors:
        raise _not_from_hub(spec, _hub_errors[0])
    source = str(spec.hub_id) if root is None else str(root / str(spec.hub_id))
    names = [f"{spec.folder}/{file.name}" for file in files] or f"{spec.folder}/{split}-*.parquet"
    try:
        return datasets.load_dataset(source, data_files={split: names}, split=split, cache_dir=cache)
    except Exception as error:  # the library's, pyarrow's and the network client's errors share no narrower base
        reason = " ".join(str(error).split())[:200]
        if files:
            raise UserError(
                f"{_broken(files)}: cannot be read as Parquet ({type(error).__name__}: {reason}); "
                f"delete it and type: {_download(spec, str(root))}"
            ) from None
        reason = f"{type(error).__name__}: {reason}"
        if isinstance(error, ConnectionError):
            _hub_errors.append(reason)
        raise _not_from_hub(spec, reason) from None


_hub_errors: list[str] = []  # finding out that the hub is out of reach takes most of a minute: once per process


def _not_from_hub(spec: DatasetSpec, reason: str) -> Unavailable:
    return Unavailable(
        f"dataset {spec.name}: {spec.hub_id} could not be read from the hub ({reason}); "
        f"where there is network access, type: {_download(spec, 'DIR')} and set LEAKBENCH_DATA=DIR"
    )


def _broken(files: list[Path]) -> Path:
    """Return the first file that pyarrow cannot read to its end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                for _ in opened.iter_batches():
                    pass
        except (pa.ArrowException, OSError):
            return file
    return files[0].parent


def _where(spec: DatasetSpec, split: str, files: list[Path]) -> str:
    if len(files) == 1:
        return str(files[0])
    return f"{files[0].parent if files else f'{spec.hub_id}/{spec.folder}'}/{split}-*.parquet"


def _integers(table: Any, name: str, rows: Rows, where: str) -> npt.NDArray[np.int64]:
    values = table.with_format("numpy", columns=[name])[name][:][rows]
    if values.dtype.kind not in "iub":
        raise UserError(f"{where}: expected whole numbers in column {name!r}, got {values.dtype}; drop incomplete rows")
    return np.asarray(values, dtype=np.int64)


def _images(spec: DatasetSpec, split: str, files: list[Path], table: Any, rows: Rows) -> npt.NDArray[np.uint8]:
    import datasets
    from PIL import Image, ImageOps

    where = _where(spec, split, files)
    channels, height, width = spec.input.shape
    images = np.empty((len(rows), channels, height, width), dtype=np.uint8)
    encoded = table.select_columns([spec.image_column])
    try:
        encoded = encoded.cast_column(spec.image_column, datasets.Image(decode=False)).select(rows)
    except (TypeError, ValueError, NotImplementedError):
        found = encoded.features[spec.image_column]
        raise UserError(
            f"{where}: expected images in column {spec.image_column!r}, got {found}; use the hub's files"
        ) from None
    for i, cell in enumerate(cell for batch in encoded.iter(256) for cell in batch[spec.image_column]):
        try:
            image = Image.open(io.BytesIO(cell["bytes"])).convert("L" if channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"{where}: expected an image in row {rows[i]}, got {reason}; get the file again") from None
        if spec.fit:
            image = ImageOps.fit(image, (width, height), method=Image.Resampling.BILINEAR)
        if image.size != (width, height):
            raise UserError(
                f"{where}: expected every image of {spec.name} to be {width}x{height}, "
                f"got {image.width}x{image.height} in row {rows[i]}; resize the images or give an .npz file"
            )
        pixels = np.asarray(image)
        images[i] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return images
