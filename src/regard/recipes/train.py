"""A training loop for small models on endless fresh data: deterministic and resumable."""

from __future__ import annotations

import math
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.checks import check_integer, reject, words
from regard.recipes import checkpoints
from regard.recipes.optimiser import Optimiser
from regard.tasks.task import Sample, Task


@dataclass(frozen=True)
class Record:
    """Metrics at a step, on that step's training batch before its update: data never seen."""

    step: int
    metrics: dict[str, float]


@dataclass
class History:
    """What happened: the loss of every step, and metrics every `record_every` steps."""

    losses: list[float] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many steps have been made."""
        return len(self.losses)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of one metric, at every record that has it.

        >>> History([1.0, 0.5], [Record(2, {"accuracy": 0.75})]).curve("accuracy")
        [(2, 0.75)]
        """
        return [(r.step, r.metrics[metric]) for r in self.records if metric in r.metrics]


Callback = Callable[[nn.Module, History], bool | None]
"""Called after every record with the model and the history so far; True ends the training."""


def train_small(
    model: nn.Module,
    task: Task,
    steps: int,
    *,
    optimiser: Optimiser | None = None,
    batch_size: int = 32,
    seed: int = 0,
    device: str | torch.device = "cpu",
    record_every: int = 100,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> History:
    """Trains `model` in place on fresh batches of `task` until `steps` steps have been made.

        loss = task.loss(model(*inputs), target),   gradient cut to `optimiser.clip`,   AdamW

    `seed` decides the data, and what the model draws (dropout) from torch's global generators,
    which are put back afterwards. The model's initial values are the caller's. Data are drawn
    on the CPU, so they are the same for every device; on one device and thread count, the same
    call gives the same bits.

    With `checkpoint`, model, optimiser, generators and history are written there every
    `checkpoint_every` steps and at the end, whole or not at all. If the file exists, training
    continues from it as if it had never stopped, bit for bit. Ctrl-C finishes
    the step that is being made, writes the checkpoint and then raises KeyboardInterrupt; a
    second one stops at once, and the checkpoint is the last one written. The file is read by
    torch's loader for weights only, which runs no code from it.

    A callback that answers True ends the training after that step; called again with the same
    checkpoint, the run goes on. `progress` shows a bar on standard error with the current loss.

    Raises:
        ValueError, TypeError: a bad argument; a checkpoint that is none, or of another run.
        FloatingPointError: the loss or the gradient is NaN or infinite; the parameters are as
            they were before that step.

    >>> from regard.tasks import GroupWord
    >>> torch.manual_seed(0) and None
    >>> model = nn.Sequential(nn.Embedding(2, 8), nn.Linear(8, 2))  # no memory, cannot learn it
    >>> history = train_small(model, GroupWord("Z2", length=8), steps=3, record_every=3)
    >>> history.steps, [record.step for record in history.records]
    (3, [3])
    """
    run = _Run(
        model, task, steps, optimiser or Optimiser(), batch_size, seed, torch.device(device),
        record_every, callbacks, None if checkpoint is None else Path(checkpoint),
        checkpoint_every,
    )
    with _own_random_state(run.device), _training(model):
        _seed(seed, run.device)
        run.resume()
        with _bar(steps, progress) as show, _stop_after_step() as asked_to_stop:
            show(run.history)
            for step in range(run.history.steps + 1, steps + 1):
                ended = run.step(step)
                show(run.history)
                last = ended or asked_to_stop() or step == steps
                if run.checkpoint is not None and (last or step % checkpoint_every == 0):
                    run.save()
                if asked_to_stop():
                    raise KeyboardInterrupt
                if ended:
                    break
    return run.history


@dataclass
class _Run:
    """One training run between two steps."""

    model: nn.Module
    task: Task
    steps: int
    optimiser: Optimiser
    batch_size: int
    seed: int
    device: torch.device
    record_every: int
    callbacks: Sequence[Callback]
    checkpoint: Path | None
    checkpoint_every: int

    def __post_init__(self) -> None:
        op = "train_small"
        if not isinstance(self.model, nn.Module):
            raise reject(op, "model", "a torch.nn.Module", self.model, kind=TypeError)
        _check_task(op, self.task)
        check_integer(op, "steps", self.steps, least=0)
        check_integer(op, "seed", self.seed, least=0)
        for name in ("batch_size", "record_every", "checkpoint_every"):
            check_integer(op, name, getattr(self, name))
        if self.checkpoint is not None and not self.checkpoint.parent.is_dir():
            accepted = "a file in a folder that exists"
            raise reject(op, "checkpoint", accepted, str(self.checkpoint))
        self.model.to(self.device)
        self.adam = self.optimiser.build(self.model)
        self.data = torch.Generator().manual_seed(self.seed)
        self.history = History()

    def step(self, number: int) -> bool:
        """One update; True if a callback wants no more."""
        inputs, target = self._batch()
        prediction = self.model(*inputs)
        loss = self.task.loss(prediction, target)
        self.adam.zero_grad(set_to_none=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"train_small: the loss is {value} at step {number}")
        loss.backward()
        trained = [p for group in self.adam.param_groups for p in group["params"]]
        clip = math.inf if self.optimiser.clip is None else self.optimiser.clip
        norm = float(nn.utils.clip_grad_norm_(trained, clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"train_small: the gradient is {norm} at step {number}")
        for group in self.adam.param_groups:
            group["lr"] = self.optimiser.rate(number, self.steps)
        self.adam.step()
        self.history.losses.append(value)
        if number % self.record_every:
            return False
        metrics = self.task.metrics(prediction.detach(), target)
        self.history.records.append(Record(number, metrics))
        wishes = [callback(self.model, self.history) for callback in self.callbacks]
        return any(wish is True for wish in wishes)

    def _batch(self) -> Sample:
        return self.task.sample(self.batch_size, self.data).to(self.device)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        found = {
            "task": repr(self.task) if is_dataclass(self.task) else type(self.task).__qualname__,
            "optimiser": asdict(self.optimiser),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "record_every": self.record_every,
        }
        if self.optimiser.schedule == "cosine":
            found["steps"] = self.steps
        return found

    def save(self) -> None:
        assert self.checkpoint is not None
        checkpoints.write(
            self.checkpoint,
            settings=self.settings,
            model=self.model.state_dict(),
            optimiser=self.adam.state_dict(),
            data=self.data.get_state(),
            random=_random_state(self.device),
            losses=self.history.losses,
            records=[(record.step, record.metrics) for record in self.history.records],
        )

    def resume(self) -> None:
        """Continues from the checkpoint, if there is one."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        found = checkpoints.read(self.checkpoint)
        for name, wanted in self.settings.items():
            if found["settings"].get(name) != wanted:
                came = words(f"a checkpoint made with {found['settings'].get(name)!r}")
                accepted = f"of a run with {name} {wanted!r}"
                raise reject("train_small", "checkpoint", accepted, came)
        if len(found["losses"]) > self.steps:
            accepted = f"at least the {len(found['losses'])} of the checkpoint"
            raise reject("train_small", "steps", accepted, self.steps)
        try:
            self.model.load_state_dict(found["model"])
        except RuntimeError as error:
            raise ValueError(f"train_small: checkpoint is of another model: {error}") from error
        self.adam.load_state_dict(found["optimiser"])
        self.data.set_state(found["data"])
        _set_random_state(found["random"], self.device)
        records = [Record(step, metrics) for step, metrics in found["records"]]
        self.history = History(found["losses"], records)


def evaluate(
    model: nn.Module,
    task: Task,
    *,
    batches: int = 8,
    batch_size: int = 32,
    seed: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Metrics of `model` on `batches` fresh batches, averaged, and their mean "loss".

    The data are decided by `seed`: pass another one than to `train_small`. Every batch counts
    the same, which is the metric of all of them together where batches hold equally many
    answers, as those of `regard.tasks` do. The model is in evaluation mode meanwhile, and
    torch's global generators are left as they were.

    >>> from regard.tasks import GroupWord
    >>> torch.manual_seed(0) and None
    >>> model = nn.Sequential(nn.Embedding(2, 8), nn.Linear(8, 2))
    >>> sorted(evaluate(model, GroupWord("Z2", length=8)))
    ['accuracy', 'accuracy/sequence', 'loss']
    """
    _check_task("evaluate", task)
    check_integer("evaluate", "batches", batches)
    check_integer("evaluate", "batch_size", batch_size)
    check_integer("evaluate", "seed", seed, least=0)
    device = torch.device(device)
    model.to(device)
    data = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = defaultdict(list)
    with _own_random_state(device), _training(model, False), torch.no_grad():
        _seed(seed, device)
        for _ in range(batches):
            inputs, target = task.sample(batch_size, data).to(device)
            prediction = model(*inputs)
            found["loss"].append(float(task.loss(prediction, target)))
            for name, value in task.metrics(prediction, target).items():
                found[name].append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def _check_task(op: str, task: Any) -> None:
    if not isinstance(task, Task):
        accepted = "a task with sample, loss and metrics"
        raise reject(op, "task", accepted, task, kind=TypeError)


@contextmanager
def _training(model: nn.Module, mode: bool = True) -> Iterator[None]:
    """In training or evaluation mode; afterwards every module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.train(mode)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _own_random_state(device: torch.device) -> Any:
    indices = [_index(device)] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=indices)


def _seed(seed: int, device: torch.device) -> None:
    """Of the CPU and this device only: `torch.manual_seed` would set every GPU's."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(_index(device))
    return states


def _set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], _index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@contextmanager
def _stop_after_step() -> Iterator[Callable[[], bool]]:
    """Keeps the first Ctrl-C until the step is complete; the second one is immediate.

    Only where Ctrl-C would raise KeyboardInterrupt: another handler is left alone.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _bar(steps: int, wanted: bool) -> Iterator[Callable[[History], None]]:
    """A progress bar on standard error."""
    if not wanted:
        yield lambda history: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps)

        def show(history: History) -> None:
            words = f"loss {history.losses[-1]:.4g}" if history.losses else "starting"
            if history.records:
                latest = history.records[-1].metrics
                words += "".join(f", {name} {latest[name]:.3g}" for name in list(latest)[:1])
            bar.update(task, completed=history.steps, description=words)

        yield show
