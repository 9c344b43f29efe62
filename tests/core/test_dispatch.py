"""Which form runs, what is said when none can, and that nothing is chosen silently."""

from __future__ import annotations

import pytest
import torch

from regard.core.dispatch import Explained, Form, asking, choose
from regard.explain import explain


def form(impl, name, reason=None, auto=True):
    return Form(impl, name, lambda call: reason, lambda call: (name, call), auto)


FORMS = [
    form("triton", "fused", "needs a CUDA device"),
    form("native", "panels", "needs float32"),
    form("eager", "sdpa", "a window was given"),
    form("eager", "blocks"),
    form("reference", "equations", auto=False),
]


def op(x, *, impl="auto"):
    return choose("op", FORMS, impl, x).run(x)


def test_auto_takes_the_first_that_can():
    assert op(1) == ("blocks", 1)
    assert choose("op", [form("eager", "one"), form("eager", "two")], "auto", None).name == "one"


def test_an_explicit_choice_is_exactly_that():
    assert op(2, impl="eager") == ("blocks", 2)
    assert op(2, impl="reference") == ("equations", 2)
    text = r"^op: impl='native' cannot serve this call \(panels: needs float32\)$"
    with pytest.raises(ValueError, match=text):
        op(2, impl="native")


def test_a_form_kept_out_of_auto_is_never_a_fallback():
    forms = [form("eager", "blocks", "too long"), form("reference", "equations", auto=False)]
    with pytest.raises(ValueError, match=r"impl='auto' cannot serve .*\(blocks: too long\)"):
        choose("op", forms, "auto", None)


def test_a_form_that_the_op_does_not_have():
    with pytest.raises(ValueError, match="this op has no such form"):
        choose("op", FORMS[3:], "triton", None)
    with pytest.raises(ValueError, match="did you mean 'native'"):
        op(1, impl="nativ")
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference', 'eager', "):
        op(1, impl=None)


def test_later_forms_are_not_asked_once_one_serves():
    def never(call):
        raise AssertionError

    forms = [form("eager", "blocks"), Form("eager", "late", never, never)]
    assert choose("op", forms, "auto", None).name == "blocks"


def test_explain_says_which_and_why_not_without_running():
    def run(call):
        raise AssertionError

    forms = [*FORMS[:3], Form("eager", "blocks", lambda call: None, run), FORMS[4]]
    found = explain(lambda x, impl="auto": choose("op", forms, impl, x).run(x), 1)
    assert (found.op, found.form, found.impl) == ("op", "blocks", "eager")
    assert found.available == ("eager", "reference")
    assert found.reasons["panels"] == "needs float32"
    assert str(found).splitlines() == [
        "op: runs blocks (impl='eager')",
        "  fused: needs a CUDA device",
        "  panels: needs float32",
        "  sdpa: a window was given",
        "  equations: could serve; another was preferred",
    ]


def test_explain_raises_the_errors_of_the_op_and_refuses_other_functions():
    with pytest.raises(ValueError, match="panels: needs float32"):
        explain(op, 1, impl="native")
    with pytest.raises(TypeError, match="chooses no form"):
        explain(len, [])


def test_asking_ends_with_its_block_even_after_an_error():
    with pytest.raises(Explained), asking():
        op(1)
    assert op(1) == ("blocks", 1)


def test_the_choice_is_fixed_at_trace_time():
    forms = [Form("eager", "double", lambda x: None, lambda x: x * 2)]

    def double(x):
        return choose("op", forms, "auto", x).run(x)

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)).item() == 2
