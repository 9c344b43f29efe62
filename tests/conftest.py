"""Options and habits of the whole suite.

    --device cpu|cuda     where the contract suite runs
    --seed N              chooses values and places; a new one each time, printed, if not given
    --expect-missing A,B  what this machine is known to lack: any other skip fails the session

A test that needs what a machine may lack says so: `@pytest.mark.requires("cuda")`. Uninitialised
memory is filled with NaN, and torch runs on one thread.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)

FAST_TIER_SECONDS = 12.0  # CPU time that the fast tier of the contract may take, per card


def is_here(need: str) -> bool:
    """Whether this machine has it: "cuda", "two_gpus", "program:NAME", "resource:NAME" (see
    regard.testing.resources), or a Python module.
    """
    if need == "cuda":
        return torch.cuda.is_available()
    if need == "two_gpus":
        return torch.cuda.device_count() >= 2
    if need.startswith("program:"):
        return shutil.which(need.removeprefix("program:")) is not None
    if need.startswith("resource:"):
        from regard.testing import resources

        return resources.is_here(need.removeprefix("resource:"))
    return importlib.util.find_spec(need) is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("regard")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="contract suite")
    group.addoption("--seed", type=int, default=None, help="values and places of the laws")
    group.addoption(
        "--expect-missing",
        default=None,
        metavar="A,B",
        help="fail unless exactly these requirements are missing and nothing else was skipped",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires(*needs): skipped where one of them is missing")
    if config.option.seed is None:
        given = getattr(config, "workerinput", {}).get("regard_seed")
        config.option.seed = time.time_ns() // 1_000_000 % 100_000 if given is None else given
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device here")
    if config.pluginmanager.hasplugin("dsession"):  # the controller of pytest-xdist
        config.pluginmanager.register(_SameSeed(), "regard-same-seed")


class _SameSeed:
    """Gives the workers of pytest-xdist the seed of their controller."""

    def pytest_configure_node(self, node) -> None:
        node.workerinput["regard_seed"] = node.config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"regard: --seed {config.option.seed} --device {config.option.device}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs = [need for mark in item.iter_markers("requires") for need in mark.args]
    missing = [need for need in needs if not is_here(need)]
    if missing:
        pytest.skip(f"requires {missing[0]}")


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """A law that turned out to have nothing to check is told as such, not as passed."""
    if report.when == "call" and report.passed and "not applicable" in dict(report.user_properties):
        return "not applicable", "-", "NOT APPLICABLE"
    return None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and complaints(reporter) and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped, spent = _skipped(terminalreporter), _spent(terminalreporter)
    if skipped:
        terminalreporter.section("not run here")
        for reason, count in sorted(skipped.items()):
            terminalreporter.line(f"{count:5d}  {reason}")
    if spent:
        terminalreporter.section("contract, fast tier")
        for card, seconds in sorted(spent.items()):
            terminalreporter.line(f"{seconds:6.1f} CPU-seconds  {card}")
    for complaint in complaints(terminalreporter):
        terminalreporter.line(complaint, red=True)


def complaints(reporter: pytest.TerminalReporter) -> list[str]:
    """What fails the session although no test failed: an unexpected skip, a slow contract."""
    told = []
    expected = reporter.config.option.expect_missing
    if expected is not None:
        wanted = {f"requires {need.strip()}" for need in expected.split(",") if need.strip()}
        found = set(_skipped(reporter))
        told += [f"unexpectedly not run: {reason}" for reason in sorted(found - wanted)]
        told += [f"nothing was skipped for it: {reason}" for reason in sorted(wanted - found)]
    if reporter.config.option.device != "cpu":
        return told  # starting kernels takes other time than computing
    for card, seconds in _spent(reporter).items():
        if seconds > FAST_TIER_SECONDS:
            limit = f"{FAST_TIER_SECONDS:g} CPU-seconds"
            told.append(f"the fast tier of {card} took {seconds:.1f}, more than {limit}")
    return told


def _skipped(reporter: pytest.TerminalReporter) -> Counter[str]:
    counted: Counter[str] = Counter()
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        counted[reason.removeprefix("Skipped: ")] += 1
    return counted


def _spent(reporter: pytest.TerminalReporter) -> dict[str, float]:
    """CPU-seconds per card, from what every fast test of the contract told, in any process."""
    spent: dict[str, float] = defaultdict(float)
    for reports in reporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                told = dict(report.user_properties).get("fast tier")
                if told is not None:
                    spent[told[0]] += told[1]
    return spent


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """Where to run."""
    return pytestconfig.option.device


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """The printed seed."""
    return pytestconfig.option.seed


@pytest.fixture(autouse=True)
def _poisoned_memory(pytestconfig: pytest.Config) -> Iterator[None]:
    """`torch.empty` and its kin give NaN, so that reading what was never written shows.

    torch does so in its deterministic mode, which on a GPU would also change algorithms.
    """
    poison = pytestconfig.option.device == "cpu"
    torch.use_deterministic_algorithms(poison, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
