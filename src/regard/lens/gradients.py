"""Saliency by gradients, through captum: what an infinitesimal change of the input does.

Cheaper than occlusion (one backward pass per output token and step), but of the model's slope and
not of its behaviour without a part of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.core.checks import check_choice, check_integer
from regard.lens.forced import ForcedDecoding
from regard.lens.inputs import array, require
from regard.lens.occlusion import draw_tokens
from regard.lens.records import Record

Method = Literal["gradient", "input_x_gradient", "integrated_gradients"]
METHODS = ("gradient", "input_x_gradient", "integrated_gradients")


@dataclass(frozen=True)
class GradientSaliency(Record):
    """The magnitude of each token's attribution, [I, ...] with the axes of what it is of."""

    values: np.ndarray
    method: str
    of: str

    def picture(self, path: Any) -> None:
        """The map of the first eight tokens, and of all tokens on average."""
        draw_tokens(self.values, path)


def gradient_saliency(
    model: nn.Module,
    inputs: Tensor,
    tokens: Int[Tensor, "1 I"],
    *,
    method: Method = "input_x_gradient",
    of: Literal["input", "encoder"] = "input",
    steps: int = 16,
) -> GradientSaliency:
    """What each token's probability depends on at the margin: the size of gradient attributions.

    The attributed quantity is log P(token). method: "gradient" |∂/∂x|; "input_x_gradient" |x ∂/∂x|;
    "integrated_gradients" along the line from 0 in `steps`. of: "input" gives the input's axes;
    "encoder" the vectors of the encoder's output, summed over their channels: [I, S].
    tokens: the decoder's input ids; row i is about the token after position i, and what follows
    the last is the model's likeliest. Parameters need no gradient and get none.

    Needs captum (the extra `lens`). Cost: a forward and a backward pass per token (and step).

    Raises:
        ValueError: an unknown method, or more than one sequence.
        ImportError: captum is not installed.
    """
    operation = "gradient_saliency"
    check_choice(operation, "method", method, METHODS)
    check_choice(operation, "of", of, ("input", "encoder"))
    check_integer(operation, "steps", steps)
    captum = require("captum.attr", "lens")
    forced = ForcedDecoding(model, inputs, tokens)
    with torch.no_grad():
        memory = forced.encode(forced.inputs)
        last = forced.decode(memory)[0, -1].argmax()
    said = torch.cat([tokens[0, 1:], last[None].to(tokens)])

    def log_probability(given: Tensor) -> Float[Tensor, "B I"]:
        found = forced.decode(given if of == "encoder" else forced.encode(given))
        return found.gather(2, said.expand(len(found), -1)[..., None])[..., 0]

    if method == "integrated_gradients":
        explainer, options = captum.IntegratedGradients(log_probability), {"n_steps": steps}
        options["internal_batch_size"] = 8
    elif method == "input_x_gradient":
        explainer, options = captum.InputXGradient(log_probability), {}
    else:
        explainer, options = captum.Saliency(log_probability), {}
    start = (memory if of == "encoder" else forced.inputs).detach().clone()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    made = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for i in range(tokens.shape[1]):
            given = start.clone().requires_grad_()
            found = explainer.attribute(given, target=i, **options)[0].detach()
            made.append(found.abs().sum(-1) if of == "encoder" else found.abs())
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return GradientSaliency(array(torch.stack(made)), method, of)
