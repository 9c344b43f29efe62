"""The command's first moment: Ctrl-C while everything is still being imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import regard_command

# Stands in for the package: what is pressed while torch is being imported.
PRESSED = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
RUN = "import signal; signal.signal(signal.SIGINT, signal.{handler}); import regard_command; "


def start(folder: Path, handler: str, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "regard").mkdir()
    (folder / "regard" / "__init__.py").write_text(code)
    path = os.pathsep.join([str(folder), str(Path(regard_command.__file__).parent)])
    command = [sys.executable, "-c", RUN.format(handler=handler) + "regard_command.main()"]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=50, check=False,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_during_the_import_is_one_line_and_130(tmp_path: Path) -> None:
    done = start(tmp_path, "default_int_handler", PRESSED)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "regard: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    done = start(tmp_path, "SIG_IGN", PRESSED.replace("60", "0") + "; raise SystemExit(7)")
    assert done.returncode == 7


def test_afterwards_the_command_runs_and_python_listens_again(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["regard", "--version"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            regard_command.main()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("regard ")
