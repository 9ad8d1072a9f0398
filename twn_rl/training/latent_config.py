"""Hyper-parameters of latent thoughts, checked. Knows no models, no data and no losses."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from twn_rl.training.settings import ContrastiveSettings, LaunchSettings


@dataclass
class LatentConfig(ContrastiveSettings, LaunchSettings, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Hyper-parameters of LaME; the paper publishes no weights, these are our reading of it."""

    warm_up_share: float = field(
        default=0.15,
        metadata={
            "help": "Share of the steps of the bottleneck warm-up, in which LoRA is frozen and "
            "reason tokens, read-outs and decoder train; 0 is off."
        },
    )
    warm_up_reconstruction_weight: float = field(
        default=1.0, metadata={"help": "Weight of the reconstruction in the warm-up; 0 is off."}
    )
    warm_up_contrastive_weight: float = field(
        default=0.3, metadata={"help": "Weight of InfoNCE in the warm-up; 0 is off."}
    )
    reconstruction_weight: float = field(
        default=0.3, metadata={"help": "Weight of the reconstruction after it; 0 is off."}
    )
    contrastive_weight: float = field(
        default=1.0, metadata={"help": "Weight of InfoNCE after the warm-up; 0 is off."}
    )
    regression_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight, inside the reconstruction, of 1 - cosine to the detached vector of a "
            "target without text or caption; 0 is off and refuses such targets."
        },
    )
    no_think_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of InfoNCE(query without reason tokens, target), which keeps the mode "
            "never usable; 0 is off."
        },
    )
    caption_field: str = field(
        default="caption", metadata={"help": "Metadata field with the words of a picture target."}
    )
    decoder_layers: int = field(default=2, metadata={"help": "Layers of the decoder head."})
    decoder_width: int = field(default=256, metadata={"help": "Width of the decoder head."})
    decoder_heads: int = field(default=4, metadata={"help": "Attention heads of the decoder."})
    max_target_tokens: int = field(
        default=64, metadata={"help": "Words of a target to reconstruct; the rest is left out."}
    )

    def __post_init__(self) -> None:
        """Check the method's own fields, all problems at once, then HF's."""
        problems = self.contrastive_problems()
        if not 0.0 <= self.warm_up_share < 1.0:
            problems.append(f"warm_up_share = {self.warm_up_share}, expected in [0, 1)")
        weights = [name for name in self.__dataclass_fields__ if name.endswith("_weight")]
        for name in weights:
            if getattr(self, name) < 0:
                problems.append(f"{name} = {getattr(self, name)}, expected >= 0")
        for name in ("decoder_layers", "decoder_width", "decoder_heads", "max_target_tokens"):
            if getattr(self, name) < 1:
                problems.append(f"{name} = {getattr(self, name)}, expected >= 1")
        if self.decoder_width % max(1, self.decoder_heads):
            problems.append(
                f"decoder_width = {self.decoder_width}, expected a multiple of decoder_heads = "
                f"{self.decoder_heads}"
            )
        if problems:
            raise ValueError("LatentConfig: " + "; ".join(problems) + "; change these fields")
        self.remove_unused_columns = False
        super().__post_init__()

    @property
    def is_reconstructing(self) -> bool:
        """Whether any step asks the decoder for anything."""
        in_warm_up = self.warm_up_share > 0 and self.warm_up_reconstruction_weight > 0
        return in_warm_up or self.reconstruction_weight > 0
