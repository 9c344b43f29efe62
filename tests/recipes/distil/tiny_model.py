"""A tiny character model of Python source text: what conversions are tried on."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from regard.models import Decoder, DecoderConfig, MixerConfig
from regard.recipes import Optimiser
from regard.recipes.distil import (
    add_lora,
    batch_loss,
    convert,
    distil_attention,
    finetune,
)

LENGTH, BATCH = 96, 16
FILES = (  # of the standard library, all much alike in every version of Python
    "argparse", "ast", "asyncio/base_events", "calendar", "codecs", "configparser", "csv",
    "datetime", "difflib", "dis", "doctest", "ftplib", "functools", "heapq", "inspect", "ipaddress",
    "locale", "mailbox", "optparse", "pickle", "pydoc", "random", "shutil", "statistics", "tarfile",
    "textwrap", "threading", "tokenize", "traceback", "zipfile",
)  # fmt: skip


@functools.cache
def text() -> tuple[Tensor, Tensor, int]:
    """Symbols for training and for validation, and how many kinds there are."""
    home = Path(os.__file__).parent
    found = [home / f"{name}.py" for name in FILES if (home / f"{name}.py").exists()]
    whole = "".join(path.read_text(errors="ignore") for path in found)[:1_000_000]
    symbols = [c for c in sorted(set(whole)) if ord(c) < 127]
    number = {c: i for i, c in enumerate(symbols)}
    data = torch.tensor([number[c] for c in whole if c in number])
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:], len(symbols)


def batches(seed: int) -> Iterator[Tensor]:
    """Random excerpts, without end."""
    make, data = torch.Generator().manual_seed(seed), text()[0]
    while True:
        at = torch.randint(len(data) - LENGTH, (BATCH,), generator=make)
        yield torch.stack([data[i : i + LENGTH] for i in at.tolist()])


def validation_loss(model: Decoder) -> float:
    """In nats per symbol, on 128 fixed excerpts that were not trained on."""
    data = text()[1]
    rows = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[:: max(1, len(rows) // 128)][:128]
    with torch.no_grad():
        return float(torch.stack([model.loss(part) for part in rows.split(32)]).mean())


@functools.cache
def teacher() -> Decoder:
    """Two layers of two heads with rotary positions, trained for 700 steps."""
    torch.manual_seed(0)
    mixer = MixerConfig("attention", {"heads": 2, "rope": True})
    config = DecoderConfig(
        (mixer,), vocabulary=text()[2], dim=64, layers=2, mlp_dim=256, init_std=0.05
    )
    model = Decoder(config)
    optimiser = Optimiser(5e-3, weight_decay=0.0, warmup=50, schedule="cosine")
    finetune(model, batches(1), model.loss, steps=700, optimiser=optimiser)
    return model


def cross_entropy(model: Decoder) -> float:
    """That of a converted model's weights under its teacher's, a mean over layers."""
    with torch.no_grad():
        losses = batch_loss(model, next(batches(7)))[1]
    return sum(float(loss.xent) for loss in losses.values()) / len(losses)


def converted(
    features: str = "softmax_dim", window: int | None = None, distil: bool = True,
    xent: float = 1.0, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Validation losses and the cross-entropy of weights on the way of one conversion."""
    torch.manual_seed(seed)
    model = copy.deepcopy(teacher())
    convert(model, features=features, window_length=window)
    found = {"zero_shot": validation_loss(model), "xent_before": cross_entropy(model)}
    if distil:
        rate = Optimiser(1e-2, warmup=50, schedule="cosine")
        distil_attention(model, batches(2), xent=xent, steps=200, optimiser=rate)
        found |= {"distilled": validation_loss(model), "xent_after": cross_entropy(model)}
    add_lora(model, rank=8, alpha=16)
    rate = Optimiser(2e-3, warmup=10, schedule="cosine")
    finetune(model, batches(3), model.loss, steps=120, optimiser=rate)
    found["finetuned"] = validation_loss(model)
    return found
