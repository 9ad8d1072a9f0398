"""Files damaged, swapped or lost; values that are not finite; disks full or read-only; two owners.

Each group draws its faults from a seed: some of them in every run of the tests, all of them in
`make hostile`. A fault is handled if the command goes on with what is whole, or ends with the
place in one line, and what was there before stays.
"""

import gc
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from made_records import picture_records  # pyright: ignore[reportAttributeAccessIssue]
from short_runs import small_model, weights
from tiny_backbones import make_idefics3  # pyright: ignore[reportAttributeAccessIssue]
from zero_worker import STAGES, write_data

from hostile.faults import (
    DAMAGES,
    at_most,
    contents,
    files_of,
    read_only,
    small_disk,
    swapped_for,
    told,
)
from hostile.table import Tally, Verdict
from twn_rl.data.record import Item
from twn_rl.data.record_files import load_records, write_records
from twn_rl.launch.run_folder import checkpoint_to_resume, owned_run, train_and_save
from twn_rl.modeling.adapters import adapter_parameters
from twn_rl.modeling.checkpoint import save_decision
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import QUERY_SIDE, Gate
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.gate_labels import read_labels
from twn_rl.training.measure_gains import LabelSettings, measure_gains
from twn_rl.training.rollout_scorer import RolloutScorer
from twn_rl.training.whole_checkpoints import newest_whole

QUICK = 8  # faults of a group in every run of the tests
SIZES = pytest.mark.parametrize(
    "count", [QUICK, pytest.param(1000, marks=pytest.mark.campaign)], ids=["some", "all"]
)
Case = tuple[str, Callable[[Path, Random], None], str]  # file, damage, name of the damage


def drawn(cases: Sequence[Any], count: int, seed: int = 0) -> list[Any]:
    """Return so many of the cases, drawn from a seed; all of them if there are no more."""
    return Random(seed).sample(list(cases), min(count, len(cases)))


def damages(folder: Path, others: Sequence[Path] = ()) -> list[Case]:
    """Return every damage of every file, also by the file of the same name in other folders."""
    cases: list[Case] = []
    for name in files_of(folder):
        cases += [(name, damage, word) for word, damage in DAMAGES.items()]
        for other in others:
            same = other / name
            if same.is_file() and same.read_bytes() != (folder / name).read_bytes():
                cases.append((name, swapped_for(same), f"that of {other.name}"))
    return cases


def is_same(one: DualLoraModel, other: DualLoraModel) -> bool:
    """Return whether all weights, gates and settings agree to the bit."""
    a, b = weights(one), weights(other)
    gates = [model.gates.state_dict() for model in (one, other)]
    return (
        all(torch.equal(a[key], b[key]) for key in a)
        and gates[0].keys() == gates[1].keys()
        and all(torch.equal(gates[0][key], gates[1][key]) for key in gates[0])
        and one.config == other.config
    )


def trained(stage: str, folder: Path, data: Any, **settings: Any) -> Any:
    """Return a stage's trainer after a run of four steps with a checkpoint after each second."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    trainer: Any = STAGES[stage](folder, data, use_cpu=True, **settings)
    train_and_save(trainer, folder)
    return trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Any) -> Path:
    """Return the folder of a warm start that was never disturbed."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    trained("sft", folder, data)
    return folder


def give_gate(model: DualLoraModel, threshold: float = 0.5) -> DualLoraModel:
    gate = Gate(model.hidden_size, 4)
    gate.fitted_to = Fingerprints(model).gate_origin
    model.gates[QUERY_SIDE] = gate
    model.config.gate_threshold = threshold
    return model


