"""One decoder for all language models; a config chooses the mixer of every layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, silu

from regard.core import checks
from regard.core.checks import Sizes, reject, words
from regard.core.group import StateGroup
from regard.core.precision import compute_dtype
from regard.core.state import State
from regard.mixers import RMSNorm, ShortConvolution
from regard.models.decoder.config import MIXERS, DecoderConfig
from regard.models.pretrained import Pretrained
from regard.tasks.task import IGNORED

OP = "Decoder"


class GatedUnit(nn.Module):
    """y = W_d (silu(W_g x) * W_u x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """The same shape."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Perceptron(nn.Module):
    """y = W_d gelu(W_u x), with the exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """The same shape."""
        return self.down_proj(gelu(self.up_proj(x)))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        chosen = config.mixer(layer)
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer = MIXERS[chosen.kind](config.dim, causal=True, **chosen.options)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = (GatedUnit if config.mlp == "gated" else Perceptron)(config.dim, config.hidden)

    def forward(
        self, x: Float[Tensor, "b t c"], state: State | None, return_state: bool, **inputs: Any
    ) -> tuple[Float[Tensor, "b t c"], State | None]:
        """The tokens, and the state of the mixer."""
        mixed = self.mixer(self.mixer_norm(x), state=state, return_state=return_state, **inputs)
        mixed, after = mixed if return_state else (mixed, None)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), after


