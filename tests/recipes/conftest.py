"""Fixtures of comparisons."""

import json
import sys
from pathlib import Path

import pytest
from comparison_runs import Launched


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Let `accelerate launch` be a program that leaves its recipe and flags in a file."""
    log, program, starter = (tmp_path / name for name in ("launched", "program.py", "python"))
    program.write_text(
        "import json, os, sys\n"
        "place = max(n for n, word in enumerate(sys.argv) if word == '-m')\n"
        "recipe = sys.argv[place + 1].removeprefix('twn_rl.recipes.')\n"
        f"with open({str(log)!r}, 'a') as file:\n"
        "    file.write(json.dumps([recipe, *sys.argv[place + 2:]]) + '\\n')\n"
        "print('a line of the recipe on', os.environ.get('OMP_NUM_THREADS'), 'threads')\n"
        "sys.exit('--seed=13' in sys.argv)\n",
        encoding="utf-8",
    )
    starter.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n', encoding="utf-8")
    starter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(starter))

    def read() -> list[list[str]]:
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return read
