"""Multi-query associative recall: the invariants of the task, its laws, the authors' arrays."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regard.tasks import MQAR, Sample, Task, official_draws
from regard.tasks.recall import distinct

GOLDEN = Path(__file__).parents[1] / "golden" / "regression_tasks"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_invariants(task: MQAR, sample: Sample) -> None:
    """The promises of the docstring, row by row, without the generator's own arithmetic."""
    (tokens,), labels = sample
    assert tokens.dtype == labels.dtype == torch.int64
    half, written = task.vocabulary // 2, 2 * task.pairs
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        context, later = row[: task.context], row[task.context :]
        assert context == context[:written] * task.passes
        keys, values = context[0:written:2], context[1:written:2]
        assert len(set(keys)) == len(set(values)) == task.pairs
        assert all(0 < key < half for key in keys)
        assert all(half <= value < task.vocabulary for value in values)
        value_of = dict(zip(keys, values, strict=True))
        queries = {t: token for t, token in enumerate(row) if label[t] != -100}
        assert sorted(queries.values()) == sorted(keys)
        assert all(t >= task.context and t % 2 == 0 for t in queries)
        assert all(label[t] == value_of[key] for t, key in queries.items())
        if not task.random_filling:
            filling = [x for t, x in enumerate(later, task.context) if t not in queries]
            assert set(filling) <= {0}


@pytest.mark.parametrize(
    "task",
    [
        MQAR(128, 64, 8),
        MQAR(129, 64, 16, power=1.0),
        MQAR(256, 64, 4, random_filling=True),
        MQAR(9, 8, 2),  # as many values as there can be, every slot taken
        MQAR(64, 36, 4, passes=3),
    ],
    ids=lambda task: f"{task.vocabulary}-{task.length}-{task.pairs}",
)
def test_a_sample_keeps_its_promises(task):
    check_invariants(task, task.sample(50, generator()))


@pytest.mark.parametrize("name", ["mqar_official", "mqar_official_random"])
def test_official_draws_are_those_of_the_authors_code(name):
    arguments = json.loads((GOLDEN / f"{name}.json").read_text())["args"]
    data = load_file(GOLDEN / f"{name}.safetensors")
    task = MQAR(
        arguments["vocab_size"],
        arguments["input_seq_len"],
        arguments["num_kv_pairs"],
        random_filling=arguments["random_non_queries"],
    )
    np.random.seed(7)
    torch.manual_seed(7)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    sample = official_draws(
        task, arguments["num_examples"], arguments["seed"], filling_seed=arguments["torch_seed"]
    )
    assert torch.equal(sample.inputs[0], data["out.inputs"])
    assert torch.equal(sample.target, data["out.labels"])
    assert (np.random.get_state()[1] == before[0]).all()  # global generators are left alone
    assert torch.equal(torch.get_rng_state(), before[1])
    check_invariants(task, sample)


def test_a_random_state_is_numpys_global_generator():
    own = np.random.RandomState(3)
    np.random.seed(3)
    law = np.array([0.5, 0.3, 0.1, 0.1])
    for _ in range(20):
        assert (own.choice(9, 4, replace=False) == np.random.choice(9, 4, replace=False)).all()
        ours, theirs = (r.choice(4, 2, replace=False, p=law) for r in (own, np.random))
        assert (ours == theirs).all()


