"""What the kernels read instead of keys and values: centred, scaled, rounded, padded copies.

    k' = (k - centre) / sigma,    v' = v / sigma_v

in the type of the products. Centring costs nothing in the result (weights, covariances and
slopes are shift-invariant) and saves digits. The sigmas are powers of two per head: they keep
float16 within its range, and change no digit. Where queries do not see all keys, centre and
sigmas come from the first real key alone, so that no later key changes an earlier result; keys
more than some hundred times larger are cut off, and the rows that see them computed otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.gpu import interpreting
from regard.gpu.inside import power_of_two
from regard.gpu.start import start
from regard.ops.local_linear.call import SINGLE
from regard.ops.local_linear.layout import Inputs

LOG2E = 1 / math.log(2.0)
PAD = 128
LARGEST = 60000.0  # finite in float16: a key that nobody sees yet must not become inf
ROOM = 128  # the largest norm there is; 64 p (t - c) <= 64 x 2 x 256 is a float16 still
_ROWS = 64


@dataclass(frozen=True)
class Prepared:
    """Operands of the kernels. P stands for the next power of two, S' for S padded to 128."""

    keys: Tensor  # [B * Hk, S', DP]
    values: Tensor  # [B * Hk, S', DvP]
    centre: Tensor  # float32 [B * Hk, DP]
    sigma: Tensor  # float32 [B * Hk, 2]: of keys and of values
    overflow: Tensor  # int32 [B * Hk]: the first key that was cut off, or S'
    bias: Tensor | None  # float32 [B * heads, S'] in bits, -inf where masked or padded
    decay: tuple[Tensor, Tensor, Tensor] | None  # high, low, first [B * heads, S']

    @property
    def half(self) -> bool:
        """Whether products have 16-bit operands."""
        return self.keys.dtype == torch.float16

    @property
    def length(self) -> int:
        return self.keys.shape[1]


def padded(channels: int) -> int:
    """The width at which channels are computed."""
    return max(16, 1 << max(channels - 1, 0).bit_length())


def operand_dtype(inputs: Inputs, single: bool = False) -> torch.dtype:
    """float16 for 16-bit inputs on a GPU, or float32 where they are to be `single`.

    The interpreter cannot multiply in 16 bits.
    """
    if single or interpreting() or inputs.q.dtype == torch.float32:
        return torch.float32
    return torch.float16


