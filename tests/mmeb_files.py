"""Small data sets in MMEB-V2's official layouts: one call a family, a handful of rows each."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WORDS = "camel pizza zebra tree above below left right top bottom center row".split()  # noqa: SIM905
MARK = "<|image_1|>"


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def pixels(seed: int) -> Image.Image:
    """Return a small picture of random pixels."""
    array = np.random.default_rng(seed).integers(256, size=(16, 16, 3), dtype=np.uint8)
    return Image.fromarray(array)


def png(seed: int) -> bytes:
    """Return the bytes of a small picture."""
    buffer = io.BytesIO()
    pixels(seed).save(buffer, "PNG")
    return buffer.getvalue()


def save(path: Path, seed: int) -> str:
    """Write a picture and return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels(seed).save(path)
    return path.name


def write_frames(folder: Path, count: int = 2, *, seed: int = 0) -> None:
    """Write frames named as ffmpeg numbers them."""
    for index in range(count):
        save(folder / f"frame_{index + 1:04d}.jpg", 1000 * seed + index)


def image_rows(root: Path, name: str) -> Path:
    """Return the file of an image task's rows."""
    return root / "ziyjiang" / "MMEB_Test_Instruct" / name / "test-00000-of-00001.parquet"


def image_row(root: Path, name: str, number: int, **cells: Any) -> dict[str, Any]:
    """Return a row whose query picture is on disk."""
    save(root / "image-tasks" / name / f"q{number}.png", 100 + number)
    return {
        "qry_inst": f"{MARK}\nfind the object",
        "qry_text": "",
        "qry_img_path": f"{name}/q{number}.png",
        "tgt_inst": "",
        "tgt_text": [],
        "tgt_img_path": [],
        **cells,
    }


def text_task(root: Path, name: str, count: int = 4) -> None:
    """Write a task that ranks texts: classes, answers, captions; the first is right."""
    rows = []
    for i in range(count):
        texts = [WORDS[(i + j) % 5] + " " + WORDS[5 + i % 3] for j in range(4)]
        blank = ["" for _ in texts]
        rows.append(image_row(root, name, i, tgt_text=texts, tgt_img_path=blank, qry_text="it is"))
    write_table(image_rows(root, name), rows)


def picture_task(root: Path, name: str, count: int = 4, *, captions: bool = False) -> None:
    """Write a task that ranks pictures, perhaps with texts."""
    rows = []
    for i in range(count):
        paths = [f"{name}/t{(i + j) % 6}.png" for j in range(3)]
        for path in paths:
            save(root / "image-tasks" / path, int(path[-5]))
        texts = [f'"{WORDS[i + j]}"' if captions else "" for j in range(3)]
        cells = {"tgt_inst": f"{MARK} find the picture", "tgt_text": texts, "tgt_img_path": paths}
        rows.append(image_row(root, name, i, qry_text=WORDS[i], **cells))
    write_table(image_rows(root, name), rows)


def breakfast(root: Path, count: int = 10) -> None:
    """Write Breakfast: every label once."""
    rows = []
    for i in range(count):
        write_frames(root / "video-tasks/frames/video_cls/Breakfast" / f"v{i}", seed=i)
        rows.append({"video_id": f"v{i}", "pos_text": f"{WORDS[i]} {WORDS[(i + 1) % 7]}"})
    write_table(root / "VLM2Vec/Breakfast/data/test-00000-of-00001.parquet", rows)


def smthsmth(root: Path) -> None:
    """Write SmthSmthV2: numeric ids, each with its own labels."""
    rows = []
    for i in range(3):
        write_frames(root / "video-tasks/frames/video_cls/SSv2" / str(i), seed=i)
        rows.append({"video_id": i, "pos_text": WORDS[i], "neg_text": WORDS[:6]})
    write_table(root / "VLM2Vec/SmthSmthV2/data/test-00000-of-00001.parquet", rows)


