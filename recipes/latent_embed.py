r"""Latent thoughts: K reason tokens think in one forward pass, taught by what they must say again.

LaME (2606.13061): a light decoder that sees the K reason states alone reconstructs each query's
target, and the read-outs after them serve retrieval. First a bottleneck warm-up (LoRA frozen), then
joint optimisation. No chain of thought is read; the decoder is left out of the saved model.

    accelerate launch recipes/latent_embed.py
    accelerate launch recipes/latent_embed.py --num_reason_tokens 16 --latent_bottleneck true
    accelerate launch recipes/latent_embed.py --direct_only true --output_dir outputs/demo/direct
    accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/latent_embed.py  # GPUs
    accelerate launch --config_file recipes/accelerate/zero3_cpu.yaml recipes/latent_embed.py

The third is the baseline: same data, steps and read-outs without reason tokens and decoder. Without
arguments it reads recipes/configs/demo_latent.yaml and trains on the embedded emoji scenes; every
field of the file is also a flag. Measure with recipes/eval_embed.py --model DIR.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.launch.program import start
from twn_rl.launch.run_folder import owned_run, publish, set_up_logging, train_and_save
from twn_rl.launch.validation import validation_of
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, set_trainable
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.whole_files import write_text
from twn_rl.training.latent import LatentConfig, LatentTrainer
from twn_rl.training.monitor import MetricsWriter

logger = logging.getLogger(__name__)
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "demo_latent.yaml"
CHECK_FILE = "reconstruction.json"


@dataclass
class LatentScriptArguments:
    """What only this script needs."""

    direct_only: bool = field(
        default=False,
        metadata={"help": "Baseline: no reason tokens, no decoder, no warm-up; InfoNCE alone."},
    )
    split: str = field(default="train", metadata={"help": "Split to train on: train or rl."})
    check_split: str = field(
        default="validation",
        metadata={"help": "Held-out split on which the decoder reads own and other states."},
    )
    check_records: int = field(
        default=512, metadata={"help": "Records of that split to look at; 0 is off."}
    )


ARGUMENTS = (LatentScriptArguments, ModelArguments, DataArguments, LatentConfig)


def main(
    script: LatentScriptArguments,
    model_args: ModelArguments,
    data: DataArguments,
    training: LatentConfig,
) -> Path:
    """Train, save, check what the reason states carry, and return the folder of the model."""
    set_up_logging()
    set_seed(training.seed)
    output = Path(training.output_dir or "outputs/latent")

    # Model: its size is checked before anything is read
    if script.direct_only:
        model_args.num_reason_tokens = 0
        model_args.latent_bottleneck = model_args.latent_documents = False
    elif model_args.num_reason_tokens < 1:
        raise ValueError(
            f"num_reason_tokens = {model_args.num_reason_tokens}; expected K >= 1 reason tokens; "
            "set it, or pass --direct_only true for the baseline without them"
        )
    with owned_run(output, training):
        records = data.load(script.split)  # pyright: ignore[reportArgumentType]
        model = model_args.build(training.seed)
        set_trainable(model.peft_model, [EMBEDDING_ADAPTER])

        # Trainer
        callbacks = [MetricsWriter(output / "metrics.jsonl")]
        is_direct = script.direct_only
        trainer = LatentTrainer(
            model,
            training,
            records,
            direct_only=is_direct,
            callbacks=callbacks,
            eval_dataset=validation_of(data, training),
        )

        # Train and save
        train_and_save(trainer, output, script, model_args, data, training)
        publish(trainer, output)

        # Check: from other queries' states the decoder must fail
        if not script.direct_only and script.check_records and data.has(script.check_split):  # pyright: ignore[reportArgumentType]
            held_out = data.load(script.check_split)  # pyright: ignore[reportArgumentType]
            count = min(script.check_records, len(held_out))
            check = trainer.check_reconstruction([held_out[i] for i in range(count)])
            trainer.log(dict(check))
            if join_processes().is_main_process:
                write_text(output / CHECK_FILE, json.dumps(check, indent=1) + "\n")
            logger.log(NOTICE, "Reconstruction of %d held-out targets: %s", count, check)
    return output


if __name__ == "__main__":
    start(main, ARGUMENTS, default_config=DEFAULT_CONFIG, description=__doc__)
