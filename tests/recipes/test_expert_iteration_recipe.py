"""Expert iteration whole: it learns from pairs alone, and goes on where it was stopped."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, TORCHRUN, launch

from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import load_records, write_records
from twn_rl.demo.scenes import concepts
from twn_rl.launch.parsing import parse_arguments
from twn_rl.modeling.model import DualLoraModel
from twn_rl.recipes import expert_iteration, sft_embed
from twn_rl.training.thought_selection.drafts import SelectionError

CATEGORIES = sorted(set(concepts().values()))


def write_pairs(path: Path, *, wrong: float | None) -> None:
    """Write words and their categories, with a thought that names one, or with none."""
    dice = random.Random(0)
    records = []
    for name, category in concepts().items():
        thought = dice.choice(CATEGORIES) if dice.random() < (wrong or 0) else category
        records.append(
            Record(
                id=name,
                source="words",
                query=Item(instruction="find the category", text=name),
                positive=Item(text=category),
                negatives=tuple(Item(text=c) for c in CATEGORIES if c != category),
                query_cot=None if wrong is None else f"{name} is ; {thought}",
                metadata={
                    "pool": "category",
                    "task": "category",
                    "gold_cot": f"{name} is ; {category}",
                },
            )
        )
    write_records(path, records)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with pairs, and a warm start that was taught many wrong thoughts."""
    folder = tmp_path_factory.mktemp("words")
    write_pairs(folder / "taught.jsonl", wrong=0.5)
    write_pairs(folder / "pairs.jsonl", wrong=None)
    flags = {
        "config": ROOT / "recipes" / "configs" / "demo_sft.yaml",
        "train_file": folder / "taught.jsonl",
        "output_dir": folder / "sft",
        "max_steps": 60,
        "reasoning_rank": 16,
        "self_written_share": 0.0,
        "max_think_tokens": 12,
        "logging_steps": 20,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    sft_embed.main(*parse_arguments(sft_embed.ARGUMENTS, arguments=words))
    return folder


def flags_of(started: Path, output: Path, **own: Any) -> list[str]:
    flags = {
        "config": ROOT / "recipes" / "configs" / "demo_expert_iteration.yaml",
        "rl_file": started / "pairs.jsonl",
        "warm_start": started / "sft",
        "output_dir": output,
        "num_rounds": 2,
        "prompts_per_round": 32,
        "num_generations": 8,
        "max_steps": 20,
        "per_device_train_batch_size": 16,
        "learning_rate": 2e-3,
        "evaluate": "false",
        **own,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def run(started: Path, output: Path, **own: Any) -> Path:
    words = flags_of(started, output, **own)
    return expert_iteration.main(*parse_arguments(expert_iteration.ARGUMENTS, arguments=words))


def rounds_of(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "rounds.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def output(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(started, tmp_path_factory.mktemp("run") / "out")


def test_it_learns_from_pairs_alone_within_its_budget(started: Path, output: Path) -> None:
    rounds = rounds_of(output)
    assert [r["samples"] for r in rounds] == [32 * 8] * 2
    assert [r["optimizer_steps"] for r in rounds] == [10, 10]
    before, after = (r["noise"]["all"]["right"] / r["samples"] for r in rounds)
    assert after > before + 0.05, "the second round samples from what the first one taught"
    assert rounds[0]["mean_reward_kept"] > rounds[0]["mean_reward"]
    for number, report in enumerate(rounds):
        kept = load_records(output / f"round-{number}" / "kept.jsonl", data_root=started)
        assert len(kept) == report["kept"] == report["records"] - report["direct_only"]
        assert all(record.query_cot for record in kept)
        assert all(record.metadata["selection"]["worth"] > 0 for record in kept)
        assert report["fates"]["selected"] >= report["kept"]


def test_the_embedding_adapter_stays_as_it_was(started: Path, output: Path) -> None:
    name = "embedding/adapter_model.safetensors"
    assert (output / name).read_bytes() == (started / "sft" / name).read_bytes()
    name = "reasoning/adapter_model.safetensors"
    weights = [
        (folder / name).read_bytes() for folder in (started / "sft", output / "round-0", output)
    ]
    assert len(set(weights)) == 3


def test_its_card_says_how_it_was_trained(output: Path) -> None:
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "| Method | expert iteration on the policy's best thoughts" in card
    assert "| Went on from | `sft` |" in card


def test_a_run_that_was_stopped_goes_on_to_the_same_model(
    started: Path, output: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(output, again)
    first = again / "round-0" / "reasoning" / "adapter_model.safetensors"
    shards = [*again.glob("round-*/drafts/*/*.jsonl"), *again.glob("round-*/scores/*.jsonl")]
    assert len(shards) == 4
    times = {path: path.stat().st_mtime_ns for path in (first, *shards)}
    # As if it had been killed in the last round, after sampling.
    wanted = (again / "reasoning" / "adapter_model.safetensors").read_bytes()
    for path in (again / "reasoning", again / "embedding"):
        shutil.rmtree(path)
    (again / "twn_config.json").unlink()
    (again / "rounds.json").unlink()
    run(started, again)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (again / "reasoning" / "adapter_model.safetensors").read_bytes() == wanted
    assert rounds_of(again) == rounds_of(output)


def test_rounds_of_other_settings_or_another_warm_start_are_refused(
    started: Path, output: Path
) -> None:
    anew = {"overwrite_output_dir": "true"}  # the model may be replaced, not the rounds
    with pytest.raises(ValueError, match=r"rounds of another run: num_generations = 8, now 4"):
        run(started, output, num_generations=4, **anew)
    with pytest.raises(ValueError, match=r"rounds of another run: warm_start.*another output_dir"):
        run(started, output, warm_start=output / "round-0", **anew)


def test_rounds_that_another_text_of_a_reward_has_paid_are_refused(
    started: Path, tmp_path: Path
) -> None:
    source, text = (
        tmp_path / "mine.py",
        "def mine(completions, *, positive_similarity, **kwargs):\n",
    )
    source.write_text(text + "    return list(positive_similarity)\n", encoding="utf-8")
    own = {"rewards": f"{source}:mine", "reward_weights": 1.0, "num_rounds": 1}
    own |= {"prompts_per_round": 4, "num_generations": 2, "max_steps": 1, "min_gain": -9}
    run(started, tmp_path / "out", **own)
    source.write_text(text + "    return [2 * s for s in positive_similarity]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="rounds of another run: rewards"):
        run(started, tmp_path / "out", overwrite_output_dir="true", **own)


def test_a_policy_of_which_nothing_may_be_kept_is_refused_in_words(
    started: Path, tmp_path: Path
) -> None:
    with pytest.raises(SelectionError, match=r"round 0: of 8 thoughts none may be kept.*min_gain"):
        run(started, tmp_path / "out", min_gain=9, prompts_per_round=4, num_generations=2)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_sample_and_keep_what_one_does(
    started: Path, output: Path, tmp_path: Path
) -> None:
    words = flags_of(started, tmp_path / "two", per_device_train_batch_size=8)
    done = launch("expert_iteration.py", words, config=TORCHRUN, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    one, two = rounds_of(output), rounds_of(tmp_path / "two")
    kept = [folder / "round-0" / "kept.jsonl" for folder in (output, tmp_path / "two")]
    assert [len(load_records(path, data_root=started)) for path in kept] == [one[0]["kept"]] * 2
    assert one[0]["fates"] == two[0]["fates"]
    assert two[1]["noise"]["all"]["right"] > two[0]["noise"]["all"]["right"]
    DualLoraModel.from_pretrained(tmp_path / "two")
