"""Runs a function in a process in which Triton's kernels are interpreted on the CPU.

Triton decides at import whether its kernels are interpreted, so a process of their own is
needed: one per test process, started when it is first asked. `interpreted("package.module:name",
*arguments)` calls that function there; arguments and result travel by pickle, and what it
raises is raised here. bfloat16 is not for the interpreter, whose products of it are wrong.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import struct
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

import torch

TESTS = Path(__file__).parents[1]


class _Worker:
    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, path: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        _send(process.stdin, (path, arguments, named))
        try:
            told, value = _receive(process.stdout)
        except EOFError:
            raise RuntimeError(f"the interpreter's process died in {path}") from None
        if told != "failed":
            return value
        error, trace = value
        error.add_note(f"in the interpreter's process:\n{trace}")
        raise error

    def _start(self) -> subprocess.Popen[bytes]:
        search = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(search),
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "gpu.interpreter"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        )  # fmt: skip
        atexit.register(self._stop)
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.wait(10)


_worker = _Worker()


def interpreted(path: str, *arguments: Any, **named: Any) -> Any:
    """`package.module:name(*arguments, **named)` with interpreted kernels."""
    return _worker.call(path, arguments, named)


def gradients(
    path: str, operands: dict[str, Any], options: dict[str, Any], cotangent: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """For `interpreted`: the output of an op, and the gradient of each operand that wants one."""
    fresh = {
        name: x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for name, x in operands.items()
    }
    out = _find(path)(**fresh, **options)
    wanted = {n: x for n, x in fresh.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    found = torch.autograd.grad(out, list(wanted.values()), cotangent)
    return out.detach(), dict(zip(wanted, found, strict=True))


def _find(path: str) -> Any:
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _send(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<q", len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<q", size)[0]))


def _serve() -> None:
    import numpy as np

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints is no answer
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    np.seterr(all="ignore")  # a GPU does not tell of inf - inf either; results are compared
    while True:
        try:
            path, arguments, named = _receive(sys.stdin.buffer)
        except EOFError:
            answers.close()
            return
        try:
            answer = ("done", _find(path)(*arguments, **named))
        except Exception as error:
            answer = ("failed", (error, traceback.format_exc()))
        try:
            _send(answers, answer)
        except Exception as error:  # a result or an error that cannot travel
            _send(answers, ("failed", (RuntimeError(repr(error)), traceback.format_exc())))


if __name__ == "__main__":
    _serve()
