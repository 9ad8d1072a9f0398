"""The judge of thoughts: what it refuses, how often, and its place in the gate's file."""

import logging

import pytest
import torch
from torch import Tensor

from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import QUERY_SIDE, Gate
from twn_rl.modeling.gate_files import GATE_FILE
from twn_rl.modeling.judge import Judge, fit_judge, judge_report
from twn_rl.modeling.model import DualLoraModel

WIDTH = 12


def matching(count: int, seed: int, *, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return states whose second is the first, turned, with noise; `shift` breaks the match.

    Each state by itself looks the same with and without a shift.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, WIDTH, generator=generator)
    noise = torch.randn(count, WIDTH, generator=generator)
    partner = torch.randn(count, WIDTH, generator=generator)
    second = (1 - shift) * first.roll(3, dims=1) + shift * partner + 0.3 * noise
    return first, second


@pytest.fixture(scope="module")
def judge() -> Judge:
    fitted = fit_judge(matching(1000, 0), matching(400, 1))
    assert fitted is not None
    return fitted


def test_a_thought_that_does_not_go_with_its_input_is_refused(judge: Judge) -> None:
    """Either state alone is as usual as any, so that only a judge of both can tell."""
    wrong = judge.plausibility(*matching(500, 2, shift=1.0))
    right = judge.plausibility(*matching(500, 3))
    assert float((wrong > judge.level).float().mean()) < 0.02
    assert float((right > judge.level).float().mean()) > 0.9
    swapped = judge.plausibility(*matching(500, 3)[::-1])
    assert float((swapped > judge.level).float().mean()) < 0.5


@pytest.mark.parametrize("max_refused", [0.05, 0.2, 0.5])
def test_at_most_the_asked_share_of_helpful_thoughts_is_refused(max_refused: float) -> None:
    judge = fit_judge(matching(1000, 0), matching(2000, 1), max_refused=max_refused)
    assert judge is not None
    plausibility = judge.plausibility(*matching(4000, 4))
    refused = sum(not judge.keeps(p) for p in plausibility.tolist()) / 4000
    assert refused == pytest.approx(max_refused, abs=0.02)
    # Calibrated at every level, not only at its own.
    assert float(plausibility.mean()) == pytest.approx(0.5, abs=0.02)


def test_neither_the_length_of_a_state_nor_its_batch_matters(judge: Judge) -> None:
    first, second = matching(50, 5)
    whole = judge.plausibility(first, second)
    scaled = judge.plausibility(7 * first, torch.nn.functional.normalize(second, dim=1))
    torch.testing.assert_close(judge.distance(first, second), judge.distance(7 * first, second))
    assert float((whole - scaled).abs().max()) <= 1 / 400
    alone = torch.cat([judge.plausibility(first[i : i + 1], second[i : i + 1]) for i in range(50)])
    assert float((whole - alone).abs().max()) <= 1 / 400


def test_plausibility_is_a_share_of_the_reference_distances(judge: Judge) -> None:
    first, second = matching(30, 6)
    for distance, said in zip(
        judge.distance(first, second).tolist(),
        judge.plausibility(first, second).tolist(),
        strict=True,
    ):
        farther = sum(other >= distance for other in judge.reference.tolist())
        assert said == pytest.approx((farther + 1) / 401)


def test_the_distance_is_that_of_a_plain_gaussian_when_every_axis_is_kept() -> None:
    fit = matching(4000, 0)
    judge = fit_judge(fit, matching(50, 1))
    assert judge is not None
    assert judge.sizes == (2 * WIDTH - 1, 50)
    pairs = torch.cat([torch.nn.functional.layer_norm(s, (WIDTH,)) for s in fit], 1).double()
    # Each half has mean 0: the last number of each is told by the others.
    seen = torch.cat([pairs[:, : WIDTH - 1], pairs[:, WIDTH:-1]], 1)
    offset = seen[:10] - seen.mean(0)
    expected = (offset @ seen.T.cov().inverse() * offset).sum(1)
    found = judge.distance(fit[0][:10], fit[1][:10]).double()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.05)


def test_pairs_fewer_than_axes_are_enough() -> None:
    fit = torch.randn(40, 64), torch.randn(40, 64)
    judge = fit_judge(fit, (torch.randn(20, 64), torch.randn(20, 64)))
    assert judge is not None
    assert judge.sizes == (5, 20)
    assert torch.isfinite(judge.distance(*fit)).all()


def test_too_few_helpful_thoughts_leave_a_gate_without_judge(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    assert fit_judge(matching(7, 0), matching(100, 1)) is None
    assert fit_judge(matching(100, 0), matching(19, 1)) is None
    assert "19 held out: a judge needs 8 and 20" in caplog.text
    assert judge_report(None, matching(4, 0), torch.ones(4)) == {"num_axes": None}


def test_the_report_counts_what_is_kept(judge: Judge) -> None:
    good, bad = matching(200, 7), matching(100, 8, shift=1.0)
    states = (torch.cat([good[0], bad[0]]), torch.cat([good[1], bad[1]]))
    gains = torch.cat([torch.ones(200), -torch.ones(100)])
    report = judge_report(judge, states, gains)
    assert report["kept_share_helps"] > 0.9
    assert report["kept_share_hurts"] < 0.05
    assert report["kept_share_all"] == pytest.approx(
        (200 * report["kept_share_helps"] + 100 * report["kept_share_hurts"]) / 300
    )
    assert (report["level"], report["num_reference"]) == (pytest.approx(0.05), 400)


def test_states_that_cannot_be_are_refused() -> None:
    first, second = matching(100, 0)
    with pytest.raises(ValueError, match=r"\(100, 12\) and \(99, 12\)"):
        fit_judge((first, second[1:]), matching(50, 1))
    second[3, 0] = float("nan")
    with pytest.raises(ValueError, match=r"rows \[3\] \(1 in all\) hold NaN"):
        fit_judge((first, second), matching(50, 1))
    with pytest.raises(ValueError, match=r"max_refused = 0"):
        fit_judge(matching(100, 0), matching(50, 1), max_refused=0)


def test_the_judge_is_stored_with_the_gate_and_stays_in_float32(
    make_model, make_backbone, tmp_path
) -> None:
    model = make_model("llama")
    gate = Gate(model.hidden_size, 8)
    fit, held_out = (torch.randn(2, count, model.hidden_size) for count in (80, 30))
    gate.judge = fit_judge((fit[0], fit[1]), (held_out[0], held_out[1]))
    gate.fitted_to = Fingerprints(model).gate_origin
    model.gates[QUERY_SIDE] = gate
    model.save_pretrained(tmp_path / "model")
    loaded = DualLoraModel.from_pretrained(tmp_path / "model", backbone=make_backbone("llama"))
    stored = loaded.gates[QUERY_SIDE]
    assert isinstance(stored, Gate)
    assert gate.judge is not None
    assert stored.judge is not None
    for name, tensor in gate.judge.state_dict().items():
        assert torch.equal(tensor, stored.judge.state_dict()[name])
    assert {tensor.dtype for tensor in stored.half().state_dict().values()} == {torch.float32}

    # A gate without judge is read as before, and its file names none.
    gate.judge = None
    model.save_pretrained(tmp_path / "model")
    bare = DualLoraModel.from_pretrained(tmp_path / "model", backbone=make_backbone("llama"))
    assert bare.judge(QUERY_SIDE) is None
    assert (tmp_path / "model" / GATE_FILE).is_file()
