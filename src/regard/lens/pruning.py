"""Running a model with heads taken out, from the first layer that changes and no earlier.

The gate of a head scales its output before the heads are joined: `z <- m z + (1 - m) r`, with m = 1
for the model as it is and m = 0 for a pruned head, whose output becomes the replacement r: zero
(the same as zeroing the head's attention weights), the head's mean over a data set per token, or
what the head would give with uniform weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.lens.layers import Layer, attention_layers
from regard.lens.shortcuts import Shortcuts, instead

Ablation = Literal["zero", "mean", "uniform"]
ABLATIONS = ("zero", "mean", "uniform")
HEADS = ("head", "classifier", "heads", "fc", "score")
Batch = Tensor | Mapping[str, Any]
MOST_NUMBERS = 1 << 20  # in the hidden states of copies that a CPU runs together


@dataclass(frozen=True)
class Answer:
    """What a model says: logits [..., B, C] and what entered its classifier [..., B, E], if any."""

    logits: Tensor
    embedding: Tensor | None

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Both of them."""
        return self.logits, self.embedding


class head_gates:  # noqa: N801 (a context manager, used as a function)
    """Scales heads while it is open; yields `gates [L, H]`, ones, which may be written to.

    With all gates at one the outputs are those of the model bit for bit; with a gate at zero they
    are those of a model whose value projection has zeros for that head (biases of the output
    projection stay). Layers with fewer heads than others ignore the gates beyond theirs. Whatever
    happens inside, the model is as before outside.

    Raises:
        ValueError: the model has no layers of attention that are known (see `attention_layers`).

    >>> from regard.lens.layers import attention_layers
    >>> layer = torch.nn.Module()
    >>> for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
    ...     layer.add_module(name, torch.nn.Linear(8, 8))
    >>> layer.num_heads = 2
    >>> with head_gates(torch.nn.Sequential(layer, torch.nn.Identity())) as gates:
    ...     gates[0, 1] = 0
    Traceback (most recent call last):
    ...
    ValueError: head_gates: Sequential has no layer of attention that is known here: ...
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = attention_layers(model, "head_gates")
        self._stack = ExitStack()

    def __enter__(self) -> Float[Tensor, "l h"]:
        weight = next(self._layers[0].projection.parameters())
        heads = max(layer.heads for layer in self._layers)
        gates = torch.ones(len(self._layers), heads, device=weight.device)
        for number, layer in enumerate(self._layers):
            hook = _scaled(layer, lambda number=number: (gates[number], None))
            handle = layer.projection.register_forward_pre_hook(hook)
            self._stack.callback(handle.remove)
        return gates

    def __exit__(self, *problem: object) -> None:
        self._stack.close()


def _scaled(
    layer: Layer, setting: Callable[[], tuple[Tensor | None, Tensor | None]]
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    """A hook before the output projection: gates [H] or [B, H], replacement [B or 1, T or 1, W]."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        gates, replacement = setting()
        if gates is None:
            return None
        z = inputs[0]
        gates = gates[..., : layer.heads].to(z.dtype).repeat_interleave(layer.head_width, -1)
        gates = gates[:, None] if gates.ndim == 2 else gates
        scaled = gates * z
        if replacement is not None:
            scaled = scaled + (1 - gates) * replacement.to(z.dtype)
        return scaled, *inputs[1:]

    return hook


