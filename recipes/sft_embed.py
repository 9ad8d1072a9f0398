r"""Stage 1, SFT warm start: token loss on chains of thought + InfoNCE with and without them.

One frozen backbone, two LoRA adapters (Think When Needed, 2605.14448; loss weights of UME-R1,
2511.00405).

    accelerate launch recipes/sft_embed.py
    accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/sft_embed.py  # GPUs
    accelerate launch --config_file recipes/accelerate/zero3_cpu.yaml recipes/sft_embed.py
    accelerate launch recipes/sft_embed.py --config recipes/configs/qwen3_vl_2b_sft.yaml \
        --train_file train.jsonl --output_dir outputs/sft
    accelerate launch recipes/sft_embed.py --config recipes/configs/demo_refit.yaml  # after RL

Without arguments it reads recipes/configs/demo_sft.yaml and trains on the embedded emoji scenes
(about five minutes on two CPU cores); every field of the file is also a flag.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from transformers import set_seed

from twn_rl.launch.arguments import DataArguments, ModelArguments, Split
from twn_rl.launch.program import start
from twn_rl.launch.run_folder import owned_run, publish, set_up_logging, train_and_save
from twn_rl.launch.validation import validation_of
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER, set_trainable
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.problems import Problems
from twn_rl.training.monitor import MetricsWriter
from twn_rl.training.sft import SftConfig, SftTrainer

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "demo_sft.yaml"
# What may be trained alone -> its adapter, and the settings that leave the other without a loss.
TRAINED: dict[str, tuple[str, dict[str, float]]] = {
    "reasoning": (REASONING_ADAPTER, {"contrastive_from": 1.0}),
    "embedding": (EMBEDDING_ADAPTER, {"contrastive_from": 0.0, "token_weight": 0.0}),
}


@dataclass
class SftScriptArguments:
    """What only this script needs."""

    checkpoint: str | None = field(
        default=None, metadata={"help": "Trained model to go on from; default: new adapters."}
    )
    split: str = field(default="train", metadata={"help": "Split to train on: train or rl."})
    train_adapters: str = field(
        default="both",
        metadata={
            "help": "both; reasoning (token loss only, embedding frozen); or embedding "
            "(contrastive losses only, reasoning frozen): learn to read what RL made of thoughts."
        },
    )

    def __post_init__(self) -> None:
        """Refuse a misspelt choice, which would train one adapter only."""
        problems = Problems()
        problems.one_of(self, (*TRAINED, "both"), "train_adapters")
        problems.one_of(self, get_args(Split), "split")
        problems.refuse("SftScriptArguments")


ARGUMENTS = (SftScriptArguments, ModelArguments, DataArguments, SftConfig)


def main(
    script: SftScriptArguments, model_args: ModelArguments, data: DataArguments, training: SftConfig
) -> Path:
    """Train, save, and return the folder of the model."""
    set_up_logging()
    set_seed(training.seed)
    output = Path(training.output_dir or "outputs/sft")

    with owned_run(output, training):
        # Data first: bad records must show before a backbone is loaded.
        records = data.load(script.split)  # pyright: ignore[reportArgumentType]

        # Model and adapters
        if script.checkpoint is None:
            model = model_args.build(training.seed)
        else:
            kernel = model_args.attn_implementation
            model = DualLoraModel.from_pretrained(
                script.checkpoint, is_trainable=True, attn_implementation=kernel
            )
        set_trainable(model.peft_model, trained_adapters(script.train_adapters, training))

        # Trainer
        callbacks = [MetricsWriter(output / "metrics.jsonl")]
        trainer = SftTrainer(
            model,
            training,
            records,
            callbacks=callbacks,
            eval_dataset=validation_of(data, training),
        )

        # Train and save
        train_and_save(trainer, output, script, model_args, data, training)
        publish(trainer, output)
    return output


def trained_adapters(choice: str, training: SftConfig) -> list[str]:
    """Return the adapters of a choice, and take the losses of the others out of the settings."""
    if choice == "both":
        return [REASONING_ADAPTER, EMBEDDING_ADAPTER]
    adapter, settings = TRAINED[choice]
    for name, value in settings.items():
        setattr(training, name, value)
    return [adapter]


if __name__ == "__main__":
    start(main, ARGUMENTS, default_config=DEFAULT_CONFIG, description=__doc__)
