"""The bank holds what the scorer made, also after a kill; columns agree with a naive loop."""

import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twn_rl.data.record import Item
from twn_rl.training.bank_product import Asked
from twn_rl.training.candidate_pools import CandidatePools, audit
from twn_rl.training.similarity_columns import similarity_columns
from twn_rl.training.target_bank import BankError, ScorerMismatchError, TargetBank

WIDTH = 6
TEMPERATURE = 0.1


def vector_of(text: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(ord(c) * 7**i for i, c in enumerate(text)))
    return torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)


class Scorer:
    """Turns texts into fixed vectors and remembers which it was asked for."""

    def __init__(self, *, raise_after: int | None = None) -> None:
        self.seen: list[str] = []
        self.calls = 0
        self.raise_after = raise_after

    def __call__(self, items: list[Item]) -> torch.Tensor:
        if self.calls == self.raise_after:
            raise KeyboardInterrupt
        self.calls += 1
        self.seen += [item.text or "" for item in items]
        return torch.stack([vector_of(item.text or "") for item in items])


def make_items(count: int) -> list[Item]:
    return [Item(text=f"target {i:02d}") for i in range(count)]


def build(directory, items, scorer=None, **options) -> TargetBank:
    options = {"fingerprint": "scorer-a", "batch_size": 4, "shard_size": 4, **options}
    return TargetBank(directory).build(
        items, scorer or Scorer(), show_progress_bar=False, **options
    )


def test_a_bank_holds_each_distinct_target_once_in_order(tmp_path):
    items = make_items(10)
    scorer = Scorer()
    bank = build(tmp_path, [*items, items[3], items[0]], scorer)
    assert bank.ids == [item.content_key() for item in items]
    assert scorer.seen == [item.text for item in items]
    for row, item in enumerate(items):
        assert torch.equal(torch.tensor(bank.embeddings[row]), vector_of(item.text or ""))
    assert isinstance(bank.embeddings, np.memmap)
    assert not (tmp_path / "shards").exists()


def test_the_same_targets_and_scorer_are_not_embedded_again(tmp_path):
    build(tmp_path, make_items(10))
    scorer = Scorer()
    assert len(build(tmp_path, make_items(10), scorer)) == 10
    assert scorer.calls == 0


def test_other_targets_or_pools_are_embedded_anew(tmp_path):
    build(tmp_path, make_items(10))
    assert len(build(tmp_path, make_items(11))) == 11
    scorer = Scorer()
    assert set(build(tmp_path, make_items(11), scorer, pools=["a"] * 11).pools) == {"a"}
    assert scorer.calls == 3


def test_vectors_of_another_scorer_are_refused_unless_rebuilt(tmp_path):
    build(tmp_path, make_items(5))
    with pytest.raises(
        ScorerMismatchError, match=r"scorer-a, expected scorer-b; pass rebuild=True"
    ):
        build(tmp_path, make_items(5), fingerprint="scorer-b")
    with pytest.raises(ScorerMismatchError):
        TargetBank(tmp_path).open(fingerprint="scorer-b")
    assert build(tmp_path, make_items(5), fingerprint="scorer-b", rebuild=True).fingerprint == (
        "scorer-b"
    )


def test_an_interrupted_build_encodes_only_the_missing_shards(tmp_path):
    items = make_items(18)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, items, Scorer(raise_after=3))
    with pytest.raises(BankError, match="expected a finished bank"):
        TargetBank(tmp_path).open()
    scorer = Scorer()
    # A smaller batch after running out of memory must not lose the finished shards.
    bank = build(tmp_path, items, scorer, batch_size=2)
    assert scorer.seen == [item.text for item in items[12:]]
    assert np.array_equal(bank.embeddings, build(tmp_path / "whole", items).embeddings)


