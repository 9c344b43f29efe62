"""Configs of decoders: the shape of the stack, the mixer of every layer, and published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from regard.core.checks import check_choice, check_flag, check_integer, check_number, reject
from regard.mixers import (
    Attention,
    GatedRNN,
    Hedgehog,
    LocalLinear,
    Mesa,
    Parallax,
    Rat,
    SSAAttention,
)

MIXERS = {
    "attention": Attention,
    "gated_rnn": GatedRNN,
    "hedgehog": Hedgehog,
    "local_linear": LocalLinear,
    "mesa": Mesa,
    "parallax": Parallax,
    "rat": Rat,
    "ssa": SSAAttention,
}
MLPS = ("gated", "gelu")
ROUND = 256  # published widths of the gated unit are multiples of it


@dataclass(frozen=True)
class MixerConfig:
    """A mixer by name, with its arguments beside `dim` and `causal`.

    "attention" takes any mechanism: `{"heads": 4, "mechanism": "gated_delta"}`.
    """

    kind: str = "attention"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("MixerConfig", "kind", self.kind, MIXERS)
        if not isinstance(self.options, Mapping):
            accepted = "a mapping of the mixer's arguments"
            raise reject("MixerConfig", "options", accepted, self.options, kind=TypeError)
        for name in ("dim", "causal"):
            if name in self.options:
                raise reject("MixerConfig", "options", f"without {name!r}", self.options)
        object.__setattr__(self, "options", dict(self.options))


@dataclass(frozen=True)
class DecoderConfig:
    """A causal language model: embedding, layers of mixer and mlp, norm, head.

    mixers: layer i has mixer i modulo their number: one for all layers, two in turn, or one each.
    mlp: "gated", a gated unit with SiLU, or "gelu", two matrices with a GELU between them.
    mlp_dim: its width; None: 8/3 dim, rounded up to a multiple of 256, or with "gelu" 4 dim.
    tied: the head is the embedding.
    init_std: of all matrices and convolutions at the start.

    >>> config = DecoderConfig(mixers=(MixerConfig("attention", {"heads": 4}),), dim=96)
    >>> config.hidden, config.mixer(7).kind
    (256, 'attention')
    """

    mixers: Sequence[MixerConfig]
    vocabulary: int = 32000
    dim: int = 2048
    layers: int = 24
    mlp_dim: int | None = None
    norm_eps: float = 1e-6
    tied: bool = False
    init_std: float = 0.02
    mlp: str = "gated"

    def __post_init__(self) -> None:
        op = "DecoderConfig"
        for name in ("vocabulary", "dim", "layers"):
            check_integer(op, name, getattr(self, name))
        if self.mlp_dim is not None:
            check_integer(op, "mlp_dim", self.mlp_dim)
        check_number(op, "norm_eps", self.norm_eps, above=0.0)
        check_number(op, "init_std", self.init_std, least=0.0)
        check_flag(op, "tied", self.tied)
        check_choice(op, "mlp", self.mlp, MLPS)
        fits = isinstance(self.mixers, Sequence) and all(
            isinstance(mixer, MixerConfig) for mixer in self.mixers
        )
        if not fits or not 1 <= len(self.mixers) <= self.layers:
            accepted = f"1 to {self.layers} (the layers) of MixerConfig"
            raise reject(op, "mixers", accepted, self.mixers)
        object.__setattr__(self, "mixers", tuple(self.mixers))

    @property
    def hidden(self) -> int:
        """The width of the gated unit, or of what stands in its place."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        return 4 * self.dim if self.mlp == "gelu" else -(-(self.dim * 8 // 3) // ROUND) * ROUND

    def mixer(self, layer: int) -> MixerConfig:
        """That of a layer."""
        return self.mixers[layer % len(self.mixers)]

    def plain(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts of them."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `plain`, also after a passage through JSON."""
        known = {item.name for item in fields(cls)}
        unknown = [name for name in plain if name not in known]
        if unknown:
            raise reject("DecoderConfig", "plain", "of known fields", unknown)
        mixers = tuple(
            MixerConfig(mixer["kind"], _tuples(mixer["options"])) for mixer in plain["mixers"]
        )
        return cls(**{**plain, "mixers": mixers})


def _tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, back to tuples."""
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def mesanet(
    dim: int = 2048,
    layers: int = 24,
    heads: int = 16,
    head_dim: int = 128,
    mlp_dim: int | None = None,
    vocabulary: int = 32000,
    norm_eps: float = 1e-6,
    tied: bool = False,
    short_conv: int = 4,
    conv_bias: bool = False,
    output_gate: bool = False,
    least_ridge: float = 0.25,
    attention_layers: Sequence[int] = (),
    attention: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    init_std: float = 0.02,
) -> DecoderConfig:
    """MesaNet: ridge regression over all pairs so far in every layer (1.37 billion parameters).

    options: of `regard.ops.mesa_attention`, as `{"compat": "official"}` for the authors' iteration.
    attention_layers: those that have an attention layer instead, of the options `attention`;
        None: softmax attention with as many heads and rotary positions.
    """
    mesa = {
        "heads": heads, "head_dim": head_dim, "short_conv": short_conv, "conv_bias": conv_bias,
        "output_gate": output_gate, "least_ridge": least_ridge, "norm_eps": norm_eps,
        "options": dict(options or {}),
    }  # fmt: skip
    mixers = [MixerConfig("mesa", mesa)]
    if attention_layers:
        attention = {"heads": heads, "rope": True} if attention is None else attention
        mixers *= layers
        for layer in attention_layers:
            if not 0 <= layer < layers:
                raise reject("mesanet", "attention_layers", f"below {layers}", attention_layers)
            mixers[layer] = MixerConfig("attention", attention)
    elif attention is not None:
        raise reject("mesanet", "attention", "None without attention_layers", attention)
    return DecoderConfig(mixers, vocabulary, dim, layers, mlp_dim, norm_eps, tied, init_std)


def parallax(
    dim: int = 2048,
    layers: int = 24,
    heads: int = 32,
    kv_heads: int | None = None,
    mlp_dim: int | None = None,
    vocabulary: int = 32000,
    norm_eps: float = 1e-6,
    tied: bool = False,
    bias: bool = False,
    qk_norm: bool = False,
    probe_start: float = 1.0,
    window: int | None = None,
    rope: float | bool = 10000.0,
    init_std: float = 0.02,
) -> DecoderConfig:
    """Parallax: softmax attention corrected by a learned probe (1.46 billion parameters).

    window: keys that a query sees, its own included. rope: base of the rotary positions; False:
    none, as in the authors' first version. probe_start: below 1, with `qk_norm`, the model begins
    nearer to softmax attention than the authors' does.
    """
    layer: dict[str, Any] = {
        "heads": heads, "kv_heads": kv_heads, "bias": bias, "qk_norm": qk_norm,
        "probe_start": probe_start, "rope": rope,
    }  # fmt: skip
    if window is not None:
        check_integer("parallax", "window", window)
        layer["options"] = {"window": (window - 1, 0)}
    mixers = (MixerConfig("parallax", layer),)
    return DecoderConfig(mixers, vocabulary, dim, layers, mlp_dim, norm_eps, tied, init_std)


def rat(
    dim: int = 2048,
    layers: int = 24,
    heads: int = 16,
    chunk_length: int = 16,
    groups: int = 2,
    mlp_dim: int | None = None,
    vocabulary: int = 32000,
    norm_eps: float = 1e-6,
    tied: bool = True,
    rope: float | bool = 10000.0,
    init_std: float = 0.02,
) -> DecoderConfig:
    """RAT: attention over gated chunks in every layer (1.30 billion parameters).

    groups: of queries and keys, tiled over the heads. rope: base of the rotary positions of chunks.
    """
    mixers = (_rat_layer(heads, chunk_length, groups, rope),)
    return DecoderConfig(
        mixers, vocabulary, dim, layers, mlp_dim, norm_eps, tied, init_std, mlp="gelu"
    )


def rat_hybrid(
    dim: int = 2048,
    layers: int = 24,
    heads: int = 16,
    chunk_length: int = 16,
    groups: int = 2,
    window: int = 1024,
    step: int = 2,
    mlp_dim: int | None = None,
    vocabulary: int = 32000,
    norm_eps: float = 1e-6,
    tied: bool = True,
    rope: float | bool = 10000.0,
    init_std: float = 0.02,
) -> DecoderConfig:
    """RAT and sliding-window attention in turn (1.29 billion parameters).

    Layers 0, `step`, 2 `step` ... are RAT. window: tokens that a query sees beside its own.
    """
    check_integer("rat_hybrid", "step", step)
    local = _attention_layer(heads, window, rope)
    mixers = (_rat_layer(heads, chunk_length, groups, rope), *(local,) * (step - 1))
    return DecoderConfig(
        mixers[:layers], vocabulary, dim, layers, mlp_dim, norm_eps, tied, init_std, mlp="gelu"
    )


def rat_attention(
    dim: int = 2048,
    layers: int = 24,
    heads: int = 16,
    window: int | None = None,
    mlp_dim: int | None = None,
    vocabulary: int = 32000,
    norm_eps: float = 1e-6,
    tied: bool = True,
    rope: float | bool = 10000.0,
    init_std: float = 0.02,
) -> DecoderConfig:
    """The attention model that RAT is compared with (1.27 billion parameters).

    window: tokens that a query sees beside its own; None: all.
    """
    mixers = (_attention_layer(heads, window, rope),)
    return DecoderConfig(
        mixers, vocabulary, dim, layers, mlp_dim, norm_eps, tied, init_std, mlp="gelu"
    )


def rat_rnn(
    dim: int = 2048,
    layers: int = 24,
    longest: int = 4096,
    mlp_dim: int | None = None,
    vocabulary: int = 32000,
    norm_eps: float = 1e-6,
    tied: bool = True,
    init_std: float = 0.02,
) -> DecoderConfig:
    """The gated recurrent model that RAT is compared with (1.27 billion parameters).

    longest: the length of training, up to which memories last at the start.
    """
    mixers = (MixerConfig("gated_rnn", {"longest": longest}),)
    return DecoderConfig(
        mixers, vocabulary, dim, layers, mlp_dim, norm_eps, tied, init_std, mlp="gelu"
    )


def _rat_layer(heads: int, chunk_length: int, groups: int, rope: float | bool) -> MixerConfig:
    layer = {"heads": heads, "chunk_length": chunk_length, "groups": groups, "rope": rope}
    return MixerConfig("rat", layer)


def _attention_layer(heads: int, window: int | None, rope: float | bool) -> MixerConfig:
    layer: dict[str, Any] = {"heads": heads, "rope": rope}
    if window is not None:
        check_integer("rat", "window", window, least=0)
        layer["options"] = {"window": (window, 0)}
    return MixerConfig("attention", layer)
