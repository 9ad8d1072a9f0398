"""Rollouts to reward columns: against a naive loop, one embedding per distinct CoT, fall-backs."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbones import sharing_pictures
from torch import Tensor

from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import RecordSet, load_records, write_records
from twn_rl.evaluation.retrieval_pools import collect_candidates
from twn_rl.inference.mine_negatives import MiningPlan
from twn_rl.metrics.ranking import TIE_TOLERANCE
from twn_rl.modeling.config import LoraSettings
from twn_rl.modeling.gate import QUERY_SIDE
from twn_rl.modeling.kv_prefix import Prefix
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.grpo import EmbedGRPOConfig, make_scorer
from twn_rl.training.losses import false_negative_mask, key_ids
from twn_rl.training.measure_gains import LabelSettings, measure_gains
from twn_rl.training.rollout_scorer import RolloutScorer, embed_items, evaluating, pool_of
from twn_rl.training.similarity_columns import SCORING_COLUMNS
from twn_rl.training.target_bank import ScorerMismatchError

NUM_NEGATIVES = 3
GROUPS = [0, 0, 0, 1, 1, 3, 5, 5]  # records of the rollouts


@pytest.fixture
def model(make_model: Callable[..., DualLoraModel]) -> DualLoraModel:
    return make_model("idefics3")


@pytest.fixture
def scorer(model: DualLoraModel, records: RecordSet, tmp_path: Path) -> RolloutScorer:
    return RolloutScorer(
        model, records, tmp_path / "bank", num_negatives=NUM_NEGATIVES, batch_size=4
    )


def write(model: DualLoraModel, text: str) -> list[int]:
    return model.completion_ids(text, add_eos=True)


@pytest.fixture
def rollouts(model: DualLoraModel) -> list[list[int]]:
    return [
        write(model, "<think> camel left </think>"),
        write(model, "<think> pizza </think>"),
        write(model, "<think> camel left </think>"),  # a duplicate of the first
        write(model, "<think> camel left </think>"),  # the same words about another record
        write(model, "<think> zebra right")[:-1],  # cut off
        write(model, "zebra </think>"),  # never opened
        write(model, "<think> tree above below </think>"),
        write(model, "<think> </think>"),  # empty
    ]


COMPLETE = [True, True, True, True, False, False, True, False]


@torch.no_grad()
def naive_columns(
    model: DualLoraModel, records: RecordSet, indices: list[int], rollouts: list[list[int]]
) -> dict[str, list]:
    """One rollout, one target at a time, straight from the definitions."""

    def vector(item: Item, completion: list[int] | None = None) -> Tensor:
        return model.embed(model.collate([item], None if completion is None else [completion]))[0]

    targets = {
        item.content_key(): vector(item) for r in records for item in (r.positive, *r.negatives)
    }

    def score(query: Tensor, positive: str) -> tuple[float, list[float], int]:
        similarity = float(query @ targets[positive])
        others = [float(query @ v) for key, v in targets.items() if key != positive]
        rank = 1 + sum(other >= similarity - TIE_TOLERANCE for other in others)
        return similarity, sorted(others, reverse=True)[:NUM_NEGATIVES], rank

    columns: dict[str, list] = {}
    for index, ids, complete in zip(indices, rollouts, COMPLETE, strict=True):
        record = records[index]
        key = record.positive.content_key()
        plain = vector(record.query)
        think = vector(record.query, ids[:-1]) if complete else plain
        values = dict(
            zip(
                ("positive_similarity", "negative_similarities", "target_rank"),
                score(think, key),
                strict=True,
            )
        )
        values |= {f"no_think_{name}": value for name, value in _named(score(plain, key)).items()}
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return columns


def _named(scores: tuple[float, list[float], int]) -> dict[str, object]:
    names = ("positive_similarity", "negative_similarities", "target_rank")
    return dict(zip(names, scores, strict=True))


def test_columns_equal_a_naive_loop(
    model: DualLoraModel,
    records: RecordSet,
    scorer: RolloutScorer,
    rollouts: list[list[int]],
) -> None:
    columns = scorer.columns(GROUPS, rollouts)
    expected = naive_columns(model, records, GROUPS, rollouts)
    assert set(SCORING_COLUMNS) <= set(columns)
    for name, values in expected.items():
        if name.endswith("target_rank"):
            assert columns[name] == values
        else:
            torch.testing.assert_close(
                torch.tensor(columns[name]), torch.tensor(values), atol=2e-5, rtol=0
            )
    assert columns["is_think_complete"] == COMPLETE
    assert columns["think_tokens"] == [4, 3, 4, 4, 3, 2, 5, 2]
    assert all(len(values) == len(GROUPS) for values in columns.values())


def test_failed_thinks_have_exactly_the_columns_of_no_thinking(
    scorer: RolloutScorer, rollouts: list[list[int]]
) -> None:
    columns = scorer.columns(GROUPS, rollouts)
    for row, complete in enumerate(COMPLETE):
        for name in ("positive_similarity", "negative_similarities", "target_rank"):
            is_same = columns[name][row] == columns[f"no_think_{name}"][row]
            assert is_same or complete
    think, plain = columns["positive_similarity"], columns["no_think_positive_similarity"]
    assert all(a != b for a, b, ok in zip(think, plain, COMPLETE, strict=True) if ok)


def test_what_stands_behind_a_thought_earns_nothing(
    model: DualLoraModel, scorer: RolloutScorer
) -> None:
    thought = write(model, "<think> camel left </think>")
    longer = write(model, "<think> camel left </think> pizza zebra tree")
    columns = scorer.columns([0, 0], [thought, longer])
    for name in ("positive_similarity", "negative_similarities", "target_rank"):
        assert columns[name][0] == columns[name][1], name
    assert columns["think_tokens"] == [len(thought) - 1, len(longer) - 1]  # it still costs
    assert columns["is_think_complete"] == [True, True]


class Counting:
    """Counts the vectors that `model.embed` and `model.read_out` make, and prompts read."""

    def __init__(self, model: DualLoraModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.prompts: list[int] = []
        embed, read, read_out = model.embed, model.read, model.read_out

        def counting_embed(batch, **kwargs) -> Tensor:
            self.rows.append(len(batch["input_ids"]))
            return embed(batch, **kwargs)

        def counting_read(prompts, rows) -> Prefix:
            self.prompts.append(len(rows))
            return read(prompts, rows)

        def counting_read_out(prefix, completions=None) -> Tensor:
            self.rows.append(len(prefix))
            return read_out(prefix, completions)

        monkeypatch.setattr(model, "embed", counting_embed)
        monkeypatch.setattr(model, "read", counting_read)
        monkeypatch.setattr(model, "read_out", counting_read_out)


def test_equal_thoughts_about_one_record_are_embedded_once_in_one_forward(
    model: DualLoraModel,
    scorer: RolloutScorer,
    rollouts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counting = Counting(model, monkeypatch)
    columns = scorer.columns(GROUPS, rollouts)
    # Each of four queries without a thought; two thoughts of record 0, one of record 1, one of 5.
    assert counting.rows == [4, 4]
    assert counting.prompts == [4]
    assert columns["positive_similarity"][0] == columns["positive_similarity"][2]


def test_a_step_without_any_complete_think_has_the_columns_of_no_thinking(
    model: DualLoraModel,
    scorer: RolloutScorer,
    rollouts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counting = Counting(model, monkeypatch)
    columns = scorer.columns([1, 3], [rollouts[4], rollouts[5]])
    assert counting.rows == [2]
    assert columns["is_think_complete"] == [False, False]
    assert columns["positive_similarity"] == columns["no_think_positive_similarity"]


@sharing_pictures
def test_rollouts_are_read_in_chunks_of_tokens(
    model: DualLoraModel,
    scorer: RolloutScorer,
    rollouts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = scorer.columns(GROUPS, rollouts)
    scorer.chunk_tokens = 1
    counting = Counting(model, monkeypatch)
    chunked = scorer.columns(GROUPS, rollouts)
    assert counting.prompts == [1, 1, 1, 1]
    assert sorted(counting.rows) == [1, 1, 1, 1, 1, 1, 2]
    for name, values in whole.items():
        torch.testing.assert_close(
            torch.tensor(chunked[name]), torch.tensor(values), rtol=0, atol=1e-5
        )


def test_every_target_and_no_query_is_embedded_once_and_the_bank_is_reused(
    model: DualLoraModel, records: RecordSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(model, monkeypatch)
    first = RolloutScorer(model, records, tmp_path / "bank", batch_size=4)
    distinct = {i.content_key() for r in records for i in (r.positive, *r.negatives)}
    assert sum(counting.rows) == len(distinct)
    assert max(counting.rows) <= 4
    counting.rows.clear()
    second = RolloutScorer(model, records, tmp_path / "bank", batch_size=2)
    assert counting.rows == []
    assert (first.targets.embeddings == second.targets.embeddings).all()


def test_a_bank_of_other_embedding_weights_is_refused(
    make_model: Callable[..., DualLoraModel], records: RecordSet, tmp_path: Path
) -> None:
    RolloutScorer(make_model("idefics3"), records, tmp_path / "bank")
    with pytest.raises(ScorerMismatchError, match="rebuild=True"):
        RolloutScorer(make_model("idefics3", seed=1), records, tmp_path / "bank")


def test_records_without_pools_compete_with_every_target(
    model: DualLoraModel, records: RecordSet, tmp_path: Path
) -> None:
    assert {pool_of(record) for record in records} == {"all"}
    bare = [type(r)(**{**vars(r), "metadata": {}}) for r in records]
    assert {pool_of(record) for record in bare} == {""}
    scorer = RolloutScorer(model, bare, tmp_path / "bank", num_negatives=100)
    (negatives,) = scorer.columns([0], [[]])["negative_similarities"]
    assert len(negatives) == len(scorer.targets) - 1


def test_a_query_competes_within_its_pool_only(
    model: DualLoraModel, records: RecordSet, tmp_path: Path
) -> None:
    pooled = [
        type(r)(**{**vars(r), "metadata": {"pool": "even" if i in (0, 2, 4, 5) else "odd"}})
        for i, r in enumerate(records)
    ]
    scorer = RolloutScorer(model, pooled, tmp_path / "bank", num_negatives=100)
    counts = [len(row) for row in scorer.columns([0, 1], [[], []])["negative_similarities"]]
    sizes = {name: len(rows) for name, rows in scorer.targets.pools.items()}
    assert counts == [sizes["even"] - 1, sizes["odd"] - 1]


# Negatives of each record by hand: further positives of its query, and the query, are none.
PAIRS = [
    ("camel", "top left", []),
    ("camel", "row", ["column", "top left"]),
    ("zebra", "column", ["zebra", "row"]),  # the query is a target too
    ("pizza", "top left", ["right"]),
]
NEGATIVES = [
    {"column", "zebra", "right"},
    {"column", "zebra", "right"},
    {"top left", "row", "right"},
    {"row", "column", "zebra", "right"},
]


@pytest.fixture
def repeated() -> list[Record]:
    return [
        Record(
            f"r{i}",
            "words",
            Item(text=query),
            Item(text=positive),
            tuple(Item(text=text) for text in negatives),
            metadata={"pool": "all"},
        )
        for i, (query, positive, negatives) in enumerate(PAIRS)
    ]


def test_rewards_leave_out_further_positives_of_a_query_and_the_query_itself(
    model: DualLoraModel, repeated: list[Record], tmp_path: Path
) -> None:
    scorer = RolloutScorer(model, repeated, tmp_path / "bank", num_negatives=100)
    thought = write(model, "<think> camel left </think>")
    columns = scorer.columns([0, 1, 2, 3], [thought] * 4)
    for row, (record, texts) in enumerate(zip(repeated, NEGATIVES, strict=True)):
        targets = embed_items(model, [Item(text=text) for text in (record.positive.text, *texts)])
        for mode, ids in (("", thought[:-1]), ("no_think_", None)):
            batch = model.collate([record.query], None if ids is None else [ids])
            positive, *others = (targets @ model.embed(batch)[0].detach()).tolist()
            seen = columns[f"{mode}negative_similarities"][row]
            assert seen == pytest.approx(sorted(others, reverse=True), abs=2e-5)
            rank = 1 + sum(other >= positive - TIE_TOLERANCE for other in others)
            assert columns[f"{mode}target_rank"][row] == rank


def test_training_labels_mining_and_evaluation_leave_out_what_rewards_do(
    model: DualLoraModel, repeated: list[Record], tmp_path: Path
) -> None:
    text_of = {i.content_key(): i.text for r in repeated for i in (r.positive, *r.negatives)}
    count = len(repeated)

    # The warm start, with all records in one batch.
    targets = [r.positive for r in repeated] + [i for r in repeated for i in r.negatives]
    keys = [item.content_key() for item in targets]
    mask = false_negative_mask(
        key_ids([r.query.content_key() for r in repeated]), key_ids(keys), torch.arange(count)
    ).scatter(1, torch.arange(count)[:, None], True)
    assert [{text_of[keys[j]] for j in (~row).nonzero()[:, 0]} for row in mask] == NEGATIVES

    # Rewards and gate labels: the hardest negative is that of the texts.
    scorer = RolloutScorer(model, repeated, tmp_path / "bank", num_negatives=100)
    labels = measure_gains(
        model,
        repeated,
        QUERY_SIDE,
        tmp_path / "labels",
        LabelSettings(max_think_tokens=2),
        show_progress_bar=False,
    )
    rewarded = scorer.columns(range(count), [[]] * count)["no_think_negative_similarities"]
    hardest = {row["id"]: row["no_think_hardest_negative"] for row in labels.rows}
    for record, texts, similarities in zip(repeated, NEGATIVES, rewarded, strict=True):
        assert len(similarities) == len(texts)
        if record.id != "r1":  # equal queries are one example
            assert hardest[record.id] == pytest.approx(similarities[0], abs=2e-5)

    # Mining, which has other reasons too.
    write_records(tmp_path / "records.jsonl", repeated)
    plan = MiningPlan(load_records(tmp_path / "records.jsonl"), tmp_path, show_progress_bar=False)
    rows = {row: text_of[key] for key, row in plan.candidates.row_of.items()}
    for position, texts in enumerate(NEGATIVES):
        barred = plan.excluded(position)["equal to the query or a positive"]
        assert set(rows.values()) - {rows[row] for row in barred} == texts

    # Evaluation.
    candidates = collect_candidates(repeated)
    for position, texts in enumerate(NEGATIVES):
        rivals = set(candidates.competing(position)) - {candidates.positive[position]}
        assert {candidates.items[row].text for row in rivals} == texts


def test_unlabelled_positives_are_the_same_for_every_rollout_of_a_record(
    model: DualLoraModel, records: RecordSet, rollouts: list[list[int]], tmp_path: Path
) -> None:
    targets = {i.content_key(): i for r in records for i in (r.positive, *r.negatives)}
    vectors = dict(zip(targets, embed_items(model, list(targets.values())), strict=True))
    own = vectors[records[0].positive.content_key()]
    cosines = sorted(float(own @ v) for v in vectors.values())
    limit = (cosines[-3] + cosines[-2]) / 2  # the positive and its nearest are above
    scorer = RolloutScorer(
        model, records, tmp_path / "bank", num_negatives=100, max_negative_similarity=limit
    )
    columns = scorer.columns([0] * len(rollouts), rollouts)
    for name in ("negative_similarities", "no_think_negative_similarities"):
        assert {len(row) for row in columns[name]} == {len(targets) - 2}
    assert max(columns["target_rank"]) <= len(targets) - 1


@pytest.mark.parametrize("limit", [-1.0, 1.5, float("nan")])
def test_a_limit_that_is_no_cosine_is_refused(tmp_path: Path, limit: float) -> None:
    with pytest.raises(ValueError, match=r"max_negative_similarity = .*\(-1, 1\]"):
        EmbedGRPOConfig(output_dir=str(tmp_path), max_negative_similarity=limit)


def test_variance_is_zero_for_equal_vectors_and_grows_as_they_spread(
    scorer: RolloutScorer, rollouts: list[list[int]]
) -> None:
    same = scorer.columns([0, 0], [rollouts[0]] * 2)["embedding_variance"]
    spread = scorer.columns(GROUPS, rollouts)["embedding_variance"]
    assert same == [pytest.approx(0.0, abs=1e-5)] * 2
    assert 0.001 < spread[0] <= 1.0


def test_scoring_leaves_modes_flags_and_random_state_alone(
    model: DualLoraModel, scorer: RolloutScorer, rollouts: list[list[int]]
) -> None:
    model.peft_model.train()
    flags = [p.requires_grad for p in model.peft_model.parameters()]
    state = torch.get_rng_state()
    scorer.columns(GROUPS, rollouts)
    assert all(module.training for module in model.peft_model.modules())
    assert flags == [p.requires_grad for p in model.peft_model.parameters()]
    assert torch.equal(state, torch.get_rng_state())


def test_evaluating_restores_each_module_after_an_error() -> None:
    inner = torch.nn.Dropout()
    outer = torch.nn.Sequential(inner, torch.nn.Dropout().eval())

    def fail() -> None:
        with evaluating(outer):
            assert not inner.training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inner.training
    assert not outer[1].training


def test_dropout_is_off_while_scoring(
    make_model: Callable[..., DualLoraModel], records: RecordSet
) -> None:
    model = make_model("idefics3", embedding_lora=LoraSettings(r=3, alpha=6, dropout=0.5))
    model.train()
    items = [record.query for record in records]
    torch.testing.assert_close(embed_items(model, items), embed_items(model, items))


@pytest.mark.parametrize("is_killed", [False, True], ids=["whole", "resumed"])
def test_the_bank_is_built_where_and_in_the_type_in_which_the_engine_will_score(
    make_model: Callable[..., DualLoraModel],
    records: RecordSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_killed: bool,
) -> None:
    model = make_model("idefics3")
    args = EmbedGRPOConfig(output_dir=str(tmp_path), report_to=[], scorer_batch_size=2)
    # As DeepSpeed's plugin says it; the engine itself is in tests/launch.
    settings = {"deepspeed_config": {"bf16": {"enabled": True}}}
    monkeypatch.setattr(args, "deepspeed_plugin", SimpleNamespace(**settings))
    calls: list[str] = []
    move, embed = model.to, model.embed

    def moving(*given: Any, **wanted: Any) -> Any:
        calls.append(f"to {wanted['device']} {wanted['dtype']}")
        return move(*given, **wanted)

    def embedding(batch: Any, **options: Any) -> Tensor:
        weight = next(model.backbone.model.parameters())
        calls.append(f"embed {weight.device} {weight.dtype}")
        if is_killed and len(calls) == 3:
            raise KeyboardInterrupt
        return embed(batch, **options)

    monkeypatch.setattr(model, "to", moving)
    monkeypatch.setattr(model, "embed", embedding)
    if is_killed:
        with pytest.raises(KeyboardInterrupt):
            make_scorer(model, records, args, tmp_path)
        is_killed = False
        assert set(calls) == {f"to {args.device} torch.bfloat16", "embed cpu torch.bfloat16"}
        calls.clear()
    scorer = make_scorer(model, records, args, tmp_path)
    assert calls[0] == f"to {args.device} torch.bfloat16"
    assert len(calls) > 2
    assert set(calls[1:]) == {f"embed {args.device} torch.bfloat16"}
    assert scorer.targets.embeddings.dtype == np.uint16  # bfloat16 on disk, too


def test_above_a_size_rollouts_meet_candidates_and_are_audited_against_the_whole_bank(
    model: DualLoraModel, records: RecordSet, rollouts: list[list[int]], tmp_path: Path
) -> None:
    shared: dict[str, Any] = {"num_negatives": NUM_NEGATIVES, "audit_steps": 2}
    whole = RolloutScorer(model, records, tmp_path / "bank", **shared)
    expected = whole.columns(GROUPS, rollouts)
    assert "is_other_margin" not in expected
    size = len(whole.targets)
    at_limit = RolloutScorer(model, records, tmp_path / "bank", exact_targets=size, **shared)
    assert at_limit.candidates is None
    for count, is_exact in ((size, True), (1, False)):
        scorer = RolloutScorer(
            model, records, tmp_path / "bank", exact_targets=1, num_candidates=count, **shared
        )
        steps = [scorer.columns(GROUPS, rollouts) for _ in range(3)]
        assert ["is_other_margin" in step for step in steps] == [True, False, True]
        assert any(steps[0]["is_other_margin"]) is not is_exact
        assert (steps[0]["target_rank"] == expected["target_rank"]) is is_exact
        for name in ("positive_similarity", "no_think_positive_similarity"):
            assert steps[0][name] == pytest.approx(expected[name], abs=1e-5)
