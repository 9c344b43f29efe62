"""The four attention patterns: what a mechanism promises, as opposed to which mask it applies."""

from __future__ import annotations

from enum import Enum


class Pattern(Enum):
    """Who attends to whom, and what an output may depend on.

    `causal` is the *mask* argument of an op; a pattern is the *promise* around it. The two
    differ for causal cross attention: every query sees the whole memory (`causal=False`), and
    no output may depend on a later query. A mechanism that pools over its queries can be
    non-causal cross without being causal cross.

    >>> Pattern.CAUSAL_CROSS.causal, Pattern.CAUSAL_CROSS.cross, Pattern.CAUSAL_CROSS.online
    (False, True, True)
    """

    NONCAUSAL_SELF = "noncausal_self"
    CAUSAL_SELF = "causal_self"
    NONCAUSAL_CROSS = "noncausal_cross"
    CAUSAL_CROSS = "causal_cross"

    @property
    def causal(self) -> bool:
        """The value of the `causal` argument with which an op serves this pattern."""
        return self is Pattern.CAUSAL_SELF

    @property
    def cross(self) -> bool:
        """Whether keys and values come from another sequence than the queries."""
        return self in (Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS)

    @property
    def online(self) -> bool:
        """Whether an output must not depend on later queries."""
        return self in (Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS)


ALL_PATTERNS: tuple[Pattern, ...] = tuple(Pattern)
