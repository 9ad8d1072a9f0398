"""One process of a distributed run of every trainer; tests/test_zero.py launches it.

Every first half of a global batch has pictures in queries and targets, every second half has none,
so that of two processes one has pictures and the other has not. What happened goes to JSON.
"""

import argparse
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from made_records import picture
from save_kills import KillPoints
from short_runs import small_model
from torch import Tensor
from transformers import TrainerCallback

from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import RecordSet, load_records, write_records
from twn_rl.evaluation.validation import Validation
from twn_rl.launch.run_folder import (
    checkpoint_to_resume,
    owned_run,
    set_up_logging,
    train_and_save,
)
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, set_trainable
from twn_rl.modeling.backbone import whole_parameters
from twn_rl.modeling.config import LoraSettings
from twn_rl.modeling.model import DualLoraModel
from twn_rl.rewards import REWARDS
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.zero import is_sharded
from twn_rl.training.adapter_trainer import AdapterCheckpoints
from twn_rl.training.adaptive import ADAPTIVE_COLUMNS, AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from twn_rl.training.grpo import (
    ROLLOUT_COLUMNS,
    EmbedGRPOConfig,
    EmbedGRPOTrainer,
    freeze_scorer,
    place_scorer,
)
from twn_rl.training.latent import LatentConfig, LatentTrainer
from twn_rl.training.reward_loading import load_rewards
from twn_rl.training.rollout_scorer import RolloutScorer, embed_items
from twn_rl.training.sft import SftConfig, SftTrainer
from twn_rl.training.similarity_columns import SCORING_COLUMNS
from twn_rl.training.trl_hooks import HookedGRPOTrainer

BATCH = 8
GENERATIONS = 4
STEPS = 4
KILLED_AT = 3
WORDS = ("camel", "pizza", "zebra", "tree")
SIDES = ("left", "right", "above", "below")


def write_data(folder: Path) -> tuple[RecordSet, RecordSet]:
    """Return records in the order of the warm start's batches, and in that of RL's groups."""
    with_pictures, without = [], []
    for i in range(16):
        for name in (f"scene{i}", f"object{i}"):
            picture(100 * i + len(name)).save(folder / f"{name}.png")
        word = Item(text=f"{WORDS[i % 4]} {SIDES[i // 4]}")
        shared: dict[str, Any] = {
            "source": "test",
            "query_cot": f"{WORDS[i % 4]} {SIDES[i // 4]}",
            "negatives": (Item(text=f"row {SIDES[i % 4]}"),),
            "metadata": {"pool": "all", "caption": f"{WORDS[i % 4]}"},
        }
        scene = Item("find the object", f"{SIDES[i % 4]} of", (f"scene{i}.png",))
        target = Item(images=(f"object{i}.png",))
        with_pictures.append(Record(id=f"p{i}", query=scene, positive=target, **shared))
        question = Item("which object is it", f"{WORDS[i // 4]} {SIDES[i % 4]}")
        without.append(Record(id=f"t{i}", query=question, positive=word, **shared))
    half = BATCH // 2
    batches = [
        record
        for start in range(0, 16, half)
        for record in (*with_pictures[start : start + half], *without[start : start + half])
    ]
    groups = [record for pair in zip(with_pictures, without, strict=True) for record in pair]
    write_records(folder / "batches.jsonl", batches)
    write_records(folder / "groups.jsonl", groups)
    return load_records(folder / "batches.jsonl"), load_records(folder / "groups.jsonl")


class FixedRollouts(HookedGRPOTrainer):
    """Mixin: TRL generates for real, then the thoughts are those of a table, on any layout."""

    def edit_completions(
        self, prompt_ids: list[list[int]], completions: list[list[int]], num_generations: int
    ) -> Mapping[str, Tensor]:
        """Write the table's thoughts over those that were sampled."""
        assert len(completions) == len(prompt_ids)
        for row, ids in enumerate(prompt_ids):
            first = sum(ids) + row % GENERATIONS
            thought = f"<think> {WORDS[first % 4]} {SIDES[row % GENERATIONS]} </think>"
            completions[row] = self.dual_model.completion_ids(thought, add_eos=True)
        return super().edit_completions(prompt_ids, completions, num_generations)


class FixedGRPO(FixedRollouts, EmbedGRPOTrainer):
    """GRPO on fixed thoughts."""


