"""Learned feature maps of linear attention as modules, under the names of published checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.core.checks import check_choice, check_flag, check_integer, reject
from regard.ops.linear.learned_features import TWO_SIDED, features, width

Init = Literal["identity", "kaiming"]


class HeadLinear(nn.Module):
    """z = x W_h + b_h: a matrix and one bias number for each head.

    State dict: `layer` [heads, d, f] and, with a bias, `bias` [1, heads, 1, 1], as LoLCATs has
    them. init: "identity" (zero under `skip`, which adds x itself), or "kaiming", uniform with
    the bound sqrt(6 / (d f)) of the authors, who count both axes as inputs.
    """

    def __init__(self, heads: int, d: int, f: int, bias: bool, skip: bool, init: Init) -> None:
        super().__init__()
        self.skip, self.init = skip, init
        self.layer = nn.Parameter(torch.empty(heads, d, f))
        self.bias = nn.Parameter(torch.empty(1, heads, 1, 1)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Where training starts; a bias starts uniform with the authors' bound sqrt(6 / heads),
        at 0 beside an identity."""
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.layer)
        elif self.skip:
            nn.init.zeros_(self.layer)
        else:
            for head in self.layer:
                nn.init.eye_(head)
        if self.bias is not None:
            if self.init == "kaiming":
                nn.init.kaiming_uniform_(self.bias)
            else:
                nn.init.zeros_(self.bias)


