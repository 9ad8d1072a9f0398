r"""Train the tiny vision-language backbone that ships as the embedded default.

Stage 1 aligns each picture tile with the word of its object (tower and connector only); stage 2
trains the language model to state scene facts in random order. It learns to see and to name, not
to reason: no lesson contains a hop. (--hop_share asks how much of that answers alone can teach.)

    python recipes/prepare/demo_backbone.py --output_dir outputs/demo_backbone
    python recipes/prepare/demo_backbone.py --start_from twn_rl/demo/backbone --hop_share 0.7 \
        --steps 1500 --output_dir outputs/hops_in_one_pass

The shipped weights were made in several legs, told in twn_rl/demo/backbone/README.md with the
figures they reach; a later leg starts from an earlier one with --start_from. About half a second a
step on two CPU cores.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import Idefics3ForConditionalGeneration

from twn_rl.demo import lessons, pretraining, tiny_vlm
from twn_rl.demo.scenes import STYLES
from twn_rl.launch.program import start
from twn_rl.runtime.text_tables import markdown_table


@dataclass
class PretrainArguments:
    """Settings of the pretraining run."""

    output_dir: str = field(default="outputs/demo_backbone", metadata={"help": "Where to save."})
    alignment_steps: int = field(default=500, metadata={"help": "Stage 1 steps (64 scenes each)."})
    steps: int = field(default=3000, metadata={"help": "Stage 2 steps."})
    batch_size: int = field(default=64, metadata={"help": "Scenes per step, both stages."})
    num_scenes: int = field(default=6000, metadata={"help": "Distinct scenes drawn."})
    find_share: float = field(
        default=0.4,
        metadata={"help": "Share of scene facts that give an object and ask for its cell."},
    )
    hop_share: float = field(
        default=0.0,
        metadata={"help": "Share of lessons that ask one or two hops for the answer alone."},
    )
    start_from: str | None = field(
        default=None,
        metadata={"help": "Earlier backbone to go on from; skips drawing weights and stage 1."},
    )
    examine_every: int = field(default=500, metadata={"help": "Steps between examinations."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, scenes and lessons."})


def main(arguments: PretrainArguments) -> None:
    """Draw pictures, align, learn scenes, examine, save."""
    started = time.perf_counter()
    output = Path(arguments.output_dir)
    processor = tiny_vlm.make_processor()
    if arguments.start_from is None:
        model = tiny_vlm.make_model(processor, seed=arguments.seed)
    else:
        model = Idefics3ForConditionalGeneration.from_pretrained(arguments.start_from)

    # Data
    store = lessons.PictureStore.build(
        processor, num_scenes=arguments.num_scenes, num_singles=512, seed=arguments.seed
    )

    # Stage 1
    batch_size, seed = arguments.batch_size, arguments.seed
    if arguments.start_from is None:
        steps = arguments.alignment_steps
        pretraining.align(model, processor, store, steps=steps, batch_size=batch_size, seed=seed)

    # Stage 2
    progress = tqdm(total=arguments.steps, desc="scene facts")
    learning = pretraining.learn_scenes(
        model,
        processor,
        store,
        steps=arguments.steps,
        batch_size=batch_size,
        seed=seed,
        find_share=arguments.find_share,
        hop_share=arguments.hop_share,
    )
    report: dict[str, dict[str, float]] = {}
    for step, loss, right in learning:
        progress.update()
        progress.set_postfix(loss=f"{loss:.3f}", right=f"{right:.3f}")
        if step % 50 == 0:
            tqdm.write(f"step {step}: loss {loss:.3f}, asked words right {right:.3f}")
        if step % arguments.examine_every == 0 or step == arguments.steps:
            report = {style: pretraining.examine(model, processor, style=style) for style in STYLES}
            tqdm.write(f"step {step}: {json.dumps(report)}")
            seconds = time.perf_counter() - started
            save(model, processor, output, report, seconds, step, arguments.hop_share)
            model.train()
    progress.close()


def save(
    model, processor, output: Path, report: dict, seconds: float, step: int, hop_share: float
) -> None:
    """Save weights, processor and the model card with the measured figures."""
    model.save_pretrained(output)
    processor.save_pretrained(output)
    parameters = sum(p.numel() for p in model.parameters())
    figures = [[style, *(f"{100 * v:.1f}" for v in row.values())] for style, row in report.items()]
    table = markdown_table(["style", *next(iter(report.values()))], figures)
    hops = f"the bare answers of hop questions ({hop_share:.0%} of lessons)"
    hops = hops if hop_share else "no hop question"
    (output / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: transformers
---
# Emoji-scene backbone

Idefics3 architecture, {parameters / 1e6:.2f} million parameters, word-level tokenizer. Trained from
scratch by `recipes/prepare/demo_backbone.py` ({step} steps, {seconds / 60:.0f} minutes on two CPU
cores, torch {torch.__version__}) on generated 3x3 emoji scenes in two artwork styles. It names what
is in a cell, finds the cell of an object, knows categories and neighbouring cells. It was shown no
chain of thought and {hops}.

Per cent right on 128 fresh scenes per style:

{table}
The artwork's licences are in `NOTICE`.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    start(main, (PretrainArguments,), description=__doc__)