def test_a_build_killed_by_the_system_goes_on(tmp_path):
    script = (
        "import os, signal, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_scoring import Scorer, build, make_items\n"
        "class Killed(Scorer):\n"
        "    def __call__(self, items):\n"
        "        if self.calls == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().__call__(items)\n"
        "build(sys.argv[1], make_items(16), Killed())\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), os.path.dirname(__file__)]
    killed = subprocess.run(command, check=False)
    assert killed.returncode == -signal.SIGKILL
    scorer = Scorer()
    assert len(build(tmp_path, make_items(16), scorer)) == 16
    assert scorer.seen == [item.text for item in make_items(16)[8:]]


@pytest.mark.parametrize("damage", ["truncated", "nan", "empty"])
def test_a_damaged_shard_is_encoded_again(tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, make_items(12), Scorer(raise_after=2))
    shard = tmp_path / "shards" / "000001.npy"
    if damage == "nan":
        np.save(shard, np.full((4, WIDTH), np.nan, dtype=np.float32))
    else:
        shard.write_bytes(shard.read_bytes()[:-5] if damage == "truncated" else b"")
    scorer = Scorer()
    build(tmp_path, make_items(12), scorer)
    assert scorer.seen == [item.text for item in make_items(12)[4:]]


def test_shards_of_another_scorer_are_not_used(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, make_items(12), Scorer(raise_after=2))
    scorer = Scorer()
    build(tmp_path, make_items(12), scorer, fingerprint="scorer-b")
    assert scorer.calls == 3


def test_nan_in_a_stored_bank_is_found_on_opening(tmp_path):
    build(tmp_path, make_items(10))
    vectors = np.lib.format.open_memmap(tmp_path / "embeddings.npy", mode="r+")
    vectors[7, 2] = np.nan
    vectors.flush()
    with pytest.raises(BankError, match=r"targets \[7\].*rebuild=True"):
        build(tmp_path, make_items(10))


@pytest.mark.parametrize("name", ["embeddings.npy", "targets.json"])
def test_a_truncated_file_is_found_on_opening(tmp_path, name):
    build(tmp_path, make_items(10))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BankError, match="is damaged.*rebuild=True"):  # noqa: RUF043
        build(tmp_path, make_items(10))
    assert len(build(tmp_path, make_items(10), rebuild=True)) == 10


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (
            lambda items: torch.full((len(items), 3), torch.nan),
            r"encode: vectors of targets \[0, 1",
        ),
        (lambda items: torch.ones(len(items), 3), r"length 1\.732.*L2-normalise"),
        (lambda items: torch.ones(1, 1), r"shape \(1, 1\) for 4 items"),
    ],
)
def test_vectors_that_cannot_be_cosines_are_refused(tmp_path, encode, message):
    with pytest.raises(BankError, match=message):
        build(tmp_path, make_items(8), encode)


def test_processes_share_the_shards_and_call_the_scorer_equally_often(tmp_path):
    # Two processes in turns: each barrier hands over to the other, as threads would.
    import threading

    barrier = threading.Barrier(2, timeout=30)
    scorers = [Scorer(), Scorer()]
    banks: list[TargetBank | None] = [None, None]

    def run(index: int) -> None:
        processes = SimpleNamespace(
            process_index=index, num_processes=2, wait_for_everyone=barrier.wait
        )
        banks[index] = build(
            tmp_path, make_items(18), scorers[index], shard_size=8, processes=processes
        )

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scorers[0].calls == scorers[1].calls == 4
    whole = build(tmp_path / "alone", make_items(18))
    for bank in banks:
        assert bank is not None
        assert np.array_equal(bank.embeddings, whole.embeddings)


def test_batches_hold_items_of_like_length_and_rows_stay_in_order(tmp_path):
    items = [Item(text="w" * (1 + i * 7 % 10) + str(i)) for i in range(10)]
    lengths: list[list[int]] = []

    def encode(batch: list[Item]) -> torch.Tensor:
        lengths.append([len(item.text or "") for item in batch])
        return Scorer()(batch)

    bank = build(tmp_path, items, encode, shard_size=10)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert [len(batch) for batch in lengths] == [4, 4, 2]
    for row, item in enumerate(items):
        assert torch.equal(torch.tensor(bank.embeddings[row]), vector_of(item.text or ""))


def test_workers_prepare_batches_and_leave_the_random_state_alone(tmp_path):
    pids, state = [], torch.get_rng_state()

    def encode(prepared: tuple[int, list[Item]]) -> torch.Tensor:
        pids.append(prepared[0])
        return Scorer()(prepared[1])

    def prepare(items: list[Item]) -> tuple[int, list[Item]]:
        return os.getpid(), items

    bank = build(tmp_path / "workers", make_items(18), encode, prepare=prepare, num_workers=2)
    assert os.getpid() not in pids
    assert len(set(pids)) == 2
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(bank.embeddings, build(tmp_path / "alone", make_items(18)).embeddings)


