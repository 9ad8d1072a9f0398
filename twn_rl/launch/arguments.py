"""Settings of a run from YAML and flags: which model, which records; knows no losses."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser

import twn_rl
from twn_rl.data.chat import Renderer
from twn_rl.data.mixture import Mixture, is_mixture, load_mixture
from twn_rl.data.record_files import RecordSet, load_records
from twn_rl.demo.dataset import SPLITS, DemoSettings, write_demo
from twn_rl.demo.questions import TeacherNoise
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.launch.command_line import program_name
from twn_rl.launch.source_settings import attributes_of
from twn_rl.modeling.adapters import change_last_bits
from twn_rl.modeling.config import MAX_IMAGE_PIXELS, MAX_LENGTH, LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.nearest import hint, path_hint
from twn_rl.runtime.problems import Problems
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.reading import load_yaml

logger = logging.getLogger(__name__)

_LIBRARIES = ("transformers.", "trl.")
RECIPES = Path(twn_rl.__file__).parent / "recipes"

# Splits that may be given as files, and those that the emoji scenes alone have.
FileSplit = Literal["train", "rl", "validation", "test", "ood"]
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
        return self.train_file if path is None and split == "rl" else path

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


def parse_arguments(
    types: Sequence[Any],
    *,
    arguments: Sequence[str] | None = None,
    default_config: str | Path | None = None,
    description: str | None = None,
) -> Any:
    """Parse YAML, then flags, into one object per dataclass.

    Without `--config` the default file is read. Unknown keys and flags raise. `arguments` are the
    process's own if None. A mapping `env` in the file sets environment variables; `base` names a
    file beside it whose settings are taken where it has none of its own.

    Raises:
        ValueError: With the problems of all dataclasses together.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", default=default_config)
    given, words = files.parse_known_args(arguments)
    config = {} if given.config is None else read_settings(given.config)
    environment = config.pop("env", {})
    os.environ.update({str(key): str(value) for key, value in environment.items()})
    try:
        parsed = _Parser(
            types,
            prog=program_name(),
            description=description,
            usage="%(prog)s [--config FILE] [--FIELD VALUE ...]",
            epilog="--config FILE reads settings from YAML; flags override them.",
            formatter_class=_Help,
        ).read(words, config)
    except ValueError as error:
        # The parser stops at the first dataclass that refuses its settings.
        problems = [problem for kind in types if (problem := _refusal(kind, words, config))]
        if len(problems) < 2:
            raise
        raise ValueError("\n".join(problems)) from error
    join_processes()  # for recipes without training arguments, which have joined by now
    return parsed


def packaged(path: str | Path) -> str:
    """Return a path; one in recipes/ that is not there is the file of that name in the package.

    So commands and configurations that name a shipped file work in any folder.
    """
    parts = Path(path).parts
    if parts[:1] == ("recipes",) and not Path(path).exists():
        inside = RECIPES.joinpath(*parts[1:])
        return str(inside if inside.exists() else path)
    return str(path)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults of flags are shown, and a recipe's docstring keeps its lines."""


