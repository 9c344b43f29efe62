"""The card of clamped ReLU linear attention."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.ops.relu_linear import relu_linear_attention
from regard.ops.relu_linear.reference import relu_linear_attention_reference

card = Card(
    name="relu_linear",
    paper=Paper(
        title="The Linear Attention Resurrection in Vision Transformer",
        arxiv="2501.16182",
        year=2025,
        code="https://github.com/ChuanyangZheng/L2ViT",
        licence="MIT",
    ),
    op=relu_linear_attention,
    reference=relu_linear_attention_reference,
    cases=(
        # With a dozen keys of eight channels the sums of weights lie on both sides of 20.
        Case("both_sides", {"minimum": 20.0, "temperature": 0.75}),
        Case("published"),
        Case("normalised", {"minimum": 0.0}),
    ),
    cost="O((T + S) D Dv)",
    state="fixed",
    # The gain is linear in the output; without training a mean is the sensible one.
    tune={"minimum": (0.0,), "temperature": (1.0,)},
)
