"""Formats people own, turned into this project's records: one family a file.

A converter yields the records of an input one by one, never all of them: a million rows stream.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from twn_rl.data.formats.beir import convert_beir
from twn_rl.data.formats.conversion import Conversion, Fields, Outcome
from twn_rl.data.formats.input_files import Row
from twn_rl.data.formats.mmeb import mmeb_records
from twn_rl.data.formats.sentence_transformers import convert_sentence_transformers
from twn_rl.data.formats.swift import swift_records
from twn_rl.data.formats.tevatron import convert_tevatron
from twn_rl.data.formats.twn import twn_records
from twn_rl.data.formats.ume import convert_ume_rl, ume_sft_records
from twn_rl.data.formats.vlm2vec import convert_vlm2vec
from twn_rl.data.record import Record

__all__ = ["FORMATS", "Conversion", "Format"]


class Format(NamedTuple):
    """A format that can be converted.

    Attributes:
        convert: Yields what becomes of each row.
        options: Settings of `Conversion` that have a meaning for this format only.
    """

    convert: Callable[[Conversion], Iterator[Outcome]]
    options: tuple[str, ...] = ()


def _each(
    build: Callable[[Row, Fields, Conversion], Iterable[Record]],
) -> Callable[[Conversion], Iterator[Outcome]]:
    """Return the converter of a format whose rows stand alone."""
    return lambda conversion: conversion.records(conversion.rows(), build)


FORMATS: dict[str, Format] = {
    "mmeb": Format(_each(mmeb_records)),
    "vlm2vec": Format(convert_vlm2vec),
    "ume-sft": Format(_each(ume_sft_records)),
    "ume-rl": Format(convert_ume_rl),
    "swift": Format(_each(swift_records), ("min_score",)),
    "sentence-transformers": Format(convert_sentence_transformers, ("min_score", "columns")),
    "beir": Format(convert_beir, ("min_score", "corpus")),
    "tevatron": Format(convert_tevatron, ("corpus",)),
    "twn": Format(_each(twn_records), ("positive_field", "cot_field", "uri_folders")),
}
