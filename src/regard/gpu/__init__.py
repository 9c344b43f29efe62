"""What Triton forms share: whether they can run, where they were verified, compiling ahead.

Importing this package imports no Triton; `availability.refusal` says in words why a Triton form
cannot serve. A kernel is launched with the options of `compiled`, or `FUSED` among its own.
"""

from regard.gpu.availability import (
    FUSED,
    capability,
    compiled,
    interpreting,
    precision,
    refusal,
)
from regard.gpu.verified import VERIFIED, Verified, unverified

__all__ = [
    "FUSED",
    "VERIFIED",
    "Verified",
    "capability",
    "compiled",
    "interpreting",
    "precision",
    "refusal",
    "unverified",
]