@SIZES
def test_damaged_checkpoints(
    count: int,
    tally: Tally,
    run: Path,
    data: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    newest = run / "checkpoint-4"
    cases = damages(newest, [run / "checkpoint-2"])
    wanted = DualLoraModel.from_pretrained(run, backbone=make_idefics3())
    for number, (name, damage, word) in enumerate(drawn(cases, count)):
        folder = tmp_path / "run"
        shutil.copytree(run, folder)
        damage(folder / "checkpoint-4" / name, Random(number))
        caplog.clear()
        verdict, why = Verdict.HANDLED, ""
        try:
            found = checkpoint_to_resume(folder, "true")
            if found == str(folder / "checkpoint-2"):
                if "checkpoint-4 is passed over: " not in caplog.text:
                    verdict, why = Verdict.SILENT, "passed over without a reason"
            elif found != str(folder / "checkpoint-4"):
                verdict, why = Verdict.LOST, f"resumed from {found}"
            elif contents(folder / "checkpoint-4") != contents(newest):
                # Settings are not sealed: resuming reads none of them. It must end the same.
                if name != "twn_config.json":
                    verdict, why = Verdict.SILENT, "taken for whole"
                else:
                    end = trained("sft", folder, data, resume_from_checkpoint="true").dual_model
                    again = DualLoraModel.from_pretrained(folder, backbone=make_idefics3())
                    if not is_same(again, wanted) or end.config != wanted.config:
                        verdict, why = Verdict.SILENT, "ended otherwise"
        except Exception as error:
            verdict, why = told(error, folder)
        tally.add("checkpoints: damaged files", f"{word} {name}, seed {number}", verdict, why)
        shutil.rmtree(folder)
    tally.check(at_least=min(count, 60))


@SIZES
def test_damaged_models(
    count: int, tally: Tally, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, name in enumerate(("model", "another")):
        give_gate(small_model(seed), 0.5 + seed / 10).save_pretrained(tmp_path / name)
    wanted = DualLoraModel.from_pretrained(tmp_path / "model", backbone=make_idefics3())
    read = ("reasoning/adapter_model", "embedding/adapter_model", "gate", "twn_config")
    cases = [
        case
        for case in damages(tmp_path / "model", [tmp_path / "another"])
        if case[0].startswith(read)
    ]
    cases += [case for case in cases if case[1] in (DAMAGES["flip"], DAMAGES["zero"])] * 3
    for number, (name, damage, word) in enumerate(drawn(cases, count)):
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "model", folder)
        damage(folder / name, Random(number))
        caplog.clear()
        try:
            found = DualLoraModel.from_pretrained(folder, backbone=make_idefics3())
            is_told = name in caplog.text
            verdict = Verdict.HANDLED if is_told or is_same(found, wanted) else Verdict.SILENT
            why = "loaded as another model"
        except Exception as error:
            verdict, why = told(error, folder)
        tally.add("models: damaged files", f"{word} {name}, seed {number}", verdict, why)
        shutil.rmtree(folder)
    tally.check(at_least=min(count, 40))


def keep(model: DualLoraModel, records: Any, folder: Path) -> dict[str, Any]:
    """Make banks and labels in a folder and return what they hold."""
    gc.collect()  # maps of files that were damaged
    labels = measure_gains(
        model, records, QUERY_SIDE, folder / "labels", LabelSettings(shard_size=4, batch_size=4)
    )
    scorer = RolloutScorer(model, records, folder / "banks", num_negatives=2, batch_size=4)
    banks = {"targets": scorer.targets}
    return {
        "rows": labels.rows,
        "states": labels.states.copy().tolist(),
        **{name: (bank.ids, bank.embeddings.copy().tolist()) for name, bank in banks.items()},
    }


@SIZES
def test_damaged_banks_and_labels(count: int, tally: Tally, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    records = picture_records(tmp_path / "data")
    model = small_model(max_think_tokens=4).eval()
    wanted = keep(model, records, tmp_path / "kept")
    cases = damages(tmp_path / "kept")
    chosen = drawn(cases, count if count > QUICK else 3)
    for number, (name, damage, word) in enumerate(chosen):
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "kept", folder)
        damage(folder / name, Random(number))
        try:
            found = keep(model, records, folder)
            verdict = Verdict.HANDLED if found == wanted else Verdict.SILENT
            why = "other vectors or labels"
            read_labels(folder / "labels")
        except Exception as error:
            verdict, why = told(error, folder)
        tally.add("banks and labels: damaged files", f"{word} {name}, seed {number}", verdict, why)
        shutil.rmtree(folder)
    tally.check(at_least=min(count, 3))


@SIZES
def test_values_that_are_not_finite(count: int, tally: Tally, data: Any, tmp_path: Path) -> None:
    values = {"NaN": float("nan"), "infinity": float("inf")}
    cases = [(s, w, share) for s in STAGES for w in values for share in ("one", "all")]
    for stage, word, share in drawn(cases, min(count, len(cases)) if count > QUICK else 3):
        folder = tmp_path / f"{stage}-{word}-{share}"
        folder.mkdir()
        torch.manual_seed(0)
        trainer: Any = STAGES[stage](folder, data, use_cpu=True)
        model = trainer.dual_model
        named = [n for n in model.peft_model.peft_config if n in ("default", "embedding")]
        owned = [p for n in named for p in adapter_parameters(model.peft_model, n).values()]
        taught = [p for p in owned if p.requires_grad]
        with torch.no_grad():
            for parameter in taught if share == "all" else taught[-1:]:
                parameter.view(-1)[0 if share == "one" else slice(None)] = values[word]
        try:
            train_and_save(trainer, folder)
            verdict, why = Verdict.SILENT, "trained and saved"
        except Exception as error:
            verdict, why = told(error, "step", "adapter", "vector", "loss")
        if (folder / "twn_config.json").exists() or newest_whole(folder) is not None:
            verdict, why = Verdict.SILENT, "something was saved"
        tally.add("values: not finite", f"{stage}, {share} {word}", verdict, why)
    tally.check(at_least=3)


def train_on(folder: Path, data: Any) -> None:
    trained("sft", folder, data, max_steps=6, resume_from_checkpoint="true")


def save_again(folder: Path, data: Any) -> None:
    give_gate(small_model(seed=5)).save_pretrained(folder)


def fit_gate_again(folder: Path, data: Any) -> None:
    model = DualLoraModel.from_pretrained(folder, backbone=make_idefics3())
    save_decision(give_gate(model, 0.25), folder)


def bank_again(folder: Path, data: Any) -> None:
    RolloutScorer(small_model(seed=3), data[1], folder / "bank", num_negatives=2, batch_size=8)


def label_again(folder: Path, data: Any) -> None:
    model = small_model(seed=3, max_think_tokens=4).eval()
    measure_gains(model, data[1], QUERY_SIDE, folder / "labels", LabelSettings(batch_size=8))


WRITERS = (train_on, save_again, fit_gate_again, bank_again, label_again)


@SIZES
def test_disks_that_fill_up(count: int, tally: Tally, run: Path, data: Any, tmp_path: Path) -> None:
    kept = contents(run)
    taken = sum(4096 * (2 + len(content) // 4096) for content in kept.values())
    rng = Random(1)
    limits = [("limit", rng.randrange(16, 12_000)) for _ in range(4)]
    disks = [("disk", taken + rng.randrange(4096, 60_000)) for _ in range(3)]
    cases = [(writer, *size) for writer in WRITERS for size in (*limits, *disks)]
    chosen = drawn(cases, count if count > QUICK else 5)
    for number, (writer, kind, size) in enumerate(chosen):
        folder = tmp_path / f"{number}" / "run"
        with small_disk(folder.parent, size if kind == "disk" else 1 << 26) as is_disk:
            if kind == "disk" and not is_disk:
                continue
            shutil.copytree(run, folder)
            try:
                if kind == "limit":
                    with at_most(size):
                        writer(folder, data)
                else:
                    writer(folder, data)
                verdict, why = Verdict.HANDLED, "it did fit"
            except Exception as error:
                verdict, why = told(error, folder)
                if verdict is Verdict.HANDLED and " needed, " not in why:
                    verdict, why = Verdict.ESCAPED, f"not what is needed: {why}"
                now = contents(folder)
                lost = [n for n in kept if n.startswith("checkpoint-") and now.get(n) != kept[n]]
                model = [n for n in kept if n.startswith(("reasoning", "embedding", "twn"))]
                lost += [n for n in model if now.get(n) != kept[n]]
                if lost:
                    verdict, why = Verdict.LOST, f"{lost} after {error}"
            tally.add("disks: full", f"{writer.__name__}, {kind} {size}", verdict, why)
    tally.check(at_least=sum(kind == "limit" for _, kind, _ in chosen))


def begin(stage: str) -> Callable[[Path, Any], None]:
    def start(folder: Path, data: Any) -> None:
        with owned_run(folder):
            trained(stage, folder, data)

    start.__name__ = stage
    return start


@SIZES
def test_folders_that_cannot_be_written(
    count: int, tally: Tally, data: Any, tmp_path: Path
) -> None:
    cases = [(begin(stage), where) for stage in STAGES for where in ("in it", "itself")]
    cases += [(writer, "in it") for writer in (save_again, bank_again, label_again)]
    chosen = drawn(cases, count if count > QUICK else 3)
    for number, (writer, where) in enumerate(chosen):
        place = tmp_path / f"{number}"
        with read_only(place) as is_closed:
            if not is_closed:
                continue
            folder = place / "run" if where == "in it" else place
            try:
                writer(folder, data)
                verdict, why = Verdict.SILENT, "it was written"
            except Exception as error:
                verdict, why = told(error, place)
            tally.add("disks: read-only", f"{writer.__name__} {where}", verdict, why)
    tally.check(at_least=0)


@SIZES
def test_resuming_on_other_records(count: int, tally: Tally, run: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    copy, _ = write_data(tmp_path / "data")  # of the same content
    records = [copy[i] for i in range(len(copy))]
    cases = [(kind, seed) for kind in ("order", "left out", "text", "seed") for seed in range(4)]
    for kind, seed in drawn(cases, count if count > QUICK else 3):
        rng, changed, settings = Random(seed), list(records), {}
        if kind == "order":
            a, b = rng.sample(range(len(changed)), 2)
            changed[a], changed[b] = changed[b], changed[a]
        elif kind == "left out":
            del changed[rng.randrange(len(changed))]
        elif kind == "text":
            place = rng.randrange(len(changed))
            own = changed[place].to_dict()
            own["query"]["text"] = "camel"
            changed[place] = type(changed[place]).from_dict(own)
        else:
            settings = {"seed": 1 + seed}
        file = tmp_path / "data" / f"{kind}{seed}.jsonl"
        write_records(file, changed)
        other = load_records(file)
        folder = tmp_path / "run"
        shutil.copytree(run, folder)
        shutil.rmtree(folder / "checkpoint-4")
        try:
            trained("sft", folder, (other, other), resume_from_checkpoint="true", **settings)
            verdict, why = Verdict.SILENT, "trained on"
        except Exception as error:
            verdict, why = told(error, folder / "checkpoint-2")
        tally.add("records: resumed on others", f"{kind}, seed {seed}", verdict, why)
        shutil.rmtree(folder)
    tally.check(at_least=3)


def test_a_model_without_damage_still_works(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The campaign's own base: what it damages is whole before."""
    caplog.set_level(logging.WARNING)
    model = DualLoraModel.from_pretrained(run, backbone=make_idefics3())
    assert torch.isfinite(model.embed(model.collate([Item(text="camel")]))).all()
    assert not caplog.records
    assert checkpoint_to_resume(run, "true") == str(run / "checkpoint-4")
