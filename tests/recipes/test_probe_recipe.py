"""The recipe that asks whether vectors read their thoughts, under a real launch."""

from pathlib import Path

import pytest
from launching import launch

from twn_rl.launch.arguments import ModelArguments

pytestmark = pytest.mark.slow


def test_probing_writes_one_row_for_each_kind_of_thought(tmp_path: Path) -> None:
    model = tmp_path / "model"
    ModelArguments(reasoning_rank=2, embedding_rank=2, max_think_tokens=6).build(0).save_pretrained(
        model
    )
    flags = [f"--model={model}", "--demo_scale=0.01", "--demo_dir=data", "--splits", "test"]
    done = launch("experiments/probe_cot.py", flags, config=None, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    text = (model / "probe_cot" / "probe_cot.md").read_text(encoding="utf-8")
    assert text.strip() in done.stdout
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines()[2:]}
    # An untrained model writes no thoughts, so that there is nothing to lend or to cut.
    assert list(rows) == ["own thoughts", "gold thoughts", "empty thought", "no thinking"]
    assert rows["no thinking"][2].strip() == "1.000 ± 0.000"
    assert (model / "probe_cot" / "test" / "metrics.json").is_file()
