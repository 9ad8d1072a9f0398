"""The tally each campaign counts into, and the table at the end of the run."""

import pytest

from hostile.table import PROPERTY, Tally, table_lines


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Return the verdicts of this test, which the table at the end of the run counts."""
    return Tally(request.node)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what became of all hostile cases of the run."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    verdicts = [
        (value[0], value[1])
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if verdicts:
        terminalreporter.section("hostile cases")
        for line in table_lines(verdicts):
            terminalreporter.write_line(line)