class SharedLinear(nn.Module):
    """z = x W^T + b, one for all heads: `weight` [f, d] and `bias` [f], as flash-linear-attention
    has them. It starts as the identity."""

    def __init__(self, d: int, f: int, init: Init) -> None:
        super().__init__()
        self.init = init
        self.weight, self.bias = nn.Parameter(torch.empty(f, d)), nn.Parameter(torch.empty(f))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity, or uniform."""
        if self.init == "identity":
            nn.init.eye_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class FeatureMap(nn.Module):
    """phi: [B, heads, n, d] -> [B, heads, n, width], x -> activation(z(x)).

    `operands` gives the weights as `regard.ops.hedgehog_attention` takes them, `settings` its
    options. Queries and keys have a map each: `for_keys` makes the second one, or is the first
    where they are tied.
    """

    ACTIVATIONS: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, activation: str, tie: bool, full_space: bool = True, skip: bool = False
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_choice(op, "act", activation, self.ACTIVATIONS)
        for name, flag in (("tie", tie), ("full_space", full_space), ("skip", skip)):
            check_flag(op, name, flag)
        if not full_space and activation not in TWO_SIDED:
            accepted = f"True with act={activation!r}, which has no half to leave out"
            raise reject(op, "full_space", accepted, full_space)
        self.activation, self.tie, self.full_space, self.skip = activation, tie, full_space, skip

    @property
    def settings(self) -> dict[str, Any]:
        """Options of the op."""
        return {"activation": self.activation, "full_space": self.full_space, "skip": self.skip}

    def operands(self) -> tuple[Tensor | None, Tensor | None]:
        """W [1 | heads, d, f] and b [heads] or [1, f]; None: the identity, and no bias."""
        return None, None

    def for_keys(self, heads: int | None = None) -> FeatureMap:
        """The map of keys: this one if tied, else another that starts alike (with `heads` maps)."""
        if self.tie:
            return self
        made = self._with_heads(heads) if heads is not None else copy.deepcopy(self)
        made.requires_grad_(all(p.requires_grad for p in self.parameters()))
        return made

    def _with_heads(self, heads: int) -> Self:
        return copy.deepcopy(self)

    def extra_repr(self) -> str:
        return f"{self.activation}, full_space={self.full_space}, skip={self.skip}, tie={self.tie}"

    def forward(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n f"]:
        """The features of x, in its dtype."""
        return features(x, *self.operands(), **self.settings)


class HedgehogFeatureMap(FeatureMap):
    """The map of Hedgehog: a matrix per head, then softmax or exp of z and of -z.

    Args:
        heads: maps, one per query head (or per key head, which is ours).
        d, f: channels of a head, and of z; None: d. The features are 2f wide, f without
            `full_space`.
        act: "softmax_dim", "exp_dim", "exp", of a matrix per head without bias, or
            "joint_softmax", of one matrix and bias for all heads: what the activations are says
            `regard.ops.hedgehog_attention`.
        tie: queries and keys share the map.
        init: "identity", or "kaiming" as the authors' default, see `HeadLinear`.
        skip: z = x + x W, from W = 0; needs f = d.

    State dict: `mlp.layer` [heads, d, f] (LoLCATs); for "joint_softmax" `layer.weight` [f, d] and
    `layer.bias` [f] (flash-linear-attention).

    >>> phi = HedgehogFeatureMap(2, 8)
    >>> phi(torch.randn(1, 2, 5, 8)).shape
    torch.Size([1, 2, 5, 16])
    """

    ACTIVATIONS = ("softmax_dim", "exp_dim", "exp", "joint_softmax")

    def __init__(
        self,
        heads: int,
        d: int,
        f: int | None = None,
        act: str = "softmax_dim",
        tie: bool = False,
        init: Init = "identity",
        skip: bool = False,
        bias: bool = False,
        full_space: bool = True,
    ) -> None:
        super().__init__(act, tie, full_space, skip)
        f = _check_sizes(type(self).__name__, heads, d, f, init, skip)
        check_flag(type(self).__name__, "bias", bias)
        if act == "joint_softmax":
            if bias or skip:
                accepted = "False with act='joint_softmax', whose linear map has a bias anyway"
                raise reject(type(self).__name__, "bias" if bias else "skip", accepted, True)
            self.layer = SharedLinear(d, f, init)
        else:
            self.mlp = HeadLinear(heads, d, f, bias, skip, init)
        self.width = width(act, f, full_space)

    def operands(self) -> tuple[Tensor | None, Tensor | None]:
        """W and b."""
        if self.activation == "joint_softmax":
            return self.layer.weight.mT[None], self.layer.bias[None]
        return _of_heads(self.mlp)

    def _with_heads(self, heads: int) -> Self:
        return _resized(self, heads)


class T2RFeatureMap(FeatureMap):
    """The map of T2R: max(x W_h + b_h, 0), never below 1e-12; random at the start.

    Source: Kasai et al. 2021, "Finetuning Pretrained Transformers into RNNs", arXiv 2103.13076.
    State dict: `mlp.layer` [heads, d, f], `mlp.bias` [1, heads, 1, 1].

    >>> T2RFeatureMap(2, 8)(torch.randn(1, 2, 5, 8)).shape
    torch.Size([1, 2, 5, 8])
    """

    ACTIVATIONS = ("relu",)

    def __init__(
        self,
        heads: int,
        d: int,
        f: int | None = None,
        tie: bool = False,
        init: Init = "kaiming",
        bias: bool = True,
        skip: bool = False,
    ) -> None:
        super().__init__("relu", tie, skip=skip)
        f = _check_sizes(type(self).__name__, heads, d, f, init, skip)
        check_flag(type(self).__name__, "bias", bias)
        self.mlp = HeadLinear(heads, d, f, bias, skip, init)
        self.width = f

    def operands(self) -> tuple[Tensor | None, Tensor | None]:
        """W and b."""
        return _of_heads(self.mlp)

    def _with_heads(self, heads: int) -> Self:
        return _resized(self, heads)


class ELU1(FeatureMap):
    """phi(x) = 1 + elu(x), with nothing to learn.

    >>> ELU1()(torch.tensor([[[[-100.0, 0.0, 2.0]]]]))
    tensor([[[[1.0000e-12, 1.0000e+00, 3.0000e+00]]]])
    """

    ACTIVATIONS = ("pos_elu",)

    def __init__(self) -> None:
        super().__init__("pos_elu", tie=True)


def feature_map(
    kind: str, heads: int, d: int, f: int | None = None, options: Mapping[str, Any] | None = None
) -> FeatureMap:
    """By name: "t2r", "elu", or the activation of a `HedgehogFeatureMap`; options are theirs.

    >>> feature_map("t2r", 2, 4, options={"tie": True}).activation
    'relu'
    """
    op, options = "feature_map", dict(options or {})
    check_choice(op, "kind", kind, KINDS)
    for name in options:
        check_choice(op, "options", name, OPTIONS)
    if kind == "elu":
        if f not in (None, d) or options:
            raise reject(op, "kind", "one with weights to have a size or options", kind)
        return ELU1()
    if kind == "t2r":
        if "full_space" in options:
            raise reject(
                op, "options", "without 'full_space' for 't2r', which is one-sided", options
            )
        return T2RFeatureMap(heads, d, f, **options)
    return HedgehogFeatureMap(heads, d, f, kind, **options)


KINDS = (*HedgehogFeatureMap.ACTIVATIONS, "t2r", "elu")
OPTIONS = ("tie", "init", "skip", "bias", "full_space")


def _of_heads(mlp: HeadLinear) -> tuple[Tensor, Tensor | None]:
    return mlp.layer, None if mlp.bias is None else mlp.bias.flatten()


def _resized(module: Any, heads: int) -> Any:
    """Another map like it, for another number of heads, where its heads are told apart."""
    made = copy.deepcopy(module)
    old = getattr(module, "mlp", None)
    if old is not None and old.layer.shape[0] != heads:
        _, d, f = old.layer.shape
        made.mlp = HeadLinear(heads, d, f, old.bias is not None, old.skip, old.init).to(old.layer)
    return made


def _check_sizes(op: str, heads: int, d: int, f: int | None, init: str, skip: bool) -> int:
    for name, size in (("heads", heads), ("d", d), ("f", d if f is None else f)):
        check_integer(op, name, size)
    check_choice(op, "init", init, ("identity", "kaiming"))
    if skip and f not in (None, d):
        raise reject(op, "f", f"{d} (d) or None with skip", f)
    return d if f is None else f
