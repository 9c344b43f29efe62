"""The contract suite as a library: `regard.testing.check(card)` holds anybody's mechanism to it."""

from __future__ import annotations

from regard.testing import tables
from regard.testing.calls import Call
from regard.testing.check import check
from regard.testing.law import LAWS, DoesNotApply, Law, LawBroken
from regard.testing.plan import Planner, Visit
from regard.testing.report import CheckFailed, Report, Row
from regard.testing.subject import Subject

__all__ = [
    "LAWS",
    "Call",
    "CheckFailed",
    "DoesNotApply",
    "Law",
    "LawBroken",
    "Planner",
    "Report",
    "Row",
    "Subject",
    "Visit",
    "check",
    "tables",
]
