"""A module of ours in a fresh process: a description goes in, objects come out as they are found.

The module reads one JSON object on standard input and writes one JSON object a line on standard
output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from typing import Any


def stream(
    module: str, description: dict[str, Any], timeout: float | None = None
) -> Generator[dict[str, Any], None, None]:
    """Starts `python -m module` and yields what it writes, line by line.

    The process is ended when the caller stops reading, and after `timeout` seconds. Raises
    RuntimeError with its last words when it fails.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    command = [sys.executable, "-W", "ignore", "-m", module]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, end) if timeout is not None else None
        try:
            if timer is not None:
                timer.daemon = True
                timer.start()
            try:
                with process.stdin:
                    json.dump(description, process.stdin)
            except BrokenPipeError:  # it failed before it read; its own words follow
                pass
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        finally:
            if timer is not None:
                timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        if code:
            said.seek(0)
            last = [line for line in said.read().splitlines() if line.strip()]
            why = f"took more than {timeout:g} s" if late.is_set() else _why(code, last)
            raise RuntimeError(f"the measuring process failed: {why}")


def _why(code: int, said: list[str]) -> str:
    if code == -getattr(signal, "SIGKILL", 9):
        return "the system ended it, as it does when memory runs out"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return said[-1].strip() if said else f"exit code {code}"
