"""Which layer of a model of transformers can take which mechanism, and why not."""

from __future__ import annotations

from torch import nn

from regard.adapt.reporting import Report, fill
from regard.adapt.swapped import ATTRIBUTE
from regard.adapt.transformers.mechanism import Mechanism
from regard.adapt.transformers.sites import sites
from regard.adapt.transformers.swapping import unreachable
from regard.core.checks import reject, words


def report(model: nn.Module) -> Report:
    """Which attention layers a model has, and which mechanism each can take, or why not.

    Nothing is run or changed. What depends on a call (padding for an op without a key mask, a
    mask of a user's own) is told when it comes.

    Raises: ValueError for a model none of whose attention goes through the registry.

    >>> from transformers import MistralConfig, MistralModel
    >>> small = dict(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    >>> config = MistralConfig(
    ...     **small, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    >>> found = report(MistralModel(config))
    >>> found.can("local_linear")
    ('layers.0.self_attn',)
    >>> print(found.reasons[0]["linear"])
    the layer has a window of 4, and the op no window (drop='window' forgets it)
    """
    found = sites(model)
    if not found:
        accepted = "a model whose attention goes through the AttentionInterface of transformers"
        raise reject("report", "model", accepted, words(type(model).__name__))
    parts = [getattr(site.module, ATTRIBUTE, None) for site in found]
    names = tuple(part.card.name if isinstance(part, Mechanism) else None for part in parts)
    return fill(model, found, names, unreachable)