def test_only_the_generator_decides():
    task = MQAR(128, 64, 8, random_filling=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (task.sample(4, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.inputs[0], two.inputs[0])
    assert torch.equal(one.target, two.target)
    assert not torch.equal(one.inputs[0], other.inputs[0])


def chi_square(counts: Counter, expected: dict) -> float:
    assert set(counts) <= set(expected)
    return sum((counts[key] - n) ** 2 / n for key, n in expected.items())


def test_draws_of_different_numbers_are_uniform_in_every_order():
    rows = 12_000
    drawn = distinct(rows, 3, 4, generator())
    counts = Counter(map(tuple, drawn.tolist()))
    expected = {order: rows / 24 for order in permutations(range(4), 3)}
    assert chi_square(counts, expected) < 50  # 23 degrees of freedom: 1 in 1000 is above 49.7


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_slots_follow_the_power_law_one_after_another(power):
    task = MQAR(64, 16, 2, power=power)  # six slots
    rows = 20_000
    (tokens,), labels = task.sample(rows, generator(1))
    slot = {}
    for i in (0, 1):  # where the i-th pair of the context is asked for
        at = (tokens[:, task.context :] == tokens[:, 2 * i, None]).double().argmax(1)
        slot[i] = (at // 2).tolist()
    weights = [power * s ** (power - 1) for s in range(1, 7)]
    law = torch.tensor(weights) / sum(weights)
    assert torch.allclose(task.slot_probabilities(), law.double())
    expected = {
        (a, b): rows * float(law[a] * law[b] / (1 - law[a])) for a, b in permutations(range(6), 2)
    }
    counts = Counter(zip(slot[0], slot[1], strict=True))
    assert chi_square(counts, expected) < 59  # 29 degrees of freedom: 1 in 1000 is above 58.3
    assert (labels >= 0).sum().item() == 2 * rows


def test_metrics_by_the_number_of_pairs():
    few, many = MQAR(64, 32, 2), MQAR(64, 32, 6)
    target = torch.cat([task.sample(10, generator()).target for task in (few, many)])
    prediction = target.clamp(min=0)
    wrong = (target != -100).nonzero()[:5]  # five of the twenty answers of rows with two pairs
    prediction[wrong[:, 0], wrong[:, 1]] = 0
    found = few.metrics(prediction, target)
    assert found == {
        "accuracy": 75 / 80,
        "accuracy/pairs=2": 15 / 20,
        "accuracy/pairs=6": 1.0,
    }
    logits = torch.nn.functional.one_hot(prediction, 64).double()
    assert few.metrics(logits, target) == found
    assert math.isnan(few.metrics(logits[:0], target[:0])["accuracy"])


def test_loss_counts_queries_only():
    task = MQAR(64, 32, 4)
    _, target = task.sample(3, generator())
    logits = torch.randn(3, 32, 64, generator=generator(), requires_grad=True)
    loss = task.loss(logits, target)
    rows, places = (target != -100).nonzero(as_tuple=True)
    by_hand = -logits.log_softmax(-1)[rows, places, target[rows, places]].mean()
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient.abs().sum(-1) > 0).nonzero().tolist() == (target != -100).nonzero().tolist()


def test_it_is_fast_enough_to_make_fresh_data_for_every_step():
    start = time.process_time()
    MQAR(vocabulary=8192, length=64, pairs=16).sample(20_000, generator())
    assert time.process_time() - start < 1.0  # about .05 s, whatever the vocabulary


def test_it_is_a_task():
    assert isinstance(MQAR(), Task)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": 0}, "pairs must be an int of at least 1"),
        ({"length": 63}, "length must be an even number of at least 2 pairs"),
        ({"length": 30, "pairs": 8}, r"at least 2 pairs \(passes \+ 1\) = 32, got 30"),
        ({"vocabulary": 64}, "vocabulary must be above length 64"),
        ({"power": 0.0}, "power must be a finite number above 0"),
        ({"random_filling": 1}, "random_filling must be True or False"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises((ValueError, TypeError), match=f"MQAR: .*{words}|{words}"):
        MQAR(**changes)


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="official_draws: task must be of one pass"):
        official_draws(MQAR(passes=2), 1, 0)
    target = torch.zeros(2, 64, dtype=torch.int64)
    bad: Tensor = torch.zeros(2, 63, 8)
    for judge in (MQAR().loss, MQAR().metrics):
        with pytest.raises(ValueError, match=r"prediction must be logits \[2, 64, classes\]"):
            judge(bad, target)
