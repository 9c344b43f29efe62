"""The card of mesa attention."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.ops.mesa import mesa_attention
from regard.ops.mesa.reference import mesa_attention_reference

card = Card(
    name="mesa",
    paper=Paper(
        title="MesaNet: Sequence Modeling by Locally Optimal Test-Time Training",
        arxiv="2506.05233",
        year=2025,
        code="https://github.com/fla-org/flash-linear-attention",
        licence="MIT",
    ),
    op=mesa_attention,
    reference=mesa_attention_reference,
    cases=(
        Case(),
        Case("conjugate_gradients", {"solver": "cg", "tol": 1e-12}),
    ),
    cost="O((T + S) D^3) or O((T + S) D^2) per iteration",
    state="fixed",
    budgets={
        "float32": (
            1e-4,
            "x is long across a single key and k.x cancels where the query is almost orthogonal "
            "to it: 6e-5 in the worst of 20000 random such rows, median 4e-7",
        ),
    },
    tune={"ridge": (0.1, 1.0, 10.0)},
)
