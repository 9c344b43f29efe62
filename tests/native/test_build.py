"""Builds the distributions as pip would, with and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROBE = "import regard; s = regard.native.status(); print(s.loaded, len(s.built), s.reason)"
pytestmark = pytest.mark.slow


def copy_of_the_project(place: Path) -> Path:
    left_out = shutil.ignore_patterns(".*", "build", "dist", "site", "*.so", "*.egg-info")
    shutil.copytree(ROOT, place, ignore=left_out)
    return place


def build(project: Path, out: Path, what: str, **environment: str) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{what}", "--outdir", str(out)]
    done = subprocess.run(
        [*command, str(project)], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (made,) = out.iterdir()
    return made


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


def metadata_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/WHEEL"))
        return file.read(name).decode()


def probe(wheel: Path, place: Path) -> list[str]:
    """What the installed wheel says of its library, in a process that sees no checkout."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place)
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE],
        env=os.environ | {"PYTHONPATH": str(place)},
        cwd=place, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split(maxsplit=2)


def test_the_sdist_builds_a_wheel_for_any_python_of_this_platform(tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path / "project")
    sdist = build(project, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    carried = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    for name in ("native/vector.h", "native/fma_peak.c", "native/processor.c", "native/table.py"):
        assert f"src/regard/{name}" in carried
    assert {"setup.py", "LICENSE", "src/regard/py.typed", "tests/native/test_build.py"} <= carried
    assert not any(name.endswith((".so", ".pyc")) for name in carried)

    wheel = build(unpacked, tmp_path / "wheel", "wheel")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if sys.platform == "linux":
        assert wheel.name == f"regard-0.1.0-py3-none-{platform}.whl"
    assert "Root-Is-Purelib: false" in metadata_of(wheel)
    names = names_in(wheel)
    for name in ("_kernels.so", "vector.h", "fma_peak.c"):
        assert f"regard/native/{name}" in names
    assert {"regard/py.typed", "regard/tasks/data/co2.csv"} <= set(names)
    assert not any(name.startswith(("tests", "regard-0.1.0.data")) for name in names)
    loaded, built, _ = probe(wheel, tmp_path / "installed")
    assert loaded == "True"
    assert int(built) >= 1


def test_without_a_compiler_the_wheel_is_pure(tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path / "project")
    build(project, tmp_path / "before", "wheel")  # what it leaves in build/ must not be taken
    wheel = build(project, tmp_path / "wheel", "wheel", CC="/bin/false")
    assert wheel.name == "regard-0.1.0-py3-none-any.whl"
    assert "Root-Is-Purelib: true" in metadata_of(wheel)
    names = names_in(wheel)
    assert "regard/native/fma_peak.c" in names
    assert not any(name.endswith(".so") for name in names)
    assert not any(name.startswith("regard-0.1.0.data") for name in names)
    loaded, built, reason = probe(wheel, tmp_path / "installed")
    assert (loaded, built) == ("False", "0")
    assert "without a C compiler" in reason


def test_an_instruction_set_that_the_compiler_lacks_is_left_out(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\nfor word in "$@"; do [ "$word" = -mavx512f ] && exit 1; done\nexec cc "$@"\n'
    )
    compiler.chmod(0o755)
    project = copy_of_the_project(tmp_path / "project")
    wheel = build(project, tmp_path / "wheel", "wheel", CC=str(compiler))
    assert "py3-none-any" not in wheel.name
    loaded, built, _ = probe(wheel, tmp_path / "installed")
    assert loaded == "True"
    assert int(built) == (2 if os.uname().machine == "x86_64" else 1)
