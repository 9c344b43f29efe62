"""The card of dynamic hierarchical sparse attention."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.core.patterns import Pattern
from regard.ops.hierarchical_sparse import hierarchical_sparse_attention
from regard.ops.hierarchical_sparse.reference import hierarchical_sparse_attention_reference

card = Card(
    name="hierarchical_sparse",
    paper=Paper(
        title="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for "
        "Memory-Constrained LLMs",
        arxiv="2510.24606",
        year=2025,
        code="https://github.com/xiongsiheng/DHSA",
    ),
    op=hierarchical_sparse_attention,
    reference=hierarchical_sparse_attention_reference,
    # With `causal` no later key or value is read, but the keys of a block are chosen from the means
    # of all its queries: it does not keep the promise of a causal pattern.
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS),
    cases=(
        Case("tokens", {"block": 3, "budget": 5, "chunk": 2}),
        Case("per head", {"block": 2, "budget": 4, "chunk": 3, "per_head": True}),
    ),
    cost="O(T S D / (block chunk) + T budget (D + Dv))",
    memory="linear",
)
