"""What results of lenses share: JSON, and pictures written whole or not at all."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


def plain(value: Any) -> Any:
    """Arrays as nested lists, dataclasses as dictionaries; numbers that are not finite as None.

    >>> plain({"a": np.array([1.0, float("nan")]), "b": (True, "x")})
    {'a': [1.0, None], 'b': [True, 'x']}
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


class Record:
    """A dataclass of plain arrays that can be written as JSON."""

    def to_json(self) -> str:
        """Every field, arrays as nested lists."""
        return json.dumps(plain(self), ensure_ascii=False)


@contextmanager
def drawing(
    path: str | os.PathLike[str], size: tuple[float, float], rows: int = 1, columns: int = 1
) -> Iterator[Any]:
    """Axes [rows, columns] of a new figure, which is written to `path` (png, svg, pdf) at the end.

    matplotlib is imported here and only here.
    """
    from matplotlib.figure import Figure

    from regard.core.state import write_atomically

    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(rows, columns, squeeze=False)
    path, buffer = Path(path), io.BytesIO()
    kind = path.suffix.removeprefix(".") or "png"
    # A date in the file would make equal pictures differ.
    metadata: Any = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
    write_atomically(path, buffer.getvalue())
