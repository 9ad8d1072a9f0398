"""Settings that recipes share: which model, which records; knows no losses."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from twn_rl.data.chat import Renderer
from twn_rl.data.mixture import Mixture, is_mixture, load_mixture
from twn_rl.data.record_files import RecordSet, load_records
from twn_rl.demo.dataset import SPLITS, DemoSettings, write_demo
from twn_rl.demo.questions import TeacherNoise
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.modeling.adapters import change_last_bits
from twn_rl.modeling.config import MAX_IMAGE_PIXELS, MAX_LENGTH, LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.nearest import hint
from twn_rl.runtime.processes import join_processes

logger = logging.getLogger(__name__)

# Splits that may be given as files, and those that the emoji scenes alone have.
FileSplit = Literal["train", "rl", "gate", "validation", "test", "ood"]
Split = Literal[FileSplit, "unseen_pairs", "three_hops", "unseen_style"]


@dataclass
class ModelArguments:
    """Backbone and adapters of a new model; a warm-started checkpoint brings its own.

    Attributes:
        backbone: Hub name or folder of a VLM or LM; default: the embedded emoji-scene backbone.
        backbone_revision: Commit of the backbone; default: its main branch.
        dtype: Parameter type: auto, float32, bfloat16.
        interface: reencode (input + CoT are read again), kv_detach (read-outs use the cache) or
            shared_prefill (the bare backbone reads the input, once for both adapters).
        num_readout_tokens: Learned read-out tokens Q.
        readout_start: random, or pooled_token on an embedder that pools its last token: the
            untrained no-think vector is then the backbone's own.
        num_reason_tokens: Learned reason tokens K of a latent thought; 0 is none.
        latent_bottleneck: Read-outs of a latent thought see the reason states only.
        latent_documents: Documents have a latent thought too, not only queries.
        reasoning_rank: LoRA rank of the reasoning adapter.
        embedding_rank: LoRA rank of the embedding adapter.
        lora_dropout: LoRA dropout; 0 is off.
        max_think_tokens: Longest CoT in tokens.
        max_length: Longest prompt in tokens, pictures included; longer texts are cut; 0 is off.
        max_image_pixels: Largest picture or frame in pixels; others are scaled down; 0 is off.
        system_prompt: System message of every prompt; default: what the chat template adds.
        instruction_in_system: Instructions take the place of the system message, as embedders of
            the Qwen-VL family were trained.
        attn_implementation: Attention kernel (sdpa, flash_attention_2, ...); default:
            transformers' choice.
        perturbation: Change each weight of the new adapters in its last bit, drawn from this
            number: what another machine may make of the run; 0 is off.
    """

    backbone: str | None = None
    backbone_revision: str | None = None
    dtype: str = "auto"
    interface: str = "reencode"
    num_readout_tokens: int = 4
    readout_start: str = "random"
    num_reason_tokens: int = 0
    latent_bottleneck: bool = False
    latent_documents: bool = False
    reasoning_rank: int = 32
    embedding_rank: int = 64
    lora_dropout: float = 0.0
    max_think_tokens: int = 256
    max_length: int | None = MAX_LENGTH
    max_image_pixels: int | None = MAX_IMAGE_PIXELS
    system_prompt: str | None = None
    instruction_in_system: bool = False
    attn_implementation: str | None = None
    perturbation: int = 0

    def config(self) -> TwnConfig:
        """Return the model config; alpha is twice the rank, as in Embed-RL (2602.13823)."""
        reasoning, embedding = self.reasoning_rank, self.embedding_rank
        return TwnConfig(
            backbone=self.backbone or str(BACKBONE_DIR),
            backbone_revision=self.backbone_revision,
            interface=self.interface,  # pyright: ignore[reportArgumentType]  (checked by TwnConfig)
            num_readout_tokens=self.num_readout_tokens,
            readout_start=self.readout_start,  # pyright: ignore[reportArgumentType]
            num_reason_tokens=self.num_reason_tokens,
            latent_bottleneck=self.latent_bottleneck,
            latent_documents=self.latent_documents,
            reasoning_lora=LoraSettings(reasoning, 2 * reasoning, self.lora_dropout),
            embedding_lora=LoraSettings(embedding, 2 * embedding, self.lora_dropout),
            renderer=Renderer(
                system_prompt=self.system_prompt,
                instruction_in_system=self.instruction_in_system,
            ),
            max_think_tokens=self.max_think_tokens,
            max_length=self.max_length or None,
            max_image_pixels=self.max_image_pixels or None,
        )

    def build(self, seed: int) -> DualLoraModel:
        """Return a new model with untrained adapters."""
        config = self.config()
        model = DualLoraModel.from_backbone(
            config.backbone,
            config,
            dtype=self.dtype,
            seed=seed,
            attn_implementation=self.attn_implementation,
        )
        if self.perturbation:
            change_last_bits(model.peft_model, self.perturbation)
        return model


@dataclass
class DataArguments:
    """Where the records are. Without files the embedded emoji scenes are written and used.

    Attributes:
        train_file: Records of the warm start: .jsonl, .parquet, or .yaml of a weighted mixture.
        rl_file: Records of RL; default: train_file.
        gate_file: Records the gate learns from, best such as no adapter was trained on; default:
            train_file.
        validation_file: Records to tune on.
        test_file: Records to report on.
        ood_file: Out-of-domain records to report on.
        data_root: Folder no image path may leave; default: each file's folder.
        on_bad_record: raise, or skip (counted) for single bad records.
        verify_workers: Processes that verify images; 0 is threads of this one.
        demo_dir: Where the embedded emoji scenes are written.
        demo_seed: Seed of scenes, questions and teacher mistakes.
        demo_scale: Multiplies the sizes of the emoji splits, for quick tries.
        teacher_random_rate: Share of teacher CoTs with a random wrong hop; 0 is off.
        teacher_swap_rate: Share of the deciding right/below hops that the teacher swaps; 0 is
            off.
        teacher_asides: Most cells of the picture that a teacher CoT describes first without need.
    """

    train_file: str | None = None
    rl_file: str | None = None
    gate_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    ood_file: str | None = None
    data_root: str | None = None
    on_bad_record: str = "raise"
    verify_workers: int = 0
    demo_dir: str = "outputs/demo/data"
    demo_seed: int = 0
    demo_scale: float = 1.0
    teacher_random_rate: float = 0.15
    teacher_swap_rate: float = 0.7
    teacher_asides: int = 0

    def is_demo(self) -> bool:
        """Tell whether the embedded default is used."""
        return not any(getattr(self, f"{split}_file") for split in get_args(FileSplit))

    def require_demo(self) -> None:
        """Refuse other records where the emoji scenes are changed for an experiment.

        Raises:
            ValueError: If other records are given.
        """
        if not self.is_demo():
            given = [f"{s}_file" for s in get_args(FileSplit) if getattr(self, f"{s}_file")]
            raise ValueError(
                f"{', '.join(given)} given; expected none: this experiment makes its records of "
                "the emoji scenes and would not read them; leave them out"
            )

    def load(self, split: Split) -> RecordSet | Mixture:
        """Return the verified records of a split, or of the mixture that a YAML file describes.

        Raises:
            ValueError: If files are given, but none for this split; or if the emoji scenes have
                no such split.
        """
        if self.is_demo():
            if split not in SPLITS:
                raise ValueError(
                    f"split = {split!r}; expected one of the emoji scenes' {SPLITS}"
                    f"{hint(split, SPLITS)} What was called ood is unseen_pairs"
                )
            path = self._write_demo()[split]
        else:
            if split not in get_args(FileSplit):
                raise ValueError(
                    f"split = {split!r} with record files; expected one of {get_args(FileSplit)}; "
                    "only the emoji scenes have the others"
                )
            path = self._given(split)
            if path is None:
                raise ValueError(
                    f"{split}_file = None while other record files are given; expected a .jsonl, "
                    f".parquet or mixture .yaml file; pass --{split}_file"
                )
        load = load_mixture if is_mixture(path) else load_records
        return load(
            path,
            data_root=self.data_root,
            on_bad_record=self.on_bad_record,  # pyright: ignore[reportArgumentType]
            workers=self.verify_workers,
            sharers=join_processes().sharers(),
        )

    def has(self, split: Split) -> bool:
        """Tell whether `load(split)` would find records."""
        return split in SPLITS if self.is_demo() else self._given(split) is not None

    def _given(self, split: Split) -> str | None:
        path = getattr(self, f"{split}_file", None)
        return self.train_file if path is None and split in ("rl", "gate") else path

    def of_seed(self, root: Path, seed: int) -> DataArguments:
        """Return the same records for every stage of a seed; emoji scenes are its own."""
        return replace(self, demo_dir=str(root / "data"), demo_seed=seed)

    def demo_settings(self) -> DemoSettings:
        """Return what the emoji scenes are written by."""
        sizes = {
            name: max(8, round(size * self.demo_scale))
            for name, size in asdict(DemoSettings()).items()
            if name.startswith("num_")
        }
        noise = TeacherNoise(self.teacher_random_rate, self.teacher_swap_rate)
        asides = self.teacher_asides
        return DemoSettings(seed=self.demo_seed, noise=noise, asides=asides, **sizes)

    def _write_demo(self) -> dict[str, Path]:
        with join_processes().one_first():
            return write_demo(Path(self.demo_dir), self.demo_settings())
