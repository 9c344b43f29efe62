"""State tracking against a simulation that moves things one by one."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch

from regard.tasks import GroupWord, SwapTracking, Task

GROUPS = {"Z2": 2, "S3": 6, "A5": 60, "S5": 120}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("queried", [False, True])
@pytest.mark.parametrize("items", [2, 3, 5, 8])
def test_swaps_are_followed(items, queried):
    task = SwapTracking(items, 16, queried)
    (tokens,), target = task.sample(20, generator())
    pairs = list(combinations(range(items), 2))
    assert task.vocabulary == len(pairs) * (items if queried else 1)
    assert (tokens.shape, tokens.dtype, target.dtype) == ((20, 16), torch.int64, torch.int64)
    for row, answers in zip(tokens.tolist(), target.tolist(), strict=True):
        cups = list(range(items))
        for token, answer in zip(row, answers, strict=True):
            assert 0 <= token < task.vocabulary
            number, asked = divmod(token, items) if queried else (token, 0)
            i, j = pairs[number]
            cups[i], cups[j] = cups[j], cups[i]
            assert answer == cups[asked]


@pytest.mark.parametrize("group", GROUPS)
def test_words_are_multiplied_from_left_to_right(group):
    task = GroupWord(group, 12)
    (tokens,), target = task.sample(20, generator())
    assert task.vocabulary == task.classes == len(task.elements) == GROUPS[group]
    degree = len(task.elements[0])
    assert task.elements[0] == tuple(range(degree))
    for row, answers in zip(tokens.tolist(), target.tolist(), strict=True):
        places = list(range(degree))  # where each thing is; g moves the one at x to g[x]
        for token, answer in zip(row, answers, strict=True):
            places = [task.elements[token][x] for x in places]
            assert task.elements[answer] == tuple(places)


@pytest.mark.parametrize("group", GROUPS)
def test_tables_are_those_of_groups(group):
    table = GroupWord(group, 1).table
    n = len(table)
    every = torch.arange(n)
    assert torch.equal(table[0], every)  # the identity on either side
    assert torch.equal(table[:, 0], every)
    assert torch.equal(table.sort(0).values, every[:, None].expand(n, n))  # a Latin square
    assert torch.equal(table.sort(1).values, every[None].expand(n, n))
    a, b, c = torch.randint(n, (3, 500), generator=generator())
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert bool((table == table.T).all()) == (group == "Z2")


def test_parity_is_the_running_exclusive_or():
    (tokens,), target = GroupWord("Z2", 30).sample(10, generator())
    assert torch.equal(target, tokens.cumsum(1) % 2)


def test_elements_are_in_lexicographic_order():
    assert GroupWord("S3", 1).elements == tuple(permutations(range(3)))
    even = GroupWord("A5", 1).elements
    assert list(even) == sorted(even)
    assert (1, 2, 0, 3, 4) in even  # a cycle of three is even, an exchange is not
    assert (1, 0, 2, 3, 4) not in even


def test_tokens_are_uniform_and_decided_by_the_generator():
    for task in (GroupWord("S3", 40), SwapTracking(4, 40)):
        before = torch.get_rng_state()
        (tokens,), target = task.sample(500, generator(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(target, task.sample(500, generator(2)).target)
        share = torch.bincount(tokens.flatten(), minlength=6).double() / tokens.numel()
        assert (share - 1 / 6).abs().max() < 0.01  # 4 standard deviations


def test_metrics_and_loss():
    task = SwapTracking(3, 4)
    target = torch.tensor([[0, 1, 2, 0], [1, 1, 1, 1]])
    said = torch.tensor([[0, 1, 2, 0], [1, 1, 2, 0]])
    assert task.metrics(said, target) == {"accuracy": 0.75, "accuracy/sequence": 0.5}
    assert task.accuracy_by_step(said, target).tolist() == [1.0, 1.0, 0.5, 0.5]
    logits = torch.nn.functional.one_hot(said, 3).double()
    assert task.metrics(logits, target) == task.metrics(said, target)
    by_hand = -logits.log_softmax(-1).gather(2, target[..., None]).mean()
    assert torch.allclose(task.loss(logits, target), by_hand)
    assert isinstance(task, Task)
    assert isinstance(GroupWord("S3", 2), Task)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="SwapTracking: items must be an int of at least 2, got 1"):
        SwapTracking(1, 4)
    with pytest.raises(ValueError, match="GroupWord: group must be one of 'Z2', 'S3', 'A5', 'S5'"):
        GroupWord("S4", 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="queried must be True or False"):
        SwapTracking(3, 4, queried=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"GroupWord.metrics: prediction must be logits \[1, 2, "):
        GroupWord("S3", 2).metrics(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64))
