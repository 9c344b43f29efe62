"""What is compiled, and for which instruction sets: data that the build and the loader share.

`setup.py` runs this file alone, before anything is installed: the standard library only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InstructionSet:
    """One set of vector instructions, as the C bodies see it (`vector.h`).

    `width` is the floats per register, `registers` how many there are, and `vectors` x `rows`
    the block of accumulators of a matrix microkernel. `flags` are the compiler's.
    """

    name: str
    width: int
    registers: int
    vectors: int
    rows: int
    flags: tuple[str, ...] = ()

    @property
    def macros(self) -> list[tuple[str, str]]:
        """The definitions under which a C body is compiled for this set."""
        return [
            ("REGARD_ISA", self.name),
            (f"REGARD_ISA_{self.name.upper()}", "1"),
            ("REGARD_WIDTH", str(self.width)),
            ("REGARD_REGISTERS", str(self.registers)),
            ("REGARD_VECTORS", str(self.vectors)),
            ("REGARD_ROWS", str(self.rows)),
        ]


_BASELINE = InstructionSet("baseline", width=4, registers=16, vectors=3, rows=4)
_AVX2 = InstructionSet(
    "avx2", width=8, registers=16, vectors=2, rows=4, flags=("-mavx2", "-mfma")
)
_AVX512 = InstructionSet(
    "avx512", width=16, registers=32, vectors=3, rows=8,
    flags=(
        "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma",
        "-mprefer-vector-width=512",
    ),
)  # fmt: skip
_NEON = InstructionSet("neon", width=4, registers=32, vectors=4, rows=4)

# Best first. A machine that is not named here has its compiler's default and 4-float vectors.
BY_MACHINE: dict[str, tuple[InstructionSet, ...]] = {
    "x86_64": (_AVX512, _AVX2, _BASELINE),
    "aarch64": (_NEON,),
}
_SYNONYMS = {"amd64": "x86_64", "arm64": "aarch64"}

# No -ffast-math (it makes the process flush denormals), no OpenMP (a second run-time library).
FLAGS = (
    "-std=gnu11", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden",
    "-pthread", "-g0",
)  # fmt: skip

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = "_kernels"  # regard/native/_kernels.so (.dll on Windows)
ONCE = ("native/processor.c",)  # compiled once, for any processor; every other body once per set


def instruction_sets(machine: str) -> tuple[InstructionSet, ...]:
    """The sets to compile for a target machine (`x86_64`, `arm64` ...), best first."""
    machine = machine.lower()
    return BY_MACHINE.get(_SYNONYMS.get(machine, machine), (_BASELINE,))


def bodies(package: Path = PACKAGE) -> list[Path]:
    """The C files that are compiled once per instruction set: all there are but those of `ONCE`.

    An engine adds a form by putting a `.c` file into its folder.
    """
    return [path for path in sorted(package.rglob("*.c")) if _inside(package, path) not in ONCE]


def sources(package: Path = PACKAGE) -> list[Path]:
    """Every file that the library is made of: bodies, headers, and this table."""
    return sorted([*package.rglob("*.c"), *package.rglob("*.h"), package / "native" / "table.py"])


def digest(package: Path = PACKAGE) -> str:
    """A fingerprint of the sources, by which a library from other sources is recognised.

    >>> len(digest())
    16
    """
    total = hashlib.sha256()
    for path in sources(package):
        total.update(_inside(package, path).encode() + b"\0")
        total.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return total.hexdigest()[:16]


def _inside(package: Path, path: Path) -> str:
    return path.relative_to(package).as_posix()