def mvbench(root: Path, subsets: Sequence[str]) -> None:
    """Write MVBench: one subset a kind of question, no split but train."""
    for number, subset in enumerate(subsets):
        frames = root / "video-tasks/frames/video_qa/MVBench" / subset / "a.mp4"
        write_frames(frames, seed=number)
        row = {"video": "a.mp4", "question": "which object", "candidates": ["camel", "pizza"]}
        write_table(
            root / "VLM2Vec/MVBench" / subset / "train-00000-of-00001.parquet",
            [{**row, "answer": "pizza"}],
        )


def nextqa(root: Path) -> None:
    """Write NExTQA: the answer is a number."""
    frames = root / "video-tasks/frames/video_qa/NExTQA"
    rows = []
    for i in range(3):
        write_frames(frames / f"40{i}", seed=i)
        options = {f"a{j}": WORDS[(i + j) % 12] for j in range(5)}
        rows.append({"video": 400 + i, "question": "which object", "answer": i, **options})
        rows[-1] |= {"qid": i, "type": "CW"}
    write_table(root / "VLM2Vec/NExTQA/MC/test-00000-of-00001.parquet", rows)


def videomme(root: Path) -> None:
    """Write Video-MME: the answer is a letter."""
    write_frames(root / "video-tasks/frames/video_qa/Video-MME" / "xyz", seed=3)
    options = ["A. camel.", "B. pizza.", "C. zebra.", "D. tree."]
    row = {"videoID": "xyz", "question": "which object", "options": options, "answer": "C"}
    row |= {"question_id": "1", "domain": "d", "sub_category": "s"}
    write_table(root / "video-tasks/Video-MME/videomme/test-00000-of-00001.parquet", [row])


def egoschema(root: Path) -> None:
    """Write EgoSchema: the answer is a number in a string."""
    write_frames(root / "video-tasks/frames/video_qa/EgoSchema" / "u1", seed=4)
    options = ["A. camel", "B. pizza", "C. zebra", "D. tree", "E. row"]
    row = {"video_idx": "u1", "question": "which?", "answer": "3", "option": options}
    write_table(
        root / "VLM2Vec/EgoSchema/Subset/test-00000-of-00001.parquet", [{**row, "question_idx": 1}]
    )


def activitynetqa(root: Path) -> None:
    """Write ActivityNetQA."""
    write_frames(root / "video-tasks/frames/video_qa/ActivityNetQA" / "v_k", seed=5)
    row = {"video_name": "k", "question": "is it a camel", "answer": "no", "question_id": "k_1"}
    write_table(root / "VLM2Vec/ActivityNetQA/data/test-00000-of-00001.parquet", [row])


def video_retrieval(root: Path, task: str, rows: Sequence[dict[str, Any]], names: Sequence[str]):
    """Write a task of captions and videos."""
    for number, name in enumerate(names):
        write_frames(root / "video-tasks/frames/video_ret" / task / name, seed=20 + number)
    place = {"MSR-VTT": "MSR-VTT/test_1k", "YouCook2": "../lmms-lab/YouCook2/data"}.get(
        task, f"{task}/data"
    )
    split = "val" if task == "YouCook2" else "test"
    write_table((root / "VLM2Vec" / place).resolve() / f"{split}-00000-of-00001.parquet", rows)


def msvd(root: Path, count: int = 5) -> None:
    """Write MSVD: several captions a video, the first one counts."""
    rows = [
        {"video_id": f"m{i}", "video": f"m{i}.avi", "caption": [f"{WORDS[i]} row", "tree"]}
        for i in range(count)
    ]
    video_retrieval(root, "MSVD", rows, [f"m{i}" for i in range(count)])


def moments(root: Path, task: str = "QVHighlight") -> None:
    """Write moment retrieval: a folder a video with query, positive and negative clips."""
    folder = root / "video-tasks/frames/video_mret" / task.replace("-", "_")
    rows = []
    for i in range(3):
        for j, clip in enumerate(["query", "positive", "negative_0", "negative_1"]):
            write_frames(folder / f"v{i}" / clip, 2, seed=40 + 10 * i + j)
        rows.append({"query": f"find {WORDS[i]}", "video_path": f"videos/v{i}.mp4"})
    write_table(root / "VLM2Vec" / task / "data/test-00000-of-00001.parquet", rows)


