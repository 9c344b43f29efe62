"""The gated delta rule under the names, the layout and the defaults of published models.

transformers (Qwen3-Next and others) calls these two functions of flash-linear-attention, or its
own torch code where that is not installed. Put ours in their place:

    layer.chunk_gated_delta_rule = chunk_gated_delta_rule
    layer.recurrent_gated_delta_rule = fused_recurrent_gated_delta_rule
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from regard.ops.gated_delta.forms import OWNER
from regard.ops.linear.delta import attend_by_rule


def chunk_gated_delta_rule(
    query: Float[Tensor, "b t h d"],
    key: Float[Tensor, "b t h d"],
    value: Float[Tensor, "b t h dv"],
    g: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    chunk_size: int = 64,
    initial_state: Float[Tensor, "b h d dv"] | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    scale: float | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h d dv"] | None]:
    """Causal gated delta-rule attention, called as transformers calls it.

        S = exp(g_t) S_{t-1},    S_t = S + beta_t k_t (v_t - S^T k_t)^T,    o_t = scale S_t^T q_t

    `gated_delta_attention(causal=True)` in the layout [B, T, H, D], with `g` for log_decay.

    Args:
        chunk_size: tokens per chunk; another size than 64 asks for the form in chunks.
        initial_state: [B, H, D, Dv], float32; with packed sequences, one row for each.
        output_final_state: return the last state beside the output, else None.
        use_qk_l2norm_in_kernel: divide queries and keys by their norms, 1e-6 under the root.
        scale: multiplies the queries; None is D ** -0.5.
        cu_seqlens: int32 [n + 1] boundaries of packed sequences, with B = 1.

    Precision, cost: as of `gated_delta_attention`.
    Source: Qwen3-Next in transformers 4.57, `torch_chunk_gated_delta_rule`, Apache-2.0: outputs,
    states and gradients are matched to 1e-5 and 1e-4 in float32. It computes in float32 always;
    here float64 stays float64, and normalising 16-bit inputs does not round twice.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 10, 2, 4)
    >>> g, beta = -torch.rand(1, 10, 2), torch.rand(1, 10, 2)
    >>> out, state = chunk_gated_delta_rule(
    ...     q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
    >>> out.shape, state.shape
    (torch.Size([1, 10, 2, 4]), torch.Size([1, 2, 4, 4]))
    """
    return attend_by_rule(
        OWNER._replace(op="chunk_gated_delta_rule"), query, key, value, g, beta, scale=scale,
        initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        chunk_size=None if chunk_size == 64 else chunk_size, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    query: Float[Tensor, "b t h d"],
    key: Float[Tensor, "b t h d"],
    value: Float[Tensor, "b t h dv"],
    g: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    initial_state: Float[Tensor, "b h d dv"] | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    scale: float | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h d dv"] | None]:
    """The same function as `chunk_gated_delta_rule`, under the name with which models decode.

    Which form runs is chosen by the shapes, not by the name: one token takes the recurrence.

    Shapes, arguments, source: as of `chunk_gated_delta_rule`, without chunks.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 1, 2, 4)
    >>> g, beta, state = -torch.rand(1, 1, 2), torch.rand(1, 1, 2), torch.zeros(1, 2, 4, 4)
    >>> fused_recurrent_gated_delta_rule(q, k, v, g, beta, state, True)[1].shape
    torch.Size([1, 2, 4, 4])
    """
    return attend_by_rule(
        OWNER._replace(op="fused_recurrent_gated_delta_rule"), query, key, value, g, beta,
        scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
    )  # fmt: skip
