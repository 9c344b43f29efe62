"""The signature and conventions of the authors' FlashLLA, on our form of it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from regard.core import checks
from regard.ops.local_linear import forms
from regard.ops.local_linear.layout import Workspace
from regard.ops.local_linear.registered import inputs_of, local_linear_fwd
from regard.ops.local_linear.tiles import LOG2E, walk


def flash_lla(
    q: Float[Tensor, "b s d"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s dv"],
    ridge_lambda: float | Tensor = 10.0,
    qk_scale: float | None = None,
    delta_eps: float = 1e-12,
    cg_atol: float = 1e-12,
    cg_rtol: float = 1e-12,
    cg_max_iters: int = 32,
    cg_use_preconditioner: bool = False,
) -> tuple[Float[Tensor, "b s dv"], Float[Tensor, "b s"]]:
    """Causal local linear attention with the arguments and the results of the authors' FlashLLA.

    For those who have code that calls it; `local_linear_attention` says what is computed:

        o_i = sum_j p_j (1 - g . (k_j - kbar)) v_j,    omega_i = sum_j exp(s_ij - max_j s_ij).

    Arguments:
        q, k, v: [B, S, D], heads folded into the batch: [B, H, T, D] with H = 1 elsewhere here.
        ridge_lambda: > 0, a number or a tensor of shape (), (1,), (S,) or (B, S). It is added
            to the covariance of the normalised weights.
        qk_scale: of the scores; None is D ** -0.5.
        delta_eps: kept for compatibility; the centred form has no denominator to protect.
        cg_rtol: a query stops when its squared residual is at most cg_rtol |r_0|^2, r_0 being
            that of x = 0: squared norms, so 1e-12 is 1e-6 of a residual.
        cg_atol: in the original a floor of |r_0|^2; here a row is always solved to cg_rtol,
            which is at least as strict.
        cg_max_iters: conjugate gradient steps at most; a query that needs more is solved
            directly, in float64, where the original keeps what it has.
        cg_use_preconditioner: only False; the diagonal one of the authors never helps.

    Returns:
        o [B, S, Dv] in q's dtype and omega [B, S] in float32 (float64 for float64 inputs).
        Gradients flow through o.

    Precision:
        Computes in float32 for 16-bit inputs (the authors' kernels round operands to bfloat16).

    Cost:
        O(S^2 D) per iteration, memory O(S D).

    Source:
        Zuo et al. 2025, arXiv 2510.01450, github.com/Yifei-Zuo/FlashLLA. Equal to the authors'
        fp32 operator to 1e-5. The gradient is the exact one; theirs leaves out a term
        (`local_linear_attention(grad="official")`).

    Limits:
        Causal only. omega carries no gradient, as in the original.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or domain.

    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 5, 16)
    >>> o, omega = flash_lla(q, k, v, 0.1)
    >>> o.shape, torch.allclose(o[:, 0], v[:, 0]), omega[:, 0]
    (torch.Size([2, 5, 16]), True, tensor([1., 1.]))
    """
    op = "flash_lla"
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor):
            raise checks.reject(op, name, "a torch.Tensor", value, kind=TypeError)
        if value.dim() != 3:
            raise checks.reject(op, name, "3-dimensional [batch, length, channels]", value)
    sizes = checks.check_qkv(op, q[:, None], k[:, None], v[:, None])
    if sizes.T != sizes.S:
        raise checks.reject(op, "k", f"of q's length {sizes.T}", k)
    for name, number in (("delta_eps", delta_eps), ("cg_atol", cg_atol), ("cg_rtol", cg_rtol)):
        checks.check_number(op, name, number, least=0.0)
    checks.check_integer(op, "cg_max_iters", cg_max_iters)
    if cg_use_preconditioner is not False:
        raise checks.reject(op, "cg_use_preconditioner", "False", cg_use_preconditioner)
    ridge = _ridge(op, ridge_lambda, sizes, q)
    if qk_scale is not None and not isinstance(qk_scale, Tensor):
        checks.check_number(op, "qk_scale", qk_scale)
    tol = max(cg_rtol, torch.finfo(torch.float32).tiny) ** 0.5
    call = forms.Call(
        q[:, None], k[:, None], v[:, None], True, ridge, "relative", qk_scale, None, None, None,
        None, tol, min(tol, forms.backward_tolerance(tol)), "cg", max_iters=cg_max_iters,
    )
    forms.check(op, sizes, call)
    out, _, lse, _, _ = local_linear_fwd(*forms.operands(call), *forms.options(call))
    return out[:, 0], torch.exp(lse.detach() - _largest_scores(call))[:, 0]


def _largest_scores(call: forms.Call) -> Tensor:
    """max_j s_ij [B, 1, S]."""
    with torch.no_grad():
        inputs = inputs_of(forms.operands(call), forms.options(call))
        top = torch.zeros(call.q.shape[:3], dtype=inputs.dtype, device=call.q.device)
        if call.q.numel():
            for heads, block in walk(inputs, 0, Workspace(call.q, inputs.dtype)):
                queries = heads.rows(inputs.q, block) * heads.rows(inputs.scale_rows, block)
                largest = heads.scores(block, queries).amax(-1, keepdim=True) / LOG2E
                largest = largest + (queries * heads.centre).sum(-1, keepdim=True)
                heads.put(top[..., None], block, largest)
    return top


def _ridge(op: str, ridge: float | Tensor, sizes: checks.Sizes, like: Tensor) -> float | Tensor:
    """A number, or [B, 1, S]."""
    if not isinstance(ridge, Tensor):
        checks.check_number(op, "ridge_lambda", ridge, above=0.0)
        return ridge
    B, S = sizes.B, sizes.S
    if not ridge.is_floating_point():
        raise checks.reject(op, "ridge_lambda", "a floating-point tensor", ridge, kind=TypeError)
    if tuple(ridge.shape) not in ((), (1,), (S,), (B, S)):
        accepted = f"of shape [], [1], [{S}] or [{B}, {S}]"
        raise checks.reject(op, "ridge_lambda", accepted, ridge)
    return ridge.to(like.device).expand(B, S)[:, None]
