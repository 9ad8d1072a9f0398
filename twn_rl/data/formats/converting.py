"""One conversion from start to end: every record verified, the file written whole or not at all."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from twn_rl.data.formats.conversion import Conversion, Outcome
from twn_rl.data.formats.tally import Tally
from twn_rl.data.images import ImageError
from twn_rl.data.record import Item, Record, RecordError
from twn_rl.data.record_files import write_records


def convert_file(
    convert: Callable[[Conversion], Iterator[Outcome]],
    conversion: Conversion,
    *,
    on_bad_record: Literal["raise", "skip"] = "raise",
    limit: int | None = None,
    overwrite: bool = False,
) -> Tally:
    """Write the records that `convert` makes of the input, and return what was counted.

    Records are checked as `load_records` checks them, save that a picture is decoded only where a
    negative might equal the positive. An existing output stays as it was until the new one is
    whole.

    Args:
        convert: Converter of a format, as in `FORMATS`.
        conversion: Settings.
        on_bad_record: "raise" stops at a bad row; "skip" leaves it out and counts it.
        limit: Write at most this many records; None writes all.
        overwrite: Replace an output that exists.

    Raises:
        RecordError: For a bad row under "raise", an unreadable file, or when no record comes of it.
        FileExistsError: If the output exists and may not be replaced.
    """
    output = conversion.output
    if output.exists() and not overwrite:
        raise FileExistsError(
            f"output = {str(output)!r} exists; expected a new file; choose another name or "
            "overwrite it"
        )
    if output.resolve() == conversion.input.resolve():
        raise ValueError(
            f"output = {str(output)!r} is the input; expected another file; choose another name"
        )
    _check_settings(conversion, limit)
    is_strict = on_bad_record == "raise"
    records = _records(convert, conversion, is_strict=is_strict, limit=limit)
    write_records(output, records, data_root=conversion.data_root)
    return conversion.tally


def _check_settings(conversion: Conversion, limit: int | None) -> None:
    root = conversion.data_root.resolve()
    problems = []
    if not (root / conversion.image_dir).resolve().is_relative_to(root):
        problems.append(
            f"image_dir = {conversion.image_dir!r} leads outside the data root {str(root)!r}; "
            "expected a folder in it; give a relative path"
        )
    if limit is not None and limit < 1:
        problems.append(f"limit = {limit}; expected at least 1; leave it out for all records")
    if conversion.num_negatives is not None and conversion.num_negatives < 0:
        problems.append(f"num_negatives = {conversion.num_negatives}; expected 0 or more; raise it")
    if problems:
        raise ValueError("\n".join(problems))


def _records(
    convert: Callable[[Conversion], Iterator[Outcome]],
    conversion: Conversion,
    *,
    is_strict: bool,
    limit: int | None,
) -> Iterator[Record]:
    tally, seen = conversion.tally, set[str]()
    outcomes = tqdm(
        convert(conversion), desc=f"Converting {conversion.input.name}", unit=" rows", disable=None
    )
    for outcome in outcomes:
        try:
            record = _checked(outcome.value, conversion, seen)
        except RecordError as error:
            located = error.at(file=outcome.file, row=outcome.number)
            if is_strict:
                raise located from error
            tally.drop(error.reason, str(located))
            continue
        tally.add(record)
        yield record
        if tally.records == limit:
            return
    if not tally.records:
        first = next((f"; first: {tally.first_of[r]}" for r in tally.first_of), "")
        raise RecordError(
            f"records = 0, dropped {dict(tally.dropped)}; expected at least one; correct the input"
            + first,
            reason="no_records",
            file=conversion.input,
        )


def _checked(value: Record | RecordError, conversion: Conversion, seen: set[str]) -> Record:
    """Return the record as it is written, if `load_records` will take it."""
    if isinstance(value, RecordError):
        raise value
    if conversion.instruction is not None and value.query.instruction is None:
        value = replace(value, query=replace(value.query, instruction=conversion.instruction))
    Record.from_dict(value.to_dict())
    try:
        json.dumps(value.metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecordError(
            f"JSON cannot hold it ({error}); expected text, finite numbers, lists and objects; "
            "convert the value",
            reason="bad_type",
            field="metadata",
        ) from error
    if value.id in seen:
        raise RecordError(
            f"id = {value.id!r} was used before; expected unique ids; remove the copy",
            reason="duplicate_id",
            field="id",
        )
    _refuse_positive_as_negative(value, conversion.data_root)
    seen.add(value.id)
    return value


def _refuse_positive_as_negative(record: Record, data_root: Path) -> None:
    for i, negative in enumerate(record.negatives):
        if _is_same(negative, record.positive, data_root):
            raise RecordError(
                f"negatives[{i}] has the content of positive; expected items that must not be "
                "found; remove it",
                reason="positive_in_negatives",
                field=f"negatives[{i}]",
            )


def _is_same(one: Item, other: Item, data_root: Path) -> bool:
    """Return whether two items have equal content; pictures are decoded only if all else agrees."""
    plain = [(it.instruction, it.text, len(it.images), len(it.video)) for it in (one, other)]
    if plain[0] != plain[1]:
        return False
    try:
        return one.content_key(data_root) == other.content_key(data_root)
    except ImageError as error:
        raise RecordError(str(error), reason=error.reason, field="negatives") from error
