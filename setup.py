"""The native library: plain C, compiled once per instruction set, loaded through ctypes.

Neither Python's nor torch's headers are needed, so one wheel per platform serves every Python.
Without a compiler that knows vector types (GCC, clang) the wheel is pure and every op runs in
eager torch. What is compiled stands in `src/regard/native/table.py`.
"""

from __future__ import annotations

import os
import platform
import runpy
import sysconfig
from itertools import pairwise
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "src" / "regard"
TABLE = runpy.run_path(str(PACKAGE / "native" / "table.py"))


def target_machine() -> str:
    """The machine to compile for; of a Python for two machines (macOS), the one at hand."""
    machine = sysconfig.get_platform().rsplit("-", 1)[-1]
    return platform.machine() if machine.startswith("universal") else machine


class BuildLibrary(build_ext):
    """Compiles every body once per instruction set with its own flags, into one library."""

    built = False

    def get_ext_filename(self, fullname: str) -> str:
        suffix = ".dll" if os.name == "nt" else ".so"  # of no Python version
        return os.path.join(*fullname.split(".")) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # it is no Python module

    def build_extension(self, ext: Extension) -> None:
        path = Path(self.get_ext_fullpath(ext.name))
        path.unlink(missing_ok=True)  # that of an earlier build, should this one fail
        if self.compiler.compiler_type == "msvc":
            raise PlatformError("MSVC has no vector types; GCC or clang is needed")
        one_machine(self.compiler)
        objects, built = [], []
        for isa in TABLE["instruction_sets"](target_machine()):
            try:
                objects += self._compile(TABLE["bodies"](PACKAGE), isa.name, isa.macros, isa.flags)
                built.append(isa.name)
            except CompileError:
                self.warn(f"this compiler cannot build the {isa.name} kernels; left out")
        if not built:
            raise CompileError("no instruction set could be compiled")
        macros = [
            ("REGARD_BUILT", f'"{",".join(built)}"'),
            ("REGARD_DIGEST", f'"{TABLE["digest"](PACKAGE)}"'),
        ]
        objects += self._compile([PACKAGE / name for name in TABLE["ONCE"]], "once", macros, ())
        path.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(path), libraries=["m"], extra_postargs=["-pthread"], target_lang="c"
        )
        self.built = True

    def _compile(self, sources, folder, macros, flags) -> list[str]:
        return self.compiler.compile(
            [os.path.relpath(source) for source in sources],
            output_dir=os.path.join(self.build_temp, folder),
            macros=macros,
            include_dirs=[str(PACKAGE / "native")],
            extra_postargs=[*TABLE["FLAGS"], *flags],
        )

    def get_outputs(self) -> list[str]:
        return super().get_outputs() if self.built else []

    def get_output_mapping(self) -> dict[str, str]:
        return super().get_output_mapping() if self.built else {}


def one_machine(compiler) -> None:
    """Takes `-arch` pairs of other machines out of a macOS compiler's commands."""
    for name in ("compiler", "compiler_so", "linker_so"):
        command = list(getattr(compiler, name, None) or ())
        dropped: set[int] = set()
        for index, (flag, machine) in enumerate(pairwise(command)):
            if flag == "-arch" and machine != target_machine():
                dropped |= {index, index + 1}
        if dropped:
            setattr(compiler, name, [w for i, w in enumerate(command) if i not in dropped])


class Wheel(bdist_wheel):
    """`py3-none-<platform>` with the library, `py3-none-any` without."""

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
        if not self.get_finalized_command("build_ext").built:
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        if "universal" in platform_tag:
            platform_tag = platform_tag.rsplit("_", 1)[0] + f"_{target_machine()}"
        return "py3", "none", platform_tag


setup(
    ext_modules=[Extension(f"regard.native.{TABLE['LIBRARY']}", sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
