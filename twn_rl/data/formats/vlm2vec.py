"""VLM2Vec's training configuration: `--from vlm2vec`, a YAML file that lists data sets.

Each entry names a `dataset_parser` and where its rows lie: `dataset_path` (a file) or
`dataset_name` (a hub id, of which a local copy must lie in the data root: nothing is fetched), and
`subset_name, dataset_split, image_dir, num_sample_per_subset, num_hardneg, video_frame_basedir,
num_frames, data_mode`. All paths are relative to the data root; `weight` lands in the metadata.

Parsers: mmeb, mmeb_neg; vidore (query and page -> answer); visrag (query -> page);
llavahound_caption and llavahound_qa (frames of a video and text). VLM2Vec's loader puts prompts of
its own around some of these; the rows are taken as they are, and `instruction` adds yours.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from twn_rl.data.formats.conversion import Conversion, Outcome, build_each, required, text_of
from twn_rl.data.formats.extras import import_extra
from twn_rl.data.formats.layout import DataFile, find_files
from twn_rl.data.formats.marks import strip_marks
from twn_rl.data.formats.mmeb import mmeb_records
from twn_rl.data.formats.pictures import Pictures
from twn_rl.data.formats.rows import Row, read_rows
from twn_rl.data.record import Item, Record, RecordError

Entry = Mapping[str, Any]

_USED = {
    "dataset_parser", "dataset_path", "dataset_name", "subset_name", "dataset_split", "image_dir",
    "num_sample_per_subset", "num_hardneg", "video_frame_basedir", "num_frames", "data_mode",
    "weight", "num_rows", "global_dataset_name",
}  # fmt: skip


def convert_vlm2vec(conversion: Conversion) -> Iterator[Outcome]:
    """Yield the records of every entry of the YAML file, or of those that `subset` names.

    Raises:
        RecordError: If an entry names a parser nobody knows or rows that are not there; all such
            entries are listed before the first record is made.
    """
    entries = _entries(conversion)
    problems, plans = [], []
    for name, entry in entries.items():
        try:
            plans.append((name, entry, _files(name, entry, conversion)))
        except (RecordError, FileNotFoundError) as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise RecordError("\n".join(problems), reason="bad_file", file=conversion.input)
    return _convert(plans, conversion)


def _convert(
    plans: list[tuple[str, Entry, list[DataFile]]], conversion: Conversion
) -> Iterator[Outcome]:
    for name, entry, files in plans:
        folder = entry.get("image_dir") or ""
        unknown = set(entry) - _USED
        conversion.tally.unknown_fields.update(f"{name}.{key}" for key in unknown)
        asked = [n for n in (conversion.num_negatives, entry.get("num_hardneg")) if n is not None]
        build = partial(
            _PARSERS[entry["dataset_parser"]],
            conversion=replace(conversion, num_negatives=min(asked, default=None)),
            pictures=Pictures(
                conversion.data_root, conversion.image_dir, conversion.tally, folder=folder
            ),
        )
        if build.func is _llavahound_records:
            build = partial(build, entry=entry)
        rows = islice(read_rows(files), entry.get("num_sample_per_subset"))
        yield from _with_weight(build_each(rows, build), entry.get("weight"))


def _with_weight(outcomes: Iterable[Outcome], weight: float | None) -> Iterator[Outcome]:
    for outcome in outcomes:
        record = outcome.value
        if isinstance(record, Record) and weight is not None:
            record = replace(record, metadata={**record.metadata, "sampling_weight": weight})
        yield outcome._replace(value=record)


def _entries(conversion: Conversion) -> dict[str, Entry]:
    yaml = import_extra("yaml", package="yaml", extra="train", purpose="YAML files")
    try:
        data = yaml.safe_load(conversion.input.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecordError(
            f"no valid YAML ({error}); expected named data sets; correct the file",
            reason="bad_file",
            file=conversion.input,
        ) from error
    if not isinstance(data, dict) or not all(isinstance(entry, dict) for entry in data.values()):
        raise RecordError(
            f"content = {data!r:.80}; expected named data sets, each with its settings; correct it",
            reason="bad_file",
            file=conversion.input,
        )
    missing = [name for name in conversion.subset if name not in data]
    if missing:
        raise RecordError(
            f"subset = {missing} not in the file; expected some of {sorted(data)}; correct the "
            "name",
            reason="no_records",
            file=conversion.input,
        )
    return {name: data[name] for name in conversion.subset or data}


def _files(name: str, entry: Entry, conversion: Conversion) -> list[DataFile]:
    """Return the files of an entry, all under its name."""
    if entry.get("dataset_parser") not in _PARSERS:
        raise RecordError(
            f"dataset_parser = {entry.get('dataset_parser')!r}; expected one of "
            f"{sorted(_PARSERS)}; leave the entry out by naming the others as subset",
            reason="bad_file",
        )
    if entry.get("data_mode") not in (None, "caption_retrieval", "video_retrieval"):
        raise RecordError(
            f"data_mode = {entry['data_mode']!r}; expected caption_retrieval or video_retrieval; "
            "correct the entry",
            reason="bad_file",
        )
    subset = entry.get("subset_name")
    split = entry.get("dataset_split") or conversion.split
    files = find_files(_place(entry, conversion), subset=[subset] if subset else (), split=split)
    return [file._replace(subset=name) for file in files]


def _place(entry: Entry, conversion: Conversion) -> Path:
    """Return where the rows of an entry lie, under the data root."""
    root = conversion.data_root
    name = str(entry.get("dataset_path") or entry.get("dataset_name"))
    candidates = [root / name, root / name.rpartition("/")[2]]
    for place in candidates:
        if place.exists():
            return place
    raise RecordError(
        f"data = {name!r} is not here; expected {' or '.join(map(str, candidates))}; download it "
        "there (nothing is fetched) or leave the entry out by naming the others as subset",
        reason="bad_file",
    )


def _vidore_records(
    row: Row, data: Mapping[str, Any], *, conversion: Conversion, pictures: Pictures
) -> Iterator[Record]:
    page = pictures.path(required(data, "image"), field="image")
    kept = ("image_filename", "answer_type", "source", "options", "page", "model", "prompt")
    yield Record(
        id=row.name,
        source=row.subset,
        query=Item(text=text_of(data, "query"), images=(page,) if page else ()),
        positive=Item(text=text_of(data, "answer")),
        metadata=conversion.metadata(data, used=("query", "image", "answer"), kept=kept),
    )


def _visrag_records(
    row: Row, data: Mapping[str, Any], *, conversion: Conversion, pictures: Pictures
) -> Iterator[Record]:
    page = pictures.path(required(data, "image"), field="image")
    yield Record(
        id=row.name,
        source=row.subset,
        query=Item(text=text_of(data, "query")),
        positive=Item(images=(page,) if page else ()),
        metadata=conversion.metadata(data, used=("query", "image"), kept=("source",)),
    )


def _llavahound_records(
    row: Row, data: Mapping[str, Any], *, conversion: Conversion, pictures: Pictures, entry: Entry
) -> Iterator[Record]:
    turns = required(data, "conversations")
    asked, answered = (_turn(turns, i) for i in (0, 1))
    folder = replace(pictures, folder=entry.get("video_frame_basedir") or "")
    frames = folder.frames(
        required(data, "video"), field="video", num_frames=entry.get("num_frames")
    )
    question = strip_marks(
        asked, has_pictures=bool(frames), notes=conversion.tally.notes, field="conversations[0]"
    )
    video_first = Item(text=question, video=frames), Item(text=answered)
    text_first = Item(text=answered), Item(video=frames)
    query, positive = text_first if entry.get("data_mode") == "video_retrieval" else video_first
    yield Record(
        id=row.name,
        source=row.subset,
        query=query,
        positive=positive,
        metadata=conversion.metadata(data, used=("conversations", "video"), kept=("id",)),
    )


def _turn(turns: Any, at: int) -> str | None:
    if not isinstance(turns, list) or len(turns) < 2 or not isinstance(turns[at], Mapping):
        raise RecordError(
            f"conversations = {turns!r:.80}; expected a question and an answer; correct the row",
            reason="bad_type",
            field="conversations",
        )
    return text_of(turns[at], "value", where=f"conversations[{at}].")


_PARSERS: dict[str, Callable[..., Iterator[Record]]] = {
    "mmeb": mmeb_records,
    "mmeb_neg": mmeb_records,
    "vidore": _vidore_records,
    "visrag": _visrag_records,
    "llavahound_caption": _llavahound_records,
    "llavahound_qa": _llavahound_records,
}
