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
name, decay, impl, length, size, heads = *sys.argv[1:4], *map(int, sys.argv[4:])

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def train(length):
    q, k, v = (torch.randn(1, heads, length, size).requires_grad_() for _ in range(3))
    options = {}
    if decay:
        shape = (1, heads, length) if decay == "token" else (1, heads, length, size)
        options["log_decay"] = (-torch.rand(shape)).requires_grad_()
    if decay == "channel":  # as gated linear attention does: no map, no normaliser
        options |= {"feature_map": "identity", "normalise": False}
    if "delta" in name:
        options["beta"] = torch.rand(1, heads, length).requires_grad_()
    op = regard.mechanisms[name].op
    op(q, k, v, causal=True, impl=impl, **options).sum().backward()

train(512)
before = peak()
train(length)
print((peak() - before) / (4 * heads * length * size))
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
    assert queries_at_the_peak(name, decay, impl, LENGTH, 1) < 12


@pytest.mark.slow
def test_features_and_a_decay_for_every_channel_take_less_than_ten_times_the_queries():
    """Beside q, k, v and the decays: two features, output, four gradients, factors, states."""
    assert queries_at_the_peak("linear", "mapped channel", "auto", LENGTH, 1) - 4 < 10


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "eager"])
@pytest.mark.parametrize("decay", ["", "token"])
def test_lightning_needs_little_beside_its_inputs_and_results(decay, impl):
    """Training on 16,384 tokens of four heads: 64 MB over q, k, v, out and three gradients."""
    extra = queries_at_the_peak("lightning", decay, impl, 16384, 4) - 7
    assert extra * 4 * 4 * 16384 * SIZE < 64e6


def queries_at_the_peak(name: str, decay: str, impl: str, length: int, heads: int) -> float:
    """The memory of a fresh process over that of a short call, in sizes of q."""
    arguments = [name, decay, impl, str(length), str(SIZE), str(heads)]
    # What is freed goes back at once: malloc would keep it, which says nothing about the op.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    program = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)
