"""Beyond the size of training: resize, add noise again, and denoise along two paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from regard.core.checks import check_integer, check_number, reject
from regard.steer.freeswim.dual_path import DualPath

# (latents, timestep [1]) -> what the model predicts.
Predict = Callable[[Tensor, Tensor], Tensor]


def flow_sigmas(steps: int, shift: float = 1.0, strength: float = 1.0) -> Float[Tensor, " n"]:
    """Noise levels of a flow-matching sampler, falling to 0; `strength` of the last ones.

        sigma_i = shift s_i / (1 + (shift - 1) s_i),   s_i = 1 - i / steps

    >>> flow_sigmas(4).tolist(), len(flow_sigmas(50, 9.0, strength=0.7))
    ([1.0, 0.75, 0.5, 0.25, 0.0], 36)
    """
    check_integer("flow_sigmas", "steps", steps)
    check_number("flow_sigmas", "shift", shift, above=0.0)
    check_number("flow_sigmas", "strength", strength, above=0.0)
    if strength > 1:
        raise reject("flow_sigmas", "strength", "in (0, 1]", strength)
    s = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigmas = shift * s / (1 + (shift - 1) * s)
    return sigmas[steps - min(steps, int(steps * strength)) :].float()


def resize(
    latents: Float[Tensor, "b c f h w"], size: tuple[int, int]
) -> Float[Tensor, "b c f y x"]:
    """Frame by frame, bilinear, to a height and a width.

    The paper resizes decoded frames in RGB and encodes them again; without a decoder, this.
    """
    B, _, F = latents.shape[:3]
    frames = latents.transpose(1, 2).flatten(0, 1)
    return interpolate(frames, size, mode="bilinear").unflatten(0, (B, F)).transpose(1, 2)


@torch.no_grad()
def upscale(
    predict: Predict,
    latents: Float[Tensor, "b c f h w"],
    sigmas: Float[Tensor, " n"],
    *,
    dual: DualPath | None = None,
    negative: Predict | None = None,
    guidance: float = 5.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b c f h w"]:
    """Noise is added to resized latents and taken away again, with FreeSwim's two paths.

        x = (1 - sigma_0) latents + sigma_0 noise,   x += (sigma_{i+1} - sigma_i) v(x, sigma_i),
        v = v_negative + guidance (v_prompt - v_negative)

    Args:
        predict: the model with its prompt: (latents, timestep = 1000 sigma) -> the velocity,
            noise minus data, as flow-matching models are trained to.
        latents: of the size that is wanted (`resize`), or all zeros with sigma_0 = 1.
        sigmas: `flow_sigmas`; the paper takes 70 % of 50 steps with a shift of 9.
        dual: None: the model as it is.
        negative: the model with the negative prompt; None: no guidance.

    Returns: latents; with `dual`, those of the window path.
    Source: FreeSwim, arXiv 2511.14712, 2025.
    Raises: TypeError, ValueError naming the argument.

    >>> toward_zero = lambda x, time: x / (time / 1000)
    >>> bool(upscale(toward_zero, torch.ones(1, 1, 1, 4, 4), flow_sigmas(4)).abs().max() < 1e-6)
    True
    """
    op = "upscale"
    check_number(op, "guidance", guidance)
    if sigmas.dim() != 1 or len(sigmas) < 2:
        raise reject(op, "sigmas", "at least two levels", sigmas)
    noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype)
    x = (1 - sigmas[0]) * latents + sigmas[0] * noise.to(latents.device)
    if dual is not None:
        dual.clear()
    for step in range(len(sigmas) - 1):
        sigma, following = sigmas[step], sigmas[step + 1]
        time = (1000 * sigma).reshape(1).to(x.device)
        v = _velocity(predict, x, time, dual, step, True)
        if negative is not None:
            base = _velocity(negative, x, time, dual, step, False)
            v = base + guidance * (v - base)
        x = x + (following - sigma) * v
    return x


def _velocity(
    predict: Predict, x: Tensor, time: Tensor, dual: DualPath | None, step: int, conditional: bool
) -> Tensor:
    if dual is None:
        return predict(x, time)
    copies: Sequence[Tensor] = [x] * dual.paths(step, conditional)
    with dual.at(step, conditional):
        return predict(torch.cat(copies), time)[: len(x)]
