"""Wan: a transformer that denoises the latent of a video, guided by a prompt.

Source: Wan2.1 (arXiv 2503.20314) as diffusers publishes it; names of tensors are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from regard.core.checks import reject
from regard.core.precision import compute_dtype
from regard.mixers.norms import RMSNorm
from regard.models.pretrained import Pretrained
from regard.models.wan.config import WanConfig
from regard.ops.softmax import softmax_attention

# The attention of a layer: q [B, H, T, D], k and v [B, H, S, D] -> [B, H, T, D].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Wan(Pretrained):
    """Denoises latents: (latents, timestep, text) -> what the sampler asks for, of the same shape.

    A latent [B, channels, frames, height, width] is cut into tokens in raster order; blocks of
    self-attention with rotary positions, cross-attention to the prompt and an MLP follow, shifted,
    scaled and gated by the encoded time.

    Every block has `attn1` and `attn2`, whose `attend` is a plain function of q, k and v (rotary
    positions in) that others may replace for a time, as `regard.steer.freeswim` does.

    Precision: normalisations and rotary positions in float32 at least, else that of the weights.
    Source: matched to 2e-6 with the authors' layers.

    >>> model = Wan(WanConfig(heads=2, head_dim=12, layers=1, mlp_dim=8, channels=4,
    ...     channels_out=4, text_dim=10, freq_dim=16))
    >>> model(torch.randn(1, 4, 2, 6, 8), torch.tensor([500.0]), torch.randn(1, 3, 10)).shape
    torch.Size([1, 4, 2, 6, 8])
    """

    KIND: ClassVar[str] = "wan"
    CONFIG: ClassVar[type[Any]] = WanConfig

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.patch_embedding = nn.Conv3d(config.channels, dim, config.patch, config.patch)
        self.condition_embedder = Conditions(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.proj_out = nn.Linear(dim, config.channels_out * math.prod(config.patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def grid(self, latents: Float[Tensor, "b c f h w"]) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        sizes = latents.shape[2:]
        if latents.dim() != 5 or any(n % p for n, p in zip(sizes, self.config.patch, strict=True)):
            accepted = f"[batch, channels, frames, height, width], multiples of {self.config.patch}"
            raise reject(type(self).__name__, "latents", accepted, latents)
        f, h, w = (n // p for n, p in zip(sizes, self.config.patch, strict=True))
        return f, h, w

    def forward(
        self,
        latents: Float[Tensor, "b c f h w"],
        timestep: Float[Tensor, " #b"],
        text: Float[Tensor, "#b s e"],
    ) -> Float[Tensor, "b o f h w"]:
        """timestep: 0 .. 1000. A timestep or a prompt of one row serves the whole batch."""
        f, h, w = grid = self.grid(latents)
        x = self.patch_embedding(latents).flatten(2).mT
        time, modulation, prompt = self.condition_embedder(timestep, text)
        prompt = prompt.expand(x.shape[0], -1, -1)
        angles = self.angles(grid, x.device)
        for block in self.blocks:
            x = block(x, modulation, prompt, angles)
        shift, scale = (self.scale_shift_table + time[:, None]).unbind(1)
        x = self.proj_out(_norm(x, self.config.eps) * (1 + scale[:, None]) + shift[:, None])
        x = x.unflatten(2, (*self.config.patch, -1)).unflatten(1, grid)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # b, c, f, pf, h, ph, w, pw
        return x.reshape(x.shape[0], -1, *(n * p for n, p in zip((f, h, w), self.config.patch,
                                                                 strict=True)))  # fmt: skip

    def angles(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """The rotary angle of every pair of channels at every token, float64 [T, head_dim / 2]."""
        parts = []
        for axis, (size, channels) in enumerate(zip(grid, self.config.rope_split, strict=True)):
            power = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
            place = torch.arange(size, dtype=torch.float64, device=device)
            shape = [1, 1, 1, -1]
            shape[axis] = size
            part = torch.outer(place, self.config.rope**-power).view(shape)
            parts.append(part.expand(*grid, -1))
        return torch.cat(parts, 3).flatten(0, 2)


class Conditions(nn.Module):
    """Time and prompt as the blocks take them."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = _Pair(config.freq_dim, config.dim, silu)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = _Pair(config.text_dim, config.dim, _gelu)

    def forward(self, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, dim] of the time, [B, 6, dim] of its modulations, [B, S, dim] of the prompt."""
        half = self.freq_dim // 2
        power = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
        angle = timestep.double()[:, None] * 10000.0**-power
        encoded = torch.cat([angle.cos(), angle.sin()], 1).to(text.dtype)
        time = self.time_embedder(encoded)
        return time, self.time_proj(silu(time)).unflatten(1, (6, -1)), self.text_embedder(text)


class _Pair(nn.Module):
    """Two linear layers."""

    def __init__(self, size: int, dim: int, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(size, dim), nn.Linear(dim, dim)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.between(self.linear_1(x)))


class Block(nn.Module):
    """Self-attention, cross-attention, MLP; the first and the last under the time's control."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1, self.attn2 = Attention(config), Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = MLP(config.dim, config.mlp_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, modulation: Tensor, prompt: Tensor, angles: Tensor) -> Tensor:
        """x [B, T, dim], modulation [1 or B, 6, dim], prompt [B, S, dim]."""
        parts = (self.scale_shift_table + modulation)[:, :, None].unbind(1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        y = (_norm(x, self.eps) * (1 + scale) + shift).to(x.dtype)
        x = x + gate * self.attn1(y, y, angles)
        x = x + self.attn2(self.norm2(x), prompt)
        y = (_norm(x, self.eps) * (1 + scale_mlp) + shift_mlp).to(x.dtype)
        return x + gate_mlp * self.ffn(y)


class Attention(nn.Module):
    """Attention whose queries and keys are normalised over all heads at once.

    attend: what is done with q, k and v; softmax attention unless somebody replaces it.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        self.attend: Attend = softmax_attention

    def forward(self, x: Tensor, memory: Tensor, angles: Tensor | None = None) -> Tensor:
        """x [B, T, dim], memory [B, S, dim]; angles turn queries and keys."""
        parts = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(memory)), self.to_v(memory)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        if angles is not None:
            q, k = _turn(q, angles), _turn(k, angles)
        return self.to_out[0](self.attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU (tanh), Linear, under the names of the checkpoints."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Module(), nn.Identity(), nn.Linear(hidden, dim)])
        self.net[0].proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> the same."""
        first = self.net[0].get_submodule("proj")
        return self.net[2](_gelu(first(x)))


def _gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def _norm(x: Tensor, eps: float) -> Tensor:
    return layer_norm(x.to(compute_dtype(x.dtype)), x.shape[-1:], eps=eps)


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the pairs of neighbouring channels of x [B, H, T, D] by angles [T, D / 2]."""
    wide = x.to(compute_dtype(x.dtype))
    cos, sin = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
    even, odd = wide[..., ::2], wide[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], 4).flatten(3).to(x.dtype)
