"""What is said and done when the native library is missing, broken or stale."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from regard.native import loader, table


@pytest.fixture
def library_at(monkeypatch: pytest.MonkeyPatch):
    """Makes the loader look at another place; the real library is found again afterwards."""

    def move(place: Path) -> None:
        monkeypatch.setattr(loader, "path", lambda: place)

    yield move
    loader._load.cache_clear()


def test_without_a_library_everything_says_so(library_at, tmp_path: Path) -> None:
    library_at(tmp_path / "none.so")
    status = regard.native.status()
    assert not status.loaded
    assert status.reason is not None
    assert "without a C compiler" in status.reason
    assert status.remedy is not None
    assert "pip install" in status.remedy
    assert regard.native.instruction_sets() == ()
    assert regard.native.refusal() == status.reason
    with pytest.raises(regard.native.NativeUnavailable, match="fma_peak: no native library: .*pip"):
        regard.native.fma_peak()


def test_a_file_that_is_no_library(library_at, tmp_path: Path) -> None:
    place = tmp_path / "broken.so"
    place.write_text("not a library")
    library_at(place)
    reason = regard.native.status().reason
    assert reason is not None
    assert reason.startswith("broken.so could not be loaded")


def test_a_library_of_other_sources(library_at, tmp_path: Path, monkeypatch) -> None:
    if regard.native.refusal() is not None:
        return  # there is none to copy
    place = tmp_path / "stale.so"
    shutil.copy(loader.path(), place)
    library_at(place)
    monkeypatch.setattr(table, "digest", lambda: "0" * 16)
    status = regard.native.status()
    assert status.reason == "stale.so was built from other sources than these"
    assert status.remedy == "build it again: pip install -e . in the checkout"


def test_import_does_not_load_it() -> None:
    code = (
        "import regard, pathlib\n"
        "maps = pathlib.Path('/proc/self/maps')\n"
        "print('_kernels' in maps.read_text() if maps.exists() else False)\n"
        "print(regard.native.loader._load.cache_info().currsize)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0"]


def test_refusal_is_none_exactly_when_loaded() -> None:
    assert (regard.native.refusal() is None) == regard.native.status().loaded
