"""MMEB, VLM2Vec, UME and TWN in their real shapes: fields and thoughts arrive where they belong."""

import json
from pathlib import Path

import pytest
import yaml
from format_files import convert, make_root, png, under, write_lines, write_table

from twn_rl.data.record import Item, Record


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path)


def test_mmeb_rows_lose_the_placeholder_and_keep_instruction_and_text_together(root: Path) -> None:
    row = {
        "qry": "<|image_1|>\nRepresent the given image with the following question: What is it?\n",
        "qry_image_path": "pics/a.png",
        "pos_text": "A camel",
        "pos_image_path": "",
        "neg_text": "",
        "neg_image_path": "pics/b.png",
    }
    source = root / "hub"
    write_table(source / "OK-VQA" / "original-00000-of-00001.parquet", [row])
    write_table(source / "OK-VQA" / "diverse_instruction-00000-of-00001.parquet", [row, row])
    write_table(source / "CIRR" / "original-00000-of-00001.parquet", [{**row, "qry": "Find it"}])
    records = convert(root, "mmeb", source, "--split", "original")
    assert [record.id for record in records] == ["CIRR/1", "OK-VQA/1"]
    assert records[1] == Record(
        id="OK-VQA/1",
        source="OK-VQA",
        query=Item(
            text="Represent the given image with the following question: What is it?",
            images=under(root, "pics/a.png"),
        ),
        positive=Item(text="A camel"),
        negatives=(Item(images=under(root, "pics/b.png")),),
    )
    chosen = ("--split", "diverse_instruction", "--subset", "OK-VQA", "--overwrite")
    assert [r.id for r in convert(root, "mmeb", source, *chosen)] == ["OK-VQA/1", "OK-VQA/2"]


def test_mmeb_lists_of_negatives_are_paired_and_cut_to_the_first(root: Path) -> None:
    row = {
        "qry": "Find it",
        "qry_image_path": "",
        "pos_text": "<|image_1|>\nRepresent the image.",
        "pos_image_path": "pics/a.png",
        "neg_text": ["<|image_1|>\nRepresent the image.", "plain", "third"],
        "neg_image_path": ["pics/b.png", "", None],
    }
    source = write_lines(root / "rows.jsonl", row)
    records = convert(root, "mmeb", source, "--num_negatives", "2", "--instruction", "Retrieve.")
    assert records[0].query == Item(instruction="Retrieve.", text="Find it")
    assert records[0].negatives == (
        Item(text="Represent the image.", images=under(root, "pics/b.png")),
        Item(text="plain"),
    )


def test_vlm2vec_yaml_lists_local_data_of_every_parser(root: Path) -> None:
    mmeb = {"qry": "<|image_1|>\nWhat?", "qry_image_path": "a.png", "pos_text": "x"}
    folder = root / "MMEB-train" / "OK-VQA"
    write_table(folder / "original-00000-of-00001.parquet", [{**mmeb, "pos_image_path": ""}] * 3)
    page = {"bytes": png(1), "path": "page.png"}
    vidore = {"query": "How many?", "image": page, "answer": "Seven", "source": "arxiv"}
    write_table(root / "colpali" / "data" / "train-00000-of-00001.parquet", [vidore])
    visrag = {"query": "A plot of y", "image": page, "source": "PlotQA"}
    write_table(root / "visrag.parquet", [visrag])
    turns = [{"from": "human", "value": "<video>\nDescribe."}, {"from": "gpt", "value": "A dog."}]
    write_lines(root / "caps.jsonl", {"id": "c1", "video": "v1", "conversations": turns})
    video = {"dataset_parser": "llavahound_caption", "dataset_path": "caps.jsonl"}
    video |= {"video_frame_basedir": "clips", "num_frames": 2}
    config = {
        "OK-VQA": {
            "dataset_parser": "mmeb",
            "dataset_name": "TIGER-Lab/MMEB-train",
            "subset_name": "OK-VQA",
            "dataset_split": "original",
            "image_dir": "pics",
            "num_sample_per_subset": 2,
            "weight": 0.5,
        },
        "colpali": {"dataset_parser": "vidore", "dataset_name": "vidore/colpali"},
        "visrag": {"dataset_parser": "visrag", "dataset_path": "visrag.parquet"},
        "caption": {**video, "data_mode": "caption_retrieval"},
        "retrieval": {**video, "data_mode": "video_retrieval"},
    }
    source = root / "train.yaml"
    source.write_text(yaml.safe_dump(config, sort_keys=False))
    records = {record.id: record for record in convert(root, "vlm2vec", source)}
    singles = ["colpali/1", "visrag/1", "caption/1", "retrieval/1"]
    assert list(records) == ["OK-VQA/1", "OK-VQA/2", *singles]
    assert records["OK-VQA/1"].query == Item(text="What?", images=under(root, "pics/a.png"))
    assert records["OK-VQA/1"].metadata == {"sampling_weight": 0.5}
    saved = records["colpali/1"].query.images
    assert records["colpali/1"].query == Item(text="How many?", images=saved)
    assert records["colpali/1"].positive == Item(text="Seven")
    assert records["colpali/1"].metadata == {"source": "arxiv"}
    assert records["visrag/1"].query == Item(text="A plot of y")
    assert records["visrag/1"].positive == Item(images=saved)
    frames = under(root, "clips/v1/frame0.png", "clips/v1/frame2.png")
    assert records["caption/1"].query == Item(text="Describe.", video=frames)
    assert records["caption/1"].positive == Item(text="A dog.")
    assert records["retrieval/1"].query == Item(text="A dog.")
    assert records["retrieval/1"].positive == Item(video=frames)


