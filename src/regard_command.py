"""The command `regard` from its first moment on: Ctrl-C while torch is imported ends it quietly.

It stands beside the package, as importing anything of the package imports torch first.
"""

from __future__ import annotations

import os
import signal
from typing import Any


def main() -> None:
    """Imports and runs the command line; exit code 130 when that is interrupted."""
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, _leave)
    from regard.cli import main as run

    if listens:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _leave(number: int, frame: Any) -> None:
    """Nothing was begun, so there is nothing to save; half an import could raise anything."""
    os.write(2, b"regard: interrupted\n")
    os._exit(130)
