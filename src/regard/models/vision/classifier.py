"""The frame of every vision backbone: image -> features -> logits."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.core.checks import FLOATS, reject
from regard.models.pretrained import Pretrained
from regard.models.vision.config import VisionConfig


class Classifier(Pretrained):
    """A backbone with a linear head: `features` by a subclass, logits here.

    A subclass sets `KIND`, `CONFIG` and `head`, and defines `features(image) -> [B, C]`. It calls
    `start` when it is built.
    """

    KIND: ClassVar[str]
    CONFIG: ClassVar[type[Any]]
    head: nn.Linear

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if not isinstance(config, self.CONFIG):
            accepted = f"a {self.CONFIG.__name__}"
            raise reject(type(self).__name__, "config", accepted, config, kind=TypeError)
        self.config = config

    def start(self) -> None:
        """Matrices truncated normal with standard deviation 0.02, their biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """What the head reads."""
        raise NotImplementedError

    def forward(self, image: Float[Tensor, "b c h w"]) -> Any:
        """Logits [B, classes] of images [B, channels, height, width]."""
        self.check(image)
        return self.head(self.features(image))

    def check(self, image: Any) -> None:
        """An image of the right channels."""
        op, channels = type(self).__name__, self.config.channels
        if not isinstance(image, Tensor) or image.dtype not in FLOATS:
            raise reject(op, "image", "a floating-point tensor", image, kind=TypeError)
        if image.dim() != 4 or image.shape[1] != channels:
            raise reject(op, "image", f"of shape [batch, {channels}, height, width]", image)


def average(x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b c"]:
    """The mean token of a map."""
    return torch.mean(x, (1, 2))
