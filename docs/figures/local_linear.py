"""Draws docs/figures/local_linear_*.svg: the fit, its weights at an edge, and its bias.

Run: python docs/figures/local_linear.py   (a few seconds)
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

matplotlib.use("svg")
from matplotlib import pyplot as plt

import regard

HERE = Path(__file__).parent
SOFTMAX, LLA, TRUTH = "#c0562f", "#2f6f8f", "#5b6770"
SHARP = 60.0  # 1 / bandwidth^2: a bandwidth of 0.13
RIDGE = 1e-3


def truth(x: torch.Tensor) -> torch.Tensor:
    """A line, a bend, a steeper line, up to the edge of the data."""
    return torch.where(x < 0.2, 0.4 - 0.8 * x, 0.24 + 2.2 * (x - 0.2))


def data(count: int = 60, noise: float = 0.08) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys on [-1, 1], uneven on purpose, and noisy values."""
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    keys = (2 * uniform**0.7 - 1).sort().values
    return keys, truth(keys) + noise * torch.randn(count, generator=generator, dtype=torch.float64)


def as_heads(x: torch.Tensor) -> torch.Tensor:
    """[n] as [1, 1, n, 1]."""
    return x[None, None, :, None]


def local_constant(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = SHARP):
    """Softmax attention with the Gaussian kernel."""
    bias = -0.5 * scale * k.square()[None, None]
    heads = (as_heads(x) for x in (q, k, v))
    return regard.ops.softmax_attention(*heads, scale=scale, key_bias=bias)[0, 0, :, 0]


def local_line(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = SHARP):
    """Local linear attention with the same kernel."""
    heads = (as_heads(x) for x in (q, k, v))
    return regard.ops.local_linear_attention(
        *heads, scale=scale, kernel="gaussian", ridge=RIDGE
    )[0, 0, :, 0]


def draw_fit() -> None:
    """Both predictions over the data, and the line fitted at one query."""
    k, v = data()
    q = torch.linspace(-1.1, 1.15, 300, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot(k, v, "o", color=TRUTH, markersize=3, alpha=0.6, label="keys and values")
    axes.plot(q, truth(q), color=TRUTH, linewidth=1, linestyle=":", label="truth")
    axes.plot(q, local_constant(q, k, v), color=SOFTMAX, label="softmax: local constant")
    axes.plot(q, local_line(q, k, v), color=LLA, label="local linear")
    at = torch.tensor([0.95], dtype=torch.float64)
    heads = (as_heads(x) for x in (at, k, v))
    slope = regard.ops.local_linear_slope(*heads, scale=SHARP, kernel="gaussian", ridge=RIDGE)
    x = torch.linspace(0.6, 1.15, 2, dtype=torch.float64)
    line = local_line(at, k, v) + slope.item() * (x - at)
    axes.plot(x, line, color="black", linewidth=1, linestyle="--", label="the fit at q = 0.95")
    axes.plot(at, local_line(at, k, v), "o", color="black", markersize=5)
    axes.set(xlabel="key", ylabel="value")
    axes.legend(frameon=False, fontsize=8)
    save(figure, "fit")


def draw_weights() -> None:
    """p and the signed weights of a query beyond the last key."""
    k, _ = data()
    at = torch.tensor([1.05], dtype=torch.float64)
    options = {"scale": SHARP, "kernel": "gaussian"}
    figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for name, ridge, colour, marker in (
        ("softmax (ridge to infinity)", 1e9, SOFTMAX, "o"), ("local linear", RIDGE, LLA, "s"),
    ):
        weights = regard.ops.local_linear_weights(as_heads(at), as_heads(k), ridge=ridge, **options)
        axes.vlines(k, 0, weights[0, 0, 0], color=colour, linewidth=1, alpha=0.5)
        axes.plot(k, weights[0, 0, 0], marker, color=colour, markersize=4, label=name)
    axes.axvline(float(at), color="black", linewidth=1, linestyle="--")
    axes.axhline(0, color=TRUTH, linewidth=0.5)
    axes.set(xlabel="key", ylabel="weight", xlim=(0.4, 1.1))
    axes.legend(frameon=False, fontsize=8)
    save(figure, "weights")


def draw_bandwidth() -> None:
    """Error over the bandwidth, inside the data and at its edges."""
    k, v = data(400)
    q = torch.linspace(-1, 1, 401, dtype=torch.float64)
    edge = q.abs() > 0.9
    widths = torch.logspace(-1.7, 0.3, 30, dtype=torch.float64)
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True, layout="constrained")
    for panel, where, name in zip(panels, (~edge, edge), ("inside", "at the edges"), strict=True):
        for label, predict, colour in (
            ("softmax", local_constant, SOFTMAX), ("local linear", local_line, LLA),
        ):
            errors = [
                (predict(q, k, v, float(h) ** -2) - truth(q))[where].square().mean().sqrt()
                for h in widths
            ]
            panel.loglog(widths, errors, color=colour, label=label)
        panel.set(xlabel="bandwidth", title=name)
    panels[0].set_ylabel("root mean square error")
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, "bandwidth")


def save(figure, name: str) -> None:
    """Writes the same bytes for the same picture."""
    figure.savefig(HERE / f"local_linear_{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draws all of them."""
    plt.rcParams["svg.hashsalt"] = "regard"
    draw_fit()
    draw_weights()
    draw_bandwidth()


if __name__ == "__main__":
    main()
