"""The memory of training on one long sequence, of a process that does nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LENGTH, SIZE = 65536, 64

PROGRAM = """
import re, sys
import torch
import regard
torch.set_num_threads(1)
name, decay, impl, length, size = *sys.argv[1:4], *map(int, sys.argv[4:])

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def train(length):
    q, k, v = (torch.randn(1, 1, length, size).requires_grad_() for _ in range(3))
    options = {}
    if decay:
        shape = (1, 1, length) if decay == "token" else (1, 1, length, size)
        options["log_decay"] = (-torch.rand(shape)).requires_grad_()
    if decay == "channel":  # as gated linear attention does: no map, no normaliser
        options |= {"feature_map": "identity", "normalise": False}
    if "delta" in name:
        options["beta"] = torch.rand(1, 1, length).requires_grad_()
    op = regard.mechanisms[name].op
    op(q, k, v, causal=True, impl=impl, **options).sum().backward()

train(512)
before = peak()
train(length)
print((peak() - before) / (4 * length * size))
"""


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "eager"])
@pytest.mark.parametrize(
    ("name", "decay"),
    [("lightning", ""), ("lightning", "token"), ("linear", "token"), ("linear", "channel"),
     ("delta", ""), ("gated_delta", "token")],
)  # fmt: skip
def test_training_on_65536_tokens_takes_less_than_twelve_times_the_queries(name, decay, impl):
    """Everything that a call brings or makes: q, k, v, decays, output, gradients, states."""
    arguments = [name, decay, impl, str(LENGTH), str(SIZE)]
    # What is freed goes back at once: malloc would keep it, which says nothing about the op.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    program = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 12, done.stdout