def test_a_bank_in_bfloat16_takes_half_the_room_and_is_multiplied_in_float32(tmp_path):
    items = make_items(40)
    whole = build(tmp_path / "float32", items)
    half = build(tmp_path / "bfloat16", items, dtype="bfloat16")
    assert half.embeddings.nbytes * 2 == whole.embeddings.nbytes
    rounded = torch.tensor(np.array(whole.embeddings)).bfloat16().float()
    rows = np.arange(40)
    assert torch.equal(half.rows(rows, torch.device("cpu")), rounded)
    assert torch.equal(half.keep("cpu").rows(rows, torch.device("cpu")), rounded)
    query = vector_of("x")
    columns = similarity_columns(query[None], [half.ids[3]], half, num_negatives=39)
    expected = (rounded @ query).tolist()
    assert columns["positive_similarity"] == pytest.approx([expected.pop(3)], abs=1e-6)
    assert columns["negative_similarities"][0] == pytest.approx(
        sorted(expected, reverse=True), abs=1e-6
    )
    scorer = Scorer()
    build(tmp_path / "bfloat16", items, scorer, dtype="bfloat16")
    assert scorer.calls == 0
    build(tmp_path / "bfloat16", items, scorer)  # another type is another bank
    assert scorer.calls == 10


def test_infinity_in_a_bank_of_bfloat16_is_found_on_opening(tmp_path):
    build(tmp_path, make_items(10), dtype="bfloat16")
    vectors = np.lib.format.open_memmap(tmp_path / "embeddings.npy", mode="r+")
    vectors[7, 2] = torch.tensor(-torch.inf).bfloat16().view(torch.int16).numpy().view(np.uint16)
    vectors.flush()
    with pytest.raises(BankError, match=r"targets \[7\].*rebuild=True"):
        TargetBank(tmp_path).open()


