"""Specification of extras/import_data.py: six published data sets in their own formats at small
scale, the filter by difficulty, and the score of HR-Bench.

A row that cannot be used is skipped and counted with its reason, and nothing in a file is trusted:
no path leaves the folder, no text is run, no image may be huge.
"""

import base64
import csv
import hashlib
import io
import itertools
import json
import re
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import build_data
import sft
import tools
from extras import crash, import_data
from support.launch import Forked, refused, run_script

# ---- Small data sets ----------------------------------------------------------------------------


def picture(number=0, size=(60, 40), kind="PNG"):
    """Return the bytes of an image file. Each number is another image."""
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, 3 * number % 256, 200)).save(file, kind)
    return file.getvalue()


def bomb(side):
    """Return a PNG that claims side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
              for part in (header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def too_many(num_pixels):
    return (f"image has too many pixels ({num_pixels}, the limit is 89,478,485); make it smaller, "
            "or raise MAX_PIXELS in tools.py")


def stored(data, suffix="png"):
    return f"images/{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"


def base64_of(data):
    return base64.b64encode(data).decode()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def write_tsv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)


def write_parquet(path, rows, **more):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **more)


def imported(capsys, name, source, out, seed=0):
    """Import a data set. Return ({split: rows}, {split: (read, written)}, {"3 skipped: why (first:
    file:row)", ...})."""
    capsys.readouterr()
    import_data.import_data(name, source, out, seed)
    lines = capsys.readouterr().out.splitlines()
    counts = {}
    for line in lines:
        match = re.fullmatch(r".*/(\w+)\.jsonl: (\d+) rows read, (\d+) written", line)
        if match:
            counts[match[1]] = (int(match[2]), int(match[3]))
    rows = {path.stem: tools.read_questions(path) for path in out.glob("*.jsonl")}
    num_written = {split: written for split, (_, written) in counts.items()}
    assert {split: len(split_rows) for split, split_rows in rows.items()} == num_written
    for row in itertools.chain(*rows.values()):
        tools.open_image(out / row["image"])
    return rows, counts, {line.strip() for line in lines if line.startswith("    ")}


# ---- VisualProbe, and what is refused in any data set -------------------------------------------


def probe(name, number, folder="VisualProbe_Hard", image=None, **more):
    """Return a row of VisualProbe."""
    return {"doc_id": f"{name}_{number}", "problem": f"<image>\nWhat is {number}?",
            "solution": "White.", "images": [image or f"{folder}/data/{number}.jpg"],
            "data_source": name, **more}


def visualprobe(source, count=3):
    for folder, name in (("VisualProbe_train", "train"), ("VisualProbe_Easy", "val"),
                         ("VisualProbe_Hard", "val"), ("DeepEyes_train_4K", "train")):
        for i in range(count):
            write(source / folder / "data" / f"{i}.jpg", picture(i, kind="JPEG"))
        rows = [probe(folder.lower(), i, folder) for i in range(count)]
        write(source / folder / f"{name}.json", json.dumps(rows))


def test_visualprobe(tmp_path, capsys):
    """Every folder becomes a file named after it; images are kept to the byte, the same image of
    several sets once."""
    visualprobe(tmp_path / "in")
    rows, counts, notes = imported(capsys, "visualprobe", tmp_path / "in", tmp_path / "out")
    assert counts == dict.fromkeys(["train", "easy", "hard", "deepeyes_train_4k"], (3, 3))
    assert notes == set()
    image = picture(2, kind="JPEG")
    assert rows["hard"][2] == {
        "id": "visualprobe_hard_2", "image": stored(image, "jpg"), "question": "What is 2?",
        "answer": "White.", "source": "visualprobe_hard", "level": "hard"}
    assert "level" not in rows["deepeyes_train_4k"][0] and "level" not in rows["train"][0]
    assert (tmp_path / "out" / stored(image, "jpg")).read_bytes() == image
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3
    source = tmp_path / "in" / "VisualProbe_Hard"
    alone, _, _ = imported(capsys, "visualprobe", source, tmp_path / "alone")
    assert alone == {"hard": rows["hard"]}  # one data set's own folder as the source


def test_rows_that_cannot_be_used_are_counted_and_the_others_kept(tmp_path, capsys):
    source, secret = tmp_path / "in", write(tmp_path / "secret.png", picture(7))
    folder = source / "VisualProbe_Hard"
    good, jpeg = write(folder / "data" / "good.png", picture(1)), picture(5, (300, 300), "JPEG")
    for name, data in (("cut.jpg", jpeg[:len(jpeg) // 2]), ("text.jpg", b"no image"),
                       ("bomb.png", bomb(60_000)), ("large.png", bomb(12_000)),
                       ("page.ppm", picture(3, kind="PPM"))):
        write(folder / "data" / name, data)
    (folder / "data" / "link.png").symlink_to(secret)
    (folder / "data" / "near.png").symlink_to(good)
    here = "VisualProbe_Hard/data"
    paths = [f"{here}/good.png", "../secret.png", "VisualProbe_Hard/../../secret.png", str(secret),
             f"{here}/link.png", f"{here}/near.png", f"{here}/cut.jpg", f"{here}/text.jpg",
             f"{here}/page.ppm", f"{here}/bomb.png", f"{here}/large.png", f"{here}/none.png", here,
             "a\0b", "n" * 5000]
    rows = [probe("p", i, image=path) for i, path in enumerate(paths)]
    rows += [[], probe("p", 20, images=["a", "b"]), probe("p", 21, images=[3]),
             probe("p", 22, images=None),
             {**rows[0], "doc_id": "p_23", "problem": "<image>\n \ud800"},
             {**rows[0], "doc_id": "p_24", "solution": 0.5},
             {k: v for k, v in rows[0].items() if k != "problem"},
             {**rows[0], "doc_id": "p_26", "problem": "<image>\n"},
             rows[0], probe("p", 28, image="VisualProbe_Hard/data/../data/good.png")]
    write(folder / "val.json", json.dumps(rows))
    found, counts, notes = imported(capsys, "visualprobe", source, tmp_path / "out")
    assert [row["id"] for row in found["hard"]] == ["p_0", "p_5"] and counts == {"hard": (25, 2)}
    images = [p.name for p in (tmp_path / "out" / "images").iterdir()]
    assert images == [Path(stored(good.read_bytes())).name]
    assert notes == {
        "5 skipped: image path leaves the folder of the data; copy the image into it (first: "
        "val.json:2)",
        "1 skipped: image cannot be decoded (first: val.json:7)",
        "2 skipped: image cannot be decoded; convert it to one of JPEG, PNG, WEBP, BMP, GIF, TIFF, "
        "AVIF, JPEG2000 (first: val.json:8)",
        f"1 skipped: {too_many('3,600,000,000')} (first: val.json:10)",
        f"1 skipped: {too_many('144,000,000')} (first: val.json:11)",
        "5 skipped: image is missing (first: val.json:12)",
        "1 skipped: not a readable row (first: val.json:16)",
        "2 skipped: not exactly one image (first: val.json:17)",
        "1 skipped: text is not UTF-8 (first: val.json:20)",
        "1 skipped: field 'solution' is missing or not text (first: val.json:21)",
        "1 skipped: field 'problem' is missing or not text (first: val.json:22)",
        "1 skipped: field 'question' must be a non-empty string (first: val.json:23)",
        "1 skipped: id is in an earlier row, too (first: val.json:24)"}
    assert sum(int(note.split()[0]) for note in notes) == 23


def test_imports_have_the_rules_of_ones_own_rows():
    """AVIF is read; numbers of 32 bits, which would be shown black, are not."""
    file = io.BytesIO()
    Image.new("F", (3, 3), 0.5).save(file, "TIFF")
    with pytest.raises(tools.InputError, match="numbers of 32 bits.*; save it with 8 or 16"):
        import_data.decode_image(file.getvalue())
    if not features.check("avif"):
        pytest.skip("this build of Pillow cannot read AVIF")
    data = picture(kind="AVIF")
    assert import_data.decode_image(data)[:2] == (data, "avif")


# ---- V* -----------------------------------------------------------------------------------------


def vstar_row(number, label="B", text=None):
    options = "(A) rubber\n(B) cotton wool\n(C) a (red) one\n(D) 4"
    return {"image": f"direct_attributes/sa_{number}.jpg", "category": "direct_attributes",
            "label": label, "text": text or f"What is it?\n{options}\nAnswer with the letter."}


def vstar(source, rows):
    for i in range(len(rows)):
        write(source / "direct_attributes" / f"sa_{i}.jpg", picture(i))
    write(source / "test_questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def test_vstar_keeps_the_options_in_their_order(tmp_path, capsys):
    """Options are listed once. The sentence after them is dropped, since the prompts say how to
    answer. A wrong label is counted."""
    rows = [vstar_row(0), vstar_row(1, "C"), vstar_row(2, "E"), vstar_row(3, "AB"),
            vstar_row(4, text="What is it?"),
            vstar_row(5, text="What?\n(A) x\n(C) y")]
    vstar(tmp_path / "in", rows)
    with open(tmp_path / "in" / "test_questions.jsonl", "ab") as file:
        again = json.dumps(vstar_row(0, "A")).replace("direct_attributes\"", "\\ud800\"")
        file.write(b'{"broken\n\xff\xfe\n' + again.encode())
    found, counts, notes = imported(capsys, "vstar", tmp_path / "in", tmp_path / "out")
    assert counts == {"test": (9, 2)} and notes == {
        "2 skipped: the label is not the letter of an option (first: test_questions.jsonl:3)",
        "2 skipped: options are not a list of (A), (B), ... in this order "
        "(first: test_questions.jsonl:5)",
        "2 skipped: not a readable row (first: test_questions.jsonl:7)",
        "1 skipped: id is in an earlier row, too (first: test_questions.jsonl:9)"}
    assert found["test"][0] == {
        "id": "direct_attributes/sa_0", "image": stored(picture(0)), "source": "vstar",
        "category": "direct_attributes",
        "question": "What is it?\n(A) rubber\n(B) cotton wool\n(C) a (red) one\n(D) 4",
        "options": ["rubber", "cotton wool", "a (red) one", "4"], "answer": "cotton wool"}
    assert found["test"][1]["answer"] == "a (red) one"
    options = found["test"][1]["options"]
    for prediction, right in (("C", True), ("(C)", True), ("(C) a (red) one", True),
                              ("A (red) one.", True), ("B", False)):
        assert tools.match_answer(prediction, "a (red) one", options) == right


def in_question(row):
    """Return the options as the question lists them: {letter: text}."""
    return dict(re.findall(r"^\(([A-Z])\) (.*)$", row["question"], re.MULTILINE))


@pytest.mark.parametrize("listed", [True, False])
def test_vstar_is_shuffled_where_the_right_option_always_comes_first(tmp_path, capsys, listed):
    """The seed and the id decide the order, not the other rows; the answer stays the right text, at
    every letter equally."""
    count, source = 60, tmp_path / "in"
    if listed:
        vstar(source, [vstar_row(i, "A") for i in range(count)])
        with (source / "test_questions.jsonl").open("a") as file:   # neither says that A is wrong
            file.write("\n\nnot json\n")
    else:
        for i in range(count):
            options = ["rubber", "cotton wool", "a (red) one", "4"]
            about = {"target_object": ["glove"], "bbox": [[1, 2, 3, 4]], "question": "What is it?",
                     "options": options}
            write(source / "direct_attributes" / f"sa_{i}.jpg", picture(i))
            write(source / "direct_attributes" / f"sa_{i}.json", json.dumps(about))
    rows = {seed: imported(capsys, "vstar", source, tmp_path / f"out{seed}", seed)[0]["test"]
            for seed in (0, 1)}
    for row in rows[0]:
        assert list(in_question(row).values()) == row["options"] and row["answer"] == "rubber"
        assert sorted(row["options"]) == ["4", "a (red) one", "cotton wool", "rubber"]
    assert all(5 < [row["options"][i] for row in rows[0]].count("rubber") < 25 for i in range(4))
    assert [row["options"] for row in rows[0]] != [row["options"] for row in rows[1]]
    assert imported(capsys, "vstar", source, tmp_path / "again", 0)[0]["test"] == rows[0]
    for path in source.rglob("*"):  # fewer rows, the same orders
        if path.stem in ("sa_0", "sa_17"):
            path.unlink()
    fewer = imported(capsys, "vstar", source, tmp_path / "fewer", 0)[0]["test"]
    assert fewer == [row for row in rows[0] if row["id"].split("/")[1] not in ("sa_0", "sa_17")]


def test_vstar_json_without_an_image_is_counted(tmp_path, capsys):
    about = json.dumps({"question": "What is it?", "options": ["rubber", "wool"]})
    write(tmp_path / "direct_attributes" / "sa_0.jpg", picture(0))
    write(tmp_path / "direct_attributes" / "sa_0.json", about)
    write(tmp_path / "package.json", about)
    rows, _, notes = imported(capsys, "vstar", tmp_path, tmp_path / "out")
    assert [row["id"] for row in rows["test"]] == ["direct_attributes/sa_0"]
    assert notes == {"1 skipped: image is missing (first: package.json:1)"}


# ---- HR-Bench -----------------------------------------------------------------------------------


def hrbench_row(number, **more):
    return {"index": number, "question": "What is\nthere?", "answer": "C", "category": "single",
            "A": "5%", "B": "5", "C": "$5", "D": "six", "cycle_category": f"cycle {number % 4}",
            "image": base64_of(picture(number // 4)), **more}


def test_hrbench(tmp_path, capsys):
    """Two tables, quoted cells over several lines, images in base64, shared by four cycles; options
    that read alike."""
    source = tmp_path / "in"
    source.mkdir()
    write_tsv(source / "hr_bench_4k.tsv", [hrbench_row(i) for i in range(4)] + [
        hrbench_row(4, image="%%%"), hrbench_row(5, image=""), hrbench_row(6, answer="E"),
        hrbench_row(7, B=" "),
        hrbench_row(8, image=base64_of(picture(9, (200, 200), "JPEG")[:-900])),
        hrbench_row(9, answer="D")])
    unasked = {k: v for k, v in hrbench_row(0).items() if k != "question"}
    write_tsv(source / "hr_bench_8k.tsv", [unasked])
    message = r"8k\.jsonl is not written, since no row can be used"
    with pytest.raises(tools.InputError, match=message):
        imported(capsys, "hrbench", source, tmp_path / "out")
    note = "1 skipped: field 'question' is missing or not text (first: hr_bench_8k.tsv:1)"
    assert note in capsys.readouterr().out
    assert not (tmp_path / "out" / "8k.jsonl").exists()
    write_tsv(source / "hr_bench_8k.tsv", [hrbench_row(0)])
    rows, counts, notes = imported(capsys, "hrbench", source, tmp_path / "out")
    assert counts == {"4k": (10, 5), "8k": (1, 1)} and notes == {
        "1 skipped: image is missing (first: hr_bench_4k.tsv:6)",
        "1 skipped: the label is not the letter of an option (first: hr_bench_4k.tsv:7)",
        "1 skipped: field 'B' is missing or not text (first: hr_bench_4k.tsv:8)",
        "2 skipped: image cannot be decoded (first: hr_bench_4k.tsv:5)"}
    assert rows["4k"][3] == {
        "id": "hrbench_4k_3", "image": stored(picture(0)), "source": "hrbench_4k",
        "question": "What is\nthere?\n(A) 5%\n(B) 5\n(C) $5\n(D) six", "answer": "(C)",
        "options": ["5%", "5", "$5", "six"], "category": "single", "cycle": "cycle 3"}
    right = [tools.match_answer(letter, "(C)", rows["4k"][0]["options"]) for letter in "ABCD"]
    assert right == [False, False, True, False]
    right = [tools.match_answer(words, "(C)", rows["4k"][0]["options"]) for words in ("5", "$5")]
    assert right == [False, True]
    assert rows["4k"][4]["answer"] == "six" and rows["8k"][0]["source"] == "hrbench_8k"
    assert len({row["image"] for row in rows["4k"][:4]}) == 1


@pytest.mark.parametrize("question, text", [
    ('"STOP" sign?', '"STOP" sign?'), ('"STOP sign', '"STOP sign'), ('What is "it"?',) * 2,
    ('"', '"'), ('"all ""of"" it"', 'all "of" it'), ('"two\nlines"', "two\nlines"),
    ('"a\ttab"', "a\ttab")])
@pytest.mark.parametrize("is_last", [False, True])
def test_a_quote_that_is_not_doubled_belongs_to_the_text(tmp_path, capsys, question, text, is_last):
    """Of a table whose other cells are in quotes. It loses no row, wherever the cell is."""
    rows = [hrbench_row(i) for i in range(4)]
    if is_last:
        rows = [{**row, "question": row.pop("question")} for row in rows]
    write_tsv(tmp_path / "hr_bench_4k.tsv", [{**row, "question": "(q)"} for row in rows])
    table = (tmp_path / "hr_bench_4k.tsv").read_bytes().decode()
    before, after = table.split("(q)", 1)
    whole = '"in ""quotes"", on\ntwo lines"'
    (tmp_path / "hr_bench_4k.tsv").write_text(before + question + after.replace("(q)", whole))
    found, counts, notes = imported(capsys, "hrbench", tmp_path, tmp_path / "out")
    assert counts == {"4k": (4, 4)} and notes == set()
    texts = [row["question"].rpartition("\n(A)")[0] for row in found["4k"]]
    assert texts == [text, *3 * ['in "quotes", on\ntwo lines']]


def test_a_row_with_more_cells_than_columns_is_counted(tmp_path, capsys):
    write_tsv(tmp_path / "hr_bench_4k.tsv", [hrbench_row(0, question="a"), hrbench_row(1)])
    table = (tmp_path / "hr_bench_4k.tsv").read_text()
    (tmp_path / "hr_bench_4k.tsv").write_text(table.replace("\ta\t", "\ta\tb\t"))
    found, _, notes = imported(capsys, "hrbench", tmp_path, tmp_path / "out")
    assert [row["id"] for row in found["4k"]] == ["hrbench_4k_1"]
    assert notes == {"1 skipped: not a readable row (first: hr_bench_4k.tsv:1)"}


def test_a_table_that_was_saved_again_has_floats(monkeypatch, tmp_path, capsys):
    """A column of numbers, and NaN where a cell was empty."""
    rows = [{**hrbench_row(i), "index": float(i), "A": 1.5, "B": 2.0, "C": 7, "D": 0}
            for i in range(3)]
    rows[2]["C"] = float("nan")
    monkeypatch.setattr(import_data, "read_rows", lambda path, columns: iter(rows))
    write(tmp_path / "hr_bench_4k.parquet", b"")
    found, _, notes = imported(capsys, "hrbench", tmp_path, tmp_path / "out")
    assert [row["id"] for row in found["4k"]] == ["hrbench_4k_0", "hrbench_4k_1"]
    assert found["4k"][0]["options"] == ["1.5", "2", "7", "0"]
    assert notes == {
        "1 skipped: field 'C' is missing or not text (first: hr_bench_4k.parquet:3)"}


@pytest.mark.parametrize("sidecar", ["._hr_bench_4k.tsv", "__MACOSX/hr_bench_4k.tsv",
                                     ".cache/huggingface/hr_bench_4k.tsv", "._hr_bench_4k.parquet"])
def test_hidden_files_are_no_data(tmp_path, capsys, sidecar):
    """macOS and hf download write them."""
    write(tmp_path / "in" / sidecar, b"\0\5\x16\7\0\2 Mac OS X")
    write_tsv(tmp_path / "in/hr_bench_4k.tsv", [hrbench_row(0)])
    _, counts, notes = imported(capsys, "hrbench", tmp_path / "in", tmp_path / "out")
    assert counts == {"4k": (1, 1)} and notes == set()


def test_hrbench_as_parquet_gives_the_same_rows(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_tsv(tmp_path / "a" / "hr_bench_8k.tsv", [hrbench_row(i) for i in range(4)])
    write_parquet(tmp_path / "b" / "hr_bench_8k.parquet", [hrbench_row(i) for i in range(4)])
    first, second = (imported(capsys, "hrbench", tmp_path / name, tmp_path / f"out_{name}")[0]
                     for name in ("a", "b"))
    assert first == second != {}


# ---- MME-RealWorld ------------------------------------------------------------------------------


def mme_row(number, options=None, **more):
    listed = ["(A) It's \"here\"", "(B) There, (C)", "(C) 3.5", "(D) é\n", "(E) Not there."]
    return {"index": f"perception/remote sensing/{number}", "image": base64_of(picture(number)),
            "question": "Where's it?", "multi-choice options": str(options or listed),
            "answer": "D", "category": "Perception", "l2-category": "position", **more}


def test_mme_realworld(tmp_path, capsys):
    """Its options are a list that was printed. Nothing in it is ever run."""
    source, trap = tmp_path / "in", tmp_path / "trap"
    source.mkdir()
    for name in ("MME-RealWorld.tsv", "MME-RealWorld-Lite.tsv"):
        write_tsv(source / name, [
            mme_row(0), mme_row(1, f"[open({str(trap)!r}, 'w')]"), mme_row(2, "[" * 5000),
            mme_row(3, answer="A"), mme_row(4, ["(A) one", "(C) two"])])
    with open(source / "MME-RealWorld.tsv", "ab") as file:
        file.write(mme_row(0)["index"].encode() + b"5\t" + base64_of(picture(1)).encode()
                   + b"\tcaf\xe9?\t\"['(A) x', '(B) y']\"\tA\tc\tl\r\n")
        file.write(mme_row(0)["index"].encode() + b"6\t" + base64_of(picture(1)).encode()
                   + b"\twhere?\t\"['(A) caf\xe9', '(B) y']\"\tA\tc\tl\r\n")
    rows, counts, notes = imported(capsys, "mme_realworld", source, tmp_path / "out")
    assert counts == {"test": (7, 2), "lite": (5, 2)} and not trap.exists()
    order = "options are not a list of (A), (B), ... in this order"
    assert f"3 skipped: {order} (first: MME-RealWorld.tsv:2)" in notes
    assert "2 skipped: text is not UTF-8 (first: MME-RealWorld.tsv:6)" in notes
    assert rows["lite"][0] == {
        "id": "perception/remote sensing/0", "image": stored(picture(0)), "category": "Perception",
        "question": "Where's it?\n(A) It's \"here\"\n(B) There, (C)\n(C) 3.5\n(D) é\n"
                    "(E) Not there.",
        "answer": "é", "options": ["It's \"here\"", "There, (C)", "3.5", "é", "Not there."],
        "source": "mme_realworld_lite"}


@pytest.mark.parametrize("folder, split", [
    ("MME-RealWorld-lite-lmms-eval/data", "lite"), ("MME-RealWorld-Lmms-eval/data", "test"),
    ("MME-RealWorld-CN-Lmms-eval/data", "cn"), ("mme_realworld_lite_parts", "lite"),
    ("datasets--owner--MME-RealWorld-CN-Lmms-eval/snapshots/0a1b/data", "cn")])
def test_mme_realworld_in_parts(monkeypatch, tmp_path, capsys, folder, split):
    """As lmms-eval publishes it: the folder has the name, and the image is in the column bytes, as
    base64 text; once also as text in bytes, with line breaks, and as a data: URL."""
    rows = [{**mme_row(number), "bytes": data} for number, data in enumerate([
        base64_of(picture(0)), base64_of(picture(1)).encode(), picture(2),
        base64.encodebytes(picture(3)).decode(), "data:image/png;base64," + base64_of(picture(4))])]
    for row in rows[1:]:
        del row["image"]
    rows[0]["image"] = None
    monkeypatch.setattr(import_data, "read_rows", lambda path, columns: iter(
        rows[:2] if path.name.startswith("train-00000") else rows[2:]))
    for part in range(2):
        write(tmp_path / folder / f"train-0000{part}-of-00002.parquet", b"")
    source = tmp_path / folder.split("/")[0]
    found, counts, notes = imported(capsys, "mme_realworld", source, tmp_path / "out")
    assert counts == {split: (5, 5)} and notes == set()
    assert [row["image"] for row in found[split]] == [stored(picture(i)) for i in range(5)]
    assert found[split][0]["source"] == f"mme_realworld_{split}"


# ---- DeepEyes -----------------------------------------------------------------------------------


def deepeyes_row(number, **more):
    return {"data_source": "vstar", "prompt": [{"role": "user", "content": "<image>..."}],
            "env_name": "visual_toolbox_v2", "images": [{"bytes": picture(number), "path": None}],
            "reward_model": {"ground_truth": "red", "style": "model"},
            "extra_info": {"question": f"<image>\nWhat {number}?", "answer": "red",
                           "index": number}, **more}


def test_deepeyes(tmp_path, capsys):
    bad = [deepeyes_row(3, images=2 * [{"bytes": picture(), "path": None}]),
           deepeyes_row(4, extra_info=None), deepeyes_row(5, reward_model={"ground_truth": None}),
           deepeyes_row(6, images=[{"bytes": None, "path": "/etc/x"}])]
    for name, kind in (("data_0.1.2_visual_toolbox_v2", "vstar"),
                       ("data_thinklite_reasoning_acc", "thinklite_eureka")):
        good = [deepeyes_row(i, data_source=kind) for i in range(3)]
        write_parquet(tmp_path / f"{name}.parquet", good + bad)
    rows, counts, notes = imported(capsys, "deepeyes", tmp_path, tmp_path / "out")
    assert counts == {"train": (14, 6)} and sum(int(note.split()[0]) for note in notes) == 8
    assert rows["train"][2] == {
        "id": "data_0.1.2_visual_toolbox_v2_vstar_2", "image": stored(picture(2)),
        "question": "What 2?", "answer": "red", "source": "deepeyes_vstar"}
    assert rows["train"][3]["source"] == "deepeyes_thinklite_eureka"


# ---- The cold start of Mini-o3 ------------------------------------------------------------------


SYSTEM = "You are asked <|im_end|> {question}."
USER = "Look: {question} <|image_pad|>\n<image>\nWhat is it? "
FIRST = ('<think>a</think>'
         '<grounding>{"bbox_2d": [0, 0, 0.5, 1.0], "source": "original_image"}</grounding>')
SHOWN = "After {name}, here:\n<image>\nGo on.<|im_start|> "
BROKEN = "<grounding>{'bbox_2d': 3}</grounding>"
REFUSED = " Error {error}: cannot be read. "
SECOND = '<grounding>{"bbox_2d": [0.5, 0.5, 1, 1], "source": "observation_1"}</grounding>'
ANSWER = "<think>b</think><answer> a red hat </answer>"
WHOLE = [USER, FIRST, SHOWN, BROKEN, REFUSED, SECOND, SHOWN, ANSWER]


def talk(texts, system=SYSTEM):
    roles = itertools.cycle(["human", "gpt"])
    return ([] if system is None else [{"from": "system", "value": system}]) \
        + [{"from": role, "value": text} for role, text in zip(roles, texts)]


def cold_row(texts, sizes=((400, 300), (196, 308), (112, 84)), sample=5, rollout=2, system=SYSTEM,
             **more):
    """Return a row with as many images as the texts show."""
    shown = sum(text.count("<image>") for text in texts[::2])
    images = [{"bytes": picture(i, size), "path": None} for i, size in enumerate(sizes[:shown])]
    names = [f"{i}.png" for i in range(shown)]
    return {"conversations": json.dumps(talk(texts, system)), "images": images,
            "image_names": names, "data_source": "visual_probe", "sample_index": sample,
            "rollout_index": rollout, **more}


def test_a_coldstart_conversation_keeps_its_own_words(tmp_path, capsys):
    """Sizes by hand: half of 400 x 300 is 200 x 300, stored as 196 x 308; its lower right quarter
    is 100 x 150, stored as 112 x 84, which is another shape: counted, not fatal."""
    write_parquet(tmp_path / "a.parquet", [cold_row(WHOLE)])
    rows, counts, notes = imported(capsys, "mini_o3_coldstart", tmp_path, tmp_path / "out")
    (row,), name = rows["coldstart"], rows["coldstart"][0].pop("id")
    assert counts == {"coldstart": (1, 1)} and re.fullmatch("mini_o3_5_2_[0-9a-f]{8}", name)
    assert notes == {"1 stored observations differ in shape from our crops; their rows are kept "
                     "(first: a.parquet:1)"}
    zooms = [{"bbox_2d": [0.0, 0.0, 0.5, 1.0], "source": "original_image"},
             {"bbox_2d": [0.5, 0.5, 1.0, 1.0], "source": "observation_1"}]
    assert row == {
        "image": stored(picture(0, (400, 300))), "source": "visual_probe",
        "question": USER.replace("<image>", "").strip(), "answer": "a red hat",
        "prediction": "a red hat", "finish_reason": "answer", "reward": 1.0, "teacher": "mini_o3",
        "system": SYSTEM, "user": USER, "turns": [
            {"text": FIRST, "zoom": zooms[0], "tool_message": SHOWN},
            {"text": BROKEN, "error": REFUSED, "tool_message": REFUSED},
            {"text": SECOND, "zoom": zooms[1], "tool_message": SHOWN},
            {"text": ANSWER}]}
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1  # crops follow from the zooms
    tools.check_trajectory({"id": name, **row})


def test_a_coldstart_conversation_becomes_exactly_its_texts(tmp_path, capsys, make_tiny):
    """The ids decode to the original texts in order; special tokens and braces in them are ordinary
    text."""
    write_parquet(tmp_path / "a.parquet", [cold_row(WHOLE)])
    imported(capsys, "mini_o3_coldstart", tmp_path, tmp_path / "out")
    (row,) = tools.read_jsonl(tmp_path / "out" / "coldstart.jsonl", tools.check_trajectory)
    policy = make_tiny(torch.float32)
    sequence = sft.encode(policy, row, tmp_path / "out")
    tokens = iter([policy.num_image_tokens(grid) for _, grid in sequence.images])

    def shown(text):
        before, *after = text.split("<image>")
        for part in after:
            before += f"<|vision_start|>{'<|image_pad|>' * next(tokens)}<|vision_end|>{part}"
        return before

    expected = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for number, text in enumerate(WHOLE):
        role = "assistant" if number % 2 else "user"
        end = "\n" if number < len(WHOLE) - 1 else ""
        expected += f"<|im_start|>{role}\n{shown(text)}<|im_end|>{end}"
    assert policy.tokenizer.decode(sequence.token_ids) == expected and next(tokens, None) is None
    for token_id in (policy.im_start_id, policy.im_end_id):
        assert sequence.token_ids.count(token_id) == 1 + len(WHOLE)
    images = sum(policy.num_image_tokens(grid) for _, grid in sequence.images)
    assert sequence.token_ids.count(policy.image_token_id) == images
    trained_ids = list(itertools.compress(sequence.token_ids, sequence.loss_mask))
    replies = "".join(f"{text}<|im_end|>" for text in WHOLE[1::2])
    assert policy.tokenizer.decode(trained_ids) == replies
    prompt = sequence.token_ids[:sequence.loss_mask.index(True)]  # what the engine starts from
    assert policy.prompt_ids(row, sequence.images[0][1]) == prompt


def test_beginnings_are_merged_wherever_they_lie(tmp_path, capsys):
    """Rows of one rollout, one per reply, over two shards in any order: only the longest stays.
    Another conversation of the same rollout, and the same beginning in another rollout, are
    conversations of their own."""
    short = [USER, FIRST, SHOWN, ANSWER]
    rows = [cold_row(WHOLE[:4]), cold_row(WHOLE), cold_row(short), cold_row(WHOLE[:2]),
            cold_row(WHOLE[:6]), cold_row(short, rollout=3), cold_row(WHOLE),
            cold_row(WHOLE, system="Other."), cold_row(WHOLE, system=None)]
    seen = set()
    for number, order in enumerate(([0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 6, 4, 2, 0, 7, 5, 3, 1])):
        source = tmp_path / f"in{number}"
        source.mkdir()
        write_parquet(source / "a.parquet", [rows[i] for i in order[:5]])
        write_parquet(source / "b.parquet", [rows[i] for i in order[5:]])
        out = tmp_path / f"out{number}"
        found, counts, notes = imported(capsys, "mini_o3_coldstart", source, out)
        assert counts == {"coldstart": (9, 5)}
        assert {re.sub(r" \(first.*", "", note) for note in notes} >= {
            "3 skipped: the beginning of a longer conversation, merged into it",
            "1 skipped: id is in an earlier row, too"}
        kept = ((row["id"], len(row["turns"]), row["system"]) for row in found["coldstart"])
        seen.add(tuple(sorted(kept)))
        columns = ["conversations", "sample_index"]
        _, texts = next(import_data.read_records(source / "a.parquet", columns))
        assert list(texts) == columns  # the first pass reads no image
    (kept,) = seen
    whole = [(4, SYSTEM), (4, "Other."), (4, "")]
    assert sorted(row[1:] for row in kept) == sorted([*whole, (2, SYSTEM), (2, SYSTEM)])


def test_coldstart_rows_that_contradict_themselves_are_counted(tmp_path, capsys):
    impossible = FIRST.replace("original_image", "observation_3")
    extra = {"bytes": picture(9), "path": None}
    bad = {
        "turn 1: 'tool_message' must be a string with <image> 1 times, and absent on the last turn":
            [USER, FIRST, REFUSED, BROKEN, SHOWN, ANSWER],
        "field 'user' must be a string with <image> exactly once, or absent":
            [USER + "<image>", FIRST, REFUSED, ANSWER],
        "the conversation continues after an answer": [USER, ANSWER, REFUSED, ANSWER],
        "no final answer": [USER, FIRST],
        "conversation is not texts by system, human, gpt, ..., gpt in turn": [USER, FIRST, SHOWN],
    }
    rows = [cold_row([USER, ANSWER], sample=0),
            *(cold_row(texts, sample=i) for i, texts in enumerate(bad.values(), 1)),
            # observations that are too few or too many
            cold_row([USER, FIRST, REFUSED, ANSWER], sample=8),
            cold_row([USER, BROKEN, SHOWN, ANSWER], sample=9),
            cold_row([USER + "<image>", ANSWER], sample=10),
            cold_row([USER, impossible, SHOWN, ANSWER], sample=11),
            cold_row([USER, "<answer> </answer>"], sample=12),
            cold_row([USER, ANSWER], sample=13, images=[extra, extra]),
            cold_row([USER, ANSWER], sample=14, images=[]),
            cold_row([USER, ANSWER], sample=15, conversations="[{"),
            cold_row([USER, ANSWER], sample=16, conversations="[3]"),
            cold_row([USER, ANSWER], sample=17, conversations="[" * 100_000),
            cold_row([USER, ANSWER], sample=None),
            cold_row([USER, ANSWER], sample=18, images=[{"bytes": bomb(60_000), "path": None}]),
            cold_row(["<image>\ud800", ANSWER], sample=19),
            # refused for other reasons than its JSON: an impossible zoom, no call at all
            cold_row([USER, impossible, REFUSED, ANSWER], sample=20),
            cold_row([USER, "Hm.", REFUSED, ANSWER], sample=21)]
    write_parquet(tmp_path / "a.parquet", rows)
    found, counts, notes = imported(capsys, "mini_o3_coldstart", tmp_path, tmp_path / "out")
    assert counts == {"coldstart": (len(rows), 3)}
    assert [row["id"].split("_")[2] for row in found["coldstart"]] == ["0", "20", "21"]
    errors = [turn.get("error") for row in found["coldstart"] for turn in row["turns"]]
    assert errors == [None, REFUSED, None, REFUSED, None]
    matches = (re.match(r"(\d+) skipped: (.*) \(first", note) for note in notes)
    assert {m[2]: int(m[1]) for m in matches} == {
        **dict.fromkeys(bad, 1), "no final answer": 2, "image is missing": 1,
        too_many("3,600,000,000"): 1, "text is not UTF-8": 1,
        "conversations is not a JSON list of messages": 3,
        "images and observations differ in number": 5,
        "field 'sample_index' is missing or not text": 1}


@pytest.mark.parametrize("stored_size, same", [
    ((200, 100), True), ((400, 200), True), ((196, 112), True), ((224, 84), True),
    ((100, 200), False), ((140, 140), False), ((100, 100), False), ((1000, 460), False)])
def test_shapes_of_observations(stored_size, same):
    """A crop of 200 x 100: scaled, or rounded to the model's grid, it is the same; turned or
    squeezed it is not."""
    assert import_data.has_same_shape({"bytes": picture(0, stored_size)}, (200, 100)) == same
    assert not import_data.has_same_shape({"bytes": b"?"}, (200, 100))


# ---- Files that are broken as a whole -----------------------------------------------------------


def test_a_table_that_ends_inside_a_cell_is_refused(tmp_path, capsys):
    """Nobody could tell how many rows an open quote has swallowed."""
    write_tsv(tmp_path / "hr_bench_4k.tsv", [hrbench_row(0), hrbench_row(1)])
    whole = (tmp_path / "hr_bench_4k.tsv").read_bytes()
    (tmp_path / "hr_bench_4k.tsv").write_bytes(whole + b'3\t"what')
    with pytest.raises(tools.InputError, match=r"hr_bench_4k\.tsv: cannot be read to its end"):
        imported(capsys, "hrbench", tmp_path, tmp_path / "out")


def test_a_table_without_rows_is_counted(tmp_path, capsys):
    write_tsv(tmp_path / "hr_bench_4k.tsv", [hrbench_row(0)])
    write(tmp_path / "hr_bench_4k_more.tsv", "\t".join(hrbench_row(0)) + "\n")
    rows, _, notes = imported(capsys, "hrbench", tmp_path, tmp_path / "out")
    assert [row["id"] for row in rows["4k"]] == ["hrbench_4k_0"]
    assert notes == {"1 skipped: not a readable row (first: hr_bench_4k_more.tsv:1)"}


def test_parquet_without_pyarrow_is_one_line(monkeypatch, tmp_path):
    write(tmp_path / "hr_bench_4k.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = refused("build_data.py", "--import", "hrbench", "--source", tmp_path, "--out", tmp_path)
    assert line == "reading .parquet files needs pyarrow: pip install pyarrow"


def test_a_parquet_row_that_is_not_utf8_is_counted(tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([hrbench_row(i) for i in range(3)])
    texts = pyarrow.array([b"one", b"caf\xe9", b"two"], pyarrow.binary()).view(pyarrow.string())
    column = table.schema.get_field_index("question")
    source = tmp_path / "hr_bench_4k.parquet"  # a file as the source
    parquet.write_table(table.set_column(column, "question", texts), source)
    rows, _, notes = imported(capsys, "hrbench", source, tmp_path / "out")
    assert [row["id"] for row in rows["4k"]] == ["hrbench_4k_0", "hrbench_4k_2"]
    assert notes == {"1 skipped: not a readable row (first: hr_bench_4k.parquet:2)"}


def test_a_broken_parquet_file_is_one_line(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    write(tmp_path / "hr_bench_4k.parquet", b"PAR1 and no more")
    with pytest.raises(tools.InputError, match=r"hr_bench_4k\.parquet: cannot be read to its end"):
        imported(capsys, "hrbench", tmp_path, tmp_path / "out")


# ---- An import: files, reruns, kills, memory ----------------------------------------------------


@pytest.mark.parametrize("name", list(import_data.IMPORTERS))
def test_a_folder_without_the_data_set_is_one_line(tmp_path, name):
    write(tmp_path / "in" / "readme.txt", "nothing")
    source, out = tmp_path / "in", tmp_path / "out"
    line = refused("build_data.py", "--import", name, "--source", source, "--out", out)
    expected = import_data.IMPORTERS[name].expected
    assert line == f"{source}: nothing to import; {name} expects {expected}"
    assert not out.exists()


def test_what_is_packed_is_named(tmp_path):
    write(tmp_path / "MME-RealWorld/remote.7z.001", b"7z")
    with pytest.raises(tools.InputError, match=r"nothing to import; .* \(unpack remote.7z.001 "):
        import_data.import_data("mme_realworld", tmp_path, tmp_path / "out", 0)


def test_a_second_run_rewrites_no_image_and_gives_the_same_rows(tmp_path, capsys):
    """Nor does a run after a kill: an image that is there is whole, since it was put in place in
    one step."""
    visualprobe(tmp_path / "in")
    first = imported(capsys, "visualprobe", tmp_path / "in", tmp_path / "out")
    texts = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.jsonl")}
    image, lost = (tmp_path / "out" / stored(picture(i, kind="JPEG"), "jpg") for i in (0, 1))
    before = image.stat().st_mtime_ns, image.stat().st_ino
    lost.unlink()
    (tmp_path / "out" / "hard.jsonl").unlink()
    assert imported(capsys, "visualprobe", tmp_path / "in", tmp_path / "out") == first
    assert (image.stat().st_mtime_ns, image.stat().st_ino) == before
    assert lost.read_bytes() == picture(1, kind="JPEG")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.jsonl")} == texts


def test_a_killed_import_leaves_no_half_file_and_the_next_run_ends_the_same(tmp_path):
    visualprobe(tmp_path / "in", 200)
    command = ["build_data.py", "--import", "visualprobe", "--source", tmp_path / "in", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_script(*command, whole)
    process = Forked([*command, killed])
    crash.wait_until(process, lambda: len(list(killed.glob("images/*"))) > 20)
    crash.kill(process)
    for path in [*killed.glob("[!.]*.jsonl"), *killed.glob("images/[!.]*")]:
        assert (whole / path.relative_to(killed)).read_bytes() == path.read_bytes()
    run_script(*command, killed)
    for path in whole.rglob("*.*"):
        assert (killed / path.relative_to(whole)).read_bytes() == path.read_bytes()


def peak_memory(name, source, out):
    """Return the most bytes that Python objects took while a data set was imported."""
    tracemalloc.start()
    import_data.import_data(name, source, out, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("suffix", ["tsv", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path, suffix):
    """Of a row that was read only its id stays: 4 or 40 images of 300 kB take the same memory."""
    noise, peaks = np.random.default_rng(0), {}
    for count in (4, 4, 40):  # the first time warms up
        source = tmp_path / f"in{len(peaks)}{count}"
        source.mkdir(exist_ok=True)
        files = [io.BytesIO() for _ in range(count)]
        for file in files:
            Image.fromarray(noise.integers(0, 256, (300, 333, 3), dtype=np.uint8)).save(file, "PNG")
        rows = [hrbench_row(i, image=base64_of(file.getvalue())) for i, file in enumerate(files)]
        if suffix == "tsv":
            write_tsv(source / "hr_bench_4k.tsv", rows)
        else:
            write_parquet(source / "hr_bench_4k.parquet", rows)
        del rows, files
        peaks[count] = peak_memory("hrbench", source, tmp_path / "out")
    assert 300_000 < peaks[40] < peaks[4] + 36 * 1000


# ---- Questions of a suitable difficulty ---------------------------------------------------------


def with_rates(folder, rates):
    """Write ten questions q0, ..., q9 and a file with these rates: {number: rate}. Return the
    command that filters them, and the questions."""
    questions = [{"id": f"q{i}", "image": f"{i}.png", "question": "?", "answer": "a",
                  "colour": "red"} for i in range(10)]
    source, known = folder / "train.jsonl", folder / "train.rates.jsonl"
    tools.write_jsonl(source, questions)
    tools.write_jsonl(known, [{"id": f"q{i}", "pass_rate": rate} for i, rate in rates.items()])
    return ["build_data.py", "--source", source, "--filter", known], questions


def test_filter_keeps_what_is_neither_too_easy_nor_too_hard(monkeypatch, tmp_path):
    """Both ends belong to the interval; what was never rated is left out and counted."""
    rates = {0: 0, 1: 0.1, 2: 0.5, 3: 0.9, 4: 1, 5: 0.95, 6: 0.05, 77: 0.5}
    command, questions = with_rates(tmp_path, rates)
    more = [{"id": "q7", "pass_rate": 0.2}, {"id": "q2", "pass_rate": 0.5}]
    tools.write_jsonl(tmp_path / "more.jsonl", more)
    done = run_script(*command, tmp_path / "more.jsonl")
    kept = {1: 0.1, 2: 0.5, 3: 0.9, 7: 0.2}
    out = tmp_path / "train_filtered.jsonl"
    rows = [{**questions[i], "pass_rate": rate} for i, rate in kept.items()]
    assert tools.read_questions(out) == rows
    assert (f"{out}: 4 questions kept with a pass rate from 0.1 to 0.9, left out: 2 below, "
            "2 above, 2 without a rate; 1 rates belong to no question") in done.stdout
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--pass_rate_range", "0", "0.05"])
    build_data.main()
    assert [row["id"] for row in tools.read_questions(out)] == ["q0", "q6"]


NO_RATE = "rates.jsonl:2: a row of rates has an 'id' and a 'pass_rate' from 0 to 1"


@pytest.mark.parametrize("line, message", [
    ('{"id": "q2", "pass_rate": 0.4}',
     "rates.jsonl:2: id 'q2' has another pass_rate, 0.5, in an earlier line or file"),
    ('{"id": "q3", "pass_rate": NaN}', "rates.jsonl:2: Out of range float values are not JSON"),
    ('{"id": "q3", "pass_rate": 1e999}', "rates.jsonl:2: Out of range float values are not JSON"),
    ('{"id": "q3", "pass_rate": -0.1}', NO_RATE), ('{"id": "q3", "pass_rate": true}', NO_RATE),
    ('{"pass_rate": 1}', NO_RATE), ('{"id": "q2"}', NO_RATE)])
def test_bad_rates_are_one_line(tmp_path, line, message):
    with_rates(tmp_path, {2: 0.5})
    rates, source = tmp_path / "train.rates.jsonl", tmp_path / "train.jsonl"
    with open(rates, "a") as file:
        file.write(line + "\n")
    with pytest.raises(tools.InputError, match=re.escape(message)):
        import_data.filter_questions([rates], source, 0.1, 0.9)
    assert not (tmp_path / "train_filtered.jsonl").exists()


def test_a_filter_that_keeps_nothing_writes_nothing(tmp_path):
    with_rates(tmp_path, {2: 1.0})
    rates, source = tmp_path / "train.rates.jsonl", tmp_path / "train.jsonl"
    message = "question of .*train.jsonl is left: widen --pass_rate_range"
    with pytest.raises(tools.InputError, match=message):
        import_data.filter_questions([rates], source, 0.1, 0.9)
    assert not (tmp_path / "train_filtered.jsonl").exists()


# ---- Scoring HR-Bench ---------------------------------------------------------------------------


def cycle_row(row_id, image, cycle):
    return {"id": row_id, "image": image, "cycle": cycle}


def test_hrbench_is_scored_as_its_authors_do():
    """Cycle 1 has 2 of 2 right, cycle 2 has 0 of 1: the score is 1/2, not 2/3. The error is over
    images: a has 1/2, b has 1, so that it is s / sqrt(2) = sqrt(1/8) / sqrt(2) = 1/4."""
    rows = [cycle_row("1", "a", "1"), cycle_row("2", "b", "1"), cycle_row("3", "a", "2")]
    accuracy_of_question = {"1": 1.0, "2": 1.0, "3": 0.0}
    mean, error = import_data.avg_at_k_over_cycles(rows, accuracy_of_question)
    assert mean == 0.5 and error == pytest.approx(0.25)
    # several samples of a question are several rows, and change nothing
    assert import_data.avg_at_k_over_cycles(rows * 3, accuracy_of_question) == (mean, error)


def test_a_question_without_a_score_is_left_out():
    rows = [cycle_row("1", "a", "1"), cycle_row("2", "b", "1"), cycle_row("3", "a", "2")]
    accuracy_of_question = {"1": 0.25, "3": 0.75}
    assert import_data.avg_at_k_over_cycles(rows, accuracy_of_question) == (0.5, 0.0)
