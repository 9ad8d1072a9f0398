"""Results reach trackio where it is installed: it is not in the tested environment."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from twn_rl.launch.trackers import track_metrics
from twn_rl.runtime.processes import join_processes
join_processes()
track_metrics(["trackio"], Path(sys.argv[1]), {"test/all/always/hit@1": 0.75})
"""


@pytest.mark.distributed
def test_trackio_gets_the_metrics_of_an_evaluation(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is absent")
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    subprocess.run(command, check=True, env=env, timeout=120)
    with sqlite3.connect(tmp_path / "trackio" / "runs.db") as database:
        rows = database.execute("select metrics from metrics").fetchall()
    assert {"evaluation/test/all/always/hit@1": 0.75} in [json.loads(row[0]) for row in rows]
