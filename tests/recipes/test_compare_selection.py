"""What the comparison of selections runs, and who judges them."""

from pathlib import Path

import pytest
from comparison_runs import Launched, run_stages, seed_in

from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.launch.stage import FINISHED_FILE
from twn_rl.recipes import eval_embed, select_thoughts, sft_embed
from twn_rl.recipes.experiments import compare_selection
from twn_rl.training.sft import SftConfig


def test_every_arm_of_a_selection_trains_equally_and_the_first_one_judges(
    tmp_path: Path, launched: Launched
) -> None:
    script = compare_selection.SelectionArguments(max_steps=7)
    root, seed = tmp_path, seed_in(tmp_path, teacher_swap_rate=0.55)
    run_stages(list(compare_selection.plan(script, seed)))
    runs, steps = launched(), ["select_thoughts", "sft_embed", "eval_embed"]
    assert [words[0] for words in runs] == steps * 3
    selections, trainings, evaluations = runs[::3], runs[1::3], runs[2::3]
    parsed = [
        parse_arguments((select_thoughts.SelectScriptArguments, DataArguments), arguments=words[1:])
        for words in selections
    ]
    assert [script.rule for script, _ in parsed] == ["all", "random", "best"]
    assert [script.model for script, _ in parsed] == [None, None, str(root / "all")]
    for chosen, own in parsed:
        assert (chosen.demo_teachers, chosen.copies, chosen.seed) == (4, 4, 3)
        assert (own.demo_seed, own.teacher_swap_rate) == (3, 0.55)
        assert own.demo_dir == str(root / "data")
    differing = [
        {flag for flag in words if not flag.startswith(("--output_dir", "--train_file"))}
        for words in trainings
    ]
    assert differing[0] == differing[1] == differing[2]
    assert "--max_steps=7" in differing[0]
    for words, arm in zip(trainings, compare_selection.RULES, strict=True):
        assert f"--train_file={root / f'{arm}_thoughts' / 'selected.jsonl'}" in words
        types = (sft_embed.SftScriptArguments, ModelArguments, DataArguments, SftConfig)
        _, _, own, training = parse_arguments(types, arguments=words[1:])
        assert (own.data_root, training.max_steps, training.seed) == (str(root / "data"), 7, 3)
    for words in evaluations:
        parse_arguments((eval_embed.EvalScriptArguments, DataArguments), arguments=words[1:])
    run_stages(list(compare_selection.plan(script, seed)))
    assert launched() == [], "finished runs are kept"
    # Another threshold: selected again, trained again, evaluated again, and nothing else.
    script.threshold = 0.1
    run_stages(list(compare_selection.plan(script, seed)))
    assert [words[0] for words in launched()] == steps
    # Another judge: what it judged is forgotten, whatever else is kept.
    (root / "selected_thoughts" / "scores").mkdir()
    (root / "all" / FINISHED_FILE).unlink()
    run_stages(list(compare_selection.plan(script, seed)))
    assert [words[0] for words in launched()] == [*steps[1:], *steps]
    assert not (root / "selected_thoughts" / "scores").exists()


def test_a_selection_without_its_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="'all' too: its model selects"):
        compare_selection.SelectionArguments(arms=["selected"])
