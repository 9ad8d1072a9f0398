"""`twn-rl convert`: data in a format people own becomes a file of this project's records."""

import argparse
from pathlib import Path
from typing import Any

from twn_rl.data.formats import FORMATS, Conversion
from twn_rl.data.formats.conversion import convert_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("--from", dest="format", required=True, choices=sorted(FORMATS), help="format of the input")
    add("--input", type=Path, required=True, help="file or folder to read; never a URL")
    add("--output", type=Path, required=True, help="file to write, .jsonl or .parquet")
    add("--data_root", type=Path, help="folder of all pictures; the folder of the output if unset")
    add("--split", help="split to read, where the input has several")
    add("--subset", nargs="+", default=[], help="subsets to read; all if unset")
    add("--limit", type=int, help="write at most so many records")
    add("--image_dir", default="images", help="folder in the data root for embedded pictures")
    add("--instruction", help="instruction of queries that have none of their own")
    add("--num_negatives", type=int, help="keep the first so many negatives; all if unset")
    add("--on_bad_record", choices=("raise", "skip"), default="raise", help="what a bad row does")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--min_score", type=float, help="pairs with a lower score are no positives")
    add("--columns", nargs="+", default=None, help="columns to read: anchor, positive, negatives")
    add("--corpus", type=Path, help="file or folder of the documents, if not beside the rows")
    add("--positive_field", help="name of the positive side in TWN's rows; 'positive' if unset")
    add("--cot_field", help="name of the chain of thought in TWN's rows; 'cot' if unset")
    add(
        "--uri_folders",
        nargs="+",
        metavar="SCHEME=FOLDER",
        help="folders in the data root for the schemes of TWN's image URIs",
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert, log the summary and return 0.

    Raises:
        ValueError: For options without a meaning for the format, and for bad input.
        OSError: If a file is missing, exists already or cannot be written.
    """
    chosen = FORMATS[arguments.format]
    conversion = Conversion(
        input=arguments.input,
        output=arguments.output,
        data_root=arguments.data_root or arguments.output.parent,
        split=arguments.split,
        subset=tuple(arguments.subset),
        image_dir=arguments.image_dir,
        instruction=arguments.instruction,
        num_negatives=arguments.num_negatives,
        **_special_options(arguments, chosen.options),
    )
    tally = convert_file(
        chosen.convert,
        conversion,
        on_bad_record=arguments.on_bad_record,
        limit=arguments.limit,
        overwrite=arguments.overwrite,
    )
    tally.log()
    return 0


def _special_options(arguments: argparse.Namespace, known: tuple[str, ...]) -> dict[str, Any]:
    """Return the options that only some formats have, refusing those of other formats."""
    names = {name for chosen in FORMATS.values() for name in chosen.options}
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    foreign = sorted(set(given) - set(known))
    if foreign:
        raise ValueError(
            f"options {foreign} mean nothing for {arguments.format}; expected only "
            f"{sorted(known)} beside the general ones; remove them"
        )
    if "columns" in given:
        given["columns"] = tuple(given["columns"])
    if "uri_folders" in given:
        given["uri_folders"] = _folders(given["uri_folders"])
    return given


def _folders(pairs: list[str]) -> dict[str, str]:
    bad = [pair for pair in pairs if "=" not in pair]
    if bad:
        raise ValueError(f"uri_folders = {bad}; expected SCHEME=FOLDER; write them so")
    return dict(pair.split("=", 1) for pair in pairs)
