"""The delta rule under the names, the layout and the defaults of published models.

DeltaNet's layers, in flash-linear-attention and in models for transformers that are built on it,
call these two functions.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from regard.ops.delta.forms import OWNER
from regard.ops.linear.delta import attend_by_rule


def chunk_delta_rule(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t h d"],
    v: Float[Tensor, "b t h dv"],
    beta: Float[Tensor, "b t h"],
    scale: float | None = None,
    initial_state: Float[Tensor, "b h d dv"] | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h d dv"] | None]:
    """Causal delta-rule attention, called as DeltaNet's layers call it.

        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,    o_t = scale S_t^T q_t

    `delta_attention(causal=True)` in the layout [B, T, H, D].

    Args:
        scale: multiplies the queries; None is D ** -0.5.
        initial_state: [B, H, D, Dv], float32; with packed sequences, one row for each.
        output_final_state: return the last state beside the output, else None.
        use_qk_l2norm_in_kernel: divide queries and keys by their norms, 1e-6 under the root.
        cu_seqlens: int32 [n + 1] boundaries of packed sequences, with B = 1.

    Precision, cost: as of `delta_attention`.
    Source: Yang et al. 2024, arXiv 2406.06484; the conventions are those of
    flash-linear-attention. Equal to the gated rule without decay, to rounding.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 10, 2, 4)
    >>> out, state = chunk_delta_rule(q, k, v, torch.rand(1, 10, 2), output_final_state=True)
    >>> out.shape, state.shape
    (torch.Size([1, 10, 2, 4]), torch.Size([1, 2, 4, 4]))
    """
    return attend_by_rule(
        OWNER._replace(op="chunk_delta_rule"), q, k, v, None, beta, scale=scale,
        initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_delta_rule(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t h d"],
    v: Float[Tensor, "b t h dv"],
    beta: Float[Tensor, "b t h"],
    scale: float | None = None,
    initial_state: Float[Tensor, "b h d dv"] | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h d dv"] | None]:
    """The same function as `chunk_delta_rule`, under the name with which models decode.

    Which form runs is chosen by the shapes, not by the name: one token takes the recurrence.

    Shapes, arguments, source: as of `chunk_delta_rule`.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 1, 2, 4)
    >>> fused_recurrent_delta_rule(q, k, v, torch.rand(1, 1, 2))[0].shape
    torch.Size([1, 1, 2, 4])
    """
    return attend_by_rule(
        OWNER._replace(op="fused_recurrent_delta_rule"), q, k, v, None, beta, scale=scale,
        initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
    )  # fmt: skip
