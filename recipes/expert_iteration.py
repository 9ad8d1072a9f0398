"""In the place of RL: the policy writes CoTs, the best are kept by RL's rewards, and taught.

Expert iteration, or RAFT (arXiv 2304.06767), the honest rival of GRPO: in rounds, G CoTs are
sampled for each record, the best by the same rewards as in recipes/grpo_embed.py is kept if it
gained something, and the reasoning adapter goes on with the token loss on those kept. The embedding
adapter is frozen. A record's own CoT is not read: pairs of query and target are enough.

    accelerate launch recipes/expert_iteration.py
    accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/expert_iteration.py
    accelerate launch recipes/expert_iteration.py --warm_start outputs/sft --rl_file pairs.jsonl
    accelerate launch recipes/expert_iteration.py --num_rounds 8 --prompts_per_round 200

Without arguments it reads recipes/configs/demo_expert_iteration.yaml: the embedded emoji scenes,
with the samples and optimizer steps of its GRPO, warm start included if there is none yet,
evaluation and report.html at the end. rounds.json says what was sampled, kept and left out in each
round. The same command goes on where it was stopped: thoughts, scores and finished rounds are kept.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from twn_rl.data.mixture import Mixture
from twn_rl.data.record_files import RecordSet, load_records, write_records
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.program import start
from twn_rl.launch.progress import Stages
from twn_rl.launch.run_folder import (
    owned_run,
    publish,
    save_run,
    set_up_logging,
    train_and_save,
)
from twn_rl.modeling.checkpoint import adapter_digests
from twn_rl.modeling.config import CONFIG_FILE
from twn_rl.modeling.model import DualLoraModel
from twn_rl.recipes.grpo_embed import RewardedArguments, ensure_warm_start, evaluate
from twn_rl.rewards import REWARDS
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.sharded_pass import differences
from twn_rl.runtime.whole_files import read_json, write_json
from twn_rl.training.expert_iteration import (
    ExpertIterationConfig,
    RewardEvaluator,
    described_reward,
    round_positions,
    round_report,
)
from twn_rl.training.grpo import ROLLOUT_COLUMNS, make_scorer
from twn_rl.training.monitor import MetricsWriter
from twn_rl.training.reward_loading import CheckedReward, load_rewards
from twn_rl.training.seen_records import describe_records
from twn_rl.training.sft import SftTrainer
from twn_rl.training.similarity_columns import SCORING_COLUMNS
from twn_rl.training.thought_selection.choosing import choose, taught_records
from twn_rl.training.thought_selection.drafts import (
    Row,
    SelectionError,
    collect_drafts,
    merge_drafts,
    unique_ids,
)
from twn_rl.training.thought_selection.worth import judge
from twn_rl.training.thought_selection.writers import AdapterWriter

logger = logging.getLogger(__name__)
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "demo_expert_iteration.yaml"
KEPT_FILE, REPORT_FILE, ROUNDS_FILE, PLAN_FILE = (
    "kept.jsonl",
    "report.json",
    "rounds.json",
    "rounds_plan.json",
)
# Settings that a finished round depends on.
PLANNED = (
    *("num_rounds", "prompts_per_round", "num_generations", "sampling_temperature"),
    *("reward_weights", "min_gain", "min_reward", "num_negatives", "max_negative_similarity"),
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("seed", "bf16"),
)


ARGUMENTS = (RewardedArguments, DataArguments, ExpertIterationConfig)


def main(script: RewardedArguments, data: DataArguments, training: ExpertIterationConfig) -> Path:
    """Warm-start if needed; sample, keep and teach in rounds; return the folder of the model."""
    set_up_logging()
    output = Path(training.output_dir or "outputs/expert_iteration")

    # Rewards first: a misspelt name must show before anything is trained.
    available = [*SCORING_COLUMNS, *ROLLOUT_COLUMNS]
    parameters: Any = script.reward_parameters
    rewards = load_rewards(script.rewards, REWARDS, parameters, available_columns=available)

    with owned_run(output, training):
        # Model to start from
        is_missing = not (Path(script.warm_start) / CONFIG_FILE).is_file()
        name = "expert iteration"
        stages = Stages(("warm start", is_missing), (name, True), ("evaluation", script.evaluate))
        if is_missing:
            stages.begin("warm start")
        ensure_warm_start(script, data, training)
        stages.begin(name)
        set_seed(training.seed)

        # Data
        records = data.load("rl")
        if isinstance(records, Mixture):
            raise SelectionError("records are a mixture; expected one file; pass its records")
        unique_ids(records)
        keep_plan(output, script, training, records, rewards)

        # Rounds: each goes on from the model of the one before; the last one's is the run's.
        policy = Path(script.warm_start)
        *earlier, last = enumerate(round_positions(len(records), training))
        for number, positions in earlier:
            folder = output / f"round-{number}"
            if not (folder / CONFIG_FILE).is_file():
                run_round(script, training, records, rewards, policy, number, positions, folder)
            policy = folder
        trainer = run_round(script, training, records, rewards, policy, *last, output)
        save_run(output, script, data, training)
        write_rounds(output, training.num_rounds)

        # Evaluate
        if script.evaluate:
            stages.begin("evaluation")
            evaluate(script, data, training, output)
        publish(trainer, output)
    return output


def run_round(
    script: RewardedArguments,
    training: ExpertIterationConfig,
    records: RecordSet,
    rewards: Sequence[CheckedReward],
    policy: Path,
    number: int,
    positions: Sequence[int],
    target: Path,
) -> SftTrainer:
    """Sample, keep and teach once, from the model `policy` to the model `target`."""
    model = DualLoraModel.from_pretrained(
        policy, is_trainable=True, attn_implementation=script.attn_implementation
    )
    folder = Path(training.output_dir or "") / f"round-{number}"
    rows = sample(model, records, positions, rewards, training, number, folder)
    kept = keep(records, positions, rows, training, number, folder)

    taught = copy.copy(training)
    taught.output_dir, taught.max_steps = str(target), training.steps_of(number)
    # The token loss alone; fewer thoughts than a batch are still taught.
    taught.contrastive_from, taught.dataloader_drop_last = 1.0, False
    taught.push_to_hub = training.push_to_hub and number == training.num_rounds - 1
    callbacks = [MetricsWriter(target / "metrics.jsonl")]
    trainer = SftTrainer(model, taught, kept, callbacks=callbacks)
    train_and_save(trainer, target, script, taught)
    return trainer


def sample(
    model: DualLoraModel,
    records: RecordSet,
    positions: Sequence[int],
    rewards: Sequence[CheckedReward],
    training: ExpertIterationConfig,
    number: int,
    folder: Path,
) -> list[Row]:
    """Return a row for each record of a round: its G sampled thoughts, and what each is paid."""
    processes, size = join_processes(), training.scorer_batch_size
    shared: dict[str, Any] = {"processes": processes}
    # Targets are embedded once, unless the vectors follow the policy.
    is_detached = model.config.interface == "kv_detach"
    place = folder if is_detached else Path(training.output_dir or "")
    scorer = make_scorer(model, records, training, place)
    evaluator = RewardEvaluator(
        *(model, records, positions, scorer, rewards), weights=training.reward_weights
    )
    writer = AdapterWriter(
        model,
        "policy",
        temperatures=[training.sampling_temperature],
        num_thoughts=training.num_generations,
        batch_size=max(1, size // training.num_generations),
        seed=training.seed + 1000 * number,
    )
    share = [records[position] for position in positions]
    ids = [record.id for record in share]
    rows = merge_drafts([collect_drafts(writer, share, ids, folder / "drafts", **shared)])
    return list(judge(rows, evaluator, model, folder / "scores", batch_size=size, **shared))


def keep(
    records: RecordSet,
    positions: Sequence[int],
    rows: Sequence[Row],
    training: ExpertIterationConfig,
    number: int,
    folder: Path,
) -> RecordSet:
    """Return the records of a round with the best thought of each, as far as one may be kept.

    Raises:
        SelectionError: If none may.
    """
    processes = join_processes()
    share = [records[position] for position in positions]
    choices = [choose(row["id"], row["drafts"], training.rule) for row in rows]
    report = round_report(share, rows, choices)
    if not report["kept"]:
        raise SelectionError(
            f"round {number}: of {report['samples']} thoughts none may be kept: {report['fates']}; "
            "expected some; lower min_gain or min_reward, or start from a model that sometimes "
            "succeeds"
        )
    if processes.is_main_process:
        kept = (
            copied
            for record, row, choice in zip(share, rows, choices, strict=True)
            for copied in taught_records(record, row["drafts"], choice)
            if copied.query_cot is not None
        )
        write_records(folder / KEPT_FILE, kept, data_root=records.data_root)
        report = {"round": number, "optimizer_steps": training.steps_of(number), **report}
        write_json(folder / REPORT_FILE, report, indent=1)
        told = (number, report["kept"], len(share), report["samples"])
        logger.log(NOTICE, "Round %d: a thought kept for %d of %d records, of %d sampled", *told)
    processes.wait_for_everyone()
    with processes.one_first():
        return load_records(folder / KEPT_FILE, data_root=records.data_root)


def keep_plan(
    output: Path,
    script: RewardedArguments,
    training: ExpertIterationConfig,
    records: RecordSet,
    rewards: Sequence[CheckedReward],
) -> None:
    """Write down what all rounds depend on; refuse rounds that depended on something else."""
    settings = json.loads(json.dumps(training.to_dict(), default=str))
    plan = {
        "warm_start": adapter_digests(script.warm_start),
        "records": describe_records(records, training.seed),
        "rewards": [described_reward(reward) for reward in rewards],
        **{name: settings[name] for name in PLANNED},
    }
    processes = join_processes()
    stored = read_json(output / PLAN_FILE)
    processes.wait_for_everyone()  # all have looked before it is written
    if stored is not None and stored != plan:
        raise ValueError(
            f"{output} holds rounds of another run: {'; '.join(differences(stored, plan))}; "
            "expected the same; use another output_dir, or remove it"
        )
    if processes.is_main_process:
        write_json(output / PLAN_FILE, plan, indent=1)


def write_rounds(output: Path, num_rounds: int) -> None:
    """Write the reports of all rounds into one file."""
    if join_processes().is_main_process:
        reports = [read_json(output / f"round-{n}" / REPORT_FILE) for n in range(num_rounds)]
        write_json(output / ROUNDS_FILE, reports, indent=1)


if __name__ == "__main__":
    start(main, ARGUMENTS, default_config=DEFAULT_CONFIG, description=__doc__)
