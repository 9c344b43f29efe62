"""The training loop: the same bits again, after a stop too, and what it refuses."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from regard.recipes import History, Optimiser, checkpoints, evaluate, train_small
from regard.tasks import GroupWord, Sample

TASK = GroupWord("S3", 6)


class Small(nn.Module):
    """A recurrent network with dropout, so that torch's global generator matters too."""

    def __init__(self, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(TASK.vocabulary, width)
            self.memory = nn.GRU(width, width, batch_first=True)
            self.drop = nn.Dropout(0.1)
            self.out = nn.Linear(width, TASK.classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.drop(self.memory(self.embed(tokens))[0]))


def train(model: nn.Module, steps: int, **options) -> History:
    options = {"record_every": 5, "batch_size": 8, "optimiser": Optimiser(1e-2)} | options
    return train_small(model, options.pop("task", TASK), steps, **options)


def same(one: nn.Module, two: nn.Module) -> bool:
    two_state = two.state_dict()
    return all(torch.equal(value, two_state[name]) for name, value in one.state_dict().items())


def test_it_learns():
    model = Small()
    before = evaluate(model, TASK)
    history = train(model, 150, batch_size=32)
    after = evaluate(model, TASK)
    assert before["accuracy"] < 0.25
    assert after["accuracy"] > 0.5
    assert after["loss"] < 0.75 * before["loss"]
    assert history.steps == 150
    assert sum(history.losses[-20:]) < 0.8 * sum(history.losses[:20])
    assert [step for step, _ in history.curve("accuracy")] == list(range(5, 151, 5))


def test_the_same_call_gives_the_same_bits_and_leaves_global_generators_alone():
    one, two, other = Small(), Small(), Small()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = train(one, 12, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert train(two, 12, seed=3) == first
    assert same(one, two)
    assert train(other, 12, seed=4) != first


def test_a_step_is_adam_on_the_cut_gradient():
    ours, theirs = Small(), Small()
    ours.drop.p = theirs.drop.p = 0.0
    settings = Optimiser(0.1, weight_decay=0.3, betas=(0.8, 0.9), clip=0.05, warmup=2)
    history = train(ours, 3, optimiser=settings, seed=5, record_every=1)
    adam = torch.optim.AdamW(theirs.parameters(), betas=(0.8, 0.9), weight_decay=0.3)
    data = torch.Generator().manual_seed(5)
    for step, rate in enumerate((0.05, 0.1, 0.1)):
        (tokens,), target = TASK.sample(8, data)
        prediction = theirs(tokens)
        loss = nn.functional.cross_entropy(prediction.flatten(0, 1), target.flatten())
        adam.zero_grad()
        loss.backward()
        assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.05) > 0.05
        adam.param_groups[0]["lr"] = rate
        adam.step()
        assert history.losses[step] == loss.item()
        right = (prediction.argmax(-1) == target).double().mean()
        assert history.records[step].metrics["accuracy"] == right  # before the update
    assert same(ours, theirs)


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(tmp_path: Path):
    straight, first, second = Small(), Small(), Small(seed=9)
    whole = train(straight, 20)
    path = tmp_path / "run.pt"
    train(first, 12, checkpoint=path)
    history = train(second, 20, checkpoint=path)  # its own initial values do not matter
    assert history == whole
    assert same(second, straight)
    third = Small(seed=8)
    assert train(third, 20, checkpoint=path) == whole  # nothing left to do: the finished model
    assert same(third, straight)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_checkpoints_come_every_so_often(tmp_path: Path):
    path, seen = tmp_path / "run.pt", []

    def look(model: nn.Module, history: History) -> None:
        steps = len(checkpoints.read(path)["losses"]) if path.exists() else 0
        seen.append((history.steps, steps))

    train(Small(), 9, checkpoint=path, checkpoint_every=4, record_every=3, callbacks=[look])
    assert seen == [(3, 0), (6, 4), (9, 8)]
    assert len(checkpoints.read(path)["losses"]) == 9


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt here, as it does at a prompt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_a_checkpoint_of_the_complete_step(tmp_path: Path, ctrl_c):
    path, straight = tmp_path / "run.pt", Small()
    whole = train(straight, 15)

    class Interrupted(Small):
        calls = 0

        def forward(self, tokens: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 7:
                ctrl_c()
            return super().forward(tokens)

    model = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        train(model, 15, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    kept = checkpoints.read(path)
    assert kept["losses"] == whole.losses[:7]
    assert all(torch.equal(kept["model"][n], v) for n, v in model.state_dict().items())
    resumed = Small(seed=2)
    assert train(resumed, 15, checkpoint=path) == whole
    assert same(resumed, straight)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, ctrl_c):
    path = tmp_path / "run.pt"

    class Impatient(Small):
        calls = 0

        def forward(self, tokens: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 7:
                ctrl_c()
                ctrl_c()
            return super().forward(tokens)

    model = Impatient()
    with pytest.raises(KeyboardInterrupt):
        train(model, 15, checkpoint=path, checkpoint_every=5)
    assert len(checkpoints.read(path)["losses"]) == 5
    assert model.calls == 7


def test_another_handler_of_ctrl_c_is_left_alone(ctrl_c):
    def own(number, frame):
        raise AssertionError

    signal.signal(signal.SIGINT, own)
    train(Small(), 2, record_every=1, callbacks=[lambda m, h: _expect_handler(own)])
    assert signal.getsignal(signal.SIGINT) is own


def _expect_handler(own) -> None:
    assert signal.getsignal(signal.SIGINT) is own


def test_a_callback_may_end_it(tmp_path: Path):
    path = tmp_path / "run.pt"
    told = []

    def enough(model: nn.Module, history: History) -> bool:
        told.append(history.records[-1].step)
        return history.steps >= 4

    history = train(Small(), 50, record_every=2, callbacks=[enough], checkpoint=path)
    assert told == [2, 4]
    assert history.steps == len(checkpoints.read(path)["losses"]) == 4


def test_modes_are_put_back():
    model = Small().eval()
    model.memory.train()
    modes = [module.training for module in model.modules()]
    seen = []
    train(model, 2, record_every=1, callbacks=[lambda m, h: seen.append(m.drop.training)])
    assert seen == [True, True]
    assert [module.training for module in model.modules()] == modes
    one, two = evaluate(model, TASK, batches=2), evaluate(model, TASK, batches=2)
    assert one == two
    assert [module.training for module in model.modules()] == modes
    assert one != evaluate(model, TASK, batches=2, seed=2)
    assert model.embed.weight.requires_grad


def test_evaluate_is_the_metric_of_all_batches_together():
    model = Small().eval()
    data = torch.Generator().manual_seed(7)
    samples = [TASK.sample(16, data) for _ in range(3)]
    target = torch.cat([s.target for s in samples])
    prediction = model(torch.cat([s.inputs[0] for s in samples])).detach()
    found = evaluate(model, TASK, batches=3, batch_size=16, seed=7)
    assert found["loss"] == pytest.approx(float(TASK.loss(prediction, target)), rel=1e-5)
    for name, value in TASK.metrics(prediction, target).items():
        assert found[name] == pytest.approx(value)


@dataclass(frozen=True)
class Broken:
    """A task whose loss becomes NaN, or whose gradient becomes infinite, at one step."""

    kind: str

    def sample(self, batch: int, generator: torch.Generator) -> Sample:
        return Sample((torch.rand(batch, 1, generator=generator),), torch.zeros(batch, 1))

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.kind == "loss":
            return prediction.sum() * math.nan
        return (prediction.sum() * 0).sqrt()  # 0, with a gradient of 0 times infinity

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_stops_it_before_the_update(kind):
    model = nn.Linear(1, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=f"train_small: the {kind} is nan at step 1"):
        train(model, 3, task=Broken(kind))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rates():
    cosine = Optimiser(2.0, schedule="cosine")
    assert [cosine.rate(s, 4) for s in (2, 4)] == [pytest.approx(1.0), 0.0]
    assert Optimiser(2.0, warmup=4).rate(1, 100) == 0.5
    assert Optimiser(2.0).rate(77, 100) == 2.0


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    path = tmp_path / "run.pt"
    train(Small(), 3, checkpoint=path)
    for changes, words in (
        ({"seed": 1}, "checkpoint must be of a run with seed 1, got a checkpoint made with 0"),
        ({"batch_size": 9}, "of a run with batch_size 9"),
        ({"task": GroupWord("S3", 7)}, r"of a run with task \"GroupWord\(group='S3', length=7"),
        ({"optimiser": Optimiser(2e-2)}, "of a run with optimiser"),
    ):
        with pytest.raises(ValueError, match=words):
            train(Small(), 4, checkpoint=path, **changes)
    with pytest.raises(ValueError, match="steps must be at least the 3 of the checkpoint, got 2"):
        train(Small(), 2, checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint is of another model"):
        train(Small(width=8), 4, checkpoint=path)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"run.pt cannot be read"):
        train(Small(), 1, checkpoint=path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"run.pt must be a regard.checkpoint/1 file"):
        train(Small(), 1, checkpoint=path)
    torch.save(Optimiser(), path)  # loading it would run code
    with pytest.raises(ValueError, match=r"run.pt cannot be read"):
        train(Small(), 1, checkpoint=path)


def test_mistakes_are_named(tmp_path: Path):
    with pytest.raises(TypeError, match="train_small: task must be a task with sample, loss and"):
        train(Small(), 1, task="S3")
    with pytest.raises(TypeError, match="train_small: model must be a torch.nn.Module"):
        train("model", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must be a module with parameters to train"):
        train(nn.Identity(), 1)
    with pytest.raises(ValueError, match="checkpoint must be a file in a folder that exists"):
        train(Small(), 1, checkpoint=tmp_path / "none" / "run.pt")
    with pytest.raises(ValueError, match="record_every must be an int of at least 1"):
        train(Small(), 1, record_every=0)
    with pytest.raises(ValueError, match="learning_rate must be a finite number above 0"):
        Optimiser(0.0)
    with pytest.raises(ValueError, match="schedule must be one of 'constant', 'cosine'.*'cosine'"):
        Optimiser(schedule="cosin")  # type: ignore[arg-type]


def test_a_bar_goes_to_standard_error(capfd: pytest.CaptureFixture):
    train(Small(), 4, progress=True, record_every=2)
    out, err = capfd.readouterr()
    assert out == ""
    assert "4/4" in err
    assert "loss" in err
    assert "accuracy" in err
