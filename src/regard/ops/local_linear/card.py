"""The card of local linear attention."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.ops.local_linear import local_linear_attention
from regard.ops.local_linear.reference import local_linear_attention_reference

card = Card(
    name="local_linear",
    paper=Paper(
        title="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention "
        "For Test-Time Regression",
        arxiv="2510.01450",
        year=2025,
        code="https://github.com/Yifei-Zuo/FlashLLA",
        licence="Apache-2.0",
    ),
    op=local_linear_attention,
    reference=local_linear_attention_reference,
    cases=(
        Case("default"),
        Case("small_ridge", {"ridge": 0.1}),
        Case("iterative", {"ridge": 0.3, "solver": "cg"}),
        Case("absolute_ridge", {"ridge_mode": "absolute", "scale": 0.2}),
        Case("gaussian", {"kernel": "gaussian", "ridge": 0.3, "ridge_mode": "absolute"}),
        Case("no_intercept", {"intercept": False}),
    ),
    cost="O(T S D) per iteration, or O(T S D^2)",
    memory="linear",
    state="cache",
    budgets={
        "float32": (2e-4, "CG at the default tol of 1e-4: up to 1.9e-4 on few rows"),
    },
    tune={"scale": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), "ridge": (1e-3, 1e-2, 1e-1, 1.0)},
)
