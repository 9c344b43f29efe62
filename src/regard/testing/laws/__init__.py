"""The laws, grouped by what they are about; importing this package fills `LAWS`, in this order."""

from __future__ import annotations

# isort: off
from regard.testing.laws import values  # noqa: F401
from regard.testing.laws import masks  # noqa: F401
from regard.testing.laws import sizes  # noqa: F401
from regard.testing.laws import gradients  # noqa: F401
from regard.testing.laws import states  # noqa: F401
from regard.testing.laws import batches  # noqa: F401
from regard.testing.laws import precision  # noqa: F401
from regard.testing.laws import torch_features  # noqa: F401
from regard.testing.laws import errors  # noqa: F401
from regard.testing.laws import memory  # noqa: F401
