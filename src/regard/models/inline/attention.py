"""How the blocks of the InLine families mix the tokens of a map [B, h, w, C]."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from regard.core.checks import reject
from regard.mixers.grids import cut, join
from regard.mixers.inline import InLineAttention, LocalResidual2d
from regard.ops.inline import inline_attention
from regard.ops.softmax import softmax_attention


class MapInLine(InLineAttention):
    """InLine attention over a map, or in windows of it that are taken for images of their own.

    window: None: the whole map. shift: as of `WindowAttention2d`, but tokens that the roll has
        brought together do see each other, as in the released code.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | None = None,
        shift: int = 0,
        qkv_bias: bool = True,
        feature_map: str = "identity",
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias, feature_map=feature_map)
        self.window, self.shift = window, shift

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:  # type: ignore[override]
        """The same shape."""
        B, H, W, C = x.shape
        if self.window is None or max(H, W) <= self.window:
            return super().forward(x.reshape(B, H * W, C), (H, W)).view(B, H, W, C)
        window = min(self.window, H), min(self.window, W)
        x = pad(x, (0, 0, 0, -W % window[1], 0, -H % window[0]))
        sides = x.shape[1], x.shape[2]
        shifts = tuple(self.shift if a > b else 0 for a, b in zip(sides, window, strict=True))
        x = x.roll((-shifts[0], -shifts[1]), (1, 2)) if any(shifts) else x
        windows = cut(x, window).flatten(0, 1)
        out = super().forward(windows, window).unflatten(0, (B, -1))
        out = join(out, window, sides)
        out = out.roll(shifts, (1, 2)) if any(shifts) else out
        return out[:, :H, :W]


class ReducedAttention(nn.Module):
    """Softmax attention of all tokens to a coarser map of keys and values, as PVT has it."""

    def __init__(self, dim: int, heads: int, reduction: int = 1, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The same shape."""
        B, _, _, C = x.shape
        source = x
        if self.sr is not None and self.norm is not None:
            source = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        q = self.q(x).view(B, -1, self.heads, C // self.heads).transpose(1, 2)
        kv = self.kv(source).view(B, -1, 2, self.heads, C // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        out = softmax_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.proj(out)


class Branch(nn.Module):
    """Some channels of CSwin's attention: in stripes by softmax, or over the map by InLine.

    The values pass a static depth-wise convolution, too, inside their stripe (`get_v`), and with
    InLine the predicted one.
    """

    def __init__(self, dim: int, heads: int, inline: bool, feature_map: str) -> None:
        super().__init__()
        self.heads, self.feature_map = heads, feature_map
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.residual = LocalResidual2d(dim, heads) if inline else None

    def forward(
        self,
        qkv: Float[Tensor, "b h w three c"],
        stripe: tuple[int, int],
        context: Float[Tensor, "b c"],
    ) -> Float[Tensor, "b h w c"]:
        """The mixed values; `context` is what the local residual is predicted from."""
        B, H, W, _, C = qkv.shape
        tokens = cut(qkv.flatten(3), stripe).unflatten(3, (3, C))  # [B, n, m, 3, C]
        n, m = tokens.shape[1:3]
        parts = tokens.unflatten(4, (self.heads, C // self.heads)).permute(3, 0, 1, 4, 2, 5)
        q, k, v = parts.flatten(1, 2)  # [B n, heads, m, D]
        image = v.transpose(2, 3).reshape(B * n, C, *stripe)
        local = self.get_v(image)
        if self.residual is None:
            out = softmax_attention(q, k, v)
        else:
            out = inline_attention(q, k, v, feature_map=self.feature_map)
            local = local + self.residual(image, context)
        out = out.transpose(1, 2).reshape(B, n, m, C)
        out = out + local.flatten(2).transpose(1, 2).reshape(B, n, m, C)
        return join(out, stripe, (H, W))


class StripeAttention(nn.Module):
    """CSwin's attention: one branch over the whole map, or two in crossing stripes.

    stripe: their width; None: the whole map.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        stripe: int | None,
        inline: bool = False,
        qkv_bias: bool = True,
        feature_map: str = "identity",
    ) -> None:
        super().__init__()
        self.stripe = stripe
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        count = 1 if stripe is None else 2
        self.attns = nn.ModuleList(
            Branch(dim // count, heads // count, inline, feature_map) for _ in range(count)
        )

    def forward(
        self, x: Float[Tensor, "b h w c"], context: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b h w c"]:
        """The same shape."""
        _, H, W, C = x.shape
        qkv = self.qkv(x).unflatten(3, (3, C))
        stripes = [(H, W)]
        if self.stripe is not None:  # vertical ones first
            if H % self.stripe or W % self.stripe:
                accepted = f"of a size whose maps are multiples of their stripes, {self.stripe}"
                raise reject("InlineCSwin", "image", accepted, x)
            stripes = [(H, self.stripe), (self.stripe, W)]
        share = C // len(stripes)
        mixed = [
            branch(part, stripe, mean)
            for branch, part, stripe, mean in zip(
                self.attns, qkv.split(share, 4), stripes, context.split(share, 1), strict=True
            )
        ]
        return self.proj(torch.cat(mixed, 3))
