"""Functions of (q, k, v): every mechanism is a folder, every folder has one card."""

from regard.ops.linear import linear_attention
from regard.ops.local_linear import local_linear_attention
from regard.ops.softmax import softmax_attention

__all__ = ["linear_attention", "local_linear_attention", "softmax_attention"]
