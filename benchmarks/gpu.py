"""What this project does on a GPU, and how fast: a battery of parts in a given time.

    python benchmarks/gpu.py --minutes 9
    python benchmarks/gpu.py --minutes 2 --parts machine warm_start
    python benchmarks/gpu.py --device cpu --tiny --minutes 2

Qwen3-VL-2B of random weights in bfloat16 under its ready configurations, and the embedded demo; no
network. Every part runs in a process of its own, so that one that fails or runs out of memory or
time leaves the others alone, and memory is measured from nothing. Figures are written down as they
come: `gpu.json` and `gpu.md` in the folder of `--out` are always whole, and keep what was measured
when time runs out. `parts/NAME.log` has what a part printed.

Exit status: 0 if every part is done (vLLM may be absent), 1 if one failed, 3 if time ran out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "pyarrow")
PACKAGES += ("deepspeed", "vllm", "torchvision", "numpy", "pillow", "huggingface-hub")
TOLD_AT = 1.0  # seconds between two looks at what a part has told


@dataclass(frozen=True)
class Slot:
    """When a part runs: the most important first.

    Attributes:
        seconds: Most that it may take of nine minutes; of other times as much of them.
        needs: Package without which it is left out, and nothing is wrong.
    """

    seconds: int
    needs: str | None = None


# What is expected to take half of its time; the sum is more than there is.
SLOTS = {
    "machine": Slot(30),
    "warm_start": Slot(90),
    "grpo": Slot(110),
    "encode": Slot(90),
    "gate_labels": Slot(80),
    "chunks": Slot(110),
    "zero2": Slot(80),
    "resume": Slot(80),
    "grpo_vllm": Slot(90, needs="vllm"),
    "demo": Slot(80),
}
OUT_OF_TIME = ("out of time", "not started")


def main() -> int:
    """Run the parts and return the exit status."""
    options = parse()
    started = time.monotonic()
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    (options.out / "parts").mkdir(parents=True, exist_ok=True)
    # Parts are forked from a process that has imported everything and never touched a GPU.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["gpu_parts"])
    imported = processes.Process(target=nothing)
    imported.start()
    imported.join(60 * options.minutes)
    battery: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": " ".join(sys.argv),
        "versions": versions(),
        "parts": {name: {"state": "not started"} for name in options.parts},
    }
    for name in options.parts:
        needs, left = SLOTS[name].needs, 60 * options.minutes - (time.monotonic() - started)
        if needs is not None and importlib.util.find_spec(needs) is None:
            battery["parts"][name] = {"state": "absent", "error": f"{needs} is not installed"}
        elif left < 1:
            battery["parts"][name] = {"state": "not started", "error": "no time was left"}
        else:
            limit = min(left, SLOTS[name].seconds * options.minutes / 9)
            run(processes, name, limit, options, battery)
        write(options.out, battery)
        if name == "machine" and battery["parts"][name]["state"] == "failed":
            break  # no device, or not its drivers: nothing else could run
    battery["seconds"] = round(time.monotonic() - started, 1)
    write(options.out, battery)
    print((options.out / "gpu.md").read_text(encoding="utf-8"))
    states = {part["state"] for part in battery["parts"].values()}
    return 1 if "failed" in states else 3 if states.intersection(OUT_OF_TIME) else 0


def nothing() -> None:
    """Be a process that has come to life: everything is imported."""


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="two layers, for tests")
    parser.add_argument("--parts", nargs="+", choices=list(SLOTS), default=list(SLOTS))
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder of figures")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes = {options.minutes}, expected > 0")
    options.out = options.out.resolve()
    return options


def versions() -> dict[str, str]:
    """Return what is installed, by package."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run(
    processes: Any, name: str, limit: float, options: argparse.Namespace, battery: dict[str, Any]
) -> None:
    """Run one part for at most `limit` seconds, and write down what it tells meanwhile."""
    figures_file, started = options.out / "parts" / f"{name}.json", time.monotonic()
    figures_file.unlink(missing_ok=True)
    arguments = (name, options.device, options.tiny, str(options.out / "parts"))
    process = processes.Process(target=work, args=arguments, name=name)
    process.start()
    print(f"{name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
    state = "running"
    while state == "running":
        process.join(TOLD_AT)
        seconds = time.monotonic() - started
        if process.exitcode is not None:
            state = "done" if process.exitcode == 0 else "failed"
        elif seconds > limit:
            end(process.pid)
            process.join()
            state = "out of time"
        part = {"state": state, "seconds": round(seconds, 1), "limit_seconds": round(limit, 1)}
        part |= json.loads(figures_file.read_text("utf-8")) if figures_file.exists() else {}
        if state == "failed" and "error" not in part:
            part["error"] = f"its process ended with {process.exitcode}, see parts/{name}.log"
        battery["parts"][name] = part
        write(options.out, battery)


def end(pid: int) -> None:
    """End a part and what it has started; its process leads a group of its own."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to that yet
        os.kill(pid, signal.SIGKILL)


def work(name: str, device: str, is_tiny: bool, folder: str) -> None:
    """Be the process of one part: run it, and tell the error if there is one."""
    os.setsid()
    log = os.open(Path(folder) / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    bench = None
    try:
        import gpu_parts
        import gpu_sizes
        import torch

        sizes = gpu_sizes.TINY if is_tiny else gpu_sizes.Sizes()
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        bench = gpu_sizes.Bench(sizes, torch.device(device), own, Path(folder) / f"{name}.json")
        gpu_parts.PARTS[name](bench)
    except Exception as error:
        traceback.print_exc()
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if bench is not None:
            bench.tell(error=told, **bench.peak("peak_at_error"))
        else:
            Path(folder, f"{name}.json").write_text(json.dumps({"error": told}), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def write(out: Path, battery: dict[str, Any]) -> None:
    """Write JSON and table, each whole."""
    for name, text in (("gpu.json", json.dumps(battery, indent=1)), ("gpu.md", table(battery))):
        aside = out / f".{name}"
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(out / name)


def table(battery: dict[str, Any]) -> str:
    """Return the battery as Markdown: a line of what it ran on, and a row a part."""
    installed = ", ".join(f"{name} {version}" for name, version in battery["versions"].items())
    lines = [f"{battery['started']}, `{battery['command']}`: {installed}.", ""]
    lines += ["| part | state | seconds | figures |", "| --- | --- | ---: | --- |"]
    for name, part in battery["parts"].items():
        figures = [
            f"{key.replace('_', ' ')} {shown(value)}"
            for key, value in part.items()
            if key not in ("state", "seconds", "limit_seconds")
        ]
        cells = [name, part["state"], str(part.get("seconds", "")), "; ".join(figures)]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Return a figure with three or more digits that say something."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