class FixedAdaptive(FixedRollouts, AdaptiveGRPOTrainer):
    """Adaptive control on fixed thoughts."""


class KillOne(TrainerCallback):
    """Kills one process of an attempt without a word, as a machine that runs out of memory does."""

    def __init__(self, attempt: int, rank: int) -> None:
        self.is_meant = os.environ.get("TORCHELASTIC_RESTART_COUNT") == str(attempt)
        self.is_meant = self.is_meant and join_processes().process_index == rank

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Die after a checkpoint has been written and another step has been done."""
        if self.is_meant and state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def whole_model(dropout: float = 0.0, **settings: Any) -> DualLoraModel:
    """Return a model of which every process has all, as `load_backbone` gives it."""
    for name, rank in (("reasoning_lora", 2), ("embedding_lora", 3)):
        settings[name] = LoraSettings(r=rank, alpha=2 * rank, dropout=dropout)
    with whole_parameters():
        return small_model(**settings)


def die_in_save(output_dir: str) -> None:
    """Stand in for saving the random states of the last checkpoint: the machine goes away."""
    if output_dir.endswith(f"checkpoint-{STEPS}"):
        os._exit(9)


def shared_settings(folder: Path, processes: int, **extra: Any) -> dict[str, Any]:
    """Return settings of a run of `STEPS` steps that leaves a checkpoint in the middle."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // processes,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": True,
        **extra,
    }


def make_sft(
    folder: Path, data: tuple[RecordSet, RecordSet], *, dropout: float = 0.0, **extra: Any
) -> AdapterCheckpoints:
    """Return the trainer of the warm start, with and without thoughts of its own."""
    args = SftConfig(
        **{
            **shared_settings(folder, join_processes().num_processes),
            "train_sampling_strategy": "sequential",
            "self_written_from": 0.5,
            "self_written_share": 1.0,
            **extra,
        }
    )
    return SftTrainer(whole_model(dropout), args, data[0])


def make_latent(
    folder: Path, data: tuple[RecordSet, RecordSet], *, dropout: float = 0.0, **extra: Any
) -> AdapterCheckpoints:
    """Return the trainer of latent thoughts."""
    args = LatentConfig(
        **{
            **shared_settings(folder, join_processes().num_processes),
            "train_sampling_strategy": "sequential",
            "decoder_width": 16,
            "warm_up_share": 0.5,
            **extra,
        }
    )
    model = whole_model(dropout, num_reason_tokens=2)
    set_trainable(model.peft_model, [EMBEDDING_ADAPTER])
    return LatentTrainer(model, args, data[0])


def make_rl(
    folder: Path,
    data: tuple[RecordSet, RecordSet],
    *,
    trainer_class: Any = FixedGRPO,
    config_class: Any = EmbedGRPOConfig,
    columns: Any = SCORING_COLUMNS,
    **extra: Any,
) -> AdapterCheckpoints:
    """Return a trainer of RL whose rewards leave their columns beside the run."""
    processes = join_processes()
    args = config_class(
        **{
            **shared_settings(folder, processes.num_processes),
            "num_generations": GENERATIONS,
            "max_completion_length": 8,
            "shuffle_dataset": False,
            "beta": 0.1,
            "gradient_checkpointing": False,
            **extra,
        }
    )
    model = whole_model()
    freeze_scorer(model)
    if not os.environ.get("WORKER_UNPLACED"):
        place_scorer(model, args)
    scorer = RolloutScorer(
        *(model, data[1], folder / "bank"),
        num_negatives=3,
        processes=join_processes(),
        is_shared=True,
    )

    def margin(completions: list[Any], **seen: Any) -> list[float | None]:
        kept = {name: seen[name] for name in ("record_id", *SCORING_COLUMNS)}
        path = folder / f"columns-{processes.process_index}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(kept) + "\n")
        return REWARDS["margin"](completions, **seen)

    rewards = load_rewards(
        ["kept"], {"kept": margin}, available_columns=[*columns, *ROLLOUT_COLUMNS]
    )
    nothing = Validation(())  # checkpoints may be chosen by the reward all the same
    return trainer_class(model, rewards, args, data[1], scorer, eval_dataset=nothing)


def make_grpo(folder: Path, data: tuple[RecordSet, RecordSet], **extra: Any) -> AdapterCheckpoints:
    """Return GRPO's trainer, with a reference adapter."""
    return make_rl(folder, data, **extra)


