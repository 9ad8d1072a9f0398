"""MMEB-V2's table of tasks, and its loaders on small data in the official layouts."""

from collections import Counter
from pathlib import Path

import mmeb_files as files
import pytest
from PIL import Image

from twn_rl.data.record import Item, RecordError
from twn_rl.evaluation.mmeb_v2.loaders import (
    DOCUMENT_PARSERS,
    ROW_READERS,
    check_data,
    load_task,
)
from twn_rl.evaluation.mmeb_v2.task_data import TaskData
from twn_rl.evaluation.mmeb_v2.task_files import BenchmarkFolder
from twn_rl.evaluation.mmeb_v2.tasks import MAIN_METRICS, load_tasks, select_tasks
from twn_rl.evaluation.mmeb_v2.video_rows import MVBENCH_SUBSETS

TASKS = load_tasks()
VQA = "Given a video and a question, select the most accurate answer from the provided candidates."


def load(root: Path, name: str, **settings):
    return load_task(TASKS[name], BenchmarkFolder(root, root, **settings))


def read(data: TaskData, start: int, stop: int) -> list[Item]:
    items = [item for item in data.targets.read(start, stop) if isinstance(item, Item)]
    assert len(items) == stop - start
    return items


def picture_of(item: Item) -> Image.Image:
    (picture,) = item.images
    assert isinstance(picture, Image.Image)
    return picture


def targets_of(data: TaskData) -> dict[str, Item]:
    return dict(zip(data.targets.keys, read(data, 0, len(data.targets.keys)), strict=True))


def candidates_of(data, query) -> list[str]:
    numbers = range(len(data.targets.keys)) if query.candidates is None else query.candidates
    return [data.targets.keys[number] for number in numbers]


def right_of(data, query) -> dict[str, float]:
    return {data.targets.keys[number]: gain for number, gain in query.relevant.items()}


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_has_a_loader_a_metric_a_source_and_instructions(name: str) -> None:
    task = TASKS[name]
    assert (task.parser in ROW_READERS) != (task.parser in DOCUMENT_PARSERS)
    assert task.metric == MAIN_METRICS[task.group]
    assert task.candidates in ("local", "global")
    assert task.hf_path.count("/") == 1
    assert task.hf_split in ("test", "train", "val")
    assert task.num_queries > 0
    assert (task.query_instruction is None) == (task.group == "image"), "image rows bring theirs"
    has_text_targets = task.subgroup in ("V-CLS", "V-QA") or task.group == "image"
    assert (task.target_instruction is None) == has_text_targets
    assert task.media_root.startswith(f"{task.group}-tasks")


def test_the_groups_have_their_official_sizes() -> None:
    assert Counter(task.subgroup for task in TASKS.values()) == {
        **{"I-CLS": 10, "I-QA": 10, "I-RET": 12, "I-VG": 4},
        **{"V-CLS": 5, "V-QA": 5, "V-RET": 5, "V-MRET": 3},
        **{"VD-ViDoRe-V1": 10, "VD-ViDoRe-V2": 4, "VD-VisRAG": 6, "VD-OOD": 4},
    }
    assert Counter(task.group for task in TASKS.values()) == {
        "image": 36,
        "video": 18,
        "visdoc": 24,
    }


def test_tasks_are_chosen_by_name_group_and_meta_task_and_misspelt_ones_are_refused() -> None:
    assert len(select_tasks(TASKS, ["visdoc", "I-VG"])) == 28
    with pytest.raises(ValueError, match="MSVDD"):
        select_tasks(TASKS, ["MSVDD", "MSVD"])


