"""MMEB-V2: 36 image, 18 video and 24 visual document tasks, with and without thinking.

    accelerate launch recipes/eval_embed.py --benchmark mmeb_v2 --data_root MMEB-V2 --model DIR
    accelerate launch recipes/eval_embed.py --benchmark mmeb_v2 --data_root MMEB-V2 --model DIR \
        --tasks I-QA V-CLS ViDoSeek-page --think auto --threshold_sweep OK-VQA MSVD

DATA_ROOT is a download of TIGER-Lab/MMEB-V2, unpacked, with the annotations of each task as clones
of their repositories in it (ORG/NAME) or inside image-tasks, video-tasks and visdoc-tasks. Writes
for each task GROUP/TASK_score.json (the same from any number of processes), _pred.jsonl and
_cost.json, then summary.json, scores.md and leaderboard.json. A second call goes on where the first
one stopped. A task with bad data costs its own score only; the exit code is then 1.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from twn_rl.evaluation.mmeb_v2.leaderboard import TABLE_FILE, write_reports
from twn_rl.evaluation.mmeb_v2.loaders import check_data
from twn_rl.evaluation.mmeb_v2.run_tasks import RunReport, run_tasks
from twn_rl.evaluation.mmeb_v2.sweep import sweep_thresholds
from twn_rl.evaluation.mmeb_v2.task_files import BenchmarkFolder
from twn_rl.evaluation.mmeb_v2.tasks import LABEL_SETS, load_tasks, select_tasks
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.launch.program import start
from twn_rl.launch.run_folder import owned_run, save_run, set_up_logging
from twn_rl.runtime.problems import Problems
from twn_rl.runtime.processes import join_processes

logger = logging.getLogger(__name__)

BENCHMARK = "mmeb_v2"


@dataclass
class MmebScriptArguments:
    """What to measure, on which data, and where results go."""

    model: str = field(metadata={"help": "Model to measure."})
    data_root: str = field(metadata={"help": "Unpacked download of TIGER-Lab/MMEB-V2."})
    benchmark: str = field(default=BENCHMARK, metadata={"help": "This benchmark."})
    annotation_root: str | None = field(
        default=None, metadata={"help": "Folder of the annotations; default: data_root."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where results go; default: MODEL/mmeb_v2/THINK_LABELSET."}
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks, meta-tasks (I-QA) or groups (image); default: all 78."},
    )
    task_file: str | None = field(
        default=None, metadata={"help": "CSV that overrides cells of the table of tasks."}
    )
    label_set: str = field(
        default="page-fixed",
        metadata={"help": "page-fixed, or original: labels of ViDoSeek-page and MMLongBench-page."},
    )
    think: str = field(
        default="auto", metadata={"help": "When queries think: auto (the gate), always, never."}
    )
    think_threshold: float | None = field(
        default=None,
        metadata={"help": "Gate probability above which to think; default: the model's."},
    )
    max_think_tokens: int | None = field(
        default=None, metadata={"help": "Longest thought in tokens; default: the model's."}
    )
    threshold_sweep: list[str] | None = field(
        default=None, metadata={"help": "Tasks to draw quality against cost for; default: none."}
    )
    batch_size: int = field(default=32, metadata={"help": "Items a forward."})
    shard_size: int = field(default=64, metadata={"help": "Rows between two writes."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "Parameter type, such as bfloat16; default: the stored one."},
    )
    cot_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps thoughts; default: none is kept."}
    )
    on_missing_data: str = field(
        default="raise", metadata={"help": "raise, or skip tasks whose files are not there."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Measure anew what is there."})
    model_name: str | None = field(
        default=None, metadata={"help": "Name on the leaderboard; default: the model's folder."}
    )
    seed: int = field(default=0, metadata={"help": "Of whatever is random; scoring is not."})

    def __post_init__(self) -> None:
        """Collect every problem of the settings into one error."""
        problems = Problems()
        for name, allowed in {
            "benchmark": (BENCHMARK,),
            "label_set": LABEL_SETS,
            "on_missing_data": ("raise", "skip"),
        }.items():
            value = getattr(self, name)
            problems.unless(value in allowed, f"{name} = {value!r}, expected one of {allowed}")
        try:
            self.encode_settings()
        except ValueError as error:
            problems.append(str(error))
        problems.refuse("MmebScriptArguments", "change these settings")

    def encode_settings(self) -> EncodeSettings:
        """Return how items become vectors."""
        return EncodeSettings(
            think=self.think,  # pyright: ignore[reportArgumentType]  (checked there)
            think_threshold=self.think_threshold if self.think == "auto" else None,
            max_think_tokens=self.max_think_tokens,
            batch_size=self.batch_size,
            shard_size=self.shard_size,
            dtype=self.dtype,
        )


def main(script: MmebScriptArguments) -> RunReport:
    """Measure, write the reports, and return what became of the tasks."""
    set_up_logging()
    set_seed(script.seed)
    state = join_processes()

    # Tasks and data
    table = load_tasks(script.task_file)
    tasks = select_tasks(table, script.tasks)
    swept = select_tasks(table, script.threshold_sweep) if script.threshold_sweep else []
    root = Path(script.data_root)
    labels = script.label_set
    folder = BenchmarkFolder(root, Path(script.annotation_root or root), labels)  # pyright: ignore[reportArgumentType]
    every = list({task.task: task for task in [*tasks, *swept]}.values())
    missing = check_data(every, folder, skip_missing=script.on_missing_data == "skip")
    name = f"{script.think}_{labels}"
    output = Path(script.output_dir or Path(script.model) / "mmeb_v2" / name)

    with owned_run(output):
        # Model
        save_run(output, script)
        embedder = ThinkingEmbedder.from_pretrained(
            script.model,
            device=state.device,
            dtype=script.dtype,
            cot_cache_dir=script.cot_cache_dir,
        )

        # Scores
        report = run_tasks(
            embedder,
            [task for task in tasks if task.task not in missing],
            folder,
            output,
            script.encode_settings(),
            averaged_with=list(table.values()),
            overwrite=script.overwrite,
            processes=state,
        )
        report.failed |= missing
        if swept:
            there = [task for task in swept if task.task not in {*missing, *report.failed}]
            report.failed |= sweep_thresholds(
                embedder, there, folder, output, script.encode_settings(), processes=state
            )

        # Reports
        if state.is_main_process:
            write_reports(output, list(table.values()), metadata(script, embedder))
            print((output / TABLE_FILE).read_text(encoding="utf-8"))
            print(report)
        state.wait_for_everyone()
    return report


def metadata(script: MmebScriptArguments, embedder: ThinkingEmbedder) -> dict[str, object]:
    """Return what the leaderboard wants to know; what cannot be known here is None."""
    parameters = sum(p.numel() for p in embedder.model.parameters())
    return {
        "model_name": script.model_name or Path(script.model).resolve().name,
        "model_backbone": embedder.model.config.backbone,
        "model_size": f"{parameters / 1e9:.3g}B parameters",
        "embedding_dimension": embedder.get_embedding_dimension(),
        "max_length_tokens": embedder.max_seq_length,
        "model_release_date": None,
        "data_source": "Self-Reported",
        "url": None,
        "think": script.think,
    }


def run() -> int:
    """Measure as the flags say; return 1 if any task failed, 0 otherwise."""
    return bool(start(main, (MmebScriptArguments,), description=__doc__).failed)


if __name__ == "__main__":
    sys.exit(run())