class Pruner:
    """A model to be run many times with other gates on the same batch.

    `record(batch)` runs it as it is and keeps what entered every block; `run(gates)` then runs it
    from the first block that changes. Blocks before are passed over in the model's own forward,
    which is otherwise untouched: what comes before and after the stack runs as it was written.
    With shortcuts, the first block begins at its output projection, the last one computes only the
    tokens that the model goes on to read, and linear layers may be computed by oneDNN, so that
    answers differ by rounding from the whole model's.
    A context manager: outside nothing of it is left in the model.

    Args:
        model: an encoder in evaluation mode (see `attention_layers`).
        readout: from what the model returns to logits [B, C]; default: itself or its `.logits`.
        head: name of the module whose input is the embedding (the final class token, or what the
            model pools); default: the first of `head`, `classifier`, `heads`, `fc`, `score`.
        ablation: what a pruned head gives: "zero", "mean" (call `learn_means` first), "uniform".
        prefix: False runs the whole model every time: for comparison.
        shortcuts: False computes the blocks from the first that changes whole and as the model
            does: the same bits, where all of a batch's rows run at once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        readout: Callable[[Any], Tensor] | None = None,
        head: str | None = None,
        ablation: Ablation = "zero",
        prefix: bool = True,
        shortcuts: bool = True,
        operation: str = "Pruner",
    ) -> None:
        if ablation not in ABLATIONS:
            raise ValueError(f"{operation}: ablation must be one of {ABLATIONS}, got {ablation!r}")
        if model.training:
            raise ValueError(f"{operation}: the model is in training mode: call model.eval() first")
        self.operation, self.model, self.ablation, self.prefix = operation, model, ablation, prefix
        self.layers = attention_layers(model, operation)
        self.heads = max(layer.heads for layer in self.layers)
        self._short = prefix and shortcuts
        self._readout = readout or self._logits
        self._head = _named(model, head, operation)
        self._means: list[Tensor] | None = None
        self._forget()

    def _forget(self) -> None:
        self._batch: Batch | None = None
        self._rows, self._start, self._copies = 0, 0, 1
        self._entered: dict[int, Tensor] = {}
        self._left: dict[int, tuple[Any, ...] | None] = {}  # what a block returns beside its output
        self._uniform: dict[int, Tensor] = {}
        self._recorded_uniform: dict[int, Tensor] = {}
        self._shortcuts = Shortcuts(self.layers)
        self._gates: Tensor | None = None
        self._embedding: Tensor | None = None
        self._seen: Callable[[int, Tensor], None] | None = None
        self._mode: Literal["idle", "record", "run", "gradient"] = "idle"

    def __enter__(self) -> Pruner:
        self._stack = ExitStack()
        for number, layer in enumerate(self.layers):
            scale = _scaled(layer, lambda number=number: self._setting(number))
            for handle in (
                layer.block.register_forward_pre_hook(self._enter(number), with_kwargs=True),
                layer.block.register_forward_hook(self._leave(number)),
                layer.projection.register_forward_pre_hook(self._look(number)),
                layer.projection.register_forward_pre_hook(scale),
                layer.projection.register_forward_hook(self._project(number)),
                layer.attention.register_forward_hook(self._attend(number)),
                layer.values.register_forward_hook(self._spread(number)),
            ):
                self._stack.callback(handle.remove)
        if self._head is not None:
            self._stack.callback(self._head.register_forward_pre_hook(self._embed).remove)
        return self

    def __exit__(self, *problem: object) -> None:
        self._stack.close()
        self._forget()

    def record(self, batch: Batch) -> Answer:
        """Runs the model as it is; memory: of every block its input and its heads' outputs."""
        self._forget()
        self._batch, self._rows = batch, _rows(batch)
        with self._as("record"), torch.no_grad():
            answer = self._call()
        if self._short:
            last = len(self.layers) - 1
            self._shortcuts.find_read(lambda: self._run(last, None).tensors(), answer.tensors())
        return answer

    @property
    def read(self) -> slice | None:
        """Tokens of the last block that the recorded answer depends on; None: any of them."""
        return self._shortcuts.read

    def at_once(self) -> int:
        """Copies of the recorded batch that are best run together: on a CPU, few enough for its
        caches; elsewhere any number.
        """
        one = self._entered[0]
        return max(1, MOST_NUMBERS // one.numel()) if one.device.type == "cpu" else sys.maxsize

    def run(self, gates: Float[Tensor, "g l h"]) -> Answer:
        """One answer per row of gates, of the recorded batch: logits [G, B, C].

        All rows start at the lowest layer where any of them is not one; they are copies of the
        batch, run together.
        """
        changed = (gates != 1).any(-1).any(0).nonzero()
        first = int(changed[0]) if len(changed) else len(self.layers) - 1
        answer = self._run(first if self.prefix else 0, gates)
        shape = (len(gates), self._rows)
        embedding = answer.embedding
        return Answer(
            answer.logits.unflatten(0, shape),
            None if embedding is None else embedding.unflatten(0, shape),
        )

    def _run(self, start: int, gates: Tensor | None) -> Answer:
        self._start, self._copies = start, 1 if gates is None else len(gates)
        if gates is not None:
            self._gates = gates.repeat_interleave(self._rows, 0)  # copy-major: [G B, L, H]
        self._uniform = dict(self._recorded_uniform)
        with ExitStack() as stack, self._as("run"), torch.no_grad():
            for number, layer in enumerate(self.layers[:start]):
                stack.enter_context(instead(layer.block, self._pass_on(number)))
            if self._short:
                stack.enter_context(self._shortcuts.taken(start, self._copies))
            return self._call()

    def gradient(self, loss: Callable[[Tensor], Tensor]) -> Float[Tensor, "b l h"]:
        """d loss(logits) / d gates at one, per recorded image; the loss is a sum over images."""
        device = next(self.model.parameters()).device
        gates = torch.ones(self._rows, len(self.layers), self.heads, device=device)
        self._gates = gates.requires_grad_()
        with self._as("gradient"), torch.enable_grad():
            value = loss(self._call().logits)
            return torch.autograd.grad(value, gates)[0]

    def learn_means(self, batches: Iterable[Batch]) -> None:
        """The mean of every head's output per token over batches, for `ablation="mean"`."""
        sums: list[Tensor | None] = [None] * len(self.layers)
        count = 0

        def add(number: int, z: Tensor) -> None:
            new = z.detach().double().sum(0, keepdim=True)
            old = sums[number]
            if old is not None and old.shape != new.shape:
                raise ValueError(
                    f"{self.operation}: ablation='mean' needs equally many tokens in all batches, "
                    f"got {old.shape[1]} and {new.shape[1]}"
                )
            sums[number] = new if old is None else old + new

        self._seen = add
        with self._as("idle"), torch.no_grad():
            for batch in batches:
                self._batch, count = batch, count + _rows(batch)
                self._call()
        self._means = [total / count for total in sums if total is not None]

    @contextmanager
    def _as(self, mode: Literal["idle", "record", "run", "gradient"]) -> Iterator[None]:
        self._mode = mode
        try:
            yield
        finally:
            self._mode, self._gates, self._seen, self._copies, self._start = (
                "idle",
                None,
                None,
                1,
                0,
            )

    def _call(self) -> Answer:
        batch = self._batch
        self._embedding = None
        output = self.model(**batch) if isinstance(batch, Mapping) else self.model(batch)
        logits = self._readout(output)
        if logits.ndim != 2:
            raise ValueError(
                f"{self.operation}: logits must have the shape [B, C], got {tuple(logits.shape)}"
            )
        return Answer(logits, self._embedding)

    def _logits(self, output: Any) -> Tensor:
        found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{self.operation}: the model returns {type(output).__name__} without logits; "
                "pass readout, a function from what it returns to logits [B, C]"
            )
        return found

    def _enter(self, number: int) -> Callable[..., tuple[tuple, dict] | None]:
        def hook(block: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict] | None:
            if self._mode == "record":
                self._entered[number] = arguments[0] if arguments else named["hidden_states"]
            if self._mode != "run" or number < self._start:
                return None
            hidden = arguments[0] if arguments else named["hidden_states"]
            if number == self._start:
                hidden = self._entered[number].repeat(self._copies, 1, 1)
            named = {key: self._copied(part) for key, part in named.items()}
            if arguments:
                return (hidden, *self._copied(arguments[1:])), named
            return (), {**named, "hidden_states": hidden}

        return hook

    def _leave(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(block: nn.Module, inputs: Any, output: Any) -> None:
            if self._mode == "record":
                self._left[number] = output[1:] if isinstance(output, tuple) else None

        return hook

    def _pass_on(self, number: int) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *others: Any, **named: Any) -> Any:
            beside = self._left[number]
            return hidden_states if beside is None else (hidden_states, *beside)

        return forward

    def _copied(self, value: Any) -> Any:
        """What a block gets beside its input: masks [B, ...] have one row per image and copy."""
        if isinstance(value, Tensor):
            if value.ndim > 2 and value.shape[0] == self._rows > 1:
                return value.repeat(self._copies, *[1] * (value.ndim - 1))
            return value
        if isinstance(value, Mapping):
            return {key: self._copied(part) for key, part in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._copied(part) for part in value)
        return value

    def _look(self, number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._seen is not None:
                self._seen(number, inputs[0])

        return hook

    def _project(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if self._mode == "record" and self._short:
                self._shortcuts.projected(number, inputs[0], output)

        return hook

    def _attend(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._mode == "record" and self._short:
                self._shortcuts.attended(number, output)

        return hook

    def _spread(self, number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        layer = self.layers[number]

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.ablation != "uniform":
                return
            values = output[..., -layer.width :] if layer.fused else output
            values = values.mean(1, keepdim=True)
            repeats = layer.width // values.shape[-1]
            values = values.unflatten(-1, (-1, layer.head_width))
            found = self._recorded_uniform if self._mode == "record" else self._uniform
            found[number] = values.repeat_interleave(repeats, -2).flatten(-2)

        return hook

    def _setting(self, number: int) -> tuple[Tensor | None, Tensor | None]:
        if self._gates is None:
            return None, None
        gates = self._gates[:, number]
        if self.ablation == "zero":
            return gates, None
        if self.ablation == "uniform":
            values = self._uniform[number]  # the recorded ones, where a run begins at the heads
            return gates, values.repeat(len(gates) // len(values), 1, 1)
        if self._means is None:
            raise ValueError(f"{self.operation}: ablation='mean' needs learn_means(batches) first")
        return gates, self._means[number]

    def _embed(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._embedding = inputs[0].flatten(1)


def _rows(batch: Batch) -> int:
    first = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
    return len(first)


def _named(model: nn.Module, name: str | None, operation: str) -> nn.Module | None:
    if name is None:
        return next((found for part in HEADS if (found := getattr(model, part, None))), None)
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"{operation}: {type(model).__name__} has no module {name!r}")
    return modules[name]
