"""Laws about memory: a card that says "linear" never holds a tensor of T x S elements."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regard.testing.law import DoesNotApply, law
from regard.testing.subject import Subject

LENGTH = 1024
PROCESS_LENGTH = 8192


class Largest(TorchDispatchMode):
    """The largest storage, in elements, that any operator below returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.where = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                if held > self.elements:
                    self.elements, self.where = held, f"{func} -> {list(tensor.shape)}"
        return out


def _sample(s: Subject, options: tuple[str, ...], length: int):
    if s.card.memory != "linear":
        raise DoesNotApply("the card promises nothing about memory")
    s.free_lengths()
    dims: dict[str, Any] = {"B": 1, "H": 1, "Hk": 1, "T": length, "S": length, "D": 8, "Dv": 8}
    dims = {name: size for name, size in dims.items() if name not in s.case.dims}
    return s.sample(options, **dims).to(torch.float32)


@law(cost="rotated")
def memory(s: Subject) -> str:
    """Linear memory means that no operator returns T x S elements in a call without gradients."""
    most = 0
    for options in s.some_options(("bias",)):
        call = _sample(s, options, LENGTH)
        with torch.no_grad(), Largest() as largest:
            s.run(call)
        if largest.elements >= call.size("t") * call.size("s"):
            s.broken(f"options {options}: {largest.where} holds {largest.elements} elements")
        most = max(most, largest.elements)
    return f"largest tensor: {most} elements at T = S = {LENGTH}"


PROGRAM = """
import importlib, json, pickle, re, resource, sys
import torch
torch.set_num_threads(1)
module, name, path, device = sys.argv[1:5]
op = importlib.import_module(module)
for part in name.split("."):
    op = getattr(op, part)
with open(path, "rb") as file:
    small, call = pickle.load(file)
def peak():
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    try:  # of this program alone; getrusage inherits the peak of the process that started it
        status = open("/proc/self/status").read()
        return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)
def on(arguments):
    move = lambda v: v.to(device) if isinstance(v, torch.Tensor) else v
    return {name: move(value) for name, value in arguments.items()}
with torch.no_grad():
    op(**on(small))
    arguments = on(call)
    before = peak()
    op(**arguments)
print(json.dumps(peak() - before))
"""


@law(cost="slow")
def memory_process(s: Subject) -> str:
    """The peak of a fresh process grows by less than half of one T x S tensor."""
    call = _sample(s, (), PROCESS_LENGTH)
    small = _sample(s, (), 64)
    op = s.card.op
    found: Any = sys.modules.get(op.__module__)
    for part in op.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not op:
        raise DoesNotApply("a fresh process cannot import the op by its name")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "call.pickle"
        path.write_bytes(pickle.dumps([small.on("cpu").arguments, call.on("cpu").arguments]))
        command = [sys.executable, "-c", PROGRAM, op.__module__, op.__qualname__, str(path)]
        environment = f"import sys; sys.path[:] = {sys.path!r}\n"
        command[2] = environment + PROGRAM
        done = subprocess.run([*command, s.device], capture_output=True, text=True, check=False)
    if done.returncode:
        s.broken(f"the fresh process failed: {done.stderr.strip()[-500:]}")
    grown, whole = json.loads(done.stdout), call.size("t") * call.size("s") * 4
    if grown >= whole / 2:
        s.broken(f"the process grew by {grown} bytes; a T x S tensor has {whole}")
    return f"grew by {grown / 2**20:.1f} MB at T = S = {PROCESS_LENGTH}"
