"""Low-rank adaptation: a matrix W learns as W + (alpha / r) B A, and can be merged into one."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.core.checks import check_integer, check_number, reject, words

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTER = "default"  # PEFT keeps adapters by name


class LowRank(nn.Module):
    """y = base(x) + (alpha / rank) B A x, with A [rank, in] random and B [out, rank] zero at first.

    The state dict has PEFT's names: `base_layer.weight`, `lora_A.default.weight`,
    `lora_B.default.weight`.

    Source: Hu et al. 2021, "LoRA", arXiv 2106.09685.

    >>> base = nn.Linear(4, 3)
    >>> x = torch.randn(2, 4)
    >>> torch.equal(LowRank(base, 2)(x), base(x))
    True
    """

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        check_integer("LowRank", "rank", rank)
        check_number("LowRank", "alpha", alpha, above=0.0)
        like = {"device": base.weight.device, "dtype": base.weight.dtype, "bias": False}
        self.base_layer = base
        self.lora_A = nn.ModuleDict({ADAPTER: nn.Linear(base.in_features, rank, **like)})
        self.lora_B = nn.ModuleDict({ADAPTER: nn.Linear(rank, base.out_features, **like)})
        self.scaling = alpha / rank
        one, other = self.matrices()
        nn.init.kaiming_uniform_(one, a=math.sqrt(5))
        nn.init.zeros_(other)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        one, other = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        assert isinstance(one, nn.Linear)
        assert isinstance(other, nn.Linear)
        return one.weight, other.weight

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """The base's output and the correction."""
        return self.base_layer(x) + self.scaling * self.lora_B[ADAPTER](self.lora_A[ADAPTER](x))

    def merged(self) -> nn.Linear:
        """The base with the correction added to its weight; the sum is formed in float64."""
        base = self.base_layer
        one, other = self.matrices()
        with torch.no_grad():
            change = self.scaling * (other.double() @ one.double())
            base.weight.copy_(base.weight.double() + change)
        return base


def add_lora(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, targets: Collection[str] = TARGETS
) -> list[str]:
    """Gives every linear layer of these names a `LowRank`, freezes all that was there, and says
    which layers, by name. What else is to be trained is set free by `adaptable`.

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)})
    >>> add_lora(model, rank=2)
    ['q_proj']
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['q_proj.lora_A.default.weight', 'q_proj.lora_B.default.weight']
    """
    found = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    ]  # fmt: skip
    if not found:
        accepted = f"one with linear layers named {', '.join(targets)}"
        raise reject("add_lora", "model", accepted, words(type(model).__name__))
    model.requires_grad_(False)
    made: dict[int, LowRank] = {}  # a layer that stands in two places has one correction
    for name in found:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        low_rank = made.setdefault(id(base), LowRank(base, rank, alpha))
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, low_rank)
    return found


def merge_lora(model: nn.Module) -> list[str]:
    """Puts merged linear layers in the place of every `LowRank`, and says which, by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LowRank)}
    for name, module in found.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module.merged())
    return list(found)
