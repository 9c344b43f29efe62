"""What C forms share: headers, the build table, run-time dispatch, and the processor's peak.

`setup.py` compiles every `.c` file of the package once per instruction set of `table.py` into one
library, which `loader.py` opens through ctypes when it is first needed. Importing this package
loads nothing. Without the library every op runs in eager torch; `status()` says why it is missing.
"""

from regard.native.loader import (
    NativeUnavailable,
    Status,
    chosen,
    function,
    instruction_sets,
    limited_to,
    no_memory,
    refusal,
    status,
)
from regard.native.peak import fma_peak

__all__ = [
    "NativeUnavailable",
    "Status",
    "chosen",
    "fma_peak",
    "function",
    "instruction_sets",
    "limited_to",
    "no_memory",
    "refusal",
    "status",
]
