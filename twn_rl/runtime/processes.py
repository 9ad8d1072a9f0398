"""The processes of a run: joining them, waiting for each other, and refusing launches that lie.

A launcher (accelerate, torchrun) announces processes in environment variables; accelerate reads
some combinations of them as something else than what was asked for, silently. Here they are read
once, checked against the machine, and held.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

logger = logging.getLogger(__name__)
T = TypeVar("T")

COLLECTIVE_TIMEOUT_SECONDS = 1800  # as transformers' ddp_timeout
RESTARTED = "restarted"  # name of a rendezvous
# A process may wait while another one verifies a million pictures or embeds a catalogue.
WAIT_TIMEOUT = timedelta(days=7)


class Processes(Protocol):
    """What a shared pass needs of the processes of a run; `RunProcesses` has it."""

    @property
    def process_index(self) -> int:
        """This process's number, 0 is the main process."""
        ...

    @property
    def num_processes(self) -> int:
        """How many processes work together."""
        ...

    def wait_for_everyone(self) -> None:
        """Wait until all processes are here."""


class RunProcesses:
    """All processes of this run, seen from one of them; alone, it is the only one.

    Waiting goes through a group of its own, so that long work of one process does not run into the
    time-out that tells a dead process from a slow collective in training.
    """

    _waiting: Any = None

    @property
    def process_index(self) -> int:
        """This process's number, 0 is the main process."""
        return PartialState().process_index

    @property
    def num_processes(self) -> int:
        """How many processes work together."""
        return PartialState().num_processes

    @property
    def distributed_type(self) -> str:
        """What accelerate makes of them, such as "DEEPSPEED" or "NO"."""
        return str(PartialState().distributed_type).rpartition(".")[2]

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that reports and writes what is shared."""
        return PartialState().is_main_process

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        device = PartialState().device
        assert device is not None  # only before the processes have been joined
        return device

    def wait_for_everyone(self) -> None:
        """Wait until all processes are here, up to `WAIT_TIMEOUT`."""
        if self.num_processes > 1:
            dist.barrier(group=RunProcesses._waiting)

    def sharers(self) -> list[Processes]:
        """Return who may share work whose results lie on disk, to be asked one after the other.

        All processes do, if there are several; then those of each machine, for what they do not see
        of the others' work because the disk is their machine's own.
        """
        if self.num_processes == 1:
            return []
        machine = MachineProcesses()
        return [self, machine] if machine.num_processes < self.num_processes else [self]

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Run the body on one process of each machine, then on its others.

        The others find what the first left on disk. Every process must enter.
        """
        is_first = PartialState().is_local_main_process
        if not is_first:
            self.wait_for_everyone()
        yield
        if is_first:
            self.wait_for_everyone()


class MachineProcesses(RunProcesses):
    """The processes of this run on this machine."""

    @property
    def process_index(self) -> int:
        """This process's number on its machine."""
        return PartialState().local_process_index

    @property
    def num_processes(self) -> int:
        """How many the launcher has started on this machine; 1 if it does not say."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def wait_for_everyone(self) -> None:
        """Wait until all processes of the run are here."""
        RunProcesses().wait_for_everyone()


def wait(processes: Processes | None) -> None:
    """Wait for the other processes, if there are any."""
    if processes is not None:
        processes.wait_for_everyone()


def is_main(processes: Processes | None) -> bool:
    """Return whether this process shows progress and changes what is shared."""
    return processes is None or processes.process_index == 0


def gather_objects(mine: T) -> list[T]:
    """Return what every process brings, by process; like waiting, it has no time-out."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=RunProcesses._waiting)
    return everyone


def on_all_processes(work: Callable[[], T]) -> list[T]:
    """Return what `work` returned on each process, by process; a failure on one is raised on all.

    Raises:
        RuntimeError: If another process failed; on that one, its own exception.
    """
    problem: Exception | None = None
    mine: tuple[T | None, str | None]
    try:
        mine = work(), None
    except Exception as error:  # the others wait for this process: all must hear of it
        problem, mine = error, (None, f"process {_rank()}: {error}")
    everyone = gather_objects(mine)
    if problem is not None:
        raise problem
    if failures := [failure for _, failure in everyone if failure is not None]:
        raise RuntimeError("; ".join(failures))
    return [cast(T, result) for result, _ in everyone]


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(mine: Tensor, counts: Sequence[int]) -> Tensor:
    """Return every process's rows (N, ...) one below the other, in the order of the processes.

    Every process must call this, with tensors of one type and one width.

    Args:
        mine: (counts[this process], ...), on the device that the processes talk through.
        counts: Rows of each process.
    """
    if len(counts) == 1:
        return mine
    padded = mine.new_zeros(max(counts), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def join_processes(
    *, use_cpu: bool = False, timeout_seconds: int = COLLECTIVE_TIMEOUT_SECONDS
) -> RunProcesses:
    """Join the processes that a launcher has announced; the first call decides, later ones return.

    accelerate alone would leave CPU processes started by torchrun on their own, and would skip
    DeepSpeed on a machine without accelerator: the run would be plain data parallel, unsharded,
    whatever the launch file says.

    Args:
        use_cpu: Leave accelerators alone.
        timeout_seconds: Of one collective operation in training.

    Raises:
        ValueError: If the launch does not fit the machine, see `check_launch`.
    """
    if PartialState._shared_state:
        _open_waiting_room()
        return RunProcesses()
    wants_cpu = use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    check_launch(use_cpu=wants_cpu)
    meeting: dict[str, Any] = {"timeout": timedelta(seconds=timeout_seconds)}
    if is_restarted_in_one_store():
        meeting["init_method"] = f"{RESTARTED}://"
    has_accelerator = torch.accelerator.is_available() and not wants_cpu
    if is_deepspeed_launch() and not has_accelerator:
        # Both would make accelerate take the run for a plain CPU one.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        PartialState(cpu=False, backend="gloo", **meeting)
    else:
        PartialState(cpu=not has_accelerator, **meeting)
    _open_waiting_room()
    return RunProcesses()


def _open_waiting_room() -> None:
    if PartialState().num_processes > 1 and RunProcesses._waiting is None:
        RunProcesses._waiting = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)


