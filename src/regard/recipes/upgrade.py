"""Upgrading: a pretrained softmax model becomes a local linear one, the same function at first.

    upgrade(model, batches)                      ridge and bandwidth of every head, nothing else
    upgrade(model, batches, everything=500)      and then all weights, for so many steps

Softmax attention is local linear attention at an infinite ridge. At a large one the model computes
what it did; its heads then learn how much slope, and how narrow a kernel, they want. How large is
large depends on the model, for a ridge is measured in squared lengths of keys: 1e5 for MiniLM, 1e6
for the decoder of Whisper tiny.en.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.core.checks import check_integer, reject, words
from regard.recipes import checkpoints
from regard.recipes.optimiser import Optimiser
from regard.recipes.train import _bar, _own_random_state, _seed, _stop_after_step

if TYPE_CHECKING:
    from regard.adapt.swapped import Swap

Batches = Sequence[Mapping[str, Any]] | Callable[[torch.Generator], Mapping[str, Any]]
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
PARTS, ALL = "parts", "everything"
SAME = 1e-3  # outputs that differ by less are those of the same function


@dataclass
class Upgrade:
    """What an upgrade did.

    Fields:
        mechanism, layers: what was put where.
        ridge: where every head started, None if no ridge was to be chosen or given.
        losses: of every step. start, end: the loss on `validation` before and after, or None.
        heads: layer -> "ridge" and "scale" (in multiples of the layer's own) -> a number per head.
    """

    mechanism: str
    layers: tuple[str, ...]
    ridge: float | None = None
    losses: list[float] = field(default_factory=list)
    start: float | None = None
    end: float | None = None
    heads: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many steps have been made."""
        return len(self.losses)

    @property
    def records(self) -> list[Any]:
        """None: there are no metrics beside the loss."""
        return []

    def rows(self) -> list[tuple[str, int, str, float]]:
        """(layer, head, "ridge" or "scale", value), the smallest ridges first."""
        found = [
            (layer, head, name, value)
            for layer, parts in self.heads.items()
            for name, values in parts.items()
            for head, value in enumerate(values)
        ]
        return sorted(found, key=lambda row: (row[2], row[3]))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def upgrade(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int = 200,
    everything: int = 0,
    mechanism: str = "local_linear",
    learn: Sequence[str] = ("ridge", "bandwidth"),
    layers: Any = None,
    ridge: float | None = None,
    options: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    validation: Sequence[Mapping[str, Any]] | None = None,
    optimiser: Optimiser | None = None,
    optimiser_everything: Optimiser | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> Upgrade:
    """Swaps a mechanism in, in place, and fine-tunes its few parameters per head.

    `steps` steps change what `swap` attached and nothing else, then `everything` steps change
    the whole model. The model is in evaluation mode (dropout off) in both and afterwards in the
    modes it was in; which parameters require gradients is as it was, and the parts require them.

    Args:
        model: a model of transformers, as pretrained; or one in which the mechanism is already.
        batches: mappings of the model's arguments: a sequence, drawn from with replacement, or a
            function of a torch.Generator that makes one.
        mechanism, learn, layers, options: of `regard.adapt.transformers.swap`.
            mechanism="softmax", learn=("temperature",) is the control: as many steps for another
            number per head.
        ridge: where a learned ridge starts; None: at the first of 1e4, 1e5, ... 1e8 at which no
            output on the first batch is further than 1e-3 from that of softmax attention.
        loss: of the model and a batch; None: `model(**batch).loss`.
        validation: batches whose mean loss is taken before and after.
        optimiser: of the first stage; None: AdamW at 0.1 (the parameters are logarithms), no
            decay. optimiser_everything: None: AdamW at 1e-4.
        seed: decides the batches; the model draws nothing, as dropout is off.
        checkpoint: a file to which model and optimiser are written every `checkpoint_every`
            steps and at the end, and from which the run goes on, bit for bit, if it exists.
        progress: a bar on standard error.

    Ctrl-C finishes the step, writes the checkpoint and raises KeyboardInterrupt.

    Raises:
        ValueError, TypeError: a bad argument, a model that cannot take the mechanism, a
            checkpoint of another run, no ridge at which the model is the same function.
        FloatingPointError: the loss is not finite; the parameters are as before that step.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2))
    >>> tokens = torch.arange(10)[None]
    >>> done = upgrade(model, [{"input_ids": tokens, "labels": tokens}], steps=2)
    >>> done.steps, list(done.heads["model.layers.0.self_attn"])
    (2, ['ridge', 'scale'])
    """
    from regard.adapt import transformers as adapt

    op = "upgrade"
    for name, number in (("steps", steps), ("everything", everything), ("seed", seed)):
        check_integer(op, name, number, least=0)
    check_integer(op, "checkpoint_every", checkpoint_every)
    draw = _drawing(op, batches)
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise reject(op, "checkpoint", "a file in a folder that exists", str(checkpoint))
    given, loss = dict(options or {}), loss or _own_loss
    held = adapt.report(model).swapped
    if mechanism in held:
        ridge = None
        names = [s.name for s, n in zip(adapt.sites(model), held, strict=True) if n == mechanism]
        done = adapt.Swap(model, mechanism, tuple(names), adapt.restore)
    else:
        if "ridge" not in learn:
            ridge = None
        elif ridge is None:
            batch = draw(torch.Generator().manual_seed(seed))
            ridge = equal_ridge(model, batch, mechanism, layers, given, loss)
        given |= {} if ridge is None else {"ridge": ridge}
        done = adapt.swap(model, mechanism, layers, learn=tuple(learn), **given)
    if not done.parameters():
        raise reject(op, "learn", "of something that the mechanism learns", tuple(learn))
    run = _Run(
        model, done, draw, loss, steps, everything,
        optimiser or Optimiser(0.1), optimiser_everything or Optimiser(1e-4), seed,
        None if checkpoint is None else Path(checkpoint), checkpoint_every,
    )  # fmt: skip
    device = next(model.parameters()).device
    with _own_random_state(device), _evaluating(model):
        _seed(seed, device)
        run.result.ridge = ridge
        run.resume()
        if run.result.start is None:
            run.result.start = mean_loss(model, validation, run.loss)
        with _bar(steps + everything, progress) as show, _stop_after_step() as asked:
            show(run.result)  # pyright: ignore[reportArgumentType]
            run.go(show, asked)
        run.result.end = mean_loss(model, validation, run.loss)
    run.result.heads = done.chosen()
    return run.result


def equal_ridge(
    model: nn.Module,
    batch: Mapping[str, Any],
    mechanism: str = "local_linear",
    layers: Any = None,
    options: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
) -> float:
    """The first of 1e4, ... 1e8 at which the model computes on `batch` what softmax attention does.

    Compared are the first output of the model (logits, or hidden states) in evaluation mode, to
    1e-3. Nothing is changed. Arguments as of `upgrade`.
    """
    from regard.adapt.transformers import swapped

    given = dict(options or {})
    drop = given.pop("drop", ())
    with _evaluating(model), torch.no_grad():
        with swapped(model, "softmax", layers, drop=drop):
            wanted = _output(model, batch, loss or _own_loss)
        for ridge in (1e4, 1e5, 1e6, 1e7, 1e8):
            with swapped(model, mechanism, layers, drop=drop, ridge=ridge, **given):
                moved = _output(model, batch, loss or _own_loss) - wanted
            if bool((moved.abs() < SAME).all()):
                return ridge
    raise ValueError(
        f"upgrade: ridge must be given: at 1e8 the outputs are still {float(moved.abs().max()):.3g}"
        f" from those of softmax attention, and {SAME} was wanted"
    )


def _output(model: nn.Module, batch: Mapping[str, Any], loss: Loss) -> Tensor:
    """What the model gave when the loss called it: its first floating-point tensor after a loss."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        parts = output.values() if isinstance(output, Mapping) else output
        parts = (output,) if isinstance(output, Tensor) else parts
        found = (x for x in parts if isinstance(x, Tensor) and x.is_floating_point() and x.dim())
        seen.extend(list(found)[:1])

    handle = model.register_forward_hook(look)
    try:
        loss(model, batch)
    finally:
        handle.remove()
    if not seen:
        accepted = "given where the loss does not call the model itself"
        raise reject("upgrade", "ridge", accepted, None)
    return seen[0].float()


def mean_loss(
    model: nn.Module, batches: Sequence[Mapping[str, Any]] | None, loss: Loss | None = None
) -> float | None:
    """The mean of `loss(model, batch)` over batches, without gradients; None without batches."""
    if not batches:
        return None
    with torch.no_grad():
        found = [float((loss or _own_loss)(model, batch)) for batch in batches]
    return math.fsum(found) / len(found)


@dataclass
class _Run:
    """One upgrade between two steps."""

    model: nn.Module
    swap: Swap
    draw: Callable[[torch.Generator], Mapping[str, Any]]
    loss: Loss
    steps: int
    everything: int
    optimiser: Optimiser
    optimiser_everything: Optimiser
    seed: int
    checkpoint: Path | None
    checkpoint_every: int

    def __post_init__(self) -> None:
        self.result = Upgrade(self.swap.mechanism, self.swap.layers)
        self.data = torch.Generator().manual_seed(self.seed)
        self.stage = ""
        self.adam: torch.optim.Optimizer | None = None

    def go(self, show: Callable[[Any], None], asked: Callable[[], bool]) -> None:
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            for step in range(self.result.steps + 1, self.steps + self.everything + 1):
                self._enter(PARTS if step <= self.steps else ALL)
                self._step(step)
                show(self.result)
                last = asked() or step == self.steps + self.everything
                if self.checkpoint is not None and (last or step % self.checkpoint_every == 0):
                    self.save()
                if asked():
                    raise KeyboardInterrupt
        finally:
            for parameter, flag in before:
                parameter.requires_grad_(flag)
            self.model.zero_grad(set_to_none=True)

    def _enter(self, stage: str) -> None:
        """The optimiser of a stage, over what it may change."""
        if stage == self.stage and self.adam is not None:
            return
        self.stage = stage
        self.model.requires_grad_(stage == ALL)
        for parameter in self.swap.parameters().values():
            parameter.requires_grad_()
        self.adam = self._settings(stage).build(self.model)

    def _settings(self, stage: str) -> Optimiser:
        return self.optimiser if stage == PARTS else self.optimiser_everything

    def _step(self, number: int) -> None:
        assert self.adam is not None
        loss = self.loss(self.model, self.draw(self.data))
        self.adam.zero_grad(set_to_none=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"upgrade: the loss is {value} at step {number}")
        loss.backward()
        trained = [p for group in self.adam.param_groups for p in group["params"]]
        settings = self._settings(self.stage)
        clip = math.inf if settings.clip is None else settings.clip
        norm = float(nn.utils.clip_grad_norm_(trained, clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"upgrade: the gradient is {norm} at step {number}")
        first, total = (0, self.steps) if self.stage == PARTS else (self.steps, self.everything)
        for group in self.adam.param_groups:
            group["lr"] = settings.rate(number - first, total)
        self.adam.step()
        self.result.losses.append(value)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        return {
            "mechanism": self.swap.mechanism,
            "layers": list(self.swap.layers),
            "steps": self.steps,
            "optimiser": asdict(self.optimiser),
            "optimiser_everything": asdict(self.optimiser_everything),
            "everything": self.everything if self._ends else None,
            "seed": self.seed,
        }

    @property
    def _ends(self) -> bool:
        return self.optimiser_everything.schedule == "cosine"

    def save(self) -> None:
        assert self.checkpoint is not None
        assert self.adam is not None
        checkpoints.write(
            self.checkpoint, settings=self.settings, stage=self.stage,
            model=self.model.state_dict(), optimiser=self.adam.state_dict(),
            data=self.data.get_state(), losses=self.result.losses, start=self.result.start,
        )  # fmt: skip

    def resume(self) -> None:
        """Continues from the checkpoint, if there is one."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        found = checkpoints.read(self.checkpoint)
        for name, wanted in self.settings.items():
            if found["settings"].get(name) != wanted:
                came = words(f"a checkpoint made with {found['settings'].get(name)!r}")
                raise reject("upgrade", "checkpoint", f"of a run with {name} {wanted!r}", came)
        if len(found["losses"]) > self.steps + self.everything:
            accepted = f"together at least the {len(found['losses'])} of the checkpoint"
            raise reject("upgrade", "steps", accepted, self.steps + self.everything)
        try:
            self.model.load_state_dict(found["model"])
        except RuntimeError as error:
            raise ValueError(f"upgrade: checkpoint is of another model: {error}") from error
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        self._enter(found["stage"])
        assert self.adam is not None
        self.adam.load_state_dict(found["optimiser"])
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        self.data.set_state(found["data"])
        self.result = replace(self.result, losses=found["losses"], start=found["start"])


def _drawing(op: str, batches: Any) -> Callable[[torch.Generator], Mapping[str, Any]]:
    given: Any = batches
    if callable(batches):
        return given
    if not isinstance(given, Sequence) or not given:
        accepted = "a sequence of batches, or a function of a torch.Generator"
        raise reject(op, "batches", accepted, given, kind=TypeError)
    return lambda made: given[int(torch.randint(len(given), (), generator=made))]


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise reject("upgrade", "batches", "with labels (or give `loss`)", words("none"))
    return loss


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
