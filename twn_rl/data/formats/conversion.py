"""What a conversion is asked to do, row by row. Knows no format and writes no records."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from twn_rl.data.formats.layout import DataFile, find_files
from twn_rl.data.formats.pictures import Pictures
from twn_rl.data.formats.rows import Row, read_rows
from twn_rl.data.formats.tally import Tally
from twn_rl.data.record import Item, Record, RecordError


class Outcome(NamedTuple):
    """What became of a row: a record, or why there is none."""

    file: Path
    number: int
    value: Record | RecordError


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
        return Pictures(self.data_root, image_dir=self.image_dir, tally=self.tally)

    def files(self) -> list[DataFile]:
        """Return the data files of the input with the wanted subsets and split."""
        return find_files(
            self.input, subset=self.subset, split=self.split, without=self.output.resolve()
        )

    def rows(self) -> Iterator[Row]:
        """Yield the rows of these files."""
        return read_rows(self.files())

    def metadata(
        self,
        data: Mapping[str, Any],
        *,
        used: Iterable[str],
        kept: Iterable[str] = (),
        prefix: str = "",
    ) -> dict[str, Any]:
        """Return the `kept` fields of `data` that hold something; count fields nobody knows."""
        used, kept = set(used), list(kept)
        self.tally.unknown_fields.update(
            f"{prefix}{name}" for name in data if name not in used and name not in kept
        )
        return {name: data[name] for name in kept if data.get(name) not in (None, "", [], {})}

    def is_positive(self, score: Any, *, field: str) -> bool:
        """Return whether a pair with this `score` (None: it has none) is one; count others.

        Raises:
            RecordError: For a score that is no number, or when no `min_score` was given.
        """
        if score is None:
            return True
        if not isinstance(score, int | float) or score != score:  # NaN
            raise RecordError(
                f"score = {score!r:.80}; expected a number; correct the value",
                reason="bad_type",
                field=field,
            )
        if self.min_score is None:
            raise RecordError(
                f"{field} = {score} says how alike a pair is; expected min_score, from which on a "
                "pair is a positive one; set it",
                reason="no_min_score",
                field=field,
            )
        if score < self.min_score:
            self.tally.drop("below_min_score")
            return False
        return True

    def first_negatives(self, negatives: Sequence[Item]) -> tuple[Item, ...]:
        """Return at most `num_negatives` of `negatives`, counting what is left out."""
        kept = tuple(negatives[: self.num_negatives])
        if len(kept) < len(negatives):
            self.tally.notes["negatives beyond num_negatives, left out"] += len(negatives) - len(
                kept
            )
        return kept


def build_each(
    rows: Iterable[Row], build: Callable[[Row, Mapping[str, Any]], Iterable[Record]]
) -> Iterator[Outcome]:
    """Yield what `build` makes of each row: its records, or the error that says why not."""
    for row in rows:
        try:
            if isinstance(row.data, RecordError):
                raise row.data
            for record in build(row, row.data):
                yield Outcome(row.file, row.number, record)
        except RecordError as error:
            yield Outcome(row.file, row.number, error)


def required(data: Mapping[str, Any], name: str, *, where: str = "") -> Any:
    """Return the value of a field that must be there.

    Raises:
        RecordError: If it is missing or null; the message names the fields that are there.
    """
    if data.get(name) is None:
        raise RecordError(
            f"{name} is {'null' if name in data else 'missing'}; expected it beside "
            f"{sorted(map(str, data))}; add it, leave the row out or choose another format",
            reason="missing_field",
            field=f"{where}{name}",
        )
    return data[name]


def text_of(data: Mapping[str, Any], name: str, *, where: str = "") -> str | None:
    """Return a text field, None where it is blank, null or missing.

    Raises:
        RecordError: If it holds something else than text.
    """
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise RecordError(
            f"value = {value!r:.80} of type {type(value).__name__}; expected text; correct it",
            reason="bad_type",
            field=f"{where}{name}",
        )
    return value if value and value.strip() else None


def as_list(value: Any) -> list[Any]:
    """Return the members of a list, one value as a list of its own, and None as an empty list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