def make_adaptive(
    folder: Path, data: tuple[RecordSet, RecordSet], **extra: Any
) -> AdapterCheckpoints:
    """Return the trainer whose policy decides."""
    return make_rl(
        folder,
        data,
        trainer_class=FixedAdaptive,
        config_class=AdaptiveGRPOConfig,
        columns=ADAPTIVE_COLUMNS,
        **extra,
    )


STAGES: dict[str, Callable[..., AdapterCheckpoints]] = {
    "sft": make_sft,
    "grpo": make_grpo,
    "adaptive": make_adaptive,
    "latent": make_latent,
}


def run_elastic(
    stages: list[str], folder: Path, data: tuple[RecordSet, RecordSet], **extra: Any
) -> None:
    """Train stages as recipes do; one process of each dies once: of the first stage the last.

    `extra` are settings of the last stage.
    """
    set_up_logging()
    size = join_processes().num_processes
    for attempt, stage in enumerate(stages):
        output = folder / stage
        with owned_run(output):
            own = extra if stage == stages[-1] else {}
            trainer: Any = STAGES[stage](output, data, resume_from_checkpoint="true", **own)
            trainer.add_callback(KillOne(attempt, (size - 1 - attempt) % size))
            train_and_save(trainer, output)


def run(
    stage: str,
    folder: Path,
    data: tuple[RecordSet, RecordSet],
    *,
    resume: bool,
    kill: bool,
    **extra: Any,
) -> None:
    """Train one stage, save it, and write down which engine ran and what it logged."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer: Any = STAGES[stage](folder, data, **extra)
    point, rank = os.environ.get("WORKER_KILL_POINT"), os.environ.get("WORKER_KILL_RANK", "0")
    if kill and point is not None:
        if str(join_processes().process_index) == rank:
            KillPoints(folder, f"checkpoint-{STEPS}", point=int(point))
    elif kill and os.environ.get("WORKER_DIES_IN_SAVE"):
        trainer._save_rng_state = die_in_save
    checkpoint = checkpoint_to_resume(folder, "true") if resume else None
    if resume:
        assert checkpoint is not None
        assert checkpoint.endswith(os.environ.get("WORKER_RESUMES_FROM", "checkpoint-2"))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder))
    engine, differences = trainer.model_wrapped, []
    if hasattr(trainer, "scorer"):
        items = {i.content_key(): i for r in data[1] for i in (r.positive, *r.negatives)}
        stored = torch.from_numpy(trainer.scorer.targets.embeddings.copy())
        assert list(items) == trainer.scorer.targets.ids  # one batch: the same sums in it
        with trainer.whole_model():
            own = embed_items(trainer.dual_model, list(items.values())).cpu()
        differences.append(float((own - stored).abs().max()))
    parameters = list(trainer.model.parameters())
    local = [p for p in parameters if is_sharded(p) and p.numel() == 0]
    report = {
        "engine": type(engine).__name__,
        "stage": int(engine.zero_optimization_stage())
        if hasattr(engine, "zero_optimization_stage")
        else 0,
        "parameters": len(parameters),
        "partitioned": len(local),
        "bank_difference": max(differences, default=None),
        "recomputes": trainer.dual_model.is_gradient_checkpointing,
        "logs": trainer.state.log_history,
    }
    if join_processes().is_main_process:
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def main() -> None:
    """Run the stages that were asked for, or those of every job, each job in its own folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=json.loads, help="name -> stages and settings")
    parser.add_argument("--stages", nargs="+", default=list(STAGES))
    parser.add_argument("--resume", nargs="*", default=[])
    parser.add_argument("--kill", nargs="*", default=[])
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--settings", type=json.loads, default={})
    options = parser.parse_args()
    processes = join_processes()
    torch.manual_seed(0)
    folder: Path = options.folder / "data"
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder)
    processes.wait_for_everyone()
    data = load_records(folder / "batches.jsonl"), load_records(folder / "groups.jsonl")
    if options.elastic:
        run_elastic(options.stages, options.folder, data, **options.settings)
        return
    jobs = options.jobs or {"": {"stages": options.stages, "settings": options.settings}}
    for name, job in jobs.items():
        for stage in job["stages"]:
            run(
                stage,
                options.folder / name / stage,
                data,
                resume=stage in options.resume,
                kill=stage in options.kill,
                **job["settings"],
            )


if __name__ == "__main__":
    main()
