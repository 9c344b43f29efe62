"""From softmax attention to a linear one: conversion, attention transfer, low-rank finetuning.

    convert(model)                    the softmax layers become Hedgehog layers on the same weights
                                      (of transformers, timm: regard.adapt.swap(model, "hedgehog"))
    distil_attention(model, batches)  their feature maps learn the softmax weights
    add_lora(model); finetune(model, batches, loss)        the rest recovers
    merge_lora(model)

The files: `losses.py` and `diagnostics.py` (plain functions of attention weights), `transfer.py`
(teacher and student side by side), `convert.py`, `training.py`, `lora.py`.
"""

from __future__ import annotations

from regard.recipes.distil.convert import convert, from_attention
from regard.recipes.distil.diagnostics import (
    entropy,
    kullback_leibler,
    monotonicity,
    top_agreement,
)
from regard.recipes.distil.lora import LowRank, add_lora, merge_lora
from regard.recipes.distil.losses import (
    TransferLoss,
    output_error,
    softmax_weights,
    total_loss,
    weight_cross_entropy,
)
from regard.recipes.distil.training import (
    adaptable,
    batch_loss,
    diagnose,
    distil_attention,
    finetune,
)
from regard.recipes.distil.transfer import Both, both, transferring

__all__ = [
    "Both",
    "LowRank",
    "TransferLoss",
    "adaptable",
    "add_lora",
    "batch_loss",
    "both",
    "convert",
    "diagnose",
    "distil_attention",
    "entropy",
    "finetune",
    "from_attention",
    "kullback_leibler",
    "merge_lora",
    "monotonicity",
    "output_error",
    "softmax_weights",
    "top_agreement",
    "total_loss",
    "transferring",
    "weight_cross_entropy",
]
