"""The layer of BiFormer: regions of an image attend to the few regions that fit them best."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    max_pool2d,
    pad,
)

from regard.core.checks import check_choice, check_flag, check_integer, check_number, reject
from regard.ops.routed import region_route, routed_attention
from regard.ops.routed.maps import map_of, real_tokens, regions_of

PADDINGS = ("legacy", "nchw", "masked")
DOWNSAMPLES = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")


class FusedProjection(nn.Module):
    """One matrix for q, k and v, under the released name."""

    def __init__(self, dim: int, qk_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w e"]:
        """q, k and v one after the other."""
        return self.qkv(x)


class RouterLinear(nn.Module):
    """The extra matrix on means of regions, under the released name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.emb = nn.Linear(dim, dim)


class BiLevelRoutingAttention(nn.Module):
    """Softmax attention of every region of an image to the `topk` regions that fit it best.

        q, k, v = W_qkv x + b,   route = topk of mean(q) . mean(k) over regions
        y = W_o (softmax(s q k^T) v over the tokens of the routed regions + conv(v)) + b_o

    with s = qk_dim ** -0.5: the full width, not that of a head. Means run over all heads' channels
    together, so that all heads share a route. conv is depthwise.

    Args:
        dim: C. heads: H. n_win: regions along each side of the image. topk: of them.
        qk_dim: channels of q and k together (None: dim). scale: s.
        side_dwconv: side of the convolution; 0 for none.
        layout: "nhwc", the first release (x [B, h, w, C]; `qkv.qkv.*`, `wo.*`, `lepe.*`), or
            "nchw", the later one (x [B, C, h, w]; `qkv_linear.*`, `output_linear.*`, `lepe.*`).
        padding: an image that n_win does not divide is filled up with zeros. "legacy": before
            the projection, so that what fills are keys equal to its bias; "nchw": after it, in
            regions of h // n_win x w // n_win tokens (there may be more than n_win ** 2), with
            score and value 0; "masked": as "nchw", but what fills is not seen. None: the one of
            the layout.
        auto_pad: whether "legacy" fills up; False refuses such images.
        soft_routing: keys and values of a region are multiplied by the softmax of its routing
            score among those chosen. diff_routing: with it, that softmax has a gradient.
        param_routing: a linear map on means of regions before they are compared; with
            diff_routing and soft_routing.
        kv_downsample: how keys and values of a region are pooled: "identity", "ada_avgpool" or
            "ada_maxpool" to `kv_per_win` a side, "avgpool" or "maxpool" by the ratio
            `kv_downsample_ratio`. Routes and the convolution are of what is not pooled.

    The last four are of layout "nhwc" and padding "legacy".

    Shapes: x [B, h, w, C] (or channels first) -> the same.
    Precision, cost: of `regard.ops.routed_attention`.
    Source: BiFormer (arXiv 2303.08810), its code (MIT); both releases matched to 2e-5.
    Raises: TypeError, ValueError naming the argument.

    >>> layer = BiLevelRoutingAttention(32, heads=4, n_win=4, topk=3)
    >>> layer(torch.randn(2, 16, 16, 32)).shape
    torch.Size([2, 16, 16, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        scale: float | None = None,
        side_dwconv: int = 5,
        layout: str = "nhwc",
        padding: str | None = None,
        auto_pad: bool = True,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        kv_downsample: str = "identity",
        kv_per_win: int | None = None,
        kv_downsample_ratio: int | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        qk_dim = dim if qk_dim is None else qk_dim
        for name, number in (
            ("dim", dim), ("heads", heads), ("n_win", n_win), ("topk", topk), ("qk_dim", qk_dim)
        ):  # fmt: skip
            check_integer(op, name, number)
        check_integer(op, "side_dwconv", side_dwconv, least=0)
        for name, flag in (
            ("auto_pad", auto_pad), ("soft_routing", soft_routing), ("diff_routing", diff_routing),
            ("param_routing", param_routing),
        ):  # fmt: skip
            check_flag(op, name, flag)
        check_choice(op, "layout", layout, ("nhwc", "nchw"))
        check_choice(op, "kv_downsample", kv_downsample, DOWNSAMPLES)
        if dim % heads or qk_dim % heads:
            raise reject(op, "heads", f"a divisor of dim and qk_dim, {dim} and {qk_dim}", heads)
        if scale is not None:
            check_number(op, "scale", scale, above=0.0)
        first = layout == "nchw"
        padding = ("nchw" if first else "legacy") if padding is None else padding
        check_choice(op, "padding", padding, PADDINGS)
        if first and padding == "legacy":
            raise reject(op, "padding", "'nchw' or 'masked' with layout='nchw'", padding)
        if first and qk_dim != dim:
            raise reject(op, "qk_dim", f"dim, {dim}, with layout='nchw'", qk_dim)
        special = soft_routing or diff_routing or param_routing or kv_downsample != "identity"
        if special and padding != "legacy":
            accepted = "'legacy' with soft, differentiable or parametric routing or pooled keys"
            raise reject(op, "padding", accepted, padding)
        if diff_routing and not soft_routing:
            raise reject(op, "diff_routing", "False without soft_routing", diff_routing)
        if param_routing and not diff_routing:
            raise reject(op, "param_routing", "False without diff_routing", param_routing)
        sized = {"kv_per_win": kv_per_win, "kv_downsample_ratio": kv_downsample_ratio}
        wanted = _size_of(kv_downsample)
        for name, number in sized.items():
            if name == wanted:
                check_integer(op, name, number)
            elif number is not None:
                raise reject(op, name, f"None with kv_downsample={kv_downsample!r}", number)
        self.dim, self.heads, self.n_win, self.topk, self.qk_dim = dim, heads, n_win, topk, qk_dim
        self.scale = qk_dim**-0.5 if scale is None else scale
        self.layout, self.padding, self.auto_pad = layout, padding, auto_pad
        self.soft, self.diff = soft_routing, diff_routing
        self.pooling, self.pooled = kv_downsample, sized[wanted] if wanted else None
        if first:
            self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
            self.output_linear = nn.Conv2d(dim, dim, 1)
        else:
            self.qkv = FusedProjection(dim, qk_dim)
            self.wo = nn.Linear(dim, dim)
        self.router = RouterLinear(qk_dim) if param_routing else None
        self.lepe = None
        if side_dwconv:
            check_integer(op, "side_dwconv", side_dwconv)
            self.lepe = nn.Conv2d(
                dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim
            )  # fmt: skip

    def extra_repr(self) -> str:
        sizes = f"n_win={self.n_win}, topk={self.topk}, padding={self.padding!r}"
        return f"{self.dim}, heads={self.heads}, {sizes}"

    def forward(self, x: Float[Tensor, "b i j k"]) -> Float[Tensor, "b i j k"]:
        """The same shape."""
        return self._mix(x)[0]

    def routes(self, x: Float[Tensor, "b i j k"]) -> Int[Tensor, "b r topk"]:
        """The regions that each region attends to."""
        return self._mix(x)[1]

    def _mix(self, x: Any) -> tuple[Tensor, Tensor]:
        op, first = type(self).__name__, self.layout == "nchw"
        axis = 1 if first else 3
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[axis] != self.dim:
            sides = f"{self.dim}, height, width" if first else f"height, width, {self.dim}"
            raise reject(op, "x", f"of shape [batch, {sides}]", x)
        h, w = (x.shape[2], x.shape[3]) if first else (x.shape[1], x.shape[2])
        region = self._region(x, h, w)
        sides = h, w
        if self.padding == "legacy":
            x = pad(x, (0, 0, 0, -w % self.n_win, 0, -h % self.n_win))
            sides = x.shape[1], x.shape[2]
        qkv = self.qkv_linear(x).permute(0, 2, 3, 1) if first else self.qkv(x)
        q, k, v = qkv.split((self.qk_dim, self.qk_dim, self.dim), 3)
        q, k, heads_v = (y.unflatten(3, (self.heads, -1)).permute(0, 3, 1, 2, 4) for y in (q, k, v))
        q, k, heads_v = (regions_of(y, region) for y in (q, k, heads_v))
        real = real_tokens(sides, region, x.device)
        y, route = self._attend(q, k, heads_v, real, region)
        y = map_of(y, region, sides).permute(0, 2, 3, 1, 4).flatten(3)
        if self.lepe is not None:
            y = y + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if first:
            return self.output_linear(y.permute(0, 3, 1, 2)), route
        return self.wo(y[:, :h, :w]), route

    def _region(self, x: Tensor, h: int, w: int) -> tuple[int, int]:
        op = type(self).__name__
        if self.padding != "legacy":
            if min(h, w) < self.n_win:
                raise reject(op, "x", f"of at least n_win, {self.n_win}, tokens a side", x)
            return h // self.n_win, w // self.n_win
        if not self.auto_pad and (h % self.n_win or w % self.n_win):
            accepted = f"of sides that n_win, {self.n_win}, divides, with auto_pad=False"
            raise reject(op, "x", accepted, x)
        return -(-h // self.n_win), -(-w // self.n_win)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, region: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        op, count = type(self).__name__, k.shape[2]
        if self.topk > count:
            raise reject(op, "topk", f"at most the {count} regions", self.topk)
        if self.soft:
            return self._attend_softly(q, k, v, region)
        route = region_route(q, k, self.topk, q_mask=real, k_mask=real)
        k, v = self._pool(k, region), self._pool(v, region)
        mask = None
        if real is not None and self.padding == "masked":
            mask = real.expand(len(k), -1, -1)
        out = routed_attention(q, k, v, route, scale=self.scale, key_mask=mask)
        return out, route[:, 0]

    def _attend_softly(
        self, q: Tensor, k: Tensor, v: Tensor, region: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of each chosen region times its weight: they differ by query region."""
        means = [y.mean(3).transpose(1, 2).flatten(2) for y in (q, k)]  # [B, R, qk_dim]
        if not self.diff:
            means = [y.detach() for y in means]
        if self.router is not None:
            means = [self.router.emb(y) for y in means]
        scores = self.scale * means[0] @ means[1].mT
        best = scores.topk(self.topk, 2)
        weight, route = best.values.softmax(2), best.indices
        k, v = (self._pool(y, region).transpose(1, 2) for y in (k, v))  # [B, R, H, m, D]
        B, R = route.shape[:2]
        rows = torch.arange(B, device=q.device)[:, None]
        outs = []
        for r in range(R):  # one region at a time: no k-fold copy of the keys
            keys, values = (
                (y[rows, route[:, r : r + 1].flatten(1)] * weight[:, r, :, None, None, None])
                .transpose(1, 2)
                .flatten(2, 3)
                for y in (k, v)
            )
            outs.append(_softmax(q[:, :, r], keys, values, self.scale))
        return torch.stack(outs, 2), route

    def _pool(self, x: Tensor, region: tuple[int, int]) -> Tensor:
        """[B, H, R, m, D] with fewer tokens in a region."""
        if self.pooling == "identity" or self.pooled is None:
            return x
        B, H, R, _, D = x.shape
        image = x.reshape(-1, *region, D).permute(0, 3, 1, 2)
        pools: dict[str, Any] = {
            "ada_avgpool": adaptive_avg_pool2d, "ada_maxpool": adaptive_max_pool2d,
            "avgpool": avg_pool2d, "maxpool": max_pool2d,
        }  # fmt: skip
        image = pools[self.pooling](image, self.pooled)
        return image.flatten(2).transpose(1, 2).reshape(B, H, R, -1, D)


def _softmax(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


def _size_of(kind: str) -> str | None:
    """The argument that says how much is pooled."""
    if kind == "identity":
        return None
    return "kv_per_win" if kind.startswith("ada") else "kv_downsample_ratio"