def is_restarted_in_one_store() -> bool:
    """Return whether a launcher has restarted its processes and they meet where the dead ones did.

    torch's launchers keep one store for all attempts. In it are the addresses of the attempt
    before, at which nobody answers.
    """
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return is_shared and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _meet_again(url: str, timeout: timedelta, **options: Any) -> Iterator[Any]:
    """Yield what torch's own rendezvous does, in a part of the store that is this attempt's."""
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    for store, rank, size in rendezvous("env://", timeout=timeout, **options):
        part = dist.PrefixStore(f"attempt-{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
        yield part, rank, size


register_rendezvous_handler(RESTARTED, _meet_again)


def is_deepspeed_launch() -> bool:
    """Return whether the launcher asked for DeepSpeed."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def launch_precision() -> str | None:
    """Return the launch file's mixed precision, "bf16", "fp16" or "no"; None if none was asked."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def check_launch(*, use_cpu: bool) -> None:
    """Refuse a launch that does not fit the machine, before anything is loaded.

    A launch file for CPUs on a machine with GPUs runs on the CPU, with a warning.

    Args:
        use_cpu: Whether accelerators are to be left alone.

    Raises:
        ValueError: With every problem: FSDP, DeepSpeed without a launcher, more processes than
            accelerators, or a launch file for GPUs on a machine without.
    """
    problems = []
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        problems.append(
            "distributed_type = FSDP, expected DEEPSPEED: two adapters on one frozen backbone are "
            "read and saved outside of FSDP's forward, where its parameters are empty; shard with "
            "recipes/accelerate/zero2.yaml or zero3.yaml"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    hides = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # as the files for CPUs do
    count = 0 if use_cpu or hides else torch.accelerator.device_count()
    if is_deepspeed_launch():
        if "LOCAL_RANK" not in os.environ:
            problems.append(
                "DeepSpeed without a launcher, expected accelerate launch or torchrun, also for "
                "one process; start the recipe with one of them"
            )
        if not count and not (use_cpu or hides):
            problems.append(
                "DeepSpeed was launched with a file for GPUs and this machine has none; expected "
                "at least one GPU; take recipes/accelerate/zero2_cpu.yaml or zero3_cpu.yaml, or "
                "set gpu_ids: '' in your own file"
            )
        elif 0 < count < local:
            problems.append(
                f"num_processes = {local} on a machine with {count} GPUs, expected at most "
                f"{count}: two processes of one GPU would wait for each other for ever; pass "
                f"--num_processes {count} to accelerate launch"
            )
        elif not count and has_hidden_gpu():
            logger.warning(
                "This machine has GPUs, which the launch file hides (gpu_ids: ''), so that the run "
                "stays on the CPU; take recipes/accelerate/zero2.yaml or zero3.yaml to use them"
            )
    if problems:
        raise ValueError("launch: " + "; ".join(problems))


def has_hidden_gpu() -> bool:
    """Return whether the machine has an NVIDIA GPU that this process may not see."""
    return os.path.exists("/dev/nvidia0")


def check_engaged(trainer: Any) -> None:
    """Refuse to train when DeepSpeed was asked for and accelerate did something else.

    Raises:
        RuntimeError: If the accelerator's distributed type is not DeepSpeed.
    """
    asked = is_deepspeed_launch() or bool(trainer.args.deepspeed)
    found = trainer.accelerator.distributed_type
    if asked and found != DistributedType.DEEPSPEED:
        raise RuntimeError(
            f"DeepSpeed was asked for and accelerate runs {found}; expected "
            f"{DistributedType.DEEPSPEED}; unset ACCELERATE_USE_CPU, leave use_cpu at false and "
            "make PartialState through twn_rl.runtime.processes.join_processes"
        )