def momentseeker(root: Path) -> None:
    """Write MomentSeeker: a text alone, with a picture, and with a video; two right clips once."""
    folder = root / "video-tasks/frames/video_mret/MomentSeeker"
    for number, name in enumerate(["a_1", "a_2", "a_3", "b_q"]):
        write_frames(folder / "video_frames" / name, 2, seed=80 + number)
    save(folder / "query_x.jpg", 90)
    clips = [{"output_path": f"a/{i}.mp4"} for i in (1, 2, 3)]
    rows = [
        {"query": "camel", "input_frames": source, "positive_frames": p, "negative_frames": n}
        for source, p, n in (
            ("", clips[:1], clips[1:]),
            ("x.jpg", clips[:2], clips[2:]),
            ("b/q.mp4", clips[2:], clips[:2]),
        )
    ]
    write_table(root / "VLM2Vec/MomentSeeker/data/test-00000-of-00001.parquet", rows)


def documents(
    root: Path,
    repository: str,
    *,
    split: str = "test",
    pages: Sequence[Any] = (1, 2, 3, 4, 5),
    judgements: Sequence[tuple[Any, Any, int]] = ((10, 2, 1), (11, 4, 1), (11, 1, 2), (10, 3, 0)),
) -> Path:
    """Write queries, corpus with the bytes of pages, and qrels; return their folder."""
    folder, name = root / repository, f"{split}-00000-of-00001.parquet"
    corpus = [
        {"corpus-id": page, "image": {"bytes": png(60 + i), "path": None}}
        for i, page in enumerate(pages)
    ]
    write_table(folder / "corpus" / name, corpus)
    queries = list(dict.fromkeys(query for query, _, _ in judgements))
    rows = [
        {"query-id": query, "query": f"{WORDS[i]} page", "language": "english"}
        for i, query in enumerate(queries)
    ]
    write_table(folder / "queries" / name, rows)
    keys = ("query-id", "corpus-id", "score")
    qrels: list[dict[str, Any]] = [
        dict(zip(keys, judgement, strict=True)) for judgement in judgements
    ]
    write_table(folder / "qrels" / name, qrels)
    (root / "visdoc-tasks").mkdir(exist_ok=True)
    return folder


def one_of_each_family(root: Path) -> list[str]:
    """Write at least one task of every group of MMEB-V2; return their names."""
    text_task(root, "ImageNet-1K")
    text_task(root, "OK-VQA")
    picture_task(root, "MSCOCO_t2i")
    picture_task(root, "CIRR")
    picture_task(root, "RefCOCO-Matching", captions=True)
    breakfast(root)
    nextqa(root)
    msvd(root)
    moments(root)
    momentseeker(root)
    documents(root, "vidore/docvqa_test_subsampled_beir")
    documents(root, "vidore/esg_reports_v2")
    visrag = [("q a", "p/1.png", 1), ("q b", "p/3.png", 1)]
    pages = [f"p/{i}.png" for i in range(4)]
    documents(
        root, "openbmb/VisRAG-Ret-Test-ChartQA", split="train", pages=pages, judgements=visrag
    )
    documents(root, "VLM2Vec/ViDoSeek-page-fixed")
    documents(root, "VLM2Vec/MMLongBench-doc")
    return [
        *("ImageNet-1K", "OK-VQA", "MSCOCO_t2i", "CIRR", "RefCOCO-Matching"),
        *("Breakfast", "NExTQA", "MSVD", "QVHighlight", "MomentSeeker"),
        *("ViDoRe_docvqa", "ViDoRe_esg_reports_v2_multilingual", "VisRAG_ChartQA"),
        *("ViDoSeek-page", "MMLongBench-doc"),
    ]
