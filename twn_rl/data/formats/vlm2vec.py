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

from twn_rl.data.formats.conversion import Conversion, Fields, Outcome
from twn_rl.data.formats.input_files import (
    DataFile,
    Row,
    find_files,
    read_rows,
    read_yaml,
    required,
)
from twn_rl.data.formats.mmeb import mmeb_records
from twn_rl.data.record import Item, Record, RecordError, bad_file, bad_type

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
        unknown = set(entry) - _USED
        conversion.tally.unknown_fields.update(f"{name}.{key}" for key in unknown)
        asked = [n for n in (conversion.num_negatives, entry.get("num_hardneg")) if n is not None]
        parser = entry["dataset_parser"]
        is_video = parser in _VIDEO_PARSERS
        folder = entry.get("video_frame_basedir" if is_video else "image_dir") or ""
        own = replace(conversion, num_negatives=min(asked, default=None), picture_folder=folder)
        build = partial(_llavahound_records, entry) if is_video else _PARSERS[parser]
        rows = islice(read_rows(files), entry.get("num_sample_per_subset"))
        yield from _with_weight(own.records(rows, build), entry.get("weight"))


def _with_weight(outcomes: Iterable[Outcome], weight: float | None) -> Iterator[Outcome]:
    for outcome in outcomes:
        record = outcome.value
        if isinstance(record, Record) and weight is not None:
            record = replace(record, metadata={**record.metadata, "sampling_weight": weight})
        yield outcome._replace(value=record)


def _entries(conversion: Conversion) -> dict[str, Entry]:
    path = conversion.input
    data = read_yaml(path, "named data sets")
    if not isinstance(data, dict) or not all(isinstance(entry, dict) for entry in data.values()):
        raise bad_file(
            path,
            f"content = {data!r:.80}; expected named data sets, each with its settings; correct it",
        )
    missing = [name for name in conversion.subset if name not in data]
    if missing:
        raise RecordError(
            f"subset = {missing} not in the file; expected some of {sorted(data)}; correct the "
            "name",
            reason="no_records",
            file=path,
        )
    return {name: data[name] for name in conversion.subset or data}


def _files(name: str, entry: Entry, conversion: Conversion) -> list[DataFile]:
    """Return the files of an entry, all under its name."""
    known = (*_PARSERS, *_VIDEO_PARSERS)
    if entry.get("dataset_parser") not in known:
        raise RecordError(
            f"dataset_parser = {entry.get('dataset_parser')!r}; expected one of "
            f"{sorted(known)}; leave the entry out by naming the others as subset",
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


def _vidore_records(row: Row, data: Fields, conversion: Conversion) -> Iterator[Record]:
    required(data, "image")
    query = conversion.item(data, text="query", image="image")
    answer = conversion.item(data, text="answer")
    kept = ("image_filename", "answer_type", "source", "options", "page", "model", "prompt")
    yield Record(row.name, row.subset, query, answer, metadata=conversion.metadata(data, kept=kept))


def _visrag_records(row: Row, data: Fields, conversion: Conversion) -> Iterator[Record]:
    page = conversion.pictures.paths(required(data, "image"), field="image")
    query = conversion.item(data, text="query")
    metadata = conversion.metadata(data, kept=("source",))
    yield Record(row.name, row.subset, query, Item(images=page), metadata=metadata)


def _llavahound_records(
    entry: Entry, row: Row, data: Fields, conversion: Conversion
) -> Iterator[Record]:
    turns, clip = required(data, "conversations"), required(data, "video")
    pair = turns[:2] if isinstance(turns, list) else []
    if len(pair) < 2 or not all(isinstance(turn, Mapping) for turn in pair):
        raise bad_type(turns, "a question and an answer", "conversations")
    asked = conversion.item(
        {"value": pair[0].get("value"), "video": clip},
        text="value",
        video="video",
        where="conversations[0].",
        has_marks=True,
        num_frames=entry.get("num_frames"),
    )
    answer = conversion.item(pair[1], text="value", where="conversations[1].")
    is_retrieval = entry.get("data_mode") == "video_retrieval"
    sides = (answer, Item(video=asked.video)) if is_retrieval else (asked, answer)
    yield Record(row.name, row.subset, *sides, metadata=conversion.metadata(data, kept=("id",)))


_PARSERS: dict[str, Callable[[Row, Fields, Conversion], Iterator[Record]]] = {
    "mmeb": mmeb_records,
    "mmeb_neg": mmeb_records,
    "vidore": _vidore_records,
    "visrag": _visrag_records,
}
_VIDEO_PARSERS = ("llavahound_caption", "llavahound_qa")