def shared_case(directory, dtype):
    """Return a bank with many equal vectors, queries, and the arguments of their columns."""
    signs = torch.randint(0, 2, (100, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    vectors = signs / 2  # 16 directions: ties everywhere
    names = ["left" if i % 3 else "right" for i in range(100)]
    items = [Item(text=f"{i:03d}") for i in range(100)]
    bank = build(
        directory,
        items,
        lambda batch: vectors[[int(item.text or "") for item in batch]],
        pools=names,
        dtype=dtype,
    )
    generator = np.random.default_rng(0)
    positions = generator.integers(0, 100, size=8)
    queries = torch.from_numpy(generator.normal(size=(8, 4))).float()
    queries[2] = vectors[positions[2]]
    arguments = {
        "query_embeds": torch.nn.functional.normalize(queries, dim=1),
        "positive_ids": [bank.ids[i] for i in positions],
        "false_negative_ids": [
            [bank.ids[j] for j in generator.integers(0, 100, 5)] for _ in "8" * 8
        ],
        "pools": [None if i % 2 else names[p] for i, p in enumerate(positions)],
    }
    return bank, arguments


def found_candidates(directory, numbers, processes=None):
    """Return the candidates of some of eight queries in a bank of distinct vectors."""
    bank = build(
        directory, make_items(100), pools=["left" if i % 3 else "right" for i in range(100)]
    )
    queries = torch.stack([vector_of(f"query {number}") for number in numbers])
    asked = [Asked(n, (n,), None if n % 2 else ("left" if n % 3 else "right")) for n in numbers]
    pools = CandidatePools(bank, 20, processes)
    pools.find(numbers, queries, asked)
    return {str(number): rows.tolist() for number, rows in pools.rows.items()}


SHARED = [(None, "float32"), (0.9, "float32"), (None, "bfloat16")]
SHARE_SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from types import SimpleNamespace
from test_scoring import SHARED, found_candidates, shared_case
from twn_rl.training.bank_rows import own_rows
from twn_rl.training.similarity_columns import similarity_columns
folder, rank = sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
processes = SimpleNamespace(process_index=rank, num_processes=2)
found = []
for number, (limit, dtype) in enumerate(SHARED):
    bank, arguments = shared_case(f"{folder}/{rank}_{number}", dtype)
    if number % 2:
        bank.keep("cpu", own_rows(len(bank), processes, 16))
    mine = slice(0, 5) if rank == 0 else slice(5, 8)
    own = {name: values[mine] for name, values in arguments.items()}
    found.append(similarity_columns(
        **own, bank=bank, num_negatives=7, max_negative_similarity=limit, chunk_size=16,
        processes=processes,
    ))
candidates = found_candidates(f"{folder}/{rank}_candidates", list(range(8))[mine], processes)
print(json.dumps([found, candidates]))
"""


@pytest.mark.distributed
def test_a_bank_shared_by_two_processes_gives_the_columns_of_one_to_the_last_bit(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE_SCRIPT, os.path.dirname(__file__), tmp_path, str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    found, ranks = [part[0] for part in printed], []
    for number, (limit, dtype) in enumerate(SHARED):
        bank, arguments = shared_case(tmp_path / "alone", dtype)
        alone = similarity_columns(
            **arguments, bank=bank, num_negatives=7, max_negative_similarity=limit, chunk_size=16
        )
        both = [part[number] for part in found]
        assert alone == {name: both[0][name] + both[1][name] for name in alone}
        ranks += alone["target_rank"]
    assert len(set(ranks)) > 5
    candidates = found_candidates(tmp_path / "candidates", range(8))
    assert candidates == printed[0][1] | printed[1][1]


def naive_columns(queries, positive_ids, bank, count, false_negative_ids, pools, limit):
    vectors = np.array(bank.embeddings, dtype=np.float64)
    rows = []
    for query, positive_id, ignored, pool in zip(
        queries.double().numpy(), positive_ids, false_negative_ids, pools, strict=True
    ):
        positive = float(query @ vectors[bank.row_of[positive_id]])
        others = [
            float(query @ vectors[row])
            for row in bank.pools[pool]
            if bank.ids[row] != positive_id and bank.ids[row] not in ignored
            if limit is None or vectors[row] @ vectors[bank.row_of[positive_id]] < limit
        ]
        rank = 1 + sum(other >= positive - 1e-6 for other in others)
        exps = np.exp(np.array([positive, *others]) / TEMPERATURE)
        loss = -np.log(exps[0] / exps.sum())
        rows.append((positive, sorted(others, reverse=True)[:count], rank, loss))
    return rows


@given(
    seed=st.integers(0, 1000),
    chunk_size=st.integers(1, 50),
    count=st.integers(1, 9),
    limit=st.sampled_from([None, -0.9, 0.0, 0.3, 1.0]),
)
def test_columns_agree_with_a_naive_loop_for_any_chunk(
    tmp_path_factory, seed, chunk_size, count, limit
):
    directory = tmp_path_factory.getbasetemp() / "shared_bank"
    pool_names = ["left" if i % 3 else "right" for i in range(30)]
    bank = build(directory, make_items(30), pools=pool_names)
    generator = np.random.default_rng(seed)
    positions = generator.integers(0, 30, size=7)
    positive_ids = [bank.ids[i] for i in positions]
    pools = [pool_names[i] for i in positions]
    ignored = [[bank.ids[i] for i in generator.integers(0, 30, size=3)] for _ in positions]
    queries = torch.from_numpy(generator.normal(size=(7, WIDTH))).float()
    queries = torch.nn.functional.normalize(queries, dim=1)
    columns = similarity_columns(
        queries,
        positive_ids,
        bank,
        num_negatives=count,
        false_negative_ids=ignored,
        max_negative_similarity=limit,
        pools=pools,
        chunk_size=chunk_size,
        temperature=TEMPERATURE,
    )
    expected = naive_columns(queries, positive_ids, bank, count, ignored, pools, limit)
    for row, (positive, negatives, rank, loss) in enumerate(expected):
        assert columns["info_nce"][row] == pytest.approx(loss, abs=2e-5)
        assert columns["positive_similarity"][row] == pytest.approx(positive, abs=1e-6)
        assert columns["negative_similarities"][row] == pytest.approx(negatives, abs=1e-6)
        assert columns["target_rank"][row] == rank


ANGLES = {"positive": 0, "near": 20, "hard": 60, "far": 90}  # degrees in the plane


def plane_bank(directory):
    angles = torch.deg2rad(torch.tensor(list(ANGLES.values()), dtype=torch.float32))
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    row_of = {name: row for row, name in enumerate(ANGLES)}
    items = [Item(text=name) for name in ANGLES]
    return build(directory, items, lambda batch: vectors[[row_of[item.text] for item in batch]])


@pytest.mark.parametrize(
    ("limit", "left", "rank"),
    [(None, ["near", "hard", "far"], 4), (0.9, ["hard", "far"], 3), (0.45, ["far"], 2)],
)
def test_unlabelled_positives_are_neither_negatives_nor_rivals(tmp_path, limit, left, rank):
    # The query lies beyond "far", so that every target is nearer to it than the positive.
    query = torch.deg2rad(torch.tensor([[110.0]]))
    columns = similarity_columns(
        torch.cat([query.cos(), query.sin()], dim=1),
        [Item(text="positive").content_key()],
        plane_bank(tmp_path),
        max_negative_similarity=limit,
    )
    expected = [math.cos(math.radians(110 - ANGLES[name])) for name in reversed(left)]
    assert columns["negative_similarities"][0] == pytest.approx(expected, abs=1e-6)
    assert columns["target_rank"] == [rank]


@given(angle=st.integers(0, 359), chunk_size=st.integers(1, 4))
def test_no_query_can_hide_a_hard_negative_by_leaving_its_positive(
    tmp_path_factory, angle, chunk_size
):
    bank = plane_bank(tmp_path_factory.getbasetemp() / "plane")
    query = torch.deg2rad(torch.tensor([[float(angle)]]))
    columns = similarity_columns(
        torch.cat([query.cos(), query.sin()], dim=1),
        [Item(text="positive").content_key()],
        bank,
        max_negative_similarity=0.9,
        chunk_size=chunk_size,
    )
    expected = sorted(math.cos(math.radians(angle - ANGLES[n])) for n in ("hard", "far"))
    assert columns["negative_similarities"][0] == pytest.approx(expected[::-1], abs=1e-6)


def test_looking_for_unlabelled_positives_reads_no_more_of_the_bank(tmp_path, monkeypatch):
    bank = build(tmp_path, make_items(30))
    read, rows, block = [], bank.rows, bank.block

    def counting(chosen, device):
        read.append(len(chosen))
        return rows(chosen, device)

    def counting_block(chosen, device):
        read.append(len(chosen))
        return block(chosen, device)

    monkeypatch.setattr(bank, "rows", counting)
    monkeypatch.setattr(bank, "block", counting_block)
    queries = torch.stack([vector_of("x"), vector_of("y"), vector_of("z")])
    counts = []
    for limit in (None, 0.5):
        similarity_columns(
            *(queries, [bank.ids[0]] * 3, bank), max_negative_similarity=limit, chunk_size=7
        )
        counts.append(read.copy())
        read.clear()
    assert counts[0] == counts[1]


def test_without_pools_a_query_competes_with_the_whole_bank(tmp_path):
    bank = build(tmp_path, make_items(9), pools=["a", "b", "c"] * 3)
    columns = similarity_columns(vector_of("x")[None], [bank.ids[0]], bank, num_negatives=99)
    assert len(columns["negative_similarities"][0]) == 8


def test_a_query_equal_to_its_positive_ranks_first_and_ties_count_against_it(tmp_path):
    items = make_items(6)
    bank = build(tmp_path, items)
    columns = similarity_columns(vector_of(items[2].text or "")[None], [bank.ids[2]], bank)
    assert columns["target_rank"] == [1]
    assert columns["positive_similarity"] == pytest.approx([1.0])
    collapsed = build(tmp_path / "same", items, lambda batch: torch.eye(1, 4).repeat(len(batch), 1))
    columns = similarity_columns(torch.eye(1, 4), [collapsed.ids[2]], collapsed)
    assert columns["target_rank"] == [6]


def test_a_pool_of_one_has_no_negatives(tmp_path):
    bank = build(tmp_path, make_items(3), pools=["alone", "b", "b"])
    columns = similarity_columns(
        vector_of("x")[None], [bank.ids[0]], bank, pools=["alone"], temperature=TEMPERATURE
    )
    assert columns["info_nce"] == [0.0]
    assert columns["negative_similarities"] == [[]]
    assert columns["target_rank"] == [1]


def test_a_bank_in_memory_gives_the_same_columns_without_gradient(tmp_path):
    bank = build(tmp_path, make_items(9))
    queries = torch.stack([vector_of("x"), vector_of("y")]).requires_grad_()
    from_disk = similarity_columns(queries, bank.ids[:2], bank)
    assert similarity_columns(queries, bank.ids[:2], bank.keep("cpu")) == from_disk
    assert json.loads(json.dumps(from_disk)) == from_disk


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive_ids": ["unknown"]}, "positive of row 0 = unknown is not in the bank"),
        ({"pools": ["b"]}, "positive of row 0 .* is not in pool 'b'"),
        ({"pools": ["nowhere"]}, "pool = 'nowhere' is not in the bank"),
        ({"query_embeds": torch.full((1, WIDTH), torch.nan)}, r"rows \[0\] hold NaN"),
        ({"query_embeds": torch.ones(1, WIDTH + 1)}, "shape"),
        ({"pools": ["a", "a"]}, "one entry per query"),
        ({"num_negatives": 0}, "num_negatives = 0"),
        ({"max_negative_similarity": -1.0}, r"max_negative_similarity = -1.0, .* in \(-1, 1\]"),
        ({"max_negative_similarity": math.nan}, "max_negative_similarity = nan"),
    ],
)
def test_queries_that_cannot_be_scored_are_refused(tmp_path, change, message):
    bank = build(tmp_path, make_items(4), pools=["a", "a", "b", "b"])
    arguments = {"query_embeds": vector_of("x")[None], "positive_ids": [bank.ids[0]], "bank": bank}
    with pytest.raises(BankError, match=message):
        similarity_columns(**{**arguments, **change})


def test_candidates_are_the_nearest_to_the_query_and_to_its_positive(tmp_path):
    bank = build(tmp_path, make_items(60), pools=["a" if i % 2 else "b" for i in range(60)])
    queries = torch.stack([vector_of("x"), vector_of("y")])
    asked = [Asked(3, (3,), "a"), Asked(8, (8,), None)]
    pools = CandidatePools(bank, 4)
    pools.find([0, 1], queries, asked)
    vectors = torch.tensor(np.array(bank.embeddings))
    for number, (query, each) in enumerate(zip(queries, asked, strict=True)):
        rows = np.arange(60) if each.pool is None else bank.pools[each.pool]
        expected = {each.positive}
        for anchor in (query, vectors[each.positive]):
            expected |= set(rows[(vectors[rows] @ anchor).topk(4).indices])
        assert set(pools.rows[number]) == expected
    known = pools.rows[0]
    pools.find([0], queries[1:], asked[1:])
    assert pools.rows[0] is known  # found once


def test_scores_among_candidates_are_exact_and_the_audit_tells_where_they_are_not_enough(tmp_path):
    bank = build(tmp_path, make_items(60))
    query, thought = vector_of("x"), vector_of("z")
    asked = [Asked(3, (3, 5), None)] * 2
    vectors = torch.stack([query, thought])
    whole = similarity_columns(
        vectors, [bank.ids[3]] * 2, bank, num_negatives=3, false_negative_ids=[[bank.ids[5]]] * 2
    )
    verdicts = {}
    for count in (4, 60):
        pools = CandidatePools(bank, count)
        pools.find([0], query[None], asked[:1])
        found = pools.columns([0, 0], vectors, asked, 3, None)
        others = [row for row in pools.rows[0] if row not in (3, 5)]
        similarities = torch.tensor(np.array(bank.embeddings[others])) @ vectors.T
        for place in range(2):
            expected = similarities[:, place].topk(3).values.tolist()
            assert found["negative_similarities"][place] == pytest.approx(expected, abs=1e-6)
        verdicts[count] = audit(found, whole)["is_other_margin"]
    assert verdicts[4][1]  # a thought far from its query and positive
    assert verdicts[60] == [False, False]
