"""An inspection as a job: everything that can be wrong is found before it runs."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import regard
from regard.bench.inspecting.groups import Look, look_at
from regard.bench.inspecting.heads import head_section
from regard.bench.inspecting.opening import open_model, quiet
from regard.bench.inspecting.reading import read_subject
from regard.bench.inspecting.result import Inspection, Section
from regard.bench.inspecting.saliency import saliency_section
from regard.bench.inspecting.views import map_section, sink_section
from regard.lens.inputs import require

WHAT = ("sinks", "heads", "maps", "saliency")
PER_GROUP = {"sinks": sink_section, "heads": head_section, "maps": map_section}
Step = Callable[[str, float, float], None]


class Inspecting:
    """Attention of a model of transformers on one input.

    Args:
        folder: the model, as `save_pretrained` writes it, with tokenizer or preprocessor.
        given: a text or a file of one; a picture or a folder of them; a WAV recording.
        what: of "sinks", "heads", "maps", "saliency"; None: all, of a folder of pictures "heads".
        pictures: how many of a folder to take, evenly from all; None: 24.
        layers, heads: numbers of those to show; None: all.
        runs: with parts of the input hidden, for the saliency.
        seed: of what is hidden.
        device: "cpu" or "cuda".

    Raises:
        ValueError: an unknown `what`, a folder without a model, an input that cannot be read, a
            layer or head that is not there. ImportError: no transformers.
    """

    def __init__(
        self,
        folder: Path,
        given: str,
        what: Sequence[str] | None = None,
        *,
        pictures: int | None = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        runs: int = 128,
        seed: int = 0,
        device: str = "cpu",
        progress: Step | None = None,
    ) -> None:
        folder_given = len(given) < 1024 and Path(given).is_dir()
        if what is None:
            what = ("heads",) if folder_given else WHAT
        unknown = [name for name in what if name not in WHAT]
        if unknown or not what:
            raise ValueError(f"--what must be of {', '.join(WHAT)}, got {', '.join(unknown)!r}")
        alone = [name for name in what if name != "heads"]
        if folder_given and alone:
            raise ValueError(
                f"--what {', '.join(alone)} looks at one picture and INPUT {given} is a folder; "
                "of a folder only the heads are shown"
            )
        if runs < 4 or runs % 2:
            raise ValueError(f"--runs must be an even number of at least 4, got {runs}")
        if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
            raise ValueError(f"--device {device}: torch sees no such device")
        self._progress = progress or (lambda words, done, total: None)
        self._progress("reading the model", 0, 1)
        opened = open_model(folder, device)
        transformers = require("transformers", "hf")
        with quiet(transformers):
            subject = read_subject(opened, given, pictures)
            self._look = look_at(opened, subject, layers, heads, runs, seed)
        name = type(opened.model).__name__
        count = sum(parameter.numel() for parameter in opened.model.parameters())
        towers = "; ".join(
            f"{group.title} of {len(group.layers)} layers and {len(group.heads)} heads"
            for group in self._look.groups
        )
        about = [f"{name} from {folder}: {count / 1e6:.1f} million parameters. {towers}."]
        about.append(f"Input: {_described(self._look)}.")
        if subject.written:
            about.append(f"The decoder wrote: {' '.join(subject.written)}")
        if opened.missing:
            some = ", ".join(opened.missing[:3])
            about.append(
                f"Caution: {len(opened.missing)} weights are not in the files and are random here "
                f"({some}{', ...' if len(opened.missing) > 3 else ''})."
            )
        versions = {
            "regard": regard.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        chosen = tuple(name for name in WHAT if name in what)
        self.result = Inspection(about + subject.notes, chosen, versions, subject.thumbnail)

    def run(self) -> Inspection:
        """Looks; returns what was found."""
        jobs: list[tuple[str, Callable[[], Section]]] = []
        for name in self.result.what:
            if name == "saliency":
                jobs.append((name, lambda: saliency_section(self._look)))
                continue
            for group in self._look.groups:
                view = PER_GROUP[name]
                jobs.append((f"{name} of {group.title}", lambda v=view, g=group: v(self._look, g)))
        with quiet(require("transformers", "hf")), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # tokens of any script
            for number, (words, job) in enumerate(jobs):
                self._progress(words, number, len(jobs))
                try:
                    self.result.sections.append(job())
                except ValueError as error:  # of a reader: this model has no such thing
                    title = words[:1].upper() + words[1:]
                    self.result.sections.append(Section(title, [f"Not measured: {error}."]))
        self.result.complete = True
        return self.result


def _described(look: Look) -> str:
    subject = look.subject
    if subject.words:
        return f"{subject.source} of {len(subject.words)} tokens"
    if subject.span:
        return f"{subject.source}, {subject.seconds:.2f} seconds"
    if subject.grid:
        count = len(subject.pictures)
        many = f", {count} pictures of" if count > 1 else ","
        return f"{subject.source}{many} {subject.grid[0]} x {subject.grid[1]} patches"
    return subject.source
