"""torch's fused attention kernel, fenced: called only so that it is exact and safe.

What the fence is for. torch aligns causal masks at the start, so its causal flag is used for
square calls only; otherwise blocks of queries get a mask each, never T x S at a time. The kernels
want one head size and a dense last axis. A row without any key may be NaN in some of them, so
such a row is given one key and its output replaced by 0, which also stops its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.visibility import Visibility
from regard.ops.softmax.call import Call, Problem
from regard.ops.softmax.fused import fused

# Entries of one mask, where one is needed: it is made for a block of queries at a time. On CUDA
# up to half of T x S, because more rows keep a GPU busy.
MASK_ENTRIES = 1 << 19
MOST_ON_CUDA = 1 << 24
FEWEST_ROWS = 16
LARGEST_HEAD_ON_CUDA = 256


def refuse(call: Call) -> str | None:
    """Why torch's kernel cannot serve this call, or None."""
    q, device = call.q, call.q.device.type
    if device not in ("cpu", "cuda", "meta"):
        return f"verified on CPU and CUDA only, not on {device}"
    if call.decays:
        return "log_decay needs differences formed in float64"
    if call.biased:
        return "key_bias and bias would be expanded to T x S, and get no gradient"
    for name in ("softcap", "sinks", "block_size"):
        if getattr(call, name) is not None:
            return f"torch's kernel has no {name}"
    if call.return_aux:
        return "torch's kernel does not return its log-sum-exp"
    if q.dtype == torch.float16 and device == "cpu":
        return "nothing is computed in float16 on a CPU"
    if isinstance(call.scale, Tensor) and q.dtype.itemsize < 4:
        return f"a tensor scale would be rounded to {q.dtype} together with q"
    if device == "cuda":
        if q.dtype == torch.float64:
            return "torch has no fused kernel for float64 on CUDA"
        if max(q.shape[3], call.v.shape[3]) > LARGEST_HEAD_ON_CUDA:
            return f"torch's fused kernels take head sizes up to {LARGEST_HEAD_ON_CUDA}"
    return None


def attend(problem: Problem) -> tuple[Tensor, None]:
    """Output [B, H, T, Dv]; the kernel keeps its log-sum-exp to itself."""
    q, k, v, scale, sees = problem.q, problem.k, problem.v, problem.scale, problem.sees
    if isinstance(scale, Tensor):
        q, scale = q * scale.to(q.dtype).reshape(-1, 1, 1), 1.0
    width = v.shape[3]
    q, k, v = _fit(q, k, v)
    T, S = sees.queries, sees.keys
    if sees.key_mask is None and sees.window is None and (not sees.causal or T >= S or T == 1):
        # Everything, or a square causal call below T - S rows that come before the first key.
        blind = max(T - S, 0) if sees.causal else 0
        out = _fused(q[:, :, blind:], k, v, scale, causal=sees.causal and T - blind > 1)
        out = pad(out, (0, 0, blind, 0)) if blind else out
    else:
        rows = _rows_per_mask(q, sees)
        starts = range(0, max(T, 1), rows)
        blocks = [_masked(q, k, v, scale, sees, i, min(i + rows, T)) for i in starts]
        out = torch.cat(blocks, 2)
    return out[..., :width], None


def _rows_per_mask(q: Tensor, sees: Visibility) -> int:
    if sees.reach == (-1, -1) or sees.queries <= 1:  # one mask of a single row serves all
        return max(sees.queries, 1)
    entries = MASK_ENTRIES
    if q.device.type == "cuda":
        entries = max(entries, min(MOST_ON_CUDA, sees.queries * sees.keys // 2))
    per_row = sees.keys * (q.shape[0] if sees.key_mask is not None else 1)
    return max(FEWEST_ROWS, entries // max(per_row, 1))


def _masked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sees: Visibility, start: int, stop: int
) -> Tensor:
    """Queries [start, stop) with the mask of the keys that they can see by position."""
    first, last = sees.key_range(start, stop)
    mask = sees.tile((start, stop), (first, last), torch.bool).mask
    q, k, v = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
    if mask is None or first == last:
        return _fused(q, k, v, scale)
    empty = ~mask.any(-1, keepdim=True)
    mask = torch.cat([mask[..., :1] | empty, mask[..., 1:]], -1)
    return _fused(q, k, v, scale, mask=mask).masked_fill(empty, 0.0)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if not (q.shape[0] and q.shape[2] and k.shape[2]):  # the kernels refuse empty tensors
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return q @ k.mT @ v
    if q.device.type == "cuda" and group > 1:  # the kernels of a GPU want a key head for each
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return fused(q, k, v, mask, causal, float(scale))[0]


def _fit(*qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v with one head size, contiguous in it: what the fused kernels ask for.

    Channels of zeros change neither the products nor the other channels of the output.
    """
    size = max(tensor.shape[3] for tensor in qkv)
    if qkv[0].device.type == "cuda":
        size = -(-size // 8) * 8
    return tuple(_widen(tensor, size) for tensor in qkv)


def _widen(tensor: Tensor, size: int) -> Tensor:
    if tensor.shape[3] < size:
        tensor = pad(tensor, (0, size - tensor.shape[3]))
    if tensor.stride(3) != 1:  # clone, because contiguous() overlooks the stride of an axis of 1
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor
