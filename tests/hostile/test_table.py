"""The table itself: what is counted where, and that a case that was not handled fails its test."""

import pytest

from hostile.table import Tally, Verdict, table_lines


def test_a_table_has_a_row_for_each_group_and_one_for_all() -> None:
    verdicts = [("texts", "handled"), ("texts", "silent"), ("configs", "handled")]
    assert table_lines(verdicts) == [
        "| group | tried | handled | silent | escaped | lost | mixed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| configs | 1 | 1 | 0 | 0 | 0 | 0 |",
        "| texts | 2 | 1 | 1 | 0 | 0 | 0 |",
        "| all | 3 | 2 | 1 | 0 | 0 | 0 |",
    ]


def test_a_case_that_is_not_handled_fails_its_test(request: pytest.FixtureRequest) -> None:
    node = request.node
    before = list(node.user_properties)
    tally = Tally(node)
    tally.add("texts", "NUL", Verdict.HANDLED)
    tally.check(at_least=1)
    with pytest.raises(AssertionError, match="expected at least 2"):
        tally.check(at_least=2)
    tally.add("texts", "seed 3", Verdict.LOST, "the file is gone")
    with pytest.raises(AssertionError, match="texts: seed 3: lost: the file is gone"):
        tally.check(at_least=2)
    node.user_properties[:] = before  # these cases were no cases


@pytest.mark.campaign
def test_campaigns_run_on_request_only(request: pytest.FixtureRequest) -> None:
    assert request.config.getoption("campaign")
