"""A conversion: its settings, what its formats share, and the file of records that comes of it."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from twn_rl.data.formats.input_files import DataFile, Row, find_files, read_rows, text_of
from twn_rl.data.formats.marks import strip_marks
from twn_rl.data.formats.pictures import Pictures
from twn_rl.data.record import Item, Record, RecordError, bad_type
from twn_rl.data.record_files import writable_row, write_rows
from twn_rl.runtime.problems import Problems

logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What became of a row: a record, or why there is none."""

    file: Path
    number: int
    value: Record | RecordError


@dataclass
class Tally:
    """Everything counted during a conversion.

    Attributes:
        records: Records written.
        images: References to pictures in them, frames of videos included.
        negatives: Hard negatives in them.
        saved_images: Embedded pictures that were saved as files, by "saved".
        dropped: Rows that became no record, by reason.
        unknown_fields: Rows that had each field nobody asked for, and that was left behind.
        notes: How often something was changed, left out or guessed, by what it was.
        first_of: First example of a reason or note.
    """

    records: int = 0
    images: int = 0
    negatives: int = 0
    saved_images: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unknown_fields: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first_of: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, first: str) -> None:
        """Count a change or guess; the `first` example of its kind is kept for the summary."""
        self.notes[what] += 1
        self.first_of.setdefault(what, first)

    def drop(self, reason: str, first: str) -> None:
        """Count a row without a record; the `first` message of a reason is kept for the summary."""
        self.dropped[reason] += 1
        self.first_of.setdefault(reason, first)

    def log(self) -> None:
        """Log the summary: counts as information, everything left out as a warning."""
        logger.info(
            "records: %d, images: %d (%d saved from embedded bytes), negatives: %d",
            *(self.records, self.images, self.saved_images.total(), self.negatives),
        )
        counted = [(f"dropped, {reason}", reason, n) for reason, n in self.dropped.most_common()]
        counted += [(what, what, n) for what, n in self.notes.most_common()]
        for shown, what, count in counted:
            first = f"; first: {self.first_of[what]}" if what in self.first_of else ""
            logger.warning("%s: %d%s", shown, count, first)
        if self.unknown_fields:
            logger.warning("unknown fields, not carried over: %s", dict(self.unknown_fields))


class Fields(dict[str, Any]):
    """The fields of an object in a row, which remembers those that were asked for."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        """Hold the fields of `data`."""
        super().__init__(data)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or `default` if there is none."""
        self.asked.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)


def fields_of(value: Any, expected: str, field: str) -> Fields:
    """Return the fields of an object within a row.

    Raises:
        RecordError: If it is none; the message says what was `expected`.
    """
    if not isinstance(value, Mapping):
        raise bad_type(value, expected, field)
    return Fields(value)


