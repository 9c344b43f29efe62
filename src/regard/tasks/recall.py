"""Multi-query associative recall: which value came with this key?

A context of key-value pairs is followed by the keys again, at random places; the answer at a
key is the token that followed it in the context. The generator is that of zoology (Arora,
Eyuboglu et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv
2312.04927; Apache-2.0), vectorised; `official_draws` gives the very arrays that its code makes
from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.core.checks import check_flag, check_integer, check_number, reject
from regard.tasks.task import IGNORED, Sample, answers, check_draw, cross_entropy


@dataclass(frozen=True)
class MQAR:
    """Sequences of `length` tokens with `pairs` key-value pairs and as many queries.

        context   k_1 v_1 k_2 v_2 ... k_K v_K, written `passes` times
        queries   key i again at position 2 K passes + 2 slot_i, its label v_i
        P(slot = s) ~ power s^(power - 1), s = 1 .. (length - 2 K passes) / 2

    Keys are K different tokens of 1 .. V/2 - 1, values K different ones of V/2 .. V - 1, slots
    K different ones: small `power` puts queries early, 1 is uniform. All other labels are
    -100. The token after a query is not its value: positions without a query hold 0, or with
    `random_filling` a random token of 0 .. V - 1, which may happen to be a key.

    Sizes of the paper's Figure 2: vocabulary 8192, (length, pairs) of (64, 4), (128, 8),
    (256, 16) and (512, 64), without random filling.

    >>> task = MQAR(vocabulary=32, length=16, pairs=2)
    >>> (tokens,), labels = task.sample(3, torch.Generator().manual_seed(0))
    >>> tokens.shape, (labels >= 0).sum(1).tolist()
    (torch.Size([3, 16]), [2, 2, 2])
    """

    vocabulary: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    passes: int = 1
    random_filling: bool = False

    def __post_init__(self) -> None:
        for name in ("vocabulary", "length", "pairs", "passes"):
            check_integer("MQAR", name, getattr(self, name))
        check_number("MQAR", "power", self.power, above=0.0)
        check_flag("MQAR", "random_filling", self.random_filling)
        needed = 2 * self.pairs * (self.passes + 1)
        if self.length % 2 or self.length < needed:
            accepted = f"an even number of at least 2 pairs (passes + 1) = {needed}"
            raise reject("MQAR", "length", accepted, self.length)
        if self.vocabulary <= self.length:
            raise reject("MQAR", "vocabulary", f"above length {self.length}", self.vocabulary)

    @property
    def context(self) -> int:
        """Tokens before the first place of a query."""
        return 2 * self.pairs * self.passes

    def slot_probabilities(self) -> Float[Tensor, " slots"]:
        """How likely each place is for the first query that is placed, in float64."""
        places = torch.arange(1, (self.length - self.context) // 2 + 1, dtype=torch.float64)
        weights = self.power * places ** (self.power - 1)
        return weights / weights.sum()

    def sample(self, batch: int, generator: torch.Generator) -> Sample:
        """Tokens and labels [batch, length], int64, on the generator's device.

        Only `generator` is drawn from, in the order keys, values, slots, filling. Slots are
        drawn one after another without replacement, as the authors' code does: the K smallest
        of independent exponential times at these rates have that law.
        """
        check_draw("MQAR.sample", batch, generator)
        device, half = generator.device, self.vocabulary // 2
        keys = 1 + distinct(batch, self.pairs, half - 1, generator)
        values = half + distinct(batch, self.pairs, self.vocabulary - half, generator)
        rates = self.slot_probabilities().to(device)
        times = torch.ones(batch, len(rates), dtype=torch.float64, device=device)
        times = times.exponential_(generator=generator) / rates
        slots = times.topk(self.pairs, largest=False).indices
        tokens, labels = self._lay_out(keys, values, slots)
        if self.random_filling:
            tokens = self._fill(tokens, generator)
        return Sample((tokens,), labels)

    def _lay_out(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        tokens = keys.new_zeros(len(keys), self.length)
        labels = keys.new_full((len(keys), self.length), IGNORED)
        written = torch.stack([keys, values], 2).flatten(1).repeat(1, self.passes)
        tokens[:, : self.context] = written
        places = self.context + 2 * slots
        return tokens.scatter_(1, places, keys), labels.scatter_(1, places, values)

    def _fill(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        filling = torch.randint(
            self.vocabulary, tokens.shape, generator=generator, device=tokens.device
        )
        return torch.where(tokens == 0, filling, tokens)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of logits [B, n, V] at the queries."""
        return cross_entropy("MQAR.loss", prediction, target)

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Share of queries that are answered, in all and by the number of pairs in a row.

        `prediction` is logits [B, n, V] or tokens [B, n]. Rows with different numbers of pairs
        may be mixed, whatever `self.pairs` is: a row has as many as it has labels.

        >>> target = torch.tensor([[-100, 7, -100, -100], [-100, 7, 8, -100]])
        >>> MQAR().metrics(torch.tensor([[0, 7, 0, 0], [0, 0, 8, 0]]), target)
        {'accuracy': 0.6666666666666666, 'accuracy/pairs=1': 1.0, 'accuracy/pairs=2': 0.5}
        """
        asked = target != IGNORED
        right = (answers("MQAR.metrics", prediction, target) == target) & asked
        asked, right = asked.sum(1), right.sum(1)
        found = {"accuracy": _share(right, asked)}
        for pairs in asked.unique().tolist():
            rows = asked == pairs
            if pairs:
                found[f"accuracy/pairs={pairs}"] = _share(right[rows], asked[rows])
        return found


def _share(right: Tensor, asked: Tensor) -> float:
    return float(right.sum()) / float(asked.sum()) if bool(asked.any()) else float("nan")


def distinct(
    rows: int, count: int, population: int, generator: torch.Generator
) -> Int[Tensor, "rows count"]:
    """`count` different numbers of 0 .. population - 1 in random order, in every row.

    Floyd's algorithm, one column after another, so the cost is that of count^2 / 2 comparisons
    per row and not of shuffling the population; a shuffle of the row makes the order uniform.

    >>> distinct(2, 3, 3, torch.Generator().manual_seed(0)).sort().values.tolist()
    [[0, 1, 2], [0, 1, 2]]
    """
    if count > population:
        raise reject("distinct", "count", f"at most the population {population}", count)
    device = generator.device
    chosen = torch.zeros(rows, count, dtype=torch.int64, device=device)
    for i, last in enumerate(range(population - count, population)):
        drawn = torch.randint(last + 1, (rows,), generator=generator, device=device)
        taken = (chosen[:, :i] == drawn[:, None]).any(1)
        chosen[:, i] = torch.where(taken, last, drawn)
    order = torch.rand(rows, count, dtype=torch.float64, generator=generator, device=device)
    return chosen.gather(1, order.argsort(1))


def official_draws(task: MQAR, examples: int, seed: int, *, filling_seed: int = 0) -> Sample:
    """The arrays that zoology's `multiquery_ar` makes from `seed`, number by number.

    Its draws are numpy's legacy ones, row by row: all keys, then all values, then all slots. A
    `RandomState` of this call's own stands in for numpy's global one, which it leaves alone.
    The random filling comes from torch's global generator there, which `seed` does not set:
    `filling_seed` is what `torch.manual_seed` was called with just before.

    One pass only: with more, the authors' code stops at an error. Far slower than `MQAR.sample`,
    as it shuffles half the vocabulary in every row.

    >>> task = MQAR(vocabulary=128, pairs=8, length=64)
    >>> official_draws(task, examples=16, seed=0).inputs[0][0, :6].tolist()
    [44, 64, 50, 87, 63, 110]
    """
    if task.passes != 1:
        raise reject("official_draws", "task", "of one pass", task)
    check_integer("official_draws", "examples", examples)
    random = np.random.RandomState(seed)
    half = task.vocabulary // 2
    weights = task.power * np.arange(1, (task.length - task.context) // 2 + 1) ** (task.power - 1)
    law = weights / weights.sum()

    def draw(population: np.ndarray, p: np.ndarray | None = None) -> Tensor:
        rows = [
            random.choice(population, size=task.pairs, replace=False, p=p) for _ in range(examples)
        ]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    keys = draw(np.arange(1, half))
    values = draw(np.arange(half, task.vocabulary))
    slots = draw(np.arange(len(law)), law)
    tokens, labels = task._lay_out(keys, values, slots)
    if task.random_filling:
        tokens = task._fill(tokens, torch.Generator().manual_seed(filling_seed))
    return Sample((tokens,), labels)