def test_ume_sft_thoughts_become_cots_and_summaries_metadata(root: Path) -> None:
    request = "\n<disc_emb>\nFirst think inside <think></think>, then finish with <gen_emb>."
    row = {
        "dataset_name": "InfographicsVQA",
        "qry": {
            "conversations": [
                {"from": "human", "value": f"<image>\nWhich animal?{request}"},
                {"from": "gpt", "value": "<think>It has humps.</think>A camel.<gen_emb>"},
            ],
            "image": "pics/a.png",
        },
        "pos": {
            "conversations": [
                {"from": "human", "value": f"<video>\n{request}"},
                {"from": "gpt", "value": "<think>Cut off"},
            ],
            "video": ["clips/v1/frame0.png", "clips/v1/frame1.png"],
        },
    }
    source = root / "sft.json"
    source.write_text(json.dumps([row]))
    assert list(convert(root, "ume-sft", source)) == [
        Record(
            id="sft/1",
            source="InfographicsVQA",
            query=Item(text="Which animal?", images=under(root, "pics/a.png")),
            positive=Item(video=under(root, "clips/v1/frame0.png", "clips/v1/frame1.png")),
            query_cot="It has humps.",
            metadata={"query_summary": "A camel.", "positive_completion": "<think>Cut off"},
        )
    ]


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [("all", [1, 2, 3, 4]), ("first:3", [1, 2, 3]), ("end:1", [4]), ("first:50%", [1, 2])],
)
def test_ume_rl_rows_are_flat_and_sampled_as_their_yaml_says(
    root: Path, strategy: str, kept: list[int]
) -> None:
    rows = [
        {
            "qry_text": f"<image>\nquestion {i}",
            "qry_image": "pics/a.png",
            "qry_video": [""],
            "pos_text": f"answer {i}",
            "pos_image": "",
            "pos_video": [""],
            "solution": f"s{i}",
        }
        for i in range(1, 5)
    ]
    (root / "rl.json").write_text(json.dumps(rows))
    source = root / "rl.yaml"
    listed = {"datasets": [{"json_path": "rl.json", "sampling_strategy": strategy}]}
    source.write_text(yaml.safe_dump(listed))
    records = convert(root, "ume-rl", source)
    assert [record.id for record in records] == [f"rl/{i}" for i in kept]
    assert records[0].query == Item(text=f"question {kept[0]}", images=under(root, "pics/a.png"))
    assert records[0].positive == Item(text=f"answer {kept[0]}")
    assert records[0].metadata == {"solution": f"s{kept[0]}"}


def test_ume_rl_random_rows_are_the_same_in_every_run(root: Path) -> None:
    write_lines(root / "rl.jsonl", *({"qry_text": f"q{i}", "pos_text": "p"} for i in range(30)))
    source = root / "rl.yaml"
    listed = {"datasets": [{"json_path": "rl.jsonl", "sampling_strategy": "random:5"}]}
    source.write_text(yaml.safe_dump(listed))
    chosen = [record.id for record in convert(root, "ume-rl", source)]
    assert len(chosen) == 5
    assert chosen != [f"rl/{i}" for i in range(1, 6)]


def test_absolute_folders_of_a_yaml_file_become_relative(root: Path) -> None:
    write_lines(root / "rows.jsonl", {"qry": "q", "pos_text": "", "pos_image_path": "a.png"})
    entry = {
        "dataset_parser": "mmeb",
        "dataset_path": "rows.jsonl",
        "image_dir": str(root / "pics"),
    }
    (root / "train.yaml").write_text(yaml.safe_dump({"one": entry}))
    records = convert(root, "vlm2vec", root / "train.yaml")
    assert records[0].positive == Item(images=under(root, "pics/a.png"))
    assert '"pics/a.png"' in (root / "out.jsonl").read_text()


def test_twn_uris_lead_to_folders_and_thoughts_to_cots(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {
        "data_info": {
            "data_type": "image_classification",
            "dataset_name": "MMEB_ImageNet_1K",
            "data_id": 0,
        },
        "query": {
            "text": "Represent the given image for classification",
            "image": "mmeb_train://a.png",
            "cot": "<think>Two humps.</think> camel",
        },
        "positive": {"text": "camel", "image": None, "cot": "An animal."},
    }
    source = root / "twn.json"
    source.write_text(json.dumps([row]))
    caplog.set_level("INFO")
    records = convert(root, "twn", source, "--uri_folders", "mmeb_train=pics")
    assert list(records) == [
        Record(
            id="MMEB_ImageNet_1K/0",
            source="MMEB_ImageNet_1K",
            query=Item(
                text="Represent the given image for classification",
                images=under(root, "pics/a.png"),
            ),
            positive=Item(text="camel"),
            query_cot="Two humps.",
            positive_cot="An animal.",
            metadata={"data_type": "image_classification", "query_summary": "camel"},
        )
    ]
    assert "without a chain of thought" not in caplog.text
