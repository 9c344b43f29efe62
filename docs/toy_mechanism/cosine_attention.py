"""Attention by the angle between query and key: a mechanism outside of regard, complete."""

import torch

import regard
from regard.core.checks import check_flag, check_key_mask, check_qkv, check_scale
from regard.core.dispatch import Form, choose
from regard.core.precision import cast_for_autocast, compute_dtype, without_autocast


def cosine_attention(q, k, v, *, causal=False, scale=None, key_mask=None, impl="auto"):
    """Softmax attention on unit queries and keys: o = softmax(scale cos(q, k)) v, scale 10."""
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv("cosine_attention", q, k, v)
    check_key_mask("cosine_attention", key_mask, sizes, q)
    check_scale("cosine_attention", scale, sizes, q)
    check_flag("cosine_attention", "causal", causal)
    forms = (Form("eager", "dense", lambda call: None, lambda call: cosine_reference(*call)),)
    with without_autocast(q):
        call = (q, k, v, causal, scale, key_mask)
        return choose("cosine_attention", forms, impl, call).run(call)


def cosine_reference(q, k, v, causal=False, scale=None, key_mask=None):
    """The equations; whatever a masked key contains is taken out before anything is computed."""
    wide, T, S = compute_dtype(q.dtype), q.shape[2], k.shape[2]
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T if causal else S)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
        k, v = (torch.where(key_mask[:, None, :, None], x, 0.0) for x in (k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    cosine = unit(q.to(wide)) @ unit(k.to(wide)).mT
    scale = scale.reshape(-1, 1, 1).to(wide) if isinstance(scale, torch.Tensor) else scale
    scores = cosine * (10.0 if scale is None else scale)
    weights = scores.masked_fill(~seen, -1e30).softmax(-1) * seen
    return (weights @ v.to(wide)).to(q.dtype)


def unit(x):
    """x / |x|, and 0 for 0; divided by the largest element first, so that nothing overflows."""
    x = x / x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)


paper = regard.Paper("Query-Key Normalization for Transformers", arxiv="2010.04245", year=2020)
facts = {"memory": "quadratic", "tune": {"scale": (8.0, 32.0, 128.0)}}
card = regard.Card("cosine", paper, cosine_attention, cosine_reference, **facts)