@dataclass(frozen=True)
class Conversion:
    """Settings of one conversion, with the tally it fills.

    Attributes:
        input: File or folder to read.
        output: File that is written; never read as an input.
        data_root: Folder that every picture lies in and every written path is relative to.
        split: Split to read; None where the input has one only.
        subset: Subsets to read; empty means all.
        image_dir: Folder in the data root for embedded pictures.
        picture_folder: Folder in the data root that relative paths of pictures start from.
        instruction: Instruction of queries that bring none of their own.
        num_negatives: Keep the first so many hard negatives of a row; None keeps all.
        min_score: Pairs and judgements with a lower score are no positives.
        columns: Columns to read, in order, where columns count by their order.
        corpus: File or folder of the documents, where rows name documents by id.
        positive_field: Name of the positive side, where the format's own is not known.
        cot_field: Name of the chain of thought, where the format's own is not known.
        uri_folders: Folder in the data root for each scheme of the format's own URIs.
        tally: Counts.
    """

    input: Path
    output: Path
    data_root: Path
    split: str | None = None
    subset: tuple[str, ...] = ()
    image_dir: str = "images"
    picture_folder: str = ""
    instruction: str | None = None
    num_negatives: int | None = None
    min_score: float | None = None
    columns: tuple[str, ...] = ()
    corpus: Path | None = None
    positive_field: str = "positive"
    cot_field: str = "cot"
    uri_folders: Mapping[str, str] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    @cached_property
    def pictures(self) -> Pictures:
        """The way from a cell of the input to a path relative to the data root."""
        return Pictures(
            self.data_root, self.image_dir, self.tally.saved_images, self.picture_folder
        )

    def files(self) -> list[DataFile]:
        """Return the data files of the input with the wanted subsets and split."""
        return find_files(
            self.input, subset=self.subset, split=self.split, without=self.output.resolve()
        )

    def rows(self) -> Iterator[Row]:
        """Yield the rows of these files."""
        return read_rows(self.files())

    def item(
        self,
        data: Mapping[str, Any],
        *,
        text: str | Sequence[str] = "text",
        image: str | None = None,
        video: str | None = None,
        instruction: str | None = None,
        where: str = "",
        has_marks: bool = False,
        num_frames: int | None = None,
    ) -> Item:
        """Return the item whose parts are named fields of `data`.

        Args:
            data: A row, or an object in it.
            text: Field of the text; several are joined by a blank.
            image: Field of a picture or a list of them.
            video: Field of a video: its frames, or a folder of them.
            instruction: Field of the instruction.
            where: What stands before the names in errors, such as "query.".
            has_marks: Take placeholders of pictures and read-out marks out of the text.
            num_frames: As of `Pictures.frames`.

        Raises:
            RecordError: If a part is of another type, or a picture cannot be used.
        """
        names = [text] if isinstance(text, str) else text
        parts = [text_of(data, name, where=where) for name in names]
        whole = " ".join(part for part in parts if part) or None
        images = image and self.pictures.paths(data.get(image), field=f"{where}{image}")
        frames = video and self.pictures.frames(
            data.get(video), field=f"{where}{video}", num_frames=num_frames
        )
        if has_marks:
            whole = self.strip(whole, bool(images or frames), f"{where}{names[-1]}")
        given = text_of(data, instruction, where=where) if instruction else None
        return Item(given, whole, tuple(images or ()), tuple(frames or ()))

    def strip(self, text: str | None, has_pictures: bool, field: str) -> str | None:
        """Return a text without the marks of other models, see `strip_marks`."""
        return strip_marks(text, has_pictures=has_pictures, notes=self.tally.notes, field=field)

    def metadata(
        self, data: Fields, *, kept: Iterable[str] = (), used: Iterable[str] = (), prefix: str = ""
    ) -> dict[str, Any]:
        """Return the `kept` fields that hold something; call it last, as the rest is told.

        Args:
            data: A row or an object in it; fields that nobody asked for are counted as unknown.
            kept: Fields to keep.
            used: Fields that are known although this row was not asked for them.
            prefix: What stands before the names of unknown ones, such as "query.".
        """
        kept = list(kept)
        known = {*data.asked, *kept, *used}
        self.tally.unknown_fields.update(f"{prefix}{name}" for name in data if name not in known)
        return {name: data[name] for name in kept if data.get(name) not in (None, "", [], {})}

    def is_positive(self, score: Any, *, field: str) -> bool:
        """Return whether a pair with this `score` (None: it has none) is one; count others.

        Raises:
            RecordError: For a score that is no number, or when no `min_score` was given.
        """
        if score is None:
            return True
        if not isinstance(score, int | float) or score != score:  # NaN
            raise bad_type(score, "a number as score", field)
        if self.min_score is None:
            raise RecordError(
                f"{field} = {score} says how alike a pair is; expected min_score, from which on a "
                "pair is a positive one; set it",
                reason="no_min_score",
                field=field,
            )
        if score < self.min_score:
            self.tally.dropped["below_min_score"] += 1
            return False
        return True

    def first_negatives(self, negatives: Sequence[Item]) -> tuple[Item, ...]:
        """Return at most `num_negatives` of `negatives`, counting what is left out."""
        kept = tuple(negatives[: self.num_negatives])
        if left_out := len(negatives) - len(kept):
            self.tally.notes["negatives beyond num_negatives, left out"] += left_out
        return kept

    def records(
        self, rows: Iterable[Row], build: Callable[[Row, Fields, "Conversion"], Iterable[Record]]
    ) -> Iterator[Outcome]:
        """Yield what `build` makes of each row: its records, or the error that says why not."""
        for row in rows:
            try:
                if isinstance(row.data, RecordError):
                    raise row.data
                for record in build(row, Fields(row.data), self):
                    yield Outcome(row.file, row.number, record)
            except RecordError as error:
                yield Outcome(row.file, row.number, error)


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
        ValueError: For settings that cannot work.
    """
    output, root = conversion.output, conversion.data_root.resolve()
    if output.exists() and not overwrite:
        raise FileExistsError(
            f"output = {str(output)!r} exists; expected a new file; choose another name or "
            "overwrite it"
        )
    problems = Problems()
    problems.unless(
        output.resolve() != conversion.input.resolve(),
        f"output = {str(output)!r} is the input, expected another file",
    )
    problems.unless(
        (root / conversion.image_dir).resolve().is_relative_to(root),
        f"image_dir = {conversion.image_dir!r} leads outside the data root {str(root)!r}, expected "
        "a folder in it",
    )
    problems.unless(limit is None or limit >= 1, f"limit = {limit}, expected >= 1 or none")
    problems.expect(conversion, "None or >= 0", "num_negatives")
    problems.refuse("convert", "change these options")
    is_strict = on_bad_record == "raise"
    write_rows(output, _checked_rows(convert, conversion, is_strict=is_strict, limit=limit))
    return conversion.tally


def _checked_rows(
    convert: Callable[[Conversion], Iterator[Outcome]],
    conversion: Conversion,
    *,
    is_strict: bool,
    limit: int | None,
) -> Iterator[dict[str, Any]]:
    tally, seen, root = conversion.tally, set[str](), conversion.data_root.resolve()
    outcomes = tqdm(
        convert(conversion), desc=f"Converting {conversion.input.name}", unit=" rows", disable=None
    )
    for outcome in outcomes:
        try:
            if isinstance(record := outcome.value, RecordError):
                raise record
            if conversion.instruction is not None and record.query.instruction is None:
                query = replace(record.query, instruction=conversion.instruction)
                record = replace(record, query=query)
            row = writable_row(record, root)
            if record.id in seen:
                raise RecordError(
                    f"id = {record.id!r} was used before; expected unique ids; remove the copy",
                    reason="duplicate_id",
                    field="id",
                )
            record.refuse_positive_as_negative(root)
        except RecordError as error:
            located = error.at(file=outcome.file, row=outcome.number)
            if is_strict:
                raise located from error
            tally.drop(error.reason, str(located))
            continue
        seen.add(record.id)
        tally.records += 1
        tally.negatives += len(record.negatives)
        tally.images += sum(1 for _ in record.sources())
        yield row
        if tally.records == limit:
            return
    if not tally.records:
        first = next((f"; first: {first}" for first in tally.first_of.values()), "")
        raise RecordError(
            f"records = 0, dropped {dict(tally.dropped)}; expected at least one; correct the input"
            + first,
            reason="no_records",
            file=conversion.input,
        )
