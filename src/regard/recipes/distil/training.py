"""The two stages of training: attention transfer, then low-rank finetuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapt.learned import Learned
from regard.core.checks import check_integer, check_number, reject, words
from regard.mixers import Hedgehog
from regard.recipes.distil import diagnostics
from regard.recipes.distil.losses import (
    TransferLoss,
    output_error,
    total_loss,
    weight_cross_entropy,
)
from regard.recipes.distil.transfer import Both, transferring
from regard.recipes.optimiser import Optimiser

Batch = Any  # the arguments of the model: a tensor, a tuple, or a mapping of names


def adaptable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The feature maps and window factors of all Hedgehog layers, swapped-in ones too, by name."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Hedgehog | Learned):
            for own, parameter in layer.named_parameters():
                if own.split(".")[0] in ("feature_map_q", "feature_map_k", "window_factors"):
                    found[f"{name}.{own}" if name else own] = parameter
    return found


def batch_loss(
    model: nn.Module,
    batch: Batch,
    *,
    xent: float = 1.0,
    mse: float = 1000.0,
    query_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, TransferLoss]]:
    """The loss of attention transfer on one batch, and its parts by layer.

        xent mean_layers(cross-entropy of weights) + mse mean_layers(squared error of outputs)

    Every layer passes on its teacher's output. With xent=0 no T x S matrix is made. Padded queries
    are left out: those of the model's key_mask, in cross-attention those of `query_mask`.
    """
    losses: dict[str, TransferLoss] = {}

    def observe(name: str, found: Both) -> None:
        between = None
        if found.student_weights is not None and found.teacher_weights is not None:
            weights = found.student_weights, found.teacher_weights
            between = weight_cross_entropy(*weights, found.query_mask)
        wide = torch.promote_types(found.student.dtype, torch.float32)
        outputs = found.student.to(wide), found.teacher.to(wide)
        losses[name] = TransferLoss(between, output_error(*outputs, found.query_mask))

    with transferring(model, observe, weights=xent != 0, query_mask=query_mask):
        _call(model, batch)
    return total_loss(losses.values(), xent=xent, mse=mse), losses


def distil_attention(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    xent: float = 1.0,
    mse: float = 1000.0,
    steps: int | None = None,
    optimiser: Optimiser | None = None,
) -> list[float]:
    """Stage one: feature maps and window factors learn their teachers; the loss of every step.

    Nothing else has a gradient, and the model is in evaluation mode meanwhile.

    Args:
        batches: inputs of the model; with `steps`, the first so many of them.
        optimiser: None: AdamW with a learning rate of 1e-2 and no decay, as published.

    Raises: FloatingPointError where the loss is not finite.
    """
    trained = adaptable(model)
    if not trained:
        raise reject("distil_attention", "model", "one with feature maps to train", _kind(model))
    optimiser = optimiser or Optimiser(1e-2)
    check_number("distil_attention", "xent", xent, least=0.0)
    check_number("distil_attention", "mse", mse, least=0.0)
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _only(model, trained.values()):
            return _descend(
                "distil_attention", model, batches, steps, optimiser,
                lambda batch: batch_loss(model, batch, xent=xent, mse=mse)[0],
            )  # fmt: skip
    finally:
        for module, mode in was_training.items():
            module.training = mode


def finetune(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Any], Tensor],
    *,
    steps: int | None = None,
    optimiser: Optimiser | None = None,
    maps: bool = True,
) -> list[float]:
    """Stage two: `loss(batch)` falls by what has a gradient; the loss of every step.

    Usually after `add_lora`, which leaves the low-rank matrices free; with `maps`, feature maps
    and window factors as well. `optimiser` None: AdamW with a learning rate of 1e-4.
    """
    if maps:
        for parameter in adaptable(model).values():
            parameter.requires_grad_()
    return _descend("finetune", model, batches, steps, optimiser or Optimiser(1e-4), loss)


def diagnose(
    model: nn.Module, batch: Batch, *, query_mask: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """How close every converted layer is to its teacher on one batch, by layer and measure.

    "entropy" and "teacher_entropy" of rows, "kl" from teacher to student, "monotonicity",
    "top_agreement": see `regard.recipes.distil.diagnostics`.
    """
    found: dict[str, dict[str, float]] = {}

    def observe(name: str, seen: Both) -> None:
        a, p = seen.teacher_weights, seen.student_weights
        assert a is not None
        assert p is not None
        real = a != 0
        if seen.query_mask is not None:
            real = real & seen.query_mask[:, None, :, None]
        measures = {
            "entropy": diagnostics.entropy(p, real),
            "teacher_entropy": diagnostics.entropy(a, real),
            "kl": diagnostics.kullback_leibler(a, p, real),
            "monotonicity": diagnostics.monotonicity(a, p, real),
            "top_agreement": diagnostics.top_agreement(a, p, real),
        }
        found[name] = {measure: float(value) for measure, value in measures.items()}

    with torch.no_grad(), transferring(model, observe, query_mask=query_mask):
        _call(model, batch)
    return found


def _call(model: nn.Module, batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        caches = getattr(getattr(model, "config", None), "use_cache", False)
        more = {"use_cache": False} if caches and "use_cache" not in batch else {}
        return model(**batch, **more)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _kind(model: Any) -> str:
    return words(type(model).__name__)


@contextmanager
def _only(model: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters and no others."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _descend(
    op: str,
    model: nn.Module,
    batches: Iterable[Batch],
    steps: int | None,
    optimiser: Optimiser,
    loss_of: Callable[[Batch], Tensor],
) -> list[float]:
    if steps is not None:
        check_integer(op, "steps", steps, least=0)
        batches = islice(batches, steps)
    elif optimiser.schedule == "cosine":
        raise reject(op, "steps", "given with a schedule that ends", steps)
    if not any(p.requires_grad for p in model.parameters()):
        raise reject(op, "model", "one with parameters to train", _kind(model))
    adam, losses = optimiser.build(model), []
    trained = [p for group in adam.param_groups for p in group["params"]]
    for number, batch in enumerate(batches, 1):
        loss = loss_of(batch)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError(f"{op}: the loss is {float(loss.detach())} at step {number}")
        if optimiser.clip is not None:
            nn.utils.clip_grad_norm_(trained, optimiser.clip)
        for group in adam.param_groups:
            group["lr"] = optimiser.rate(number, steps or number)
        adam.step()
        losses.append(float(loss.detach()))
    adam.zero_grad(set_to_none=True)
    if steps is not None and len(losses) < steps:
        raise reject(op, "batches", f"at least {steps} of them", words(str(len(losses))))
    return losses
