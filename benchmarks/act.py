"""What calibrating 8 of 32 heads costs on a layer of attention with 512 tokens.

    python benchmarks/act.py [--rounds 9] [--out benchmarks/results/act.json]

Once for a Llama layer of width 2048 (32 heads of 64, random weights), once for its attention
function alone, without projections; CPU, one thread, `time.process_time`, the variants one after
the other in every round, the minimum over the rounds. `eager` forms the weights of every head;
`released` also edits them as the authors' function does: head by head, each on a copy of the map.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from regard.steer import act_calibration, edit

HEADS = [1, 4, 9, 13, 17, 22, 26, 31]
LENGTH = 512


def build(implementation: str) -> nn.Module:
    """One layer, with scores large enough for some sinks."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=1,
        num_attention_heads=32,
        attn_implementation=implementation,
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight.mul_(6)
    return model


def released(weights: Tensor, _: Any) -> Tensor:
    """One head after the other, each on a copy of all of them; written after its description."""
    for head in range(weights.shape[1]):
        weights = copy.deepcopy(weights)
        part = weights[0, head]
        counts = torch.arange(len(part), 0, -1)
        sinks = (part.sum(0) / counts > 0.1).nonzero().flatten()[1:]
        freed = 0.6 * part[:, sinks].sum(-1, keepdim=True)
        others = torch.ones(len(part), dtype=torch.bool)
        others[sinks] = False
        part[:, sinks] *= 0.4
        part[:, others] += freed * part[:, others] / part[:, others].sum(-1, keepdim=True)
        part[0, 0] = 1.0
    return weights


class Function(nn.Module):
    """Attention alone, in a module that a tap knows."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.num_heads = 32
        self.qkv, self.proj = nn.Identity(), nn.Identity()
        self.eager = implementation == "eager"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.eager:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
        return scores.softmax(-1) @ v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    hidden = torch.randn(1, LENGTH, 2048)
    q, k, v = torch.randn(3, 1, 32, LENGTH, 64)
    calls: dict[str, dict[str, Callable[[], Any]]] = {"layer": {}, "function": {}}
    models: dict[tuple[str, str], nn.Module] = {}
    for name in ("sdpa", "eager"):
        layer, function = build(name), Function(name)
        models["layer", name], models["function", name] = layer, function
        calls["layer"][name] = partial(layer, inputs_embeds=hidden, use_cache=False)
        calls["function"][name] = partial(function, q, k, v)
    variants: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
        "sdpa": ("sdpa", lambda model: nullcontext()),
        "calibrated": ("sdpa", lambda model: act_calibration(model, {0: HEADS})),
        "eager": ("eager", lambda model: nullcontext()),
        "released": ("eager", lambda model: edit(model, post=released, heads=HEADS, layers=[0])),
    }
    best = {(part, name): float("inf") for part in calls for name in variants}
    for _ in range(given.rounds):
        for part, name in best:
            implementation, context = variants[name]
            with torch.inference_mode(), context(models[part, implementation]):
                start = time.process_time()
                calls[part][implementation]()
                seconds = time.process_time() - start
            best[part, name] = min(best[part, name], seconds)
    rows = [
        {
            "of": part,
            "variant": name,
            "cpu_seconds": round(seconds, 4),
            "ratio": round(seconds / best[part, "sdpa"], 3),
        }
        for (part, name), seconds in best.items()
    ]
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()))
    if given.out:
        about = {"tokens": LENGTH, "heads": 32, "calibrated": len(HEADS), "threads": 1}
        about |= {"torch": torch.__version__, "rounds": given.rounds}
        given.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
