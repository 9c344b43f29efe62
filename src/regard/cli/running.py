"""What the commands that measure share: errors of one line, files, Ctrl-C, progress."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import typer

WRONG, INTERRUPTED = 2, 130
Step = Callable[[str, float, float], None]


class Savable(Protocol):
    """A result that can be written at any moment."""

    def save_json(self, path: Path) -> None: ...

    def save_report(self, path: Path) -> None: ...


Save = Callable[[Savable], None]


Result = TypeVar("Result", bound=Savable)


class Job(Protocol[Result]):
    """What a command measures; `result` is valid from the start."""

    result: Result

    def run(self) -> Result: ...


@dataclass(frozen=True)
class Running:
    """One run of `regard <command>`."""

    command: str

    def fail(self, message: str) -> NoReturn:
        """One line on standard error, exit code 2."""
        typer.echo(f"regard {self.command}: {' '.join(message.split())}", err=True)
        raise typer.Exit(WRONG)

    def interrupted(self, json: Path | None) -> NoReturn:
        """Says where what was found is kept, exit code 130."""
        kept = f"; what was found so far is in {json}" if json else ""
        typer.echo(f"regard {self.command}: interrupted{kept}", err=True)
        raise typer.Exit(INTERRUPTED) from None

    def words(self, error: Exception, operation: str) -> str:
        """An error as the user of the command reads it, without the name of the function."""
        if isinstance(error, OSError) and error.strerror:
            return f"cannot write {error.filename}: {error.strerror}"
        return str(error).removeprefix(f"{operation}: ")

    def check_files(self, *paths: Path | None) -> None:
        """That every file can be written, before anything is computed."""
        for path in paths:
            if path is not None and not path.parent.is_dir():
                self.fail(f"no such folder: {path.parent}")
            if path is not None and path.is_dir():
                self.fail(f"{path} is a folder, not a file")
        named = [path.resolve() for path in paths if path is not None]
        if len(set(named)) < len(named):
            self.fail(f"{named[0].name} is given for two files, of which one would be lost")

    def integers(self, option: str, text: str) -> tuple[int, ...]:
        """Whole numbers separated by commas."""
        try:
            return tuple(int(part) for part in text.split(","))
        except ValueError:
            self.fail(f"{option} must be whole numbers separated by commas, got {text!r}")

    def names(self, option: str, text: str) -> list[str]:
        """Names separated by commas."""
        names = [part.strip() for part in text.split(",") if part.strip()]
        if not names:
            self.fail(f"{option} must be names separated by commas, got {text!r}")
        return names

    def save(self, result: Savable | None, path: Path | None) -> None:
        """Writes the JSON file, if one is wanted; before anything was found, one that says so."""
        if path is None:
            return
        if result is not None:
            result.save_json(path)
            return
        from regard.core.state import write_atomically

        write_atomically(path, b'{"complete": false}\n')

    def measure(
        self,
        make: Callable[[Step, Save], Job[Result]],
        out: Path,
        json: Path | None,
        operation: str,
    ) -> Result:
        """Runs what `make(step, save)` returns, which calls `save(result)` now and then.

        Errors in making it are the user's, one line each. `operation` begins their messages.
        """
        job: Job[Result] | None = None
        with self.interruptible():
            try:
                with self.progress() as step:
                    try:
                        job = make(step, lambda result: self.save(result, json))
                        self.save(job.result, json)
                    except (KeyError, TypeError, ValueError, OSError) as error:
                        self.fail(self.words(error, operation))
                    result = job.run()
            except KeyboardInterrupt:
                self.save(job.result if job else None, json)
                self.interrupted(json)
            try:
                self.save(result, json)
                result.save_report(out)
            except OSError as error:
                self.fail(self.words(error, operation))
        return result

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A termination request is treated like Ctrl-C: what was found is kept."""

        def interrupt(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        try:
            before = signal.signal(signal.SIGTERM, interrupt)
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def progress(self) -> Iterator[Step]:
        """A bar on a terminal; elsewhere a line on standard error whenever the step changes."""
        if not sys.stderr.isatty():
            last = ""

            def tell(words: str, done: float, total: float) -> None:
                nonlocal last
                if words != last:
                    last = words
                    typer.echo(f"[{100 * done / max(total, 1):3.0f} %] {words}", err=True)

            yield tell
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("reading", total=None)
            yield lambda words, done, total: bar.update(
                task, description=words, completed=done, total=total
            )
