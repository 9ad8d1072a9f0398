"""A disk that fills up is told in one line, with what is needed; what was there stays."""

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from made_records import picture_records
from safetensors.torch import save_file
from short_runs import SHORT_RUN, small_model

from twn_rl.modeling.checkpoint import save_model
from twn_rl.runtime.whole_files import (
    full_disk_told,
    write_array,
    write_json,
    write_json_lines,
    written_aside,
)
from twn_rl.training.sft import SftConfig, SftTrainer
from twn_rl.training.whole_checkpoints import newest_whole

LIMIT = 4000
TOLD = r"no room on the disk, or beyond its limits: .* needed, [\d,.]+ MB free; expected enough"


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Let no file become larger than `size` bytes, as on a disk with no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_tensors(path: Path) -> None:
    with written_aside(path) as aside:
        save_file({"a": torch.zeros(LIMIT)}, aside)


def write_pickle(path: Path) -> None:
    with full_disk_told(path, 4 * LIMIT):
        torch.save(torch.zeros(LIMIT), path.with_suffix(".tmp"))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_json(path, ["word"] * LIMIT),
        lambda path: write_json_lines(path, [["word"] * LIMIT]),
        lambda path: write_array(path, np.zeros((LIMIT, 2))),
        write_tensors,
        write_pickle,
    ],
)
def test_any_file_says_that_there_is_no_room_and_stays(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with at_most(LIMIT), pytest.raises(OSError, match=TOLD) as error:
        write(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_text() == "before"
    with pytest.raises(ValueError, match="something else"), full_disk_told(path):
        raise ValueError("something else")


def test_a_model_stays_when_the_next_one_does_not_fit(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "model")
    before = contents(tmp_path)
    with at_most(LIMIT), pytest.raises(OSError, match=TOLD):
        save_model(small_model(seed=1), tmp_path / "model")
    assert contents(tmp_path) == before


def test_a_checkpoint_that_does_not_fit_is_removed_and_the_run_goes_on_later(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    records = picture_records(tmp_path / "data")
    settings = {**SHORT_RUN, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    output = tmp_path / "run"

    def train(steps: int, resume: Path | None = None) -> SftTrainer:
        args = SftConfig(output_dir=str(output), **{**settings, "max_steps": steps})
        trainer = SftTrainer(small_model(), args, records)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    train(1)
    before = contents(output / "checkpoint-1")
    with at_most(LIMIT), pytest.raises(OSError, match=TOLD) as error:
        train(2, output / "checkpoint-1")
    assert f"{output / 'checkpoint-2'}: no room" in str(error.value)
    needed = float(str(error.value).split("about ")[1].split(" MB")[0]) * 1e6
    assert contents(output / "checkpoint-1") == before
    assert not (output / "checkpoint-2").exists()
    trainer = train(2, newest_whole(output))
    assert trainer.state.global_step == 2
    taken = sum(map(len, contents(output / "checkpoint-2").values()))
    assert 0.5 * taken < needed < 2 * taken
    with at_most(LIMIT), pytest.raises(OSError, match=TOLD):
        trainer.save_model(str(output))
    shutil.rmtree(output / "checkpoint-1")
    assert newest_whole(output) == output / "checkpoint-2"
