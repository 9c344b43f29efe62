"""The layer of Hedgehog: linear attention with learned feature maps, with or without a window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.checks import check_flag, check_number, reject
from regard.mixers.attention import Attention
from regard.mixers.feature_maps import feature_map
from regard.mixers.norms import RMSNorm

START = 0.1  # of the window's weight, whose logit is the authors' -2.197


class Hedgehog(Attention):
    """Self- and cross-attention with feature maps that are learned, as Hedgehog and LoLCATs do.

        y = W_o op(q, k, v, phi_q, phi_k)         q, k after rotary positions, v = W_v m

    around `regard.ops.hedgehog_attention`, or with `window_length` around
    `regard.ops.hedgehog_window_attention`, whose window of softmax has the learned weight
    gamma_h = sigmoid(window_factors_h). Every query head has a map of keys of its own, as the
    authors', unless `share_key_maps`.

    Args: as of `Attention`, and
        features: the map by name: "softmax_dim", "exp_dim", "exp", "joint_softmax" (that of
            flash-linear-attention, one for all heads), "t2r", or "elu", which has no weights.
        feature_dim: channels that a head is mapped to; None: D. Two-sided maps double it.
        feature_options: further arguments of `HedgehogFeatureMap` or `T2RFeatureMap`: `tie`,
            `init`, `skip`, `bias`, `full_space`.
        share_key_maps: a map of keys per key head: the state then has Hk heads, not H. Not with
            tied maps, which are those of the query heads.
        window_length: keys that softmax sees; None: none. With one, `causal` self-attention only.
        gamma: the window's weight at the start, in (0, 1).
        output_norm: RMS norm of every head of the output, with a learned gain [D].
        options: of the op: `layout`, `align`, `affine`, `chunk_size`, `impl`, ...

    Shapes, masks, states: as of `Attention`. State dict: `q_proj.weight`, ..., `o_proj.weight`,
    `feature_map_q.*` and, unless tied, `feature_map_k.*` as the map says, `window_factors`
    [1, H, 1, 1], `o_norm.weight`. Loading takes flash-linear-attention's `norm.weight` for the
    last, and leaves out `window_factor`, which LoLCATs' terraced layers carry without using it.

    Source: Zhang et al. 2024, arXiv 2402.04347, and LoLCATs, arXiv 2410.10254, whose layers'
        outputs are matched to 5e-5.

    >>> layer = Hedgehog(32, 4, kv_heads=2, causal=True, rope=True, window_length=4)
    >>> layer(torch.randn(1, 9, 32)).shape
    torch.Size([1, 9, 32])
    >>> sorted(layer.learned())
    ['gamma', 'map_k', 'map_q']
    """

    OPERANDS = ("map_q", "map_k", "bias_q", "bias_k")
    GIVEN = ("activation", "full_space", "skip", "window_length")  # options that the layer gives
    window_factors: nn.Parameter | None
    # Of the softmax attention that the layer is to mimic, where it was converted from one.
    teacher_options: Mapping[str, Any] | None = None

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        causal: bool = False,
        head_dim: int | None = None,
        qk_norm: bool = False,
        rope: bool | float = False,
        short_conv: int = 0,
        features: str = "softmax_dim",
        feature_dim: int | None = None,
        feature_options: Mapping[str, Any] | None = None,
        share_key_maps: bool = False,
        window_length: int | None = None,
        gamma: float = START,
        output_norm: bool = False,
        output_gate: bool = False,
        dropout: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        op = type(self).__name__
        for name, flag in (("share_key_maps", share_key_maps), ("output_norm", output_norm)):
            check_flag(op, name, flag)
        check_number(op, "gamma", gamma, above=0.0)
        if gamma >= 1:
            raise reject(op, "gamma", "in (0, 1)", gamma)
        windowed = window_length is not None
        self.LEARNED = (*self.OPERANDS, *(("gamma",) if windowed else ()))
        super().__init__(
            dim, heads, kv_heads, "hedgehog_window" if windowed else "hedgehog", causal, head_dim,
            qk_norm=qk_norm, rope=rope, short_conv=short_conv, output_gate=output_gate,
            dropout=dropout, options=options,
        )  # fmt: skip
        own = attach(
            self, heads, self.head_dim, features, feature_dim, feature_options,
            key_maps=self.kv_heads if share_key_maps else heads, windowed=windowed, gamma=gamma,
        )  # fmt: skip
        if windowed:
            own["window_length"] = window_length
        for name in own:
            if name in self.options:
                raise reject(op, "options", f"without {name!r}, which the layer gives", options)
        self.options = {**self.options, **own}
        self.start = gamma
        if output_norm:
            self.o_norm = RMSNorm(self.head_dim)
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_take_their_names)

    def reset_parameters(self) -> None:
        """The window's weight at its start."""
        if self.window_factors is not None:
            nn.init.constant_(self.window_factors, math.log(self.start / (1 - self.start)))

    def learned(self) -> dict[str, Tensor]:
        """The weights of the maps, and gamma [H] in float32 at least."""
        return operands(self)


def attach(
    module: Any,
    heads: int,
    head_dim: int,
    features: str = "softmax_dim",
    feature_dim: int | None = None,
    feature_options: Mapping[str, Any] | None = None,
    *,
    key_maps: int | None = None,
    windowed: bool = False,
    gamma: float = START,
) -> dict[str, Any]:
    """Gives any module `feature_map_q`, `feature_map_k` and `window_factors`; options of the op.

    With them, `operands(module)` are the tensors that `regard.ops.hedgehog_attention` or, where
    `windowed`, `hedgehog_window_attention` takes beside q, k, v. Arguments as of `Hedgehog`;
    key_maps: maps of keys, None: one per query head.

    >>> import regard
    >>> module = nn.Module()
    >>> options = attach(module, heads=2, head_dim=4)
    >>> q, k, v = torch.randn(3, 1, 2, 5, 4)
    >>> regard.ops.hedgehog_attention(q, k, v, **operands(module), **options).shape
    torch.Size([1, 2, 5, 4])
    """
    made = feature_map(features, heads, head_dim, feature_dim, feature_options)
    module.feature_map_q = made
    tied, key_maps = made.tie, heads if key_maps is None else key_maps
    module.feature_map_k = None if tied else made.for_keys(key_maps)
    free = torch.full((1, heads, 1, 1), math.log(gamma / (1 - gamma))) if windowed else None
    module.window_factors = None if free is None else nn.Parameter(free)
    return made.settings


def operands(module: Any) -> dict[str, Tensor]:
    """The weights that `attach` gave a module, by the names of the op's arguments."""
    of_q = module.feature_map_q.operands()
    of_k = of_q if module.feature_map_k is None else module.feature_map_k.operands()
    values = (*of_q, *of_k)
    names = ("map_q", "bias_q", "map_k", "bias_k")
    found = {n: x for n, x in zip(names, values, strict=True) if x is not None}
    if module.window_factors is not None:
        free = module.window_factors.flatten()
        found["gamma"] = free.to(torch.promote_types(free.dtype, torch.float32)).sigmoid()
    return found


def _take_their_names(layer: Hedgehog, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: their norm under our name, and without what they do not use."""
    if layer.o_norm is not None and f"{prefix}norm.weight" in state:
        state[f"{prefix}o_norm.weight"] = state.pop(f"{prefix}norm.weight")
    if layer.window_factors is not None:
        state.pop(f"{prefix}window_factor", None)
    if layer.feature_map_k is None:
        for name in [n for n in state if n.startswith(f"{prefix}feature_map_k.")]:
            del state[name]
