"""Whether Triton kernels can run, and if not, why: in words, and before Triton is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

INSTALL = "pip install 'regard[triton]'"
OLDEST = (3, 4)
# A launch says so itself, as the default of Triton changes with 3.10 (and 3.9 warns of it).
FUSED = {"enable_fp_fusion": True}
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def interpreting() -> bool:
    """Whether kernels are interpreted on the CPU: TRITON_INTERPRET, which Triton reads itself.

    It must be set before Triton is imported. The interpreter is for proofs: it is slow.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes torch.compile call a function while tracing and keep its answer.

    As torch.compiler.assume_constant_result does, which imports all of the compiler.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@_constant
def missing() -> str | None:
    """Why there is no Triton here to use, or None."""
    return _missing(importlib.util.find_spec, importlib.metadata.version)


@cache
def _missing(find: Callable[[str], Any], version_of: Callable[[str], str]) -> str | None:
    """Looks once: reading the metadata of a distribution takes longer than many a kernel."""
    if find("triton") is None:
        return f"triton is not installed ({INSTALL})"
    try:
        version = version_of("triton")
    except importlib.metadata.PackageNotFoundError:
        return None  # under another name of distribution: torch's nightly builds, AMD's
    parts = version.split(".")[:2]
    if all(part.isdigit() for part in parts) and tuple(map(int, parts)) < OLDEST:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST))}"
    return None


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can serve tensors of this device and dtype, or None."""
    reason = missing()
    if reason is not None:
        return reason
    if dtype not in _NAMES:
        return f"its kernels take {', '.join(_NAMES.values())}, not {str(dtype)[6:]}"
    if interpreting():
        if dtype == torch.bfloat16:
            return "Triton's interpreter gets bfloat16 products wrong without saying so; float32"
        return None if device.type == "cpu" else "the interpreter (TRITON_INTERPRET) is for a CPU"
    if device.type != "cuda":
        return f"Triton needs a GPU, and the tensors are on {device.type}"
    return None


@_constant
def _capability(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def capability(device: torch.device) -> str:
    """What a device is to a compiler: `sm_90`, `gfx942`; `interpreter` for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def precision(half: bool) -> str:
    """`input_precision` of products: of float32 operands three of TF32, where there are such.

    For 16-bit operands it says nothing.
    """
    if half or interpreting() or torch.version.hip is not None:
        return "ieee"
    return "tf32x3"


def compiled(warps: int, stages: int = 1, registers: int | None = None) -> dict[str, Any]:
    """The compiler's options of a launch; what a device does not have is left out."""
    if torch.version.hip is not None:  # half the shared memory, and no limit of registers
        return {"num_warps": warps, "num_stages": min(stages, 2), **FUSED}
    limit = {} if registers is None else {"maxnreg": registers}
    return {"num_warps": warps, "num_stages": stages, **limit, **FUSED}
