"""What every model can do: be built from a config, saved, and read again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from regard.core.checks import FLOATS, name_of, reject
from regard.models.files import FILE, FORMAT, read_safetensors, write_safetensors
from regard.models.keys import refuse_differences


class Config(Protocol):
    """A frozen dataclass that plain data can hold."""

    def plain(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts of them."""
        ...

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `plain`."""
        ...


class Pretrained(nn.Module):
    """A model that is made from `config` alone and can be saved with it.

    A subclass sets `KIND` and `CONFIG` and takes the config as its only argument.
    """

    KIND: ClassVar[str]
    CONFIG: ClassVar[type[Any]]
    config: Any

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `model.safetensors` into `folder`, whole or not at all; its header is the config.

        >>> import regard, tempfile
        >>> model = regard.create_model("parallax", dim=8, heads=2, layers=1, vocabulary=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = type(model).from_pretrained(folder)
        >>> again.config == model.config
        True
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "kind": self.KIND, "config": json.dumps(self.config.plain())}
        write_safetensors(place / FILE, self.state_dict(), header)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Reads what `save_pretrained` wrote; `dtype=None` keeps that of the file.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it holds another model, is
                damaged, or was written by something else.
        """
        tensors, config = _read(cls, folder)
        return build(cls, config, tensors, device=device, dtype=dtype)


def _read(cls: type[Pretrained], folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any]:
    op, path = f"{cls.__name__}.from_pretrained", Path(folder) / FILE
    if not path.exists():
        raise FileNotFoundError(f"{op}: {path} does not exist")
    tensors, header = read_safetensors(op, path)
    if header.get("format") != FORMAT:
        found = header.get("format", "no format")
        raise ValueError(f"{op}: {path} must be a {FORMAT} file, got {found}")
    if header.get("kind") != cls.KIND:
        raise ValueError(f"{op}: {path} must hold a {cls.KIND}, got {header.get('kind')}")
    try:
        return tensors, cls.CONFIG.of(json.loads(header["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{op}: the header of {path} is damaged ({error})") from error


def build(
    cls: type[Any],
    config: Any,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    op: str = "from_pretrained",
) -> Any:
    """A model with its initial values, or with `tensors`, which must be exactly its own."""
    if dtype is not None and dtype not in FLOATS:
        accepted = f"None or one of {', '.join(map(name_of, FLOATS))}"
        raise reject(op, "dtype", accepted, dtype)
    if tensors is None:
        with torch.device(device):
            model = cls(config)
        return model.to(dtype=dtype) if dtype is not None else model
    with torch.device("meta"):
        model = cls(config)
    shapes = shapes_of(model)
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    missing = [name for name in shapes if name not in tensors]
    unexpected = [name for name in tensors if name not in shapes]
    refuse_differences(op, missing, unexpected, wrong)
    moved = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(moved, assign=True)
    return model


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Name -> shape of everything that a file of this model holds."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
