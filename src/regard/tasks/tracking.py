"""State tracking: where is everything after these instructions?

The state is a permutation that every token changes. A constant number of layers of attention
cannot follow it to any length; a recurrence whose updates may reflect can (for parity a factor
of -1 is enough, for the larger groups it takes more). Permutation tracking is an experiment of
Local Linear Attention (arXiv 2510.01450), whose generator is not public: these laws are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.core.checks import check_choice, check_flag, check_integer
from regard.tasks.task import Sample, answers, check_draw, cross_entropy

Group = Literal["Z2", "S3", "A5", "S5"]


class _Tracking:
    """What the tasks of this file share: one label per step, out of `classes`."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of logits [B, T, classes] over all steps."""
        return cross_entropy(f"{type(self).__name__}.loss", prediction, target)

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Shares of steps and of whole sequences that are right.

        `prediction` is logits [B, T, classes] or classes [B, T].
        """
        right = answers(f"{type(self).__name__}.metrics", prediction, target) == target
        return {
            "accuracy": float(right.double().mean()),
            "accuracy/sequence": float(right.all(1).double().mean()),
        }

    def accuracy_by_step(self, prediction: Tensor, target: Tensor) -> Float[Tensor, " t"]:
        """The share of right answers at every step: where a model stops keeping track."""
        name = f"{type(self).__name__}.accuracy_by_step"
        return (answers(name, prediction, target) == target).double().mean(0)


@dataclass(frozen=True)
class SwapTracking(_Tracking):
    """Cups and balls: `length` random swaps of `items`; what lies at a position after each?

    The state starts as item p at position p. A token stands for an unordered pair of positions
    (i, j), i < j, in the order (0, 1), (0, 2), ..., (1, 2), ...; the items there change places.
    The answer after every swap is the item at position 0. With `queried`, a token also names the
    position that is asked for: token = pair * items + position.

    >>> task = SwapTracking(items=3, length=4)
    >>> task.pairs, task.vocabulary, task.classes
    (((0, 1), (0, 2), (1, 2)), 3, 3)
    >>> task.follow(torch.tensor([[0, 1, 2, 0]])).tolist()  # 012 -> 102 -> 201 -> 210 -> 120
    [[1, 2, 2, 1]]
    """

    items: int
    length: int
    queried: bool = False

    def __post_init__(self) -> None:
        check_integer("SwapTracking", "items", self.items, least=2)
        check_integer("SwapTracking", "length", self.length)
        check_flag("SwapTracking", "queried", self.queried)

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The positions that each instruction exchanges."""
        return tuple(combinations(range(self.items), 2))

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return len(self.pairs) * (self.items if self.queried else 1)

    @property
    def classes(self) -> int:
        """Number of different answers."""
        return self.items

    def sample(self, batch: int, generator: torch.Generator) -> Sample:
        """Uniform tokens [batch, length] and the answer at every step, int64."""
        check_draw("SwapTracking.sample", batch, generator)
        tokens = torch.randint(
            self.vocabulary, (batch, self.length), generator=generator, device=generator.device
        )
        return Sample((tokens,), self.follow(tokens))

    def follow(self, tokens: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        """The answer after every token."""
        instruction, asked = tokens, torch.zeros_like(tokens)
        if self.queried:
            instruction, asked = tokens // self.items, tokens % self.items
        exchanged = torch.arange(self.items, device=tokens.device).repeat(len(self.pairs), 1)
        for row, (i, j) in enumerate(self.pairs):
            exchanged[row, i], exchanged[row, j] = j, i
        state = torch.arange(self.items, device=tokens.device).expand(len(tokens), -1)
        found = torch.empty_like(tokens)
        for t in range(tokens.shape[1]):
            state = state.gather(1, exchanged[instruction[:, t]])
            found[:, t] = state.gather(1, asked[:, t, None])[:, 0]
        return found


@dataclass(frozen=True)
class GroupWord(_Tracking):
    """The word problem of a group: the product g_1 g_2 ... g_t after every token.

    Elements are permutations in lexicographic order, the identity first: all of 3 things (S3, 6
    of them), of 5 (S5, 120), the even ones of 5 (A5, 60), and of 2, which is parity (Z2: tokens
    0 and 1, running exclusive or). Words are read from left to right: g_1 acts first, so that
    the product after t is out[x] = g_t[before[x]].

    >>> task = GroupWord("Z2", length=5)
    >>> task.follow(torch.tensor([[1, 0, 1, 1, 1]])).tolist()
    [[1, 1, 0, 1, 0]]
    """

    group: Group
    length: int

    def __post_init__(self) -> None:
        check_choice("GroupWord", "group", self.group, get_args(Group))
        check_integer("GroupWord", "length", self.length)

    @cached_property
    def elements(self) -> tuple[tuple[int, ...], ...]:
        """The permutations that tokens and answers stand for."""
        things = permutations(range(int(self.group[1])))
        return tuple(g for g in things if self.group[0] != "A" or _is_even(g))

    @property
    def vocabulary(self) -> int:
        """Number of different tokens: the order of the group."""
        return len(self.elements)

    @property
    def classes(self) -> int:
        """Number of different answers: the order of the group."""
        return len(self.elements)

    @cached_property
    def table(self) -> Int[Tensor, "classes vocabulary"]:
        """The product of `before` (row) and the next token (column)."""
        number = {g: i for i, g in enumerate(self.elements)}
        rows = [
            [number[tuple(g[x] for x in before)] for g in self.elements] for before in self.elements
        ]
        return torch.tensor(rows)

    def sample(self, batch: int, generator: torch.Generator) -> Sample:
        """Uniform elements [batch, length] and their running product, int64."""
        check_draw("GroupWord.sample", batch, generator)
        tokens = torch.randint(
            self.vocabulary, (batch, self.length), generator=generator, device=generator.device
        )
        return Sample((tokens,), self.follow(tokens))

    def follow(self, tokens: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        """The product up to every token."""
        table = self.table.to(tokens.device)
        product, found = torch.zeros_like(tokens[:, 0]), torch.empty_like(tokens)
        for t in range(tokens.shape[1]):
            product = table[product, tokens[:, t]]
            found[:, t] = product
        return found


def _is_even(permutation: tuple[int, ...]) -> bool:
    inversions = sum(a > b for a, b in combinations(permutation, 2))
    return inversions % 2 == 0
