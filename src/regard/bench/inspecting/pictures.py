"""A folder of pictures as the input of an inspection."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from regard.bench.inspecting.opening import Opened, attempt

MOST = 24  # pictures of a folder, unless more are asked for
SHOWN = 256  # longer side of a picture in the report
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Labelled:
    """A picture's file, and the number of its class if that is known."""

    path: Path
    label: int | None = None


def find_pictures(folder: Path, classes: dict[int, str], most: int) -> tuple[list[Labelled], int]:
    """At most `most` pictures of a folder, evenly from all, and how many there are.

    Those directly in it; or, if it has none, those of its subfolders, which are named for classes
    of the model (by name or number).

    Raises:
        ValueError: no pictures, or a subfolder that names no class.
    """
    found = [Labelled(path) for path in _pictures(folder)]
    if not found:
        numbers = {str(number): number for number in classes}
        numbers |= {name.casefold(): number for number, name in classes.items()}
        for part in sorted(path for path in folder.iterdir() if path.is_dir()):
            inside = _pictures(part)
            if inside and part.name.casefold() not in numbers:
                some = ", ".join(list(classes.values())[:4])
                raise ValueError(
                    f"INPUT {folder}: the subfolder {part.name!r} names no class of the model "
                    f"({some}{', ...' if len(classes) > 4 else ''})"
                )
            found += [Labelled(path, numbers[part.name.casefold()]) for path in inside]
    if not found:
        raise ValueError(f"INPUT {folder} is a folder without pictures")
    places = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[place] for place in places], len(found)


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in ENDINGS
    )


def prepared_picture(opened: Opened, path: Path) -> tuple[Tensor, NDArray[np.float32]]:
    """A file as the model takes it [1, C, H, W], and as it is shown [H, W, 3] in 0 ... 1.

    Raises:
        ValueError: it is no picture, or the model takes no single image.
    """
    from PIL import Image

    def read() -> Any:
        with Image.open(path) as picture:
            return picture.convert("RGB")

    picture = attempt(f"INPUT {path} cannot be read as an image", read)
    pixels = opened.prepare(picture, return_tensors="pt")["pixel_values"]
    if pixels.ndim != 4:
        raise ValueError(
            f"{type(opened.model).__name__} takes pixel values {tuple(pixels.shape)}; inspected "
            "are models that take [1, channels, height, width]"
        )
    shown = pixels[0].permute(1, 2, 0)
    shown = ((shown - shown.min()) / (shown.max() - shown.min()).clamp_min(1e-6)).numpy()
    return pixels, np.repeat(shown, 3, -1) if shown.shape[-1] == 1 else shown


def prepared_pictures(
    opened: Opened, pictures: list[Labelled], size: tuple[int, ...]
) -> Iterator[tuple[Tensor, NDArray[np.float32]]]:
    """`prepared_picture` of one after the other.

    Raises:
        ValueError: one of another size than `size`.
    """
    for picture in pictures:
        pixels, shown = prepared_picture(opened, picture.path)
        if pixels.shape != size:
            raise ValueError(
                f"INPUT {picture.path} becomes {tuple(pixels.shape[2:])} pixels and others "
                f"{tuple(size[2:])}: pictures that are inspected together need one size"
            )
        yield pixels, shown


def as_url(shown: NDArray[np.float32], kind: str = "jpeg", longest: int = SHOWN) -> str:
    """A picture as a data URL: "png", or a smaller "jpeg"."""
    from PIL import Image

    picture = Image.fromarray((255 * shown).astype(np.uint8))
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
