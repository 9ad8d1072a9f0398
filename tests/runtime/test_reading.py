"""Files that people hand in: one meaning each, regular ones only, and errors that name them."""

import os
from pathlib import Path
from typing import Any

import pytest

from twn_rl.runtime.problems import Problems
from twn_rl.runtime.reading import (
    MAX_DOCUMENT_BYTES,
    decode_json,
    load_json,
    load_yaml,
    regular_file,
)


def test_pipes_devices_and_folders_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for path, kind in ((pipe, "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        for load in (regular_file, load_json, load_yaml):
            with pytest.raises(ValueError, match=f"{path.name}.* is {kind}; expected a regular"):
                load(path)
    with pytest.raises(FileNotFoundError, match="does not exist; expected a file"):
        load_json(tmp_path / "none.json")
    for name in ("a\x00b", "a" * 300):
        with pytest.raises(ValueError, match="no usable path"):
            load_json(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1, "a": 2}', "key 'a' is there twice"),
        ('{"b": {"x": "1:2", "a": 1, "a": 1}}', "key 'a' is there twice"),
        ('{"a" : 1, "b": ":", "a" : 2}', "key 'a' is there twice"),
        ("[" * 100_000, "nests too deeply"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nests too deeply"),
        ('{"a": NaN}', "malformed"),
        ('{"a": "\\ud800"}', "truncated"),
        ("", "truncated"),
    ],
)
def test_json_that_has_no_one_meaning_is_an_error(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json is no valid JSON \(.*{complaint}"):
        load_json(path)


def test_json_with_colons_in_its_texts_is_read(tmp_path: Path) -> None:
    value: Any = {"a": "b: c", "d:": [{"a": 1}, {"a": ":"}], "e": {}}
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": "b: c", "d:": [{"a": 1}, {"a": ":"}], "e": {}}')
    assert load_json(path) == value
    assert decode_json(b'{"a": 1, "a": 2}', is_strict=False) == {"a": 2}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' is there twice"),
        ("a: {b: 1, b: 2}", "line 1: key 'b' is there twice"),
        ("a: &x [1]\nb: *x\n", "alias \\*x stands for another value"),
        ("a: " + "[" * 5000 + "]" * 5000, "nests too deeply"),
        ("a: 2026-99-99", "no valid YAML"),
        ("a: [1", "no valid YAML"),
        ("!!python/object/apply:os.system ['true']", "no valid YAML"),
        ("? [a, b]\n: 1\n", "no valid YAML"),
    ],
)
def test_yaml_that_has_no_one_plain_meaning_is_an_error(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        load_yaml(path)
    assert "a.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_documents_of_other_encodings_and_sizes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ValueError, match=r"a\.yaml is no UTF-8 text"):
        load_yaml(path)
    with path.open("wb") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)
    with pytest.raises(ValueError, match="expected at most"):
        load_yaml(path)


def test_settings_of_another_type_are_named() -> None:
    class Settings:
        rate, count, share = "fast", True, 0.5

    problems = Problems()
    problems.expect(Settings(), ">= 0", "rate", "count", "share")
    assert problems == [
        "rate = 'fast', expected a number >= 0",
        "count = True, expected a number >= 0",
    ]