def test_a_file_overrides_cells_of_the_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("task,query_instruction,num_queries\nMSVD,Find it:,5\n", encoding="utf-8")
    task = load_tasks(path)["MSVD"]
    assert (task.query_instruction, task.num_queries) == ("Find it:", 5)
    assert task.target_instruction == TASKS["MSVD"].target_instruction
    assert task.fingerprint() != TASKS["MSVD"].fingerprint()
    path.write_text("task,instruction\nMSVD,x\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        load_tasks(path)


@pytest.mark.parametrize("name", ["ImageNet-1K", "OK-VQA", "MSCOCO_i2t"])
def test_a_picture_is_ranked_against_its_own_texts_the_first_is_right(name, tmp_path) -> None:
    files.text_task(tmp_path, name)
    data = load(tmp_path, name)
    query = data.queries[1]
    picture = str(tmp_path / "image-tasks" / name / "q1.png")
    assert query.item == Item("find the object", "it is", (picture,))
    texts = [f"{word} {files.WORDS[6]}" for word in files.WORDS[1:5]]
    assert candidates_of(data, query) == texts
    assert right_of(data, query) == {candidates_of(data, query)[0]: 1.0}
    assert all(item == Item(text=key) for key, item in targets_of(data).items())
    assert data.warnings == ["4 queries, the official run has 1000"]


def test_text_queries_rank_pictures_and_take_no_picture_of_their_own(tmp_path: Path) -> None:
    files.picture_task(tmp_path, "MSCOCO_t2i")
    data = load(tmp_path, "MSCOCO_t2i")
    assert data.queries[2].item == Item("find the object", "zebra")
    assert candidates_of(data, data.queries[2])[0] == "MSCOCO_t2i/t2.png"
    path = str(tmp_path / "image-tasks/MSCOCO_t2i/t2.png")
    assert targets_of(data)["MSCOCO_t2i/t2.png"] == Item("find the picture", images=(path,))


def test_objects_of_one_picture_are_told_apart_by_their_texts(tmp_path: Path) -> None:
    files.picture_task(tmp_path, "RefCOCO-Matching", captions=True)
    data = load(tmp_path, "RefCOCO-Matching")
    assert len(data.queries[0].item.images) == 1
    key = candidates_of(data, data.queries[1])[0]
    assert key == "RefCOCO-Matching/t1.png:pizza"
    assert targets_of(data)[key].text == '"pizza"'


def test_videos_are_classified_among_all_labels_with_eight_frames_at_most(tmp_path: Path) -> None:
    files.breakfast(tmp_path)
    files.write_frames(tmp_path / "video-tasks/frames/video_cls/Breakfast/v0", 20)
    data = load(tmp_path, "Breakfast")
    first, second = data.queries[0].item, data.queries[1].item
    assert [Path(str(f)).stem[-2:] for f in first.video] == [
        f"{i + 1:02d}" for i in (0, 2, 5, 8, 10, 13, 16, 19)
    ]
    assert len(second.video) == 2
    assert (
        first.instruction == "Recognize the breakfast type that the person is cooking in the video."
    )
    assert data.queries[0].candidates is None
    assert len(data.targets.keys) == 10


def test_fewer_labels_than_the_data_set_has_would_be_too_easy(tmp_path: Path) -> None:
    files.breakfast(tmp_path, count=9)
    with pytest.raises(RecordError, match=r"9 labels found; expected 10.*labels/Breakfast.txt"):
        load(tmp_path, "Breakfast")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "Breakfast.txt").write_text("salad\n", encoding="utf-8")
    assert len(load(tmp_path, "Breakfast").targets.keys) == 10