class Decoder(Pretrained):
    """A causal language model with any mixer: token ids -> logits of the next token.

        x_0 = E[token]
        x <- x + mixer(norm(x)),   x <- x + W_d (silu(W_g norm(x)) * W_u norm(x))   (per layer)
        logits = W norm(x)

    with RMS norms; with `mlp="gelu"` the last term is W_d gelu(W_u norm(x)). Positions are the
    mixers' affair.

    Args:
        config: a `DecoderConfig`; `regard.models.published[name].config(...)` gives published ones.

    Shapes: tokens [B, T], logits [B, T, vocabulary]. The state dict has `embed.weight`,
    `layers.{i}.mixer_norm.weight`, `.mixer.*` (as the mixer says), `.mlp_norm.weight`,
    `.mlp.gate_proj.weight` (not with "gelu"), `.up_proj.weight`, `.down_proj.weight`,
    `norm.weight` and, unless tied, `head.weight`.

    A masked token does not exist: it may hold any id, is seen by nobody and takes up no position;
    its own logits mean nothing. So rows may be padded on either side; on the left where a mixer
    has a window, which counts places.

    Precision: norms and losses in float32 at least; otherwise that of the parameters.
    Cost: O(T C (C + mlp_dim)) per layer, and that of the mixer; O(T C vocabulary) for the head.
    Raises: TypeError, ValueError naming the argument; a state, mask or packing that a mixer's
        mechanism does not serve.

    >>> from regard.models import DecoderConfig, MixerConfig
    >>> mixer = MixerConfig("attention", {"heads": 2, "mechanism": "gated_delta"})
    >>> model = Decoder(DecoderConfig((mixer,), vocabulary=11, dim=16, layers=2, mlp_dim=32))
    >>> tokens = torch.randint(11, (3, 6))
    >>> first, state = model(tokens[:, :4], return_state=True)
    >>> torch.allclose(model(tokens[:, 4:], state=state), model(tokens)[:, 4:], atol=1e-5)
    True
    """

    KIND: ClassVar[str] = "decoder"
    CONFIG = DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if not isinstance(config, DecoderConfig):
            raise reject(OP, "config", "a DecoderConfig", config, kind=TypeError)
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices and convolutions normal with `init_std`, all else where its module starts."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | ShortConvolution):
                nn.init.normal_(module.weight, std=self.config.init_std)
            if type(module) is nn.Linear and module.bias is not None:
                nn.init.zeros_(module.bias)

    # -- the call ----------------------------------------------------------------------------

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        key_mask: Bool[Tensor, "b t"] | None = None,
        cu_seqlens: Int[Tensor, " n"] | None = None,
        state: StateGroup | None = None,
        return_state: bool = False,
    ) -> Any:
        """logits [B, T, vocabulary], or (logits, state).

        Args:
            tokens: ids [B, T], int64 or int32.
            key_mask: bool [B, T], True = a real token.
            cu_seqlens: int32 offsets of packed sequences (B = 1), which do not meet.
            state: of the tokens so far, to go on from; `key_mask` is of the new tokens.
            return_state: also return the state after this call.
        """
        x, after = self.features(
            tokens, key_mask=key_mask, cu_seqlens=cu_seqlens, state=state,
            return_state=return_state,
        )  # fmt: skip
        logits = self.logits(x)
        return (logits, after) if return_state else logits

    def features(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        key_mask: Bool[Tensor, "b t"] | None = None,
        cu_seqlens: Int[Tensor, " n"] | None = None,
        state: StateGroup | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Tensor, "b t c"], StateGroup | None]:
        """What the head reads, [B, T, dim], and the state, or None if not asked for."""
        self._check(tokens, key_mask, state, return_state)
        if key_mask is not None:
            tokens = tokens.masked_fill(~key_mask, 0)
        x = self.embed(tokens)
        parts: dict[str, Any] = {}
        for number, block in enumerate(self.layers):
            name = f"layer{number}"
            past = None if state is None else state[name]
            inputs = {"key_mask": key_mask, "cu_seqlens": cu_seqlens}
            x, parts[name] = block(x, past, return_state, **inputs)
        after = StateGroup("decoder", parts["layer0"].length, parts) if return_state else None
        return self.norm(x), after

    def logits(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b v"]:
        """Of the next token, from `features`."""
        return linear(x, self.embed.weight) if self.head is None else self.head(x)

    def loss(
        self,
        tokens: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"] | None = None,
        *,
        key_mask: Bool[Tensor, "b t"] | None = None,
        cu_seqlens: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of each label given the tokens before it; 0 where nothing counts.

        labels: [B, T], at the place of the token that they are (nothing is to be shifted); None:
            the tokens. -100 does not count, nor does the first token of a row or of a packed
            sequence, nor one that is masked or follows a masked one.
        """
        x, _ = self.features(tokens, key_mask=key_mask, cu_seqlens=cu_seqlens)
        labels = tokens if labels is None else labels
        if not isinstance(labels, Tensor) or labels.shape != tokens.shape:
            raise reject(OP, "labels", f"of tokens' shape {list(tokens.shape)}", labels)
        target = labels[:, 1:].long()
        if key_mask is not None:
            target = target.masked_fill(~(key_mask[:, 1:] & key_mask[:, :-1]), IGNORED)
        if cu_seqlens is not None:
            first = torch.zeros(tokens.shape[1] + 1, dtype=torch.bool, device=tokens.device)
            first = first.index_fill(0, cu_seqlens.long(), True)
            target = target.masked_fill(first[1:-1], IGNORED)
        logits = self.logits(x[:, :-1])
        logits = logits.to(compute_dtype(logits.dtype))
        total = cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total / (target != IGNORED).sum().clamp(min=1)

    def _check(self, tokens: Any, key_mask: Any, state: Any, return_state: Any) -> None:
        """Metadata only; what concerns the mixers they check themselves."""
        integers = (torch.int64, torch.int32)
        if not isinstance(tokens, Tensor) or tokens.dtype not in integers or tokens.dim() != 2:
            accepted = "an int64 or int32 tensor [batch, length]"
            raise reject(OP, "tokens", accepted, tokens, kind=TypeError)
        checks.check_flag(OP, "return_state", return_state)
        B, T = tokens.shape
        checks.check_key_mask(OP, key_mask, Sizes(B, 1, 1, T, T, 1, 1), tokens)
        checks.check_state(OP, state, StateGroup)
        if state is not None:
            wanted = [f"layer{number}" for number in range(self.config.layers)]
            if state.name != "decoder" or sorted(state.parts) != sorted(wanted):
                accepted = f"of a decoder with {len(wanted)} layers"
                got = words(f"that of {state.name} with {len(state.parts)} parts")
                raise reject(OP, "state", accepted, got)
