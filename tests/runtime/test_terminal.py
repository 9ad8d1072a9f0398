"""Words that people wrote do not reach a terminal as commands to it."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

from twn_rl.runtime.terminal import printable

ATTACK = "a\x1b]0;owned\x07b\u202ec\x9b31m\rd\ud800"


def test_only_what_a_terminal_would_obey_is_shown_as_codes() -> None:
    assert printable(ATTACK) == "a\\x1b]0;owned\\x07b\\u202ec\\x9b31m\\rd\\ud800"
    for text in ("two\nlines\tand a tab", "Kamel, ラクダ, 🐪, e\u0301, no\u00a0break", ""):
        assert printable(text) == text


def test_a_report_of_records_and_its_errors_show_codes(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    row = '{"id": "a%d", "source": "\\u001b[31mred", "query": {"text": "q%d"}, "positive": {%s}}\n'
    bad = '"text": "p", "\\u001b[2J": 1'
    path.write_text(row % (1, 1, '"text": "p"') + row % (2, 2, bad))
    script = "from twn_rl.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", script, "check-data", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "\\x1b[31mred" in done.stdout
    assert "\\x1b[2J" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_a_log_line_and_a_traceback_show_codes(capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "import logging, sys\n"
        "from twn_rl.launch.run_folder import set_up_logging\n"
        "set_up_logging()\n"
        "logging.getLogger('a').warning('%s', 'log \\x1b[31m')\n"
        "raise ValueError('error \\x1b[31m')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "\x1b" not in done.stderr
    assert "log \\x1b[31m" in done.stderr
    assert "ValueError: error \\x1b[31m" in done.stderr
    logging.getLogger(__name__).debug("done")
