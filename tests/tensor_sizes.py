"""How large tensors get while something runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The most memory that one result took (views take none), in float32 numbers."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for part in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(part, torch.Tensor):
                continue
            storage = part.untyped_storage()
            if storage.data_ptr() not in given:
                self.numbers = max(self.numbers, storage.nbytes() // 4)
        return result