def prepare(inputs: Inputs, precision: str = "auto") -> Prepared:
    """Nothing here waits for the device."""
    dtype = operand_dtype(inputs, precision == SINGLE)
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (inputs.k, inputs.v))
    B, Hk, S, D = k.shape
    Dv, device = v.shape[3], k.device
    length, DP, DVP = -(-max(S, 1) // PAD) * PAD, padded(D), padded(Dv)
    keys = torch.empty(B * Hk, length, DP, dtype=dtype, device=device)
    values = torch.empty(B * Hk, length, DVP, dtype=dtype, device=device)
    centre = torch.empty(B * Hk, DP, dtype=torch.float32, device=device)
    sigma = torch.empty(B * Hk, 2, dtype=torch.float32, device=device)
    overflow = torch.full((B * Hk,), length, dtype=torch.int32, device=device)
    mask = inputs.key_mask
    banded = inputs.visibility.reach != (-1, -1)
    first = None
    if not banded and S:
        _whole(inputs, centre, sigma)
    elif mask is not None and S:
        first = mask.to(torch.int32).argmax(1).to(torch.int32)
    if S == 0:
        for x in (keys, values, centre):
            x.zero_()
        sigma.fill_(1.0)
    else:
        arguments = {
            "k": k, "v": v, "mask": mask, "first": first, "keys": keys, "values": values,
            "centre": centre, "sigma": sigma, "overflow": overflow,
            "kb": k.stride(0), "kh": k.stride(1), "ks": k.stride(2),
            "vb": v.stride(0), "vh": v.stride(1), "vs": v.stride(2),
            "mb": 0 if mask is None else mask.stride(0),
            "ms": 0 if mask is None else mask.stride(1),
            "S": S, "length": length, "heads": Hk, "blocks": length // _ROWS,
            "D": D, "DP": DP, "DV": Dv, "DVP": DVP, "ROWS": _ROWS, "BANDED": banded,
            "CENTRED": inputs.intercept, "HALF": dtype == torch.float16,
            "HAS_MASK": mask is not None, "LARGEST": LARGEST,
        }  # fmt: skip
        start(_copy, length // _ROWS * B * Hk, arguments)
    return Prepared(
        keys, values, centre, sigma, overflow, _bias(inputs, length), _decay(inputs, length)
    )


def _whole(inputs: Inputs, centre: Tensor, sigma: Tensor) -> None:
    """Mean keys and largest norms, where every query sees every real key."""
    k, v, mask = inputs.k.float(), inputs.v.float(), inputs.key_mask
    B, Hk, _, D = k.shape
    count = None
    if mask is not None:
        real = mask[:, None, :, None]
        k, v = (torch.where(real, x, 0.0) for x in (k, v))
        count = mask.sum(1).clamp(min=1)[:, None, None]
    mean = torch.zeros(B, Hk, D, device=k.device)
    if inputs.intercept:
        mean = k.mean(2) if count is None else k.sum(2) / count
    centre.zero_()
    centre.view(B, Hk, -1)[..., :D] = mean
    sizes = (torch.linalg.vector_norm(x, dim=3).amax(2) for x in (k, v))
    # Room below for keys that are thousands of times smaller than the largest.
    sigma.copy_(torch.stack([x.flatten() / ROOM for x in sizes], 1))


def _bias(inputs: Inputs, length: int) -> Tensor | None:
    """key_bias and key_mask in one."""
    bias, mask, S = inputs.key_bias, inputs.key_mask, inputs.k.shape[2]
    if bias is None and mask is None:
        return None
    total = inputs.k.new_zeros(1, dtype=torch.float32)
    if bias is not None:
        total = bias.to(torch.float32) * LOG2E
    if mask is not None:
        total = torch.where(mask[:, None], total, -torch.inf)
    return torch.nn.functional.pad(total, (0, length - S), value=-torch.inf).flatten(0, 1)


def _decay(inputs: Inputs, length: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The sums as two float32 each: differences are right to the last digit of a float32.

    They start anew where a decay forgets. Here they go on instead: neighbours stay comparable.
    """
    if inputs.decay is None:
        return None
    sums, first = inputs.decay
    if sums.shape[2]:
        begins = torch.nn.functional.pad(first[..., 1:] != first[..., :-1], (1, 0))
        before = torch.nn.functional.pad(sums[..., :-1], (1, 0))
        sums = sums + torch.where(begins, before, 0.0).cumsum(2)
    sums = sums * LOG2E
    high = sums.float()
    low = (sums - high.double()).float()
    pad = (0, length - sums.shape[2])
    parts = (high, low, first.to(torch.int32))
    high, low, begin = (torch.nn.functional.pad(x, pad).flatten(0, 1) for x in parts)
    return high, low, begin


@triton.jit(do_not_specialize=["S", "heads", "blocks"])
def _copy(
    k, v, mask, first, keys, values, centre, sigma, overflow,
    kb, kh, ks, vb, vh, vs, mb, ms, S, length, heads, blocks,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr,
    BANDED: tl.constexpr, CENTRED: tl.constexpr, HALF: tl.constexpr, HAS_MASK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    b = pair // heads
    h = pair % heads
    k += b.to(tl.int64) * kb + h.to(tl.int64) * kh
    v += b.to(tl.int64) * vb + h.to(tl.int64) * vh
    channels = tl.arange(0, DP)
    value_channels = tl.arange(0, DVP)
    if BANDED:
        begin = tl.zeros([], tl.int64)
        if HAS_MASK:
            begin = tl.load(first + b).to(tl.int64)
        middle = tl.load(k + begin * ks + channels, mask=channels < D, other=0.0).to(tl.float32)
        value = tl.load(v + begin * vs + value_channels, mask=value_channels < DV, other=0.0)
        value = value.to(tl.float32)
        size = power_of_two(tl.sqrt(tl.sum(middle * middle, 0)))
        value_size = power_of_two(tl.sqrt(tl.sum(value * value, 0)))
        if HAS_MASK:  # where nothing is real, the first key is junk
            real = tl.load(mask + b.to(tl.int64) * mb + begin * ms)
            middle = tl.where(real, middle, 0.0)
            size = tl.where(real, size, 1.0)
            value_size = tl.where(real, value_size, 1.0)
    else:
        middle = tl.load(centre + pair * DP + channels)
        size = power_of_two(tl.load(sigma + pair * 2))
        value_size = power_of_two(tl.load(sigma + pair * 2 + 1))
    if not HALF:
        size = size * 0.0 + 1.0
        value_size = value_size * 0.0 + 1.0
    if not CENTRED:
        middle = tl.zeros([DP], tl.float32)
    rows = block * ROWS + tl.arange(0, ROWS)
    real = rows < S
    if HAS_MASK:
        real &= tl.load(mask + b.to(tl.int64) * mb + rows * ms, mask=real, other=0) != 0
    places = rows.to(tl.int64)
    there = real[:, None] & (channels < D)[None, :]
    x = tl.load(k + (places * ks)[:, None] + channels[None, :], mask=there, other=0.0)
    x = tl.where(there, (x.to(tl.float32) - middle[None, :]) * (1.0 / size), 0.0)
    there = real[:, None] & (value_channels < DV)[None, :]
    y = tl.load(v + (places * vs)[:, None] + value_channels[None, :], mask=there, other=0.0)
    y = tl.where(there, y.to(tl.float32) * (1.0 / value_size), 0.0)
    if HALF:
        large = (tl.max(tl.abs(x), 1) > LARGEST) | (tl.max(tl.abs(y), 1) > LARGEST)
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
        earliest = tl.min(tl.where(large, rows, length), 0)
        if earliest < length:
            tl.atomic_min(overflow + pair, earliest)
    row = pair.to(tl.int64) * length + rows
    tl.store(keys + (row * DP)[:, None] + channels[None, :], x.to(keys.dtype.element_ty))
    y = y.to(values.dtype.element_ty)
    tl.store(values + (row * DVP)[:, None] + value_channels[None, :], y)
    if block == 0:  # others may read these before or after: it makes no difference to them
        tl.store(centre + pair * DP + channels, middle)
        tl.store(sigma + pair * 2, size)
        tl.store(sigma + pair * 2 + 1, value_size)
