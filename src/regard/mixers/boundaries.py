"""A predictor of where the meaning of a sequence changes, from its keys."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, pad

from regard.core.checks import check_choice, check_integer, reject

POOLINGS = ("mean", "learned")


class _Encoder(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mha(x, x, x, need_weights=False)[0])


class _Pool(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.gate(x).softmax(1) * x).sum(1)


class BoundaryPredictor(nn.Module):
    """One logit for every token: whether a chunk ends there.

        window_l = norm(self-attention of the keys (l - w, l + w])
        a, b = pooled first and last w rows of it
        logit_l = MLP[a, b, |a - b|, a * b, cos(a, b)]

    Args:
        channels: C, of the keys of all heads of a token, key heads times head size.
        hidden: of the MLP.
        window: w, tokens on either side.
        heads: of the self-attention, a divisor of C.
        pooling: "mean" or "learned" (a softmax over the rows).

    Shapes: keys [B, C, L], after rotary positions, to logits [B, L]. The state dict has the
    authors' names: `enc.mha.*`, `enc.norm.*`, `mlp.0.*`, `mlp.2.*`, with "learned"
    `pool.gate.weight`.

    Precision: that of the parameters. Cost: O(L w C (C + w)); windows are made 1024 at a time.
    Source: Xiong et al. 2025, arXiv 2510.24606, the predictor of the first version, matched to
        2e-5 with gradients.
    Raises: TypeError, ValueError naming the argument.

    >>> BoundaryPredictor(16, hidden=8, heads=2)(torch.randn(1, 16, 20)).shape
    torch.Size([1, 20])
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 256,
        window: int = 4,
        heads: int = 8,
        pooling: str = "mean",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        sizes = {"channels": channels, "hidden": hidden, "window": window, "heads": heads}
        for name, size in sizes.items():
            check_integer(op, name, size)
        check_choice(op, "pooling", pooling, POOLINGS)
        if channels % heads:
            raise reject(op, "heads", f"a divisor of channels, {channels}", heads)
        self.channels, self.window = channels, window
        self.enc = _Encoder(channels, heads)
        self.pool = _Pool(channels) if pooling == "learned" else None
        self.mlp = nn.Sequential(
            nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, keys: Float[Tensor, "b c l"]) -> Float[Tensor, "b l"]:
        """Logits."""
        if not isinstance(keys, Tensor) or keys.dim() != 3 or keys.shape[1] != self.channels:
            accepted = f"of shape [batch, {self.channels}, length]"
            raise reject(type(self).__name__, "keys", accepted, keys)
        w, B, L = self.window, len(keys), keys.shape[2]
        padded = pad(keys, (w - 1, w)).transpose(1, 2)
        windows = padded.unfold(1, 2 * w, 1).transpose(2, 3)  # [B, L, 2 w, C]
        logits = [self._logits(part.flatten(0, 1)).view(B, -1) for part in windows.split(1024, 1)]
        return torch.cat(logits, 1) if logits else keys.new_zeros(B, L)

    def _logits(self, windows: Tensor) -> Tensor:
        encoded = self.enc(windows)
        sides = encoded[:, : self.window], encoded[:, self.window :]
        a, b = (x.mean(1) if self.pool is None else self.pool(x) for x in sides)
        near = cosine_similarity(a, b, dim=1, eps=1e-6)[:, None]
        return self.mlp(torch.cat([a, b, (a - b).abs(), a * b, near], 1))
