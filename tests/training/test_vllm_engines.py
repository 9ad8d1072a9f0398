"""What can be said of vLLM's engines without vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from twn_rl.training.vllm_engines import _default_group_kept


def test_closing_vllm_ends_its_groups_and_not_that_of_the_run(tmp_path: Path) -> None:
    meeting = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        check_groups()
    finally:
        dist.destroy_process_group()


def check_groups() -> None:
    own: Any = dist.new_group([0])
    with _default_group_kept():  # as vLLM ends them
        dist.destroy_process_group(own)
        dist.destroy_process_group()
        dist.destroy_process_group(dist.group.WORLD)
    assert dist.is_initialized()
    dist.barrier()
    with pytest.raises(KeyError):
        dist.get_process_group_ranks(own)
