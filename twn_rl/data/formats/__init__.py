"""Formats people own, turned into this project's records: one family a file.

A converter yields the records of an input one by one, never all of them: a million rows stream.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from twn_rl.data.formats.beir import convert_beir
from twn_rl.data.formats.conversion import Conversion, Outcome
from twn_rl.data.formats.mmeb import convert_mmeb
from twn_rl.data.formats.sentence_transformers import convert_sentence_transformers
from twn_rl.data.formats.swift import convert_swift
from twn_rl.data.formats.tevatron import convert_tevatron
from twn_rl.data.formats.twn import convert_twn
from twn_rl.data.formats.ume import convert_ume_rl, convert_ume_sft
from twn_rl.data.formats.vlm2vec import convert_vlm2vec

__all__ = ["FORMATS", "Conversion", "Format"]


class Format(NamedTuple):
    """A format that can be converted.

    Attributes:
        convert: Yields what becomes of each row.
        options: Settings of `Conversion` that have a meaning for this format only.
    """

    convert: Callable[[Conversion], Iterator[Outcome]]
    options: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "mmeb": Format(convert_mmeb),
    "vlm2vec": Format(convert_vlm2vec),
    "ume-sft": Format(convert_ume_sft),
    "ume-rl": Format(convert_ume_rl),
    "swift": Format(convert_swift, ("min_score",)),
    "sentence-transformers": Format(convert_sentence_transformers, ("min_score", "columns")),
    "beir": Format(convert_beir, ("min_score", "corpus")),
    "tevatron": Format(convert_tevatron, ("corpus",)),
    "twn": Format(convert_twn, ("positive_field", "cot_field", "uri_folders")),
}
