"""What tests/conftest.py promises: poisoned memory, one thread, counted skips, one seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def test_uninitialised_memory_is_nan(device) -> None:
    if device == "cpu":
        like = torch.zeros(2, 3)
        for made in (torch.empty(4), like.new_empty(5), torch.empty_like(like)):
            assert made.isnan().all()
    assert torch.get_num_threads() == 1


@pytest.fixture
def session(tmp_path):
    """Runs a session of its own with our conftest and returns its exit status and output."""
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "@pytest.mark.requires('a_module_that_is_not_here')\n"
        "def test_needs(): raise AssertionError\n"
        "@pytest.mark.requires('torch')\n"
        "def test_runs(): pass\n"
        "def test_silent(record_property): record_property('not applicable', 'no state')\n"
        "def test_costs(record_property): record_property('fast tier', ['toy', 3.0])\n"
        "def test_seed(seed): print('SEED', seed)\n"
    )

    def run(*options: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "no:cacheprovider", "-rA"]
        done = subprocess.run(
            [*command, *options],
            cwd=tmp_path,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_skips_are_counted_and_costs_summed(session) -> None:
    status, output = session("--seed", "7")
    assert status == 0, output
    assert "    1  requires a_module_that_is_not_here" in output
    assert "   3.0 CPU-seconds  toy" in output
    assert "1 not applicable" in output
    assert "SEED 7" in output


def test_the_expected_set_of_skips_is_asserted(session) -> None:
    status, output = session("--expect-missing", "a_module_that_is_not_here", "-n", "1")
    assert status == 0, output
    status, output = session("--expect-missing", "another_one")
    assert status == 1
    assert "unexpectedly not run: requires a_module_that_is_not_here" in output
    assert "nothing was skipped for it: requires another_one" in output
