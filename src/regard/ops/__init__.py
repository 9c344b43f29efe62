"""Functions of (q, k, v): every mechanism is a folder, every folder has one card."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.ops.block_sparse import block_sparse_attention, selected_attention
    from regard.ops.delta import delta_attention
    from regard.ops.gated_delta import gated_delta_attention
    from regard.ops.hedgehog import hedgehog_attention, hedgehog_weights
    from regard.ops.hedgehog_window import hedgehog_window_attention, hedgehog_window_weights
    from regard.ops.hierarchical_sparse import (
        block_mask,
        hierarchical_sparse_attention,
        token_sparse_attention,
    )
    from regard.ops.inline import inline_attention
    from regard.ops.lightning import bidirectional_lightning_attention, lightning_attention
    from regard.ops.linear import linear_attention
    from regard.ops.local_linear import (
        flash_lla,
        local_linear_attention,
        local_linear_slope,
        local_linear_weights,
    )
    from regard.ops.mesa import mesa_attention
    from regard.ops.parallax import parallax_attention
    from regard.ops.paro import axis_order_attention
    from regard.ops.pyramid_sparse import pyramid_attention, pyramid_levels
    from regard.ops.rat import rat_attention
    from regard.ops.relu_linear import relu_linear_attention
    from regard.ops.routed import region_route, region_topk_attention, routed_attention
    from regard.ops.selected import block_topk, block_topk_attention, nsa_attention
    from regard.ops.softmax import softmax_attention
    from regard.ops.window import halo_attention, inward_window_attention, window_attention

# Where a function lives: its folder is imported when one of its functions is first named.
_FOLDERS: dict[str, tuple[str, ...]] = {
    "block_sparse": ("block_sparse_attention", "selected_attention"),
    "delta": ("delta_attention",),
    "gated_delta": ("gated_delta_attention",),
    "hedgehog": ("hedgehog_attention", "hedgehog_weights"),
    "hedgehog_window": ("hedgehog_window_attention", "hedgehog_window_weights"),
    "hierarchical_sparse": (
        "block_mask",
        "hierarchical_sparse_attention",
        "token_sparse_attention",
    ),
    "inline": ("inline_attention",),
    "lightning": ("bidirectional_lightning_attention", "lightning_attention"),
    "linear": ("linear_attention",),
    "local_linear": (
        "flash_lla",
        "local_linear_attention",
        "local_linear_slope",
        "local_linear_weights",
    ),
    "mesa": ("mesa_attention",),
    "parallax": ("parallax_attention",),
    "paro": ("axis_order_attention",),
    "pyramid_sparse": ("pyramid_attention", "pyramid_levels"),
    "rat": ("rat_attention",),
    "relu_linear": ("relu_linear_attention",),
    "routed": ("region_route", "region_topk_attention", "routed_attention"),
    "selected": ("block_topk", "block_topk_attention", "nsa_attention"),
    "softmax": ("softmax_attention",),
    "window": ("halo_attention", "inward_window_attention", "window_attention"),
}
_FOLDER_OF = {name: folder for folder, names in _FOLDERS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _FOLDER_OF:
        raise AttributeError(f"module 'regard.ops' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"regard.ops.{_FOLDER_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_FOLDER_OF})


__all__ = [
    "axis_order_attention",
    "bidirectional_lightning_attention",
    "block_mask",
    "block_sparse_attention",
    "block_topk",
    "block_topk_attention",
    "delta_attention",
    "flash_lla",
    "gated_delta_attention",
    "halo_attention",
    "hedgehog_attention",
    "hedgehog_weights",
    "hedgehog_window_attention",
    "hedgehog_window_weights",
    "hierarchical_sparse_attention",
    "inline_attention",
    "inward_window_attention",
    "lightning_attention",
    "linear_attention",
    "local_linear_attention",
    "local_linear_slope",
    "local_linear_weights",
    "mesa_attention",
    "nsa_attention",
    "parallax_attention",
    "pyramid_attention",
    "pyramid_levels",
    "rat_attention",
    "region_route",
    "region_topk_attention",
    "relu_linear_attention",
    "routed_attention",
    "selected_attention",
    "softmax_attention",
    "token_sparse_attention",
    "window_attention",
]
