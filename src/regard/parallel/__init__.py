"""One sequence over many devices: the single-device op on each part, its state carried on.

Thin wrappers over `torch.distributed` groups. Sharding of parameters, checkpoints and launching
are torch's own.
"""

from regard.parallel.delta import delta_attention, gated_delta_attention
from regard.parallel.gathered import gather_sequence
from regard.parallel.linear import lightning_attention, linear_attention
from regard.parallel.shares import share, share_boundaries, span

__all__ = [
    "delta_attention",
    "gated_delta_attention",
    "gather_sequence",
    "lightning_attention",
    "linear_attention",
    "share",
    "share_boundaries",
    "span",
]
