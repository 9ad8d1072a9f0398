"""Files appear whole or not at all; one run at a time owns an output."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from twn_rl.runtime.whole_files import owned, read_json, write_json, write_json_lines, written_aside

OWNER = """
import sys, time
from pathlib import Path
from twn_rl.runtime.whole_files import owned
path, begin = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0.0, begin - time.time()))
try:
    with owned(path):
        for word in ("in", "out"):
            with (path.parent / "owners").open("a") as file:
                file.write(word + " ")
            time.sleep(0.2)
except ValueError:
    sys.exit(3)
"""


def test_a_body_that_raises_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_json_lines(path, [{"x": 1}])

    def rows() -> Iterator[dict[str, int]]:
        yield {"x": 2}
        raise KeyError("broken")

    with pytest.raises(KeyError):
        write_json_lines(path, rows())
    assert json.loads(path.read_text()) == {"x": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        with written_aside(folder) as aside:
            aside.mkdir()
            (aside / "half").touch()
            raise KeyError("killed")

    with pytest.raises(KeyError):
        half(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    with written_aside(tmp_path / "model") as aside:
        aside.mkdir()
        write_json(aside / "config.json", 3)
    assert read_json(tmp_path / "model" / "config.json") == 3


def test_what_a_killed_run_left_is_removed_by_the_next_owner(tmp_path: Path) -> None:
    path = tmp_path / "vectors"
    path.mkdir()
    (path / "whole.json").touch()
    (path / ".half.json.1.tmp").touch()
    (tmp_path / ".vectors.1.tmp").mkdir()
    (tmp_path / ".vectors.lock").touch()
    with owned(path):
        assert [entry.name for entry in path.iterdir()] == ["whole.json"]
        with pytest.raises(ValueError, match="being written by another run"), owned(path):
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["vectors"]


@pytest.mark.slow
def test_of_processes_that_start_together_one_owns_the_output(tmp_path: Path) -> None:
    begin = str(time.time() + 3)
    runs = [
        subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path / "out.npy"), begin])
        for _ in range(8)
    ]
    codes = [run.wait(timeout=120) for run in runs]
    # A process that came after another had ended may own it, too; no two at a time.
    assert (tmp_path / "owners").read_text().split() == ["in", "out"] * codes.count(0)
    assert codes.count(0) >= 1
    assert codes.count(3) == 8 - codes.count(0)


def test_a_lock_does_not_live_on_in_the_workers_of_a_killed_run(tmp_path: Path) -> None:
    script = """
import os, signal, sys, time
from pathlib import Path
from twn_rl.runtime.whole_files import owned
with owned(Path(sys.argv[1])):
    begun, begin = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(begin, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(begun, 1)
    print(worker, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "run"
    with (tmp_path / "worker").open("w") as out:
        command = [sys.executable, "-c", script, str(path)]
        done = subprocess.run(command, stdout=out, check=False)
    worker = int((tmp_path / "worker").read_text())
    try:
        assert done.returncode == -signal.SIGKILL
        os.kill(worker, 0)  # it is still there
        with owned(path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_fork_leaves_its_parents_lock_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with owned(path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(ValueError, match="being written by another run"), owned(path):
            pass
