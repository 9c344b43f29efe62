"""Runs pytest where timm needs a torchvision whose compiled part does not load.

    python tests/with_timm.py PYTEST-ARGUMENTS

The torchvision of the package registry is built for CUDA. Beside a torch for CPUs its operators
are missing, and importing it fails where it describes them to torch. timm's models use none of
them: they are declared here, without an implementation, until the import succeeds.
"""

from __future__ import annotations

import re
import sys

import pytest
import torch

MISSING = re.compile(r"operator torchvision::(\w+) does not exist")


def declare_missing() -> list[str]:
    """Imports torchvision; the operators that had to be declared for it."""
    declared: list[str] = []
    library = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as problem:
            found = MISSING.search(str(problem))
            if found is None or found[1] in declared:
                raise
            library.define(f"{found[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            declared.append(found[1])
            LIBRARIES.append(library)
            for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return declared


LIBRARIES: list[torch.library.Library] = []  # a declaration lives as long as its library

if __name__ == "__main__":
    print("declared for torchvision:", ", ".join(declare_missing()) or "nothing")
    sys.exit(pytest.main(sys.argv[1:]))
