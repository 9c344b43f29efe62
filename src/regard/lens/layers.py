"""Finding the attention layers of somebody else's model, by structure and not by its class.

A layer of attention is a module with projections to queries, keys and values (three, or one fused),
and one from the concatenated heads back to the model's width. What enters that last projection is
`z [B, T, H d]`, every head's output side by side: the place where a head can be scaled or replaced
whatever computed it, a fused kernel included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
)
FUSED = ("qkv", "Wqkv", "c_attn", "query_key_value")
BACK = ("o_proj", "out_proj", "proj", "c_proj", "out_lin", "to_out", "dense")
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


@dataclass(frozen=True)
class Layer:
    """One layer of attention: `block` is the element of the model's stack that holds it."""

    name: str
    block: nn.Module
    attention: nn.Module
    values: nn.Module
    fused: bool
    projection: nn.Module
    heads: int
    width: int

    @property
    def head_width(self) -> int:
        """Channels per head in what enters the projection."""
        return self.width // self.heads


def attention_layers(model: nn.Module, operation: str = "attention_layers") -> list[Layer]:
    """The layers of self-attention of an encoder, in the order in which they run.

    Knows the modules of transformers (ViT, DeiT, DINOv2, BERT, ...), of timm, and those named like
    them: children `q_proj, k_proj, v_proj`, `query, key, value`, `qkv`, ... and `o_proj`, `proj`,
    ... or, beside the module, `output.dense`.

    Raises:
        ValueError: there is none; one block holds several (a decoder with cross-attention); a
            block is used for several layers (ALBERT); or heads are not equally wide.
    """
    modules = dict(model.named_modules())
    layers = [
        layer
        for name, module in modules.items()
        if (layer := _as_layer(name, module, modules, operation)) is not None
    ]
    if not layers:
        raise ValueError(
            f"{operation}: {type(model).__name__} has no layer of attention that is known here: "
            "a module with children q_proj, k_proj, v_proj (or query, key, value; qkv) and a "
            "projection of the concatenated heads (o_proj, proj, out_proj, ...)"
        )
    if len({id(layer.block) for layer in layers}) < len(layers):
        raise ValueError(
            f"{operation}: a block of {type(model).__name__} holds several layers of attention; "
            "accepted are encoders with one per block"
        )
    config = getattr(model, "config", None)
    deep = getattr(config, "num_hidden_layers", len(layers))
    if isinstance(deep, int) and deep > len(layers):
        raise ValueError(
            f"{operation}: {type(model).__name__} runs {deep} layers with {len(layers)} modules; "
            "accepted are models whose layers do not share one"
        )
    return layers


def _as_layer(
    name: str, module: nn.Module, modules: dict[str, nn.Module], operation: str
) -> Layer | None:
    children = dict(module.named_children())
    values, fused = None, False
    for names in SEPARATE:
        if all(part in children for part in names):
            values = children[names[2]]
    for part in FUSED:
        if part in children:
            values, fused = children[part], True
    if values is None:
        return None
    projection = next((children[part] for part in BACK if part in children), None)
    if projection is None:  # BERT: attention.self beside attention.output.dense
        projection = modules.get(f"{name.rpartition('.')[0]}.output.dense")
    if isinstance(projection, nn.Sequential | nn.ModuleList):
        projection = projection[0]
    width = getattr(projection, "in_features", None)
    block = _block(name, modules)
    if projection is None or width is None or block is None:
        return None
    heads = heads_of(module)
    if heads is None or width % heads:
        raise ValueError(
            f"{operation}: cannot tell the number of heads of {name} ({type(module).__name__}): "
            f"it has none of the attributes {', '.join(COUNTS)} that divides its width {width}"
        )
    return Layer(name, block, module, values, fused, projection, heads, width)


def _block(name: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The outermost element of a list of modules that holds the module."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        parent = modules[".".join(parts[:end])]
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            return modules[".".join(parts[: end + 1])]
    return None


def heads_of(module: nn.Module) -> int | None:
    """How many query heads an attention module has, where it or its config says so."""
    places: list[Any] = [module, getattr(module, "config", None)]
    for place in places:
        for count in COUNTS:
            found = getattr(place, count, None)
            if isinstance(found, int) and found > 0:
                return found
    return None
