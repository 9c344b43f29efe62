"""Compiles kernels for GPUs that are not here, and reads what came out.

`launches` runs a launcher on CPU tensors and notes which kernels it would have started, with
the options it gave them; `compile_for` translates one of them for a target and `Report` says
what it needs. A local-memory access in a loop that has tensor-core instructions costs several
times the loop; registers spilled elsewhere cost next to nothing. So the loops are looked at, in
the disassembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# Of a launch, not of a kernel.
_CALL = {"grid", "warmup"}
_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8",
    torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel, the arguments of one start by name, and the compiler's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.__name__


class Report(NamedTuple):
    """What a compiled kernel needs."""

    registers: int  # per thread
    shared: int  # bytes per program
    stack: int  # bytes of local memory per thread
    hot: int  # local-memory accesses in loops with tensor-core instructions
    tensor: int  # tensor-core instructions


def launches(launcher: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Launch]:
    """What `launcher(*args, **kwargs)` starts, without starting it; its results mean nothing."""
    with _recording() as found:
        launcher(*args, **kwargs)
    return found


@contextmanager
def _recording() -> Iterator[list[Launch]]:
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def note(kernel: Any, *args: Any, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        defaults = {
            p.name: p.default for p in kernel.params if p.name not in given and p.has_default
        }
        arguments = {name: {**defaults, **given}[name] for name in names}
        options = {k: v for k, v in kwargs.items() if k not in {*names, *_CALL}}
        found.append(Launch(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", note):
        yield found


def compile_for(launch: Launch, target: str) -> Report:
    """Translates a launch for `sm_90`, `gfx942` ... and reads the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    signature, constants, attributes = _specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"enable_fp_fusion": True, **launch.options}
    if not nvidia:  # what a launcher would have said there
        options.pop("maxnreg", None)
        options["num_stages"] = min(options.get("num_stages", 2), 2)
        constants = {at: "ieee" if x == "tf32x3" else x for at, x in constants.items()}
        source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=options)
    shared = int(compiled.metadata.shared)
    if not nvidia:
        return _read_amd(compiled.asm["amdgcn"], shared)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", str(file))
        found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump told nothing about {launch.name}: {usage}")
        registers, stack, local = map(int, found.groups())
        hot, tensor = hot_accesses(_sass(_cuobjdump("-sass", str(file))))
    return Report(registers, shared, max(stack, local), hot, tensor)


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and divisibilities, as a launch with these arguments would have them."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        fixed = not getattr(parameter, "do_not_specialize", False)
        if parameter.is_constexpr or value is None or (_is_int(value) and value == 1 and fixed):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        signature[parameter.name] = type_of(value)
        whole = isinstance(value, torch.Tensor) or (_is_int(value) and value % 16 == 0)
        if whole and fixed:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def type_of(value: Any) -> str:
    """The compiler's word for the type of an argument.

    >>> type_of(torch.zeros(1)), type_of(3), type_of(1 << 40), type_of(0.5)
    ('*fp32', 'i32', 'i64', 'fp32')
    """
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
    raise TypeError(f"a kernel takes no {type(value).__name__}")


def _cuobjdump(*arguments: str) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Instruction(NamedTuple):
    """One line of a disassembly: where it stands, what it is, where it jumps to."""

    address: int
    text: str
    goal: int | None = None


def _sass(listing: str) -> list[Instruction]:
    found = []
    for address, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.M):
        jump = re.search(r"\bBRA(?:\.\S+)*\s.*?(0x[0-9a-f]+)\s*$", text.strip())
        found.append(Instruction(int(address, 16), text, int(jump[1], 16) if jump else None))
    return found


def hot_accesses(code: list[Instruction]) -> tuple[int, int]:
    """Local-memory accesses in the innermost loops that hold tensor-core instructions, and these.

    >>> loop = ["IMAD", "HGMMA", "LDL", "STL"]
    >>> code = [Instruction(i, text) for i, text in enumerate(["STL", *loop])]
    >>> hot_accesses([*code, Instruction(5, "BRA", goal=1)])
    (2, 1)
    """
    loops = [(at.goal, at.address) for at in code if at.goal is not None and at.goal < at.address]

    def innermost(address: int) -> tuple[int, int] | None:
        around = [loop for loop in loops if loop[0] <= address <= loop[1]]
        return min(around, key=lambda loop: loop[1] - loop[0], default=None)

    tensor = [at.address for at in code if re.search(r"\b(?:[HQI]G?MMA|UTC\w*MMA|v_mfma)", at.text)]
    hot = {innermost(address) for address in tensor} - {None}
    local = [at.address for at in code if re.search(r"\b(?:LDL|STL|scratch_)", at.text)]
    return sum(innermost(address) in hot for address in local), len(tensor)


def _read_amd(assembly: str, shared: int) -> Report:
    code, labels = [], {}
    for place, line in enumerate(assembly.splitlines()):
        label = re.match(r"(\.LBB\w+):", line)
        if label:
            labels[label[1]] = place
        jump = re.search(r"\bs_c?branch\w*\s+(\.LBB\w+)", line)
        code.append((place, line.split(";")[0], jump[1] if jump else None))
    instructions = [Instruction(p, text, labels.get(goal)) for p, text, goal in code]
    hot, tensor = hot_accesses(instructions)

    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return Report(fact("vgpr_count"), shared, fact("private_segment_fixed_size"), hot, tensor)
