"""Draws docs/figures/co2.svg from a comparison on the data that ships with the package.

Run: python docs/figures/compare.py   (about a quarter of a minute)
"""

from __future__ import annotations

import base64
from pathlib import Path

import regard
from regard.bench.compare.pictures import draw


def main() -> None:
    """Writes the picture of errors by horizon."""
    result = regard.compare("co2", cost_lengths=())
    picture = next(picture for picture in draw(result) if picture.name == "horizons")
    content = base64.b64decode(picture.source.split(",", 1)[1])
    Path(__file__).with_name("co2.svg").write_bytes(content)


if __name__ == "__main__":
    main()