def test_every_kind_of_video_question_has_the_official_text_and_candidates(tmp_path: Path) -> None:
    files.smthsmth(tmp_path)
    files.mvbench(tmp_path, MVBENCH_SUBSETS)
    files.nextqa(tmp_path)
    files.videomme(tmp_path)
    files.egoschema(tmp_path)
    files.activitynetqa(tmp_path)
    found = {}
    for name in ("SmthSmthV2", "MVBench", "NExTQA", "Video-MME", "EgoSchema", "ActivityNetQA"):
        data = load(tmp_path, name)
        query = data.queries[0]
        shown = [targets_of(data)[key].text for key in candidates_of(data, query)]
        found[name] = (query.item.text, shown, list(right_of(data, query)))
        assert name == "SmthSmthV2" or str(query.item.instruction).startswith(VQA)
        assert len(query.item.video) == 2
    options = ["A. camel.", "B. pizza.", "C. zebra.", "D. tree."]
    words = ["camel", "pizza", "zebra", "tree"]
    lettered = "\n".join(
        f"({letter}) {w}" for letter, w in zip("ABCDE", [*words, "above"], strict=True)
    )
    assert found == {
        "SmthSmthV2": (None, files.WORDS[:6], ["camel"]),
        "MVBench": (
            "which object\nOptions:\n(A) camel\n(B) pizza",
            ["(A) camel", "(B) pizza"],
            ["(B) pizza"],
        ),
        "NExTQA": (f"which object\nOptions:\n{lettered}", [*words, "above"], ["camel"]),
        "Video-MME": ("\n".join(["which object", *options]), words, ["C. zebra."]),
        "EgoSchema": (
            "which?A. camel B. pizza C. zebra D. tree E. row",
            [*words, "row"],
            ["D. tree"],
        ),
        "ActivityNetQA": ("is it a camel? (A) yes; (B) no.", ["yes", "no"], ["no"]),
    }
    assert len(load(tmp_path, "MVBench").queries) == 20


@pytest.mark.parametrize(
    ("name", "rows", "videos"),
    [
        ("MSVD", [{"video_id": "m1", "video": "m1.avi", "caption": ["a", "b"]}], ["m1"]),
        ("MSR-VTT", [{"video_id": "v1", "video": "v1.mp4", "caption": "a"}], ["v1"]),
        ("DiDeMo", [{"video": "clips/d.x.mp4", "caption": "a"}], ["d.x"]),
        ("VATEX", [{"videoID": "x_1", "enCap": ["a", "b"]}], ["x_1"]),
        ("YouCook2", [{"id": "y_0", "video_path": "v/y.mp4", "sentence": "a"}], ["y_0"]),
    ],
)
def test_captions_find_videos_among_all(name, rows, videos, tmp_path) -> None:
    files.video_retrieval(tmp_path, name, rows, videos)
    data = load(tmp_path, name)
    assert data.queries[0].item == Item(TASKS[name].query_instruction, "a")
    assert data.queries[0].candidates is None
    assert right_of(data, data.queries[0]) == {videos[0]: 1.0}
    target = targets_of(data)[videos[0]]
    assert target.instruction == "Understand the content of the provided video."
    assert len(target.video) == 2


def test_moments_are_ranked_among_the_clips_of_their_video(tmp_path: Path) -> None:
    files.moments(tmp_path, "Charades-STA")
    data = load(tmp_path, "Charades-STA")
    query = data.queries[1]
    assert len(query.item.video) == 2
    assert sorted(candidates_of(data, query)) == ["v1/negative_0", "v1/negative_1", "v1/positive"]
    assert right_of(data, query) == {"v1/positive": 1.0}


def test_momentseeker_asks_by_text_picture_or_video_and_may_have_two_right_clips(tmp_path) -> None:
    files.momentseeker(tmp_path)
    data = load(tmp_path, "MomentSeeker")
    text, picture, video = (query.item for query in data.queries)
    assert (text.images, text.video) == ((), ())
    assert len(picture.images) == 1
    assert len(video.video) == 2
    assert len({item.instruction for item in (text, picture, video)}) == 3
    assert len(data.queries[1].relevant) == 2
    assert len(candidates_of(data, data.queries[1])) == 3


