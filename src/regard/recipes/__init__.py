"""How to train and distil: loops over tasks and models, and losses."""

from __future__ import annotations

from regard.recipes.optimiser import Optimiser
from regard.recipes.train import Callback, History, Record, evaluate, train_small

__all__ = ["Callback", "History", "Optimiser", "Record", "evaluate", "train_small"]