class _Parser(HfArgumentParser):
    """Flags whose defaults are a file's values, helped by metadata or the class's docstring."""

    def __init__(self, types: Sequence[Any], **settings: Any) -> None:
        super().__init__(types, allow_abbrev=False, **settings)
        self.add_argument("--help-all", action="help", help="same as --help")
        told = {name: line for kind in types for name, line in _attributes(kind).items()}
        for action in self._actions:
            action.help = action.help or told.get(action.dest)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which is hundreds of lines."""
        raise ValueError(f"{message}; expected what --help says; correct the flag")

    def read(
        self, words: Sequence[str], config: Mapping[str, Any], *, is_partial: bool = False
    ) -> tuple[Any, ...]:
        """Return one object per dataclass; `is_partial` leaves unknown keys and flags alone."""
        names = {action.dest for action in self._actions}
        config = _without_outdated([*self.dataclass_types], words, config, is_told=not is_partial)
        for key in config if not is_partial else ():
            if key not in names:
                raise ValueError(
                    f"unknown key {key!r} in the configuration{hint(key, names)} Expected fields "
                    "of this recipe, see --help-all; correct or remove it"
                )
        self._refuse_types(config)
        for action in self._actions:
            if action.dest in config:
                action.default, action.required = config[action.dest], False
        if not is_partial:
            self._refuse_unknown(words)
        return self.parse_args_into_dataclasses(
            list(words), return_remaining_strings=is_partial, look_for_args_file=False
        )

    def _refuse_types(self, config: Mapping[str, Any]) -> None:
        """Refuse values of a file that are of another type than their fields; texts are parsed."""
        problems = Problems()
        values = {key: value for key, value in config.items() if not isinstance(value, str)}
        for kind in self.dataclass_types:
            try:
                hints = get_type_hints(kind)
            except NameError:  # an annotation of a library that only a type checker can read
                continue
            # Libraries write `str` for what may be a flag as well, such as resume_from_checkpoint.
            theirs = [each for each in kind.__mro__ if each.__module__.startswith(_LIBRARIES)]
            loose = {name for each in theirs for name in getattr(each, "__annotations__", {})}
            kinds = {
                name: hint
                for name, hint in hints.items()
                if name not in loose or str not in (hint, *get_args(hint))
            }
            problems.typed(values, kinds)
        problems.refuse("configuration", "correct these values")

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """Refuse flags that are none before any settings object is made: one joins processes."""
        unknown = self.parse_known_args(list(words))[1]
        if unknown:
            flag = unknown[0].split("=")[0]
            flags = [f"--{name}" for name in self._option_string_actions]
            # Each flag is known with dashes, too; one spelling of it is enough of a hint.
            flags = [each.replace("----", "--") for each in flags]
            flags = [each for each in flags if "-" not in each[2:] or each == "--help-all"]
            raise ValueError(
                f"unknown flag {' '.join(unknown)}{hint(flag, flags)} Expected a field of this "
                "recipe as --FIELD VALUE, see --help and --help-all; correct or remove it"
            )


def _without_outdated(
    types: Sequence[Any], words: Sequence[str], config: Mapping[str, Any], *, is_told: bool
) -> dict[str, Any]:
    """Return a file's values without those that belong to another value, which a flag replaces.

    A dataclass says so in `outdates`: flag -> names. The weights of a file's rewards are none of
    the rewards that a flag names.
    """
    given = {word.split("=")[0] for word in words}
    kept = dict(config)
    outdates = {flag: n for kind in types for flag, n in getattr(kind, "outdates", {}).items()}
    for flag, names in outdates.items():
        outdated = [name for name in names if name in kept]
        if f"--{flag}" in given and outdated:
            kept = {name: value for name, value in kept.items() if name not in outdated}
            if is_told:
                logger.info(
                    "--%s is given: %s of the configuration, made for its own, is left out",
                    *(flag, " and ".join(outdated)),
                )
    return kept


def _attributes(kind: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass and its parents say of their fields."""
    told: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        told |= attributes_of(each.__doc__ or "")
    return told


def read_settings(path: str) -> dict[str, Any]:
    """Return the settings of a YAML file on those of its `base`, `env` among them.

    Raises:
        FileNotFoundError: If there is no such file; the message names the nearest one.
        ValueError: If it holds something else.
    """
    path = packaged(path)
    if not Path(path).exists():
        shipped = [f"recipes/configs/{file.name}" for file in RECIPES.glob("configs/*.yaml")]
        near = hint(path, shipped) if path.startswith("recipes/") else path_hint(path)
        raise FileNotFoundError(f"--config {path} is no file{near} Correct the path")
    config = load_yaml(path)
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} holds {type(config).__name__}; expected a mapping of settings; correct it"
        )
    environment, base = config.get("env", {}), config.pop("base", None)
    if not isinstance(environment, dict) or "\x00" in str(environment):
        raise ValueError(
            f"{path}: env = {environment!r:.80}; expected a mapping of names and values of "
            "environment variables; correct it"
        )
    shared: dict[str, Any] = {}
    if base is not None:
        below = Path(path).parent / str(base)
        below = below if below.exists() else Path(packaged(str(base)))
        if below.resolve() == Path(path).resolve():
            raise ValueError(f"{path}: base = {base!r} is the file itself; name another")
        shared = read_settings(str(below))
    both = {"env": {**shared["env"], **environment}} if "env" in shared else {}
    return {**shared, **config, **both}


def _refusal(kind: Any, words: Sequence[str], config: Mapping[str, Any]) -> str | None:
    """Return why one dataclass refuses its share of the settings, None if it takes them."""
    try:
        _Parser([kind]).read(words, config, is_partial=True)
    except ValueError as error:
        return str(error)
    return None