@pytest.mark.parametrize(
    ("name", "repository", "split"),
    [
        ("ViDoRe_docvqa", "vidore/docvqa_test_subsampled_beir", "test"),
        ("ViDoRe_esg_reports_v2_multilingual", "vidore/esg_reports_v2", "test"),
        ("VisRAG_PlotQA", "openbmb/VisRAG-Ret-Test-PlotQA", "train"),
        ("ViDoSeek-doc", "visdoc-tasks/ViDoSeek", "test"),
        ("MMLongBench-page", "visdoc-tasks/MMLongBench-page-fixed", "test"),
    ],
)
def test_documents_have_graded_judgements_and_pages_from_bytes(name, repository, split, tmp_path):
    files.documents(tmp_path, repository, split=split)
    data = load(tmp_path, name)
    assert [query.id for query in data.queries] == ["10", "11"]
    assert right_of(data, data.queries[0]) == {"2": 1.0}, "a score of 0 is no judgement"
    assert right_of(data, data.queries[1]) == {"4": 1.0, "1": 2.0}
    assert data.queries[1].item == Item(
        "Find a document image that matches the given query:", "pizza page"
    )
    pages = read(data, 1, 3)
    assert [picture_of(page).size for page in pages] == [(16, 16)] * 2
    assert picture_of(pages[0]).tobytes() == files.pixels(61).tobytes()
    again = read(data, 0, 2)
    assert picture_of(again[1]).tobytes() == files.pixels(61).tobytes(), "reading may go back"
    assert pages[0].instruction == "Understand the content of the provided document image."


def test_pages_without_bytes_are_those_the_official_code_unpacks(tmp_path: Path) -> None:
    folder = files.documents(tmp_path, "vidore/docvqa_test_subsampled_beir")
    rows = [{"corpus-id": page, "image": {"bytes": None, "path": None}} for page in (1, 2, 4)]
    files.write_table(folder / "corpus/test-00000-of-00001.parquet", rows)
    for page in (1, 2, 4):
        files.save(tmp_path / "visdoc-tasks/ViDoRe_docvqa" / f"{page}.png", page)
    pages = read(load(tmp_path, "ViDoRe_docvqa"), 0, 3)
    assert pages[2].images == (str(tmp_path / "visdoc-tasks/ViDoRe_docvqa/4.png"),)


def test_each_label_set_is_read_from_its_own_folder_and_never_from_the_other(tmp_path) -> None:
    files.documents(tmp_path, "VLM2Vec/ViDoSeek-page", judgements=[(7, 1, 1)])
    with pytest.raises(RecordError, match="ViDoSeek-page-fixed"):
        load(tmp_path, "ViDoSeek-page")
    assert load(tmp_path, "ViDoSeek-page", labels="original").queries[0].id == "7"
    files.documents(tmp_path, "VLM2Vec/ViDoSeek-page-fixed", judgements=[(8, 1, 1)])
    assert load(tmp_path, "ViDoSeek-page").queries[0].id == "8"


def bad_image_task(root: Path, **cells) -> None:
    files.text_task(root, "OK-VQA")
    row = files.image_row(root, "OK-VQA", 9, tgt_text=["camel", "pizza"], tgt_img_path=["", ""])
    path = files.image_rows(root, "OK-VQA")
    files.write_table(path, [{**dict.fromkeys(cells), **row}, {**row, **cells}])


@pytest.mark.parametrize(
    ("cells", "pattern"),
    [
        ({"qry_img_path": "../../secret.png"}, "outside the data root"),
        ({"qry_img_path": "/etc/passwd"}, "is absolute"),
        ({"qry_img_path": "OK-VQA/none.png"}, "does not exist"),
        ({"qry_img_path": "https://x.org/a.png"}, "never fetched"),
        ({"qry_img_path": ""}, "qry_img_path is empty"),
        ({"tgt_text": []}, "expected a list of texts"),
        ({"tgt_text": None}, "tgt_text is null"),
        ({"qry_video_path": "v/1.mp4"}, "1 images and 1 frames"),
    ],
)
def test_a_bad_row_of_an_image_task_is_named_with_file_and_row(cells, pattern, tmp_path) -> None:
    bad_image_task(tmp_path, **cells)
    with pytest.raises(RecordError, match=pattern) as raised:
        load(tmp_path, "OK-VQA")
    assert (raised.value.file, raised.value.row) == (files.image_rows(tmp_path, "OK-VQA"), 2)


