"""A tiny diffusion transformer that draws one large disc, and what to measure in its pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, mse_loss

from regard.models.wan import Wan, WanConfig

SIZE = 16  # pixels of a picture of training
SHIFT = 4.0  # of noise levels, in training and in sampling
CONFIG = WanConfig(
    heads=2, head_dim=30, layers=3, mlp_dim=120, channels=3, channels_out=3, text_dim=5, freq_dim=32
)


def prompts(n: int, made: torch.Generator) -> Tensor:
    """[n, 2, 5]: a token for the disc and one for what is behind it, with a colour each.

    A place finds out what it shows by attending to one of them, as in large models with words.
    """
    disc = torch.rand(n, 3, generator=made) * 2 - 1
    behind = -disc.sign() * (0.3 + 0.7 * torch.rand(n, 3, generator=made))
    names = torch.eye(2).expand(n, 2, 2)
    return torch.cat([names, torch.stack([disc, behind], 1)], 2)


def pictures(text: Tensor, made: torch.Generator) -> Tensor:
    """[n, 3, 1, 16, 16]: one disc of radius 5 .. 6.5, wholly in the picture, with hard edges."""
    n = len(text)
    radius = 5 + 1.5 * torch.rand(n, 1, 1, generator=made)
    y, x = (
        radius + (SIZE - 1 - 2 * radius) * torch.rand(n, 1, 1, generator=made) for _ in range(2)
    )
    place = torch.arange(SIZE)
    inside = (place[:, None] - y) ** 2 + (place - x) ** 2 <= radius**2
    disc, behind = (colour[:, :, None, None, None] for colour in text[:, :, 2:].unbind(1))
    return torch.where(inside[:, None, None], disc, behind)


def trained(seed: int, steps: int, batch: int = 32) -> Wan:
    """The model after training on pictures of 16 x 16: flow matching, Adam, fixed seeds."""
    torch.manual_seed(seed)
    made = torch.Generator().manual_seed(seed)
    model = Wan(CONFIG)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        text = prompts(batch, made)
        clean = pictures(text, made)
        noise = torch.randn(clean.shape, generator=made)
        # Mostly much noise, where it is decided what there will be: the shift of `flow_sigmas`.
        sigma = (torch.randn(batch, generator=made) + math.log(SHIFT)).sigmoid()
        level = sigma[:, None, None, None, None]
        found = model((1 - level) * clean + level * noise, 1000 * sigma, text)
        loss = mse_loss(found, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    return model.eval()


def disc_share(drawn: Tensor, text: Tensor) -> Tensor:
    """[n, H, W]: 1 where a pixel has the disc's colour, 0 where that behind it; between: a mix."""
    disc, behind = text[:, :, 2:].unbind(1)
    along = disc - behind
    offset = drawn[:, :, 0] - behind[:, :, None, None]
    return (offset * along[:, :, None, None]).sum(1) / along.square().sum(1)[:, None, None]


def components(share: Tensor, least: int = 12) -> Tensor:
    """How many connected pieces (four neighbours) of at least `least` pixels are disc, [n]."""
    height, width = share.shape[1:]
    disc = (share > 0.5)[:, None]
    label = torch.arange(1.0, 1 + height * width).view(1, 1, height, width) * disc
    for _ in range(height * width):
        upright, across = max_pool2d(label, (3, 1), 1, (1, 0)), max_pool2d(label, (1, 3), 1, (0, 1))
        spread = torch.maximum(upright, across) * disc
        if torch.equal(spread, label):
            break
        label = spread
    counts = [torch.unique(one[one > 0], return_counts=True)[1] for one in label]
    return torch.tensor([int((count >= least).sum()) for count in counts]).float()


def sharpness(share: Tensor) -> Tensor:
    """The mean step between neighbours of which one is disc and one is not: 1 for a hard edge.

    The share is cut to 0 .. 1, so noise or overshooting cannot pass for an edge; one number for
    all pictures, as some may have no edge.
    """
    steps = []
    for axis in (1, 2):
        one, other = share[..., :-1], share[..., 1:]
        if axis == 1:
            one, other = share[:, :-1], share[:, 1:]
        edge = (one > 0.5) != (other > 0.5)
        steps.append((one.clamp(0, 1) - other.clamp(0, 1)).abs()[edge])
    return torch.cat(steps).mean()
