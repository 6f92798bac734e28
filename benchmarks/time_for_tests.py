"""A plugin of pytest for `make gpu`: tests that begin when no time is left are skipped.

    SECONDS_FOR_TESTS=160 python -m pytest -p time_for_tests

Seconds are counted from the start of pytest, which names what was left out at its end.
"""

from __future__ import annotations

import os

import pytest

from allowance import Allowance

LEFT_OUT = "left out: "
"""What lines begin with that name a test."""


class TimeForTests:
    """Skips what is left once ``allowance`` is over."""

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if not self.allowance.allows(item.nodeid):
            pytest.skip("no time was left")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name in self.allowance.left_out:
            terminalreporter.write_line(f"{LEFT_OUT}{name}")


def pytest_configure(config: pytest.Config) -> None:
    allowance = Allowance(float("inf"))
    allowance.end = allowance.clock() + float(os.environ["SECONDS_FOR_TESTS"])
    config.pluginmanager.register(TimeForTests(allowance))
