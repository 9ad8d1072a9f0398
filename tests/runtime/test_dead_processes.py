"""What is left of a run ends when one of its processes is gone, instead of waiting for it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PROCESS = """
import os, signal, sys, time
import torch
import torch.distributed as dist
from twn_rl.runtime.processes import gather_objects, join_processes

processes = join_processes(use_cpu=True, timeout_seconds=3)
processes.wait_for_everyone()
if processes.process_index == 1:
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
started = time.monotonic()
try:
    if sys.argv[2] == "training":
        dist.all_reduce(torch.ones(1))
    else:
        gather_objects(None)  # may last for days while the other one lives
except RuntimeError:
    print(time.monotonic() - started)
"""


@pytest.mark.parametrize(
    ("gone_by", "where"), [("SIGKILL", "waiting"), ("SIGKILL", "training"), ("SIGSTOP", "training")]
)
def test_the_others_end_when_a_process_is_gone(gone_by: str, where: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, gone_by, where],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        told = processes[0].communicate(timeout=60)[0]
        # A killed one is noticed at once, a frozen one after the time-out of training.
        assert float(told) < 2.0 if gone_by == "SIGKILL" else 2.0 < float(told) < 10.0
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
