"""Tables with a column of encoded images, as Hugging Face stores them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from dense2conv.data.config import DataConfig
from dense2conv.data.decode import BadImage, required
from dense2conv.data.encoded import (
    MAX_CLASSES,
    NO_LABEL,
    EncodedImages,
    every_eighth_held_out,
    file_state,
    fingerprint_of,
)
from dense2conv.data.files import train_and_held_out
from dense2conv.data.skips import Skips
from dense2conv.shapes import InputError

_ROW_GROUPS_KEPT = 16


class ParquetImages:
    """The rows of parquet files whose image column holds bytes, or {bytes, path}.

    A row is read with its whole row group, of which the last few are kept: an order that jumps about wants
    ``data.cache``. A file that is missing or damaged counts as bad among the files.

    Raises:
        InputError: no such column, too many bad files, or no rows.
    """

    def __init__(
        self, paths: list[str], config: DataConfig, classes: tuple[str, ...] | None = None
    ) -> None:
        self._parquet = required("pyarrow.parquet", "data=parquet")
        self._column = config.image_column
        skips = Skips(config, len(paths), "files")
        self._groups: list[tuple[str, int]] = []  # (path, row group), with the rows up to its end:
        ends: list[int] = []
        labels: list[np.ndarray] = []
        self._paths: list[str] = []
        for path in paths:
            try:
                file = self._parquet.ParquetFile(path)
                found = self._labels(file, path, config.label_column)
            except InputError:
                raise
            except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
                skips.bad(path, f"cannot be read: {error}")
                continue
            skips.good()
            self._paths.append(path)
            labels.append(found)
            for group in range(file.num_row_groups):
                self._groups.append((path, group))
                ends.append((ends[-1] if ends else 0) + file.metadata.row_group(group).num_rows)
        self._ends = np.array(ends)
        self._all_labels = np.concatenate(labels) if labels else np.empty(0, np.int64)
        if not len(self._all_labels):
            raise InputError(f"{paths[0]} … hold no rows; give data.root with some")
        if classes is None:
            largest = int(self._all_labels.max())
            if largest >= MAX_CLASSES:
                raise InputError(
                    f"data.label_column={config.label_column} holds {largest}, which is no number of a "
                    "class; name another column"
                )
            classes = tuple(str(label) for label in range(largest + 1))
        self.classes = classes
        self._read_group = lru_cache(_ROW_GROUPS_KEPT)(self._read_group_now)

    def __len__(self) -> int:
        return len(self._all_labels)

    def read(self, index: int) -> bytes:
        if self.label(index) >= len(self.classes):
            raise BadImage(
                f"has label {self.label(index)}, but there are {len(self.classes)} classes"
            )
        group = int(np.searchsorted(self._ends, index, side="right"))
        value = self._read_group(group)[index - int(self._ends[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise BadImage("has no bytes in its row")
        return data

    def label(self, index: int) -> int:
        return int(self._all_labels[index])

    def name(self, index: int) -> str:
        group = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._groups[group][0]}:{index}"

    def place(self, index: int) -> str:
        return self._groups[int(np.searchsorted(self._ends, index, side="right"))][0]

    def fingerprint(self) -> str:
        return fingerprint_of([self._column, *map(file_state, self._paths)])

    def _labels(self, file: Any, path: str, column: str) -> np.ndarray:
        names = file.schema_arrow.names
        if self._column not in names:
            raise InputError(
                f"{path} has no column {self._column!r} (data.image_column); it has {', '.join(names)}"
            )
        if column not in names:
            return np.full(file.metadata.num_rows, NO_LABEL)
        values = file.read(columns=[column])[column]
        try:
            return values.fill_null(NO_LABEL).to_numpy().astype(np.int64).clip(min=NO_LABEL)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise InputError(
                f"{path}: the column {column!r} (data.label_column) holds {values.type}, not whole "
                "numbers; name another one"
            ) from error

    def _read_group_now(self, group: int) -> Any:
        path, row_group = self._groups[group]
        try:
            # A file object of its own: one must not be read by two threads.
            table = self._parquet.ParquetFile(path).read_row_group(row_group, [self._column])
        except ValueError as error:
            raise BadImage(f"lies in a damaged row group: {error}") from error
        return table[self._column]


def open_parquet(config: DataConfig) -> tuple[EncodedImages, EncodedImages]:
    """(training, held-out) images of the parquet files that ``config`` names."""
    files = train_and_held_out(config.root or "", config.held_out_root, ".parquet")
    train = ParquetImages(files[0], config)
    if not files[1]:
        return every_eighth_held_out(train)
    return train, ParquetImages(files[1], config, train.classes)
