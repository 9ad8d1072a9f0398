"""Arguments of the commands that embed rows, and the one place where its model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.inference.options import Keep


def add_row_arguments(parser: argparse.ArgumentParser, *, output: str) -> None:
    """Declare input, output, which is what `output` says, and how a row becomes an item."""
    parser.add_argument("--input", required=True, help="rows, .jsonl or .parquet")
    parser.add_argument("--output", required=True, help=output)
    parser.add_argument(
        "--field",
        nargs="+",
        default=[],
        metavar="[PART=]NAME",
        help="field that holds the text or item; or parts, as id=sku text=title image=photo",
    )


def named_fields(words: Sequence[str]) -> dict[str, str]:
    """Return part -> name of the words of `--field`."""
    return dict(_part(word) for word in words)


def _part(field: str) -> tuple[str, str]:
    """Return ("text", "title") of "text=title", and ("item", "title") of "title"."""
    part, is_named, name = field.partition("=")
    return (part, name) if is_named else ("item", part)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the model, how it thinks and how much it takes at once."""
    off = EncodeSettings()
    parser.add_argument("--model", required=True, help="folder written by save_pretrained")
    parser.add_argument("--device", help="as cuda:0 or cpu; chosen if not given")
    parser.add_argument("--dtype", help="parameter type to load, as bfloat16; else the stored one")
    parser.add_argument(
        "--think",
        choices=("auto", "always", "never", "latent"),
        help="when to write a thought; if not given, queries: auto if something in the model "
        "decides, as a gate, else never; documents: never",
    )
    parser.add_argument(
        "--keep",
        choices=get_args(Keep),
        default=off.keep,
        help="better: leave out thoughts that the gate's judge finds implausible",
    )
    parser.add_argument("--think_rate", type=float, help="share of a shard that may think")
    parser.add_argument(
        "--max_think_tokens", type=int, help="budget of a thought; else the model's"
    )
    parser.add_argument("--batch_size", type=int, default=off.batch_size, help="items at a time")
    parser.add_argument(
        "--shard_size", type=int, default=off.shard_size, help="rows between two writes"
    )
    parser.add_argument("--limit", type=int, help="read this many rows only")
    parser.add_argument("--data_root", help="folder no image path may leave; else the file's")
    parser.add_argument("--overwrite", action="store_true", help="begin anew; else go on")


def encode_settings(arguments: argparse.Namespace, **settings: Any) -> EncodeSettings:
    """Return the settings that `add_model_arguments` and the command itself declared."""
    names = ("think", "think_rate", "keep", "max_think_tokens", "batch_size", "shard_size", "dtype")
    return EncodeSettings(**{name: getattr(arguments, name) for name in names}, **settings)


def load_embedder(arguments: argparse.Namespace) -> Any:
    """Return the `ThinkingEmbedder` of `--model`."""
    return _load_embedder(arguments.model, device=arguments.device, dtype=arguments.dtype)


def _load_embedder(path: str, *, device: str | None, dtype: str | None) -> Any:
    from twn_rl.inference.embedder import ThinkingEmbedder
    from twn_rl.launch.progress import quieten

    quieten()
    return ThinkingEmbedder.from_pretrained(path, device=device, dtype=dtype)
