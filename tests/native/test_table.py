"""The build table, as data."""

from __future__ import annotations

import pytest

from regard.native import table
from regard.native.peak import LANES


@pytest.mark.parametrize(
    ("machine", "names"),
    [
        ("x86_64", ["avx512", "avx2", "baseline"]),
        ("AMD64", ["avx512", "avx2", "baseline"]),
        ("aarch64", ["neon"]),
        ("arm64", ["neon"]),
        ("riscv64", ["baseline"]),
    ],
)
def test_sets_by_target_machine(machine: str, names: list[str]) -> None:
    assert [isa.name for isa in table.instruction_sets(machine)] == names


def test_blocks_fit_the_registers() -> None:
    for sets in table.BY_MACHINE.values():
        for isa in sets:
            assert isa.vectors * isa.rows <= 0.8 * isa.registers, "no room for operands"
            accumulators = 24 if isa.registers >= 32 else 12
            assert LANES % (accumulators * isa.width) == 0


def test_no_flag_changes_the_numbers_or_the_process() -> None:
    sets = [isa for group in table.BY_MACHINE.values() for isa in group]
    flags = {*table.FLAGS, *(flag for isa in sets for flag in isa.flags)}
    assert not any("fast-math" in flag or "openmp" in flag or "march" in flag for flag in flags)


def test_bodies_are_found_and_compiled_once_per_set() -> None:
    names = [path.relative_to(table.PACKAGE).as_posix() for path in table.bodies()]
    assert "native/fma_peak.c" in names
    assert not set(names) & set(table.ONCE)
    assert all((table.PACKAGE / name).exists() for name in table.ONCE)


def test_the_digest_changes_with_a_source_but_not_with_its_line_ends(tmp_path) -> None:
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "table.py").write_bytes(b"")
    source = tmp_path / "kernel.c"
    source.write_bytes(b"int a;\nint b;\n")
    first = table.digest(tmp_path)
    source.write_bytes(b"int a;\r\nint b;\r\n")
    assert table.digest(tmp_path) == first
    source.write_bytes(b"int a;\nint c;\n")
    assert table.digest(tmp_path) != first