def test_candidates_without_the_positive_are_an_error_with_file_and_row(tmp_path: Path) -> None:
    files.smthsmth(tmp_path)
    path = tmp_path / "VLM2Vec/SmthSmthV2/data/test-00000-of-00001.parquet"
    rows = [{"video_id": 0, "pos_text": "row", "neg_text": ["camel", "pizza"]}]
    files.write_table(path, rows)
    with pytest.raises(RecordError, match=r"'row'.*not among its 2 candidates") as raised:
        load(tmp_path, "SmthSmthV2")
    assert (raised.value.file, raised.value.row) == (path, 1)


def test_a_query_without_qrels_and_a_page_that_is_not_there_are_errors(tmp_path: Path) -> None:
    folder = files.documents(tmp_path, "vidore/docvqa_test_subsampled_beir")
    qrels = folder / "qrels/test-00000-of-00001.parquet"
    files.write_table(qrels, [{"query-id": 10, "corpus-id": 1, "score": 1}])
    with pytest.raises(RecordError, match=r"query '11' has no judgement") as raised:
        load(tmp_path, "ViDoRe_docvqa")
    assert raised.value.row == 2
    files.write_table(qrels, [{"query-id": 10, "corpus-id": 77, "score": 1}])
    with pytest.raises(RecordError, match=r"'77'.*not among the 5 pages") as raised:
        load(tmp_path, "ViDoRe_docvqa")
    assert (raised.value.file, raised.value.row) == (qrels, 1)


@pytest.mark.parametrize("part", ["corpus", "queries", "qrels"])
def test_a_truncated_parquet_file_is_named(part: str, tmp_path: Path) -> None:
    folder = files.documents(tmp_path, "vidore/docvqa_test_subsampled_beir")
    path = folder / part / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RecordError, match="no readable Parquet") as raised:
        load(tmp_path, "ViDoRe_docvqa")
    assert raised.value.file == path


def test_frames_that_a_cut_archive_did_not_bring_are_named(tmp_path: Path) -> None:
    files.msvd(tmp_path)
    folder = tmp_path / "video-tasks/frames/video_ret/MSVD/m3"
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(RecordError, match=r"row 4.*'m3'.*may have been cut short"):
        load(tmp_path, "MSVD")


def test_a_video_with_a_picture_is_refused(tmp_path: Path) -> None:
    files.activitynetqa(tmp_path)
    path = tmp_path / "VLM2Vec/ActivityNetQA/data/test-00000-of-00001.parquet"
    row = {"video_name": "k", "question": "q", "answer": "no", "image": "a.png"}
    files.write_table(path, [row])
    with pytest.raises(RecordError, match="1 images and 2 frames"):
        load(tmp_path, "ActivityNetQA")


def test_missing_folders_show_before_anything_is_embedded(tmp_path: Path) -> None:
    folder = BenchmarkFolder(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="is empty"):
        check_data([TASKS["MSVD"]], folder, skip_missing=True)
    files.text_task(tmp_path, "OK-VQA")
    files.msvd(tmp_path)
    tasks = [TASKS[name] for name in ("OK-VQA", "MSVD", "ImageNet-1K")]
    assert list(check_data(tasks, folder, skip_missing=True)) == ["ImageNet-1K"]
    (tmp_path / "video-tasks/frames").rename(tmp_path / "video-tasks/moved")
    (tmp_path / "video-tasks/frames").mkdir()
    (tmp_path / "video-tasks/frames/video_ret.tar.gz").write_bytes(b"")
    problems = check_data(tasks, folder, skip_missing=True)
    assert "frames/video_ret/MSVD is missing or empty" in problems["MSVD"]
    assert "unpack" in problems["MSVD"]
    assert "video_ret.tar.gz" in problems["MSVD"]
    with pytest.raises(FileNotFoundError, match="2 of 3 tasks have no data"):
        check_data(tasks, folder)
    assert len(check_data(tasks, folder, skip_missing=True)) == 2
