"""The whole benchmark, process by process, with a result that is valid after every row."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import regard
from regard.bench.measure.clock import Stopwatch
from regard.bench.measure.process import stream
from regard.bench.timing.contestants import yardsticks
from regard.bench.timing.result import Refusal, Row, SpeedResult
from regard.bench.timing.setting import DTYPES, Setting
from regard.core.checks import check_choice, check_flag, check_integer, check_number, reject

Progress = Callable[[str, float, float], None]
OP = "speed"


class Benchmark:
    """Checks its arguments when it is made, measures in `run`, and keeps `result` valid.

    `after_row(result)` is called whenever a row or a refusal is known.
    """

    def __init__(
        self,
        setting: Setting,
        mechanisms: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        _check(setting)
        sticks = yardsticks(setting.kind)
        names = self._names(mechanisms)
        watch = Stopwatch(setting.device, setting.threads)
        self.result = SpeedResult(
            setting, (*sticks, *names), sticks, machine(setting), versions(), watch.name
        )
        self.after_row: Callable[[SpeedResult], None] = lambda result: None
        self._progress = progress or (lambda words, done, total: None)

    def run(self) -> SpeedResult:
        """Everything; an exception (Ctrl-C, too) leaves what was found so far in `result`."""
        result, setting = self.result, self.result.setting
        total, done = len(result.names) * len(result.lengths), 0
        self._peak("before")
        for name in result.names:
            waiting = list(result.lengths)
            self._progress(f"{name}, length {waiting[0]}", done, total)
            description = {"name": name, "setting": asdict(setting)}
            try:
                with closing(stream("regard.bench.timing.child", description)) as answers:
                    for answer in answers:
                        self._take(name, answer)
                        waiting.remove(answer["length"])
                        done += 1
                        if waiting:
                            self._progress(f"{name}, length {waiting[0]}", done, total)
            except (OSError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                result.refused += [Refusal(name, length, reason) for length in waiting]
                done += len(waiting)
            self.after_row(result)
        self._peak("after")
        result.complete = True
        self._progress("done", total, total)
        return result

    def _take(self, name: str, answer: dict[str, Any]) -> None:
        if "row" in answer:
            self.result.rows.append(Row(name, answer["length"], **answer["row"]))
        else:
            self.result.refused.append(Refusal(name, answer["length"], answer["refused"]))
        self.after_row(self.result)

    def _peak(self, when: str) -> None:
        """The processor's peak, which tells a slow machine from a slow mechanism."""
        try:
            self.result.peak[when] = regard.native.fma_peak()
        except regard.native.NativeUnavailable:
            return

    def _names(self, names: Sequence[str] | None) -> list[str]:
        if names is None:
            return list(regard.mechanisms)
        if isinstance(names, str):
            raise reject(OP, "mechanisms", "a list of names", names, kind=TypeError)
        if not names:
            raise reject(OP, "mechanisms", "at least one name", list(names))
        return [regard.mechanisms[name].name for name in dict.fromkeys(names)]


def _check(setting: Setting) -> None:
    for name in ("heads", "dim", "batch", "threads"):
        check_integer(OP, name, getattr(setting, name))
    for length in setting.lengths:
        check_integer(OP, "lengths", length)
    if not setting.lengths:
        raise reject(OP, "lengths", "at least one", list(setting.lengths))
    check_integer(OP, "seed", setting.seed, least=0)
    check_flag(OP, "causal", setting.causal)
    check_flag(OP, "backward", setting.backward)
    check_choice(OP, "dtype", setting.dtype, DTYPES)
    if setting.patience is not None:
        check_number(OP, "patience", setting.patience, above=0)
    try:
        device = torch.device(setting.device)
    except (RuntimeError, TypeError):
        raise reject(OP, "device", "'cpu' or 'cuda'", setting.device) from None
    check_choice(OP, "device", device.type, ("cpu", "cuda"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{OP}: device {setting.device!r} is not here: torch sees no such GPU")


def versions() -> dict[str, str]:
    """regard, torch, CUDA and Python."""
    found = {
        "regard": regard.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {**found, "cuda": torch.version.cuda} if torch.version.cuda else found


def machine(setting: Setting) -> dict[str, Any]:
    """What the numbers are true of."""
    found: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "instruction_sets": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "regard": list(regard.native.instruction_sets()),
        },
    }
    if setting.kind == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(setting.device))
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
    return found


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None
