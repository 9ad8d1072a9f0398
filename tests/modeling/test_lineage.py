"""The stages of a model, told by the `run.yaml` of each folder."""

from pathlib import Path

import pytest
import yaml

from twn_rl.modeling.lineage import lineage, read_run, stage_of, start_of


def write_run(folder: Path, **settings: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def write_three(root: Path) -> list[Path]:
    sft = write_run(root / "sft", SftConfig={}, SftScriptArguments={"checkpoint": None})
    grpo = write_run(
        root / "grpo", EmbedGRPOConfig={}, GrpoScriptArguments={"warm_start": str(sft)}
    )
    alone = {"checkpoint": str(grpo), "train_adapters": "embedding"}
    return [sft, grpo, write_run(root / "refit", SftConfig={}, SftScriptArguments=alone)]


def test_a_model_is_followed_back_to_its_warm_start(tmp_path: Path) -> None:
    sft, grpo, refit = write_three(tmp_path)
    assert list(lineage(refit).items()) == [("warm start", sft), ("GRPO", grpo), ("refit", refit)]
    assert list(lineage(grpo)) == ["warm start", "GRPO"]
    assert start_of(read_run(refit)) == str(grpo)


def test_models_that_were_moved_together_are_found_beside_each_other(tmp_path: Path) -> None:
    write_three(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    found = lineage(tmp_path / "there" / "refit")
    assert list(found) == ["warm start", "GRPO", "refit"]
    assert all(folder.parent == tmp_path / "there" for folder in found.values())


def test_another_run_where_a_moved_model_came_from_is_not_taken_for_its_own(
    tmp_path: Path,
) -> None:
    def write(root: Path) -> None:
        write_run(root / "sft", SftConfig={"output_dir": str(tmp_path / "here" / "sft")})
        grpo = {"output_dir": str(tmp_path / "here" / "grpo")}
        came_from = {"warm_start": str(tmp_path / "here" / "sft")}
        write_run(root / "grpo", EmbedGRPOConfig=grpo, GrpoScriptArguments=came_from)

    write(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    write(tmp_path / "here")
    for root in (tmp_path / "here", tmp_path / "there"):
        assert lineage(root / "grpo")["warm start"] == root / "sft"


def test_the_embedding_adapter_alone_is_a_refit_after_rl_only(tmp_path: Path) -> None:
    *_, refit = write_three(tmp_path)
    again = {"checkpoint": str(tmp_path / "sft"), "train_adapters": "embedding"}
    alone = write_run(tmp_path / "alone", SftConfig={}, SftScriptArguments=again)
    assert list(lineage(alone)) == ["warm start", "embedding alone"]
    assert list(lineage(refit))[-1] == "refit"


def test_a_broken_file_of_settings_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for text in ("just words", "a: [1", ""):
        (tmp_path / "run.yaml").write_text(text)
        assert read_run(tmp_path) == {}
    assert caplog.text.count("how this model was trained is not told") == 3


def test_stages_of_one_kind_are_told_apart_and_a_circle_ends(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_run(first, SftConfig={}, SftScriptArguments={"checkpoint": str(second)})
    write_run(second, SftConfig={}, SftScriptArguments={"checkpoint": str(first)})
    assert lineage(second) == {"warm start": first, "warm start (2)": second}


def test_what_no_run_wrote_has_its_folders_name(tmp_path: Path) -> None:
    assert lineage(tmp_path / "mine") == {"mine": tmp_path / "mine"}
    assert stage_of({}) is None
    assert start_of({"GrpoScriptArguments": None}) is None
