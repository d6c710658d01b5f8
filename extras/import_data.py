"""Published data sets: import them, keep the questions of a suitable difficulty, score HR-Bench.

build_data.py imports this file when --import or --filter is given. Nothing is downloaded: download
a data set first, for example with `hf download REPOSITORY --repo-type dataset --local-dir FOLDER`.

What differs from the published data:
1. Options are texts that the question lists once, as (A), (B), ...
2. Of a cold-start conversation only the original image is stored: crops follow from its zooms.
3. An image is named after its content, and stored once for all rows that share it.
4. A row that cannot be used is skipped and counted.

Commands (all of this is CPU work):
    python build_data.py --import visualprobe --source downloads
    python build_data.py --import vstar --source downloads/vstar_bench
    python build_data.py --import hrbench --source downloads/HR-Bench
    python build_data.py --import mme_realworld --source downloads/MME-RealWorld
    python build_data.py --import deepeyes --source downloads/DeepEyes-Datasets-47k
    python build_data.py --import mini_o3_coldstart --source downloads/coldstart
    python build_data.py --filter results/rates/train.rates.jsonl --source data/train.jsonl \\
                         --pass_rate_range 0.1 0.9
"""

import ast
import base64
import codecs
import collections
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import statistics
import string
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

import tools
from extras import terminal
from extras.images import leaves_folder
from tools import check

# ---- Reading files of records -------------------------------------------------------------------


def read_rows(path, columns):
    """Yield the rows of a file, whatever they are. One row at a time is in memory, except for .json
    files."""
    if path.suffix == ".parquet":
        from pyarrow import parquet
        # page by page, not a whole row group at once
        file = parquet.ParquetFile(path, buffer_size=2**16, pre_buffer=False)
        for batch in file.iter_batches(batch_size=1, columns=columns, use_threads=False):
            try:
                yield batch.to_pylist()[0]
            except UnicodeDecodeError:
                yield None
        return
    with open(path, "rb") as file:
        check(file.read(2) not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
              "the text is not UTF-8, but UTF-16")
    # A byte that is not UTF-8 becomes half a surrogate pair: one bad row does not stop the others.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix == ".tsv":
            yield from read_table(file)
        elif path.suffix == ".jsonl":
            for line in file:
                if line.strip():
                    yield tools.parse_json_or_none(line)
        else:
            content = tools.parse_json_or_none(file.read())
            yield from content if isinstance(content, list) else [content]


def read_table(file):
    """Yield the rows of a table of tab-separated cells as dicts. Raise csv.Error for a row of which
    nobody can tell where it ends."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold an image
    header = next(csv.reader(file, delimiter="\t", strict=True), [])
    lines_read_ahead = collections.deque()

    def next_line():
        """Return the next line, None at the end of the file."""
        return lines_read_ahead.popleft() if lines_read_ahead else next(file, None)

    for line in iter(next_line, None):
        if line.strip("\r\n"):
            cells, unused_lines = parse_row(line, next_line, len(header))
            lines_read_ahead.extendleft(reversed(unused_lines))
            # Cells that the header does not know: nobody can tell which are which.
            has_more_cells = any(cells[len(header):])
            known_cells = itertools.zip_longest(header, cells[:len(header)])
            yield None if has_more_cells else dict(known_cells)


MAX_LINES = 100  # of one row


def parse_row(first_line, next_line, num_columns):
    """Return the cells of the row that begins in first_line, and the lines that were read, but are
    no part of it. next_line() returns a line after it, or None at the end of the file.

    A cell may be in quotes, and then have line breaks and doubled quotes in it. A quote that is not
    doubled is part of the text, as in a cell that begins with "STOP" sign."""
    # 1. As the csv module reads it. An open quote goes on in the next line, except where all cells
    #    are here already and the last of them has no quote.
    bare_cells = first_line.rstrip("\r\n").split("\t")
    is_whole = len(bare_cells) == num_columns and not bare_cells[-1].startswith('"')
    row_lines = [first_line]
    try:
        cells = parse_quoted(row_lines)
        while cells is None and not is_whole and len(row_lines) < MAX_LINES:
            line = next_line()
            if line is None:
                break
            row_lines.append(line)
            cells = parse_quoted(row_lines)
    except csv.Error:
        cells = None
    lines_are_rows = (len(row_lines) > 1
                      and all(line.count("\t") == num_columns - 1 for line in row_lines))
    is_right = cells is not None and (len(cells) == num_columns or len(bare_cells) != num_columns)
    if is_right and not lines_are_rows:
        return cells, []
    # 2. Every tab ends a cell.
    was_cut = not is_whole and not first_line.endswith(("\r", "\n"))
    if len(bare_cells) != num_columns or was_cut:
        raise csv.Error("a quote is not closed")
    for index, cell in enumerate(bare_cells):
        if re.fullmatch('"(?:[^"]|"")*"', cell):
            bare_cells[index] = cell[1:-1].replace('""', '"')
    return bare_cells, row_lines[1:]


def parse_quoted(lines):
    """Return the cells of a row that may have several lines, None if a quote is still open. Raise
    csv.Error if a quote is closed in the middle of a cell."""
    try:
        (cells,) = csv.reader(lines, delimiter="\t", strict=True)
    except csv.Error as error:
        if "unexpected end" not in str(error):
            raise
        return None
    return cells


def read_records(path, columns=None):
    """Yield ("file:row", record) of a .jsonl, .json, .tsv or .parquet file. A record is a dict, or
    None if the row is not readable. columns: the only ones that are read from a .parquet file.
    Raise InputError if a file is broken as a whole."""
    row_number = 0
    try:
        for row_number, row in enumerate(read_rows(path, columns), 1):
            yield f"{path.name}:{row_number}", row if isinstance(row, dict) else None
        if row_number == 0:
            yield f"{path.name}:1", None  # so that a file without rows is counted
    except ImportError:
        raise tools.InputError(
            "reading .parquet files needs pyarrow: pip install pyarrow") from None
    except (ValueError, OSError, csv.Error) as error:
        raise tools.InputError(
            f"{path}: cannot be read to its end (after row {row_number}: {error}); download it "
            "again") from None


# ---- Fields of a record -------------------------------------------------------------------------


def required_text(record, key):
    """Return the text of a field. Raise InputError if there is none."""
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is int:  # not True, which is an int, too
        value = str(value)
    check(isinstance(value, str) and value.strip(), f"field '{key}' is missing or not text")
    return value.strip()


def table_text(record, key):
    """Return the text of a cell as required_text. In a table that was saved again the texts of a
    column may have become floats: 1.5, or 2.0, which was 2, or NaN, which was an empty cell."""
    value = record.get(key)
    if type(value) is float and math.isfinite(value):
        value = str(int(value) if value.is_integer() else value)
    return required_text({key: value}, key)


def table_image(record):
    """Return the image of a row of a table. lmms-eval publishes it in a column "bytes"."""
    image = record.get("image")
    return image if isinstance(image, (str, bytes, dict)) and image else record.get("bytes")


def single_image(record):
    """Return the only image of a record."""
    images = record.get("images")
    check(isinstance(images, list) and len(images) == 1, "not exactly one image")
    return images[0]


def read_image_file(root, folder, name):
    """Return the bytes of the file `name` in `folder`. The name is not trusted: raise InputError if
    it leads out of the folder `root`, also by links."""
    check(isinstance(name, str) and name, "image is missing")
    path = folder / name
    is_file = os.path.isfile(path)  # unlike Path.is_file, False for a name that no file can have
    is_outside = Path(name).is_absolute() or ".." in Path(name).parts
    if is_file and leaves_folder(root, path):
        is_outside = True
    check(not is_outside, "image path leaves the folder of the data; copy the image into it")
    check(is_file, "image is missing")
    return path.read_bytes()


SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif",
            "AVIF": "avif", "JPEG2000": "jp2"}


def decode_image(stored_image):
    """Return (bytes, file suffix, PIL image as every later stage will see it).

    stored_image: the content of an image file as bytes or base64 text, or {"bytes": either}. Raise
    InputError if it cannot be decoded, and as tools.check_header.
    """
    data = stored_image.get("bytes") if isinstance(stored_image, dict) else stored_image
    check(isinstance(data, (bytes, str)) and data, "image is missing")
    try:
        data = decode_base64(data)
        image = Image.open(io.BytesIO(data), formats=tools.FORMATS)
        suffix = SUFFIXES.get(image.format, "jpg")  # or MPO, a JPEG
        return data, suffix, tools.to_rgb(image)
    except tools.InputError:
        raise
    except UnidentifiedImageError:
        raise tools.InputError("image cannot be decoded; convert it to one of "
                               f"{', '.join(tools.FORMATS)}") from None
    except Exception:  # PIL's decoders raise nearly anything on broken data
        raise tools.InputError("image cannot be decoded") from None


def decode_base64(data):
    """Return the bytes of an image that may be base64 text, also with line breaks or as a data:
    URL. Raise ValueError for another text."""
    text = data.encode() if isinstance(data, str) else data
    text = re.sub(rb"\A\s*data:[^,]{0,100},", b"", text)
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except ValueError:
        if isinstance(data, str):
            raise
        return data  # the file itself


def strip_letters(options):
    """Return ["red", "blue"] for ["(A) red", "(B) blue"], or for the text of such a list."""
    if isinstance(options, str) and len(options) < 100_000:
        try:
            options = ast.literal_eval(options.strip())  # reads constants and runs nothing
        except UnicodeError:    # text that is not UTF-8, see read_rows
            raise
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options = []
    message = "options are not a list of (A), (B), ... in this order"
    check(isinstance(options, list) and 1 <= len(options) <= len(string.ascii_uppercase), message)
    texts = []
    for letter, option in zip(string.ascii_uppercase, options):
        match = re.fullmatch(rf"\(?{letter}[).:]\s*(.*\S)\s*", str(option), re.DOTALL)
        check(match, message)
        texts.append(match[1])
    return texts


def parse_conversation(record):
    """Return the texts [system, user, reply, user, reply, ...] of a cold-start record, and a hash
    of the conversation up to each reply. Equal hashes mean equal beginnings of one rollout."""
    # 1. the texts
    try:
        messages = [(message["from"], message["value"])
                    for message in json.loads(record["conversations"])]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise tools.InputError("conversations is not a JSON list of messages") from None
    if messages and messages[0][0] != "system":
        messages.insert(0, ("system", ""))
    roles = [role for role, _ in messages]
    texts = [text for _, text in messages]
    has_pairs = len(messages) > 2 and roles[1:] == ["human", "gpt"] * (len(messages) // 2)
    check(has_pairs and all(isinstance(text, str) for text in texts),
          "conversation is not texts by system, human, gpt, ..., gpt in turn")
    # 2. a hash after every reply; hashed are: rollout, system, user, reply, user, reply, ...
    rollout_name = repr([record.get("sample_index"), record.get("rollout_index")])
    hashed_texts = [rollout_name, *map(json.dumps, texts)]
    hashes = []
    for end in range(4, len(hashed_texts) + 1, 2):
        hashes.append(hashlib.sha256("".join(hashed_texts[:end]).encode()).hexdigest())
    return texts, hashes


# ---- One function for each data set: record -> Draft --------------------------------------------


class Origin(NamedTuple):
    """Where a record was read."""
    path: Path           # its file
    root: Path           # the folder of the data set, which images must not leave
    split: str           # the file that is written is called split.jsonl
    first_pass: set      # what a first pass over all files has found


class Draft(NamedTuple):
    """What a record becomes, before its image is decoded. finish_row makes a row of it."""
    row: dict                           # all fields but "image" and what follows from those below
    image: object                       # see decode_image
    label: str | None = None            # options: the letter of the right one of row["options"]
    shuffle: bool = False               # options: are they to be shuffled?
    conversation: list | None = None    # cold start: texts, see parse_conversation
    observations: list | None = None    # cold start: the stored images of observations


def visualprobe(record, origin):
    """Make a draft of a row of train.json or val.json. Image paths begin with the folder's name."""
    folder = origin.path.absolute().parent.parent
    row = {"id": required_text(record, "doc_id")}
    image = read_image_file(origin.root, folder, single_image(record))
    row["question"] = required_text(record, "problem").replace("<image>", "", 1).strip()
    row["answer"] = required_text(record, "solution")
    row["source"] = required_text(record, "data_source")
    if origin.split in ("easy", "medium", "hard"):
        row["level"] = origin.split
    return Draft(row, image)


def vstar(record, origin):
    """Make a draft of a row of the table, or of the JSON file next to an image.

    The first pass finds the files in which the right option always comes first, as it does in every
    JSON file. There the options are shuffled.
    """
    if origin.path.suffix == ".json":
        candidates = [origin.path.with_suffix(suffix)
                      for suffix in (".jpg", ".jpeg", ".png", ".webp")]
        image_name = next((path.name for path in candidates if path.is_file()), None)
        category = origin.path.parent.name
        row_id = f"{category}/{origin.path.stem}"
        label = "A"
        question = required_text(record, "question")
        options = record.get("options")
    else:
        image_name = required_text(record, "image")
        category = required_text(record, "category")
        row_id = str(Path(image_name).with_suffix(""))
        label = required_text(record, "label")
        question, *option_texts = re.split(r"\n(?=\([A-Z]\))", required_text(record, "text"))
        # The sentence after the options is dropped: the prompts say how to answer.
        options = strip_letters([text.splitlines()[0] for text in option_texts])
    image = read_image_file(origin.root, origin.path.parent, image_name)
    row = {"id": row_id, "question": question, "options": options, "source": "vstar",
           "category": category}
    return Draft(row, image, label, shuffle=origin.path in origin.first_pass)


def hrbench(record, origin):
    """Make a draft of a row of HR-Bench. Each question comes in four cycles, with its options in
    another order."""
    row = {"id": f"hrbench_{origin.split}_{table_text(record, 'index')}",
           "question": table_text(record, "question"),
           "options": [table_text(record, letter) for letter in "ABCD"]}
    label = table_text(record, "answer")
    row["source"] = f"hrbench_{origin.split}"
    row["category"] = table_text(record, "category")
    row["cycle"] = table_text(record, "cycle_category")
    return Draft(row, table_image(record), label)


def mme_realworld(record, origin):
    """Make a draft of a row of MME-RealWorld, whose options are a list that was printed."""
    row = {"id": table_text(record, "index"), "question": table_text(record, "question"),
           "options": strip_letters(record.get("multi-choice options"))}
    label = table_text(record, "answer")
    row["source"] = f"mme_realworld_{origin.split}"
    row["category"] = table_text(record, "category")
    return Draft(row, table_image(record), label)


def deepeyes(record, origin):
    """Make a draft of a row of DeepEyes. Its index counts within a file and a kind of data."""
    details = record.get("extra_info")
    data_source = required_text(record, "data_source")
    row = {"id": f"{origin.path.stem}_{data_source}_{required_text(details, 'index')}"}
    image = single_image(record)
    row["question"] = required_text(details, "question").replace("<image>", "", 1).strip()
    row["answer"] = required_text(record.get("reward_model"), "ground_truth")
    row["source"] = f"deepeyes_{data_source}"
    return Draft(row, image)


def mini_o3_coldstart(record, origin):
    """Make a draft of a conversation. There is a row for each of its replies, with the conversation
    up to this reply: all but the longest are skipped, which the first pass has found."""
    texts, hashes = parse_conversation(record)
    check(hashes[-1] not in origin.first_pass,
          "the beginning of a longer conversation, merged into it")
    sample = required_text(record, "sample_index")
    rollout = required_text(record, "rollout_index")
    images = record.get("images")
    check(images and isinstance(images, list), "image is missing")
    # A rollout may have several conversations, none the beginning of another: the hash differs.
    row = {"id": f"mini_o3_{sample}_{rollout}_{hashes[-1][:8]}",
           "source": str(record.get("data_source") or "mini_o3_coldstart")}
    return Draft(row, images[0], conversation=texts, observations=images[1:])


def files_with_label_a(paths):
    """Return the files in which every label is A, or in which there is no label."""
    found_files = set()
    for path in paths:
        records = (record for _, record in read_records(path) if record)
        if all(record.get("label", "A") == "A" for record in records):
            found_files.add(path)
    return found_files


def hashes_of_beginnings(paths):
    """Return the hashes of all beginnings of conversations that continue in some row. No image is
    read."""
    found_hashes = set()
    for path in terminal.progress_bar(paths, desc="beginnings", unit=" files"):
        for _, record in read_records(path, ["conversations", "sample_index", "rollout_index"]):
            try:
                _, hashes = parse_conversation(record or {})
                found_hashes.update(hashes[:-1])
            except ValueError:
                pass  # counted when it is read again
    return found_hashes


class Importer(NamedTuple):
    make_draft: Callable                 # (record, Origin) -> Draft
    patterns: list                       # of a path in lower case, the first that fits any
    default_split: str | None            # if the pattern has no group "split" or it is empty
    expected: str                        # for the error: which files there should be
    first_pass: Callable | None = None   # all files -> Origin.first_pass


TABLE = r"[^/]*\.(?:tsv|parquet)$"
MME = r"mme[^/]?realworld(?:[^/](?P<split>lite|cn)(?![a-z]))?"
IMPORTERS = {
    "visualprobe": Importer(
        visualprobe, [r"/(?:visualprobe_)?(?P<split>[^/]+)/(?:train|val)\.json$"], None,
        "folders such as VisualProbe_Hard with train.json or val.json and data/*.jpg"),
    "vstar": Importer(
        vstar, [r"/test_questions\.jsonl$", r"\.json$"], "test",
        "test_questions.jsonl, or folders of images with a JSON file next to each",
        files_with_label_a),
    "hrbench": Importer(
        hrbench, ["(?P<split>4k|8k)" + TABLE], None, "hr_bench_4k or _8k as .tsv or .parquet"),
    "mme_realworld": Importer(
        mme_realworld, [MME + TABLE, ".*" + MME + "[^/]*/.*" + TABLE], "test",
        "MME-RealWorld, -Lite or -CN as .tsv or .parquet, or a folder of that name with them"),
    "deepeyes": Importer(
        deepeyes, [r"\.parquet$"], "train", "the .parquet files of DeepEyes-Datasets-47k"),
    "mini_o3_coldstart": Importer(
        mini_o3_coldstart, [r"\.parquet$"], "coldstart",
        "the .parquet files of the Mini-o3 cold start", hashes_of_beginnings),
}


# ---- From drafts to rows ------------------------------------------------------------------------


def multiple_choice(row, label, shuffle, seed):
    """Return the fields "options", "question", which lists them, and "answer". label: the letter of
    the right option. The order of shuffled options depends on the seed and on the row's id only."""
    options = row["options"]
    check(isinstance(options, list) and options
          and all(isinstance(option, str) and option.strip() for option in options),
          "options are missing or not texts")
    letters = list(string.ascii_uppercase[:len(options)])
    check(label.upper() in letters, "the label is not the letter of an option")
    answer_index = letters.index(label.upper())
    if shuffle:
        digest = hashlib.sha256(row["id"].encode("utf-8", "replace")).digest()[:8]
        rng = np.random.default_rng([seed, int.from_bytes(digest, "big")])
        order = rng.permutation(len(options)).tolist()
        options = [options[index] for index in order]
        answer_index = order.index(answer_index)
    options = [option.strip() for option in options]
    listed_options = [f"({letter}) {option}" for letter, option in zip(letters, options)]
    # The answer is the option's text, or its letter if several options read alike.
    answer = options[answer_index]
    num_alike = sum(tools.normalise(option) == tools.normalise(answer) for option in options)
    if num_alike != 1:
        answer = f"({letters[answer_index]})"
    check(tools.match_answer(listed_options[answer_index], answer, options),
          "the right option cannot be told from another one")
    return {"options": options, "question": "\n".join([row["question"], *listed_options]),
            "answer": answer}


def trajectory_fields(conversation, observations, image):
    """Return the fields of a trajectory, and how many stored observations have another shape than
    our crops. The zooms are replayed on the image."""
    system, user, *texts = conversation
    views = [image]
    turns = []
    for text, tool_message in itertools.zip_longest(texts[::2], texts[1::2]):
        turn, finish_reason, prediction = tools.take_turn(views, text, 1, math.inf, math.inf)
        turns.append(turn)
        if tool_message is None:
            break
        check(finish_reason != "answer", "the conversation continues after an answer")
        if "zoom" not in turn:
            turn["error"] = tool_message
        turn["tool_message"] = tool_message
    # check_trajectory checks that an image follows each zoom and nothing else.
    check(finish_reason == "answer" and prediction, "no final answer")
    check(len(observations) == len(views) - 1, "images and observations differ in number")
    num_differing = 0
    for observation, view in zip(observations, views[1:]):
        if not has_same_shape(observation, view.size):
            num_differing += 1
    # The data has no column with the true answer, but only correct conversations were published.
    fields = {"question": user.replace("<image>", "").strip(), "answer": prediction,
              "system": system, "user": user, "turns": turns, "finish_reason": "answer",
              "prediction": prediction, "reward": 1.0, "teacher": "mini_o3"}
    return fields, num_differing


def has_same_shape(stored_image, crop_size):
    """Return whether a stored observation has the aspect ratio of our crop, to first order. Its
    sides may have been rounded to multiples of 28 for the model, the crop's edges by two pixels."""
    try:
        _, _, image = decode_image(stored_image)
    except ValueError:
        return False
    ratio = image.width * crop_size[1] / (image.height * crop_size[0])
    tolerance = 28 / min(image.size) + 2 / min(crop_size)
    return max(ratio, 1 / ratio) <= 1 + tolerance


def finish_row(draft, out, seed):
    """Return a draft's row, and how many of its observations differ in shape. The image is stored,
    once for all rows that share it. Raise ValueError if the row cannot be used."""
    # 1. the fields
    data, suffix, image = decode_image(draft.image)
    image_path = f"images/{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"
    row = {"id": draft.row["id"], "image": image_path, **draft.row}
    num_differing = 0
    if draft.label is not None:
        row |= multiple_choice(row, draft.label, draft.shuffle, seed)
    if draft.conversation is not None:
        fields, num_differing = trajectory_fields(draft.conversation, draft.observations, image)
        row |= fields
    # 2. the row is checked before its image is stored
    tools.json_line(row).encode()  # half a surrogate pair raises UnicodeEncodeError
    if "turns" in row:
        tools.check_trajectory(row)
    else:
        tools.check_question(row)
    if not (out / image_path).exists():
        tools.write_atomic(out / image_path, lambda file: file.write(data))
    return row, num_differing


# ---- Importing ----------------------------------------------------------------------------------


def read_all_records(origins):
    """Yield (origin, "file:row", record) of several files."""
    for origin in origins:
        for location, record in read_records(origin.path):
            yield origin, location, record


def import_rows(make_draft, origins, out_path, seed):
    """Yield the rows of one output file, then print what was read, written and skipped. Only ids
    stay in memory. Raise InputError if there is no row."""
    ids = set()
    counts = collections.Counter()   # {note: how often}
    first_locations = {}             # {note: "file:row" of the first time}
    num_read = 0

    # 1. a row for every record; a record that cannot be used is counted under its reason
    records = terminal.progress_bar(read_all_records(origins), desc=out_path.stem, unit=" rows")
    for origin, location, record in records:
        num_read += 1
        try:
            check(record is not None, "not a readable row")
            draft = make_draft(record, origin)
            check(draft.row["id"] not in ids, "id is in an earlier row, too")
            row, num_differing = finish_row(draft, out_path.parent, seed)
        except ValueError as error:
            reason = "text is not UTF-8" if isinstance(error, UnicodeError) else error
            counts[f"skipped: {reason}"] += 1
            first_locations.setdefault(f"skipped: {reason}", location)
            continue
        if num_differing:
            note = "stored observations differ in shape from our crops; their rows are kept"
            counts[note] += num_differing
            first_locations.setdefault(note, location)
        ids.add(row["id"])
        yield row

    # 2. the notes
    print(f"{out_path}: {num_read} rows read, {len(ids)} written")
    for note, count in counts.items():
        print(f"    {count} {note} (first: {first_locations[note]})")
    check(ids, f"{out_path} is not written, since no row can be used; the reasons are above")


def is_hidden(path, source):
    """Return whether a name below `source` begins with a dot, or is __MACOSX: there a Mac keeps
    what it knows about a file (._data.parquet), and hf download its own notes (.cache)."""
    names = path.relative_to(source).parts
    return any(name.startswith(".") or name == "__MACOSX" for name in names)


def find_files(importer, source):
    """Return {split: files} of a data set in a folder, or of one file."""
    paths = sorted(source.rglob("*")) if source.is_dir() else [source]
    for pattern in importer.patterns:
        files_of_split = collections.defaultdict(list)
        for path in paths:
            match = re.search(pattern, str(path.absolute()).lower())
            if match and path.is_file() and not is_hidden(path, source):
                split = match.groupdict().get("split") or importer.default_split
                files_of_split[split].append(path)
        if files_of_split:
            return files_of_split
    return {}


PACKED = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".001")


def import_data(name, source, out, seed):
    """Write the rows of a published data set, one file for each split. Raise InputError for an
    unknown name, and if there is nothing to import."""
    check(name in IMPORTERS, f"--import {name}: known are {', '.join(IMPORTERS)}")
    importer = IMPORTERS[name]
    root = source if source.is_dir() else source.parent
    files_of_split = find_files(importer, source)
    if not files_of_split:
        packed = [path for path in sorted([source, *source.rglob("*")]) if path.suffix in PACKED]
        advice = f" (unpack {packed[0].name} first)" if packed else ""
        raise tools.InputError(
            f"{source}: nothing to import; {name} expects {importer.expected}{advice}")
    first_pass = set()
    if importer.first_pass is not None:
        first_pass = importer.first_pass(list(itertools.chain(*files_of_split.values())))
    for split, paths in sorted(files_of_split.items()):
        origins = [Origin(path, root, split, first_pass) for path in paths]
        out_path = out / f"{split}.jsonl"
        tools.write_jsonl(out_path, import_rows(importer.make_draft, origins, out_path, seed))


# ---- Questions of a suitable difficulty ---------------------------------------------------------


def read_pass_rates(paths):
    """Return {id: pass rate} of files with rows {"id", "pass_rate"}. Raise InputError for another
    row, and if an id has two rates."""
    rates = {}

    def check_rate(row):
        """Raise InputError unless a row has a rate, the same as before. Add it to the rates."""
        row_id = row.get("id")
        rate = row.get("pass_rate")
        check(isinstance(row_id, str) and type(rate) in (int, float) and 0 <= rate <= 1,
              "a row of rates has an 'id' and a 'pass_rate' from 0 to 1")
        earlier_rate = rates.setdefault(row_id, rate)
        check(earlier_rate == rate, f"id '{row_id}' has another pass_rate, {earlier_rate}, in an "
              "earlier line or file")

    for path in paths:
        tools.read_jsonl(path, check_rate, hint="python evaluate.py")
    return rates


def filter_questions(rate_files, source, lowest, highest):
    """Write the questions of the file `source` with a pass rate in [lowest, highest] to a file next
    to it, each with its "pass_rate". Raise InputError if there is none.

    With a pass rate of 0.1 or 0.9, all 16 rollouts of a question agree with probability 0.19 (no
    advantage, nothing learned). Closer to 0 or 1 this soon happens in most groups.
    """
    # 1. choose; rates that are left at the end belong to no question
    rates = read_pass_rates(rate_files)
    rows = tools.read_questions(source, hint="python build_data.py")
    kept_rows = []
    num_below = 0
    num_above = 0
    num_unrated = 0
    for row in rows:
        if row["id"] not in rates:
            num_unrated += 1
            continue
        rate = rates.pop(row["id"])
        if rate < lowest:
            num_below += 1
        elif rate > highest:
            num_above += 1
        else:
            kept_rows.append({**row, "pass_rate": rate})
    # 2. write and print
    out_path = source.with_name(f"{source.stem}_filtered.jsonl")
    if kept_rows:
        tools.write_jsonl(out_path, kept_rows)
    print(f"{out_path}: {len(kept_rows)} questions kept with a pass rate from {lowest} to "
          f"{highest}, left out: {num_below} below, {num_above} above, {num_unrated} without a "
          f"rate; {len(rates)} rates belong to no question")
    check(kept_rows, f"no question of {source} is left: widen --pass_rate_range or evaluate these "
          "questions; nothing written")


# ---- Scoring HR-Bench ---------------------------------------------------------------------------


def means_by_field(rows, accuracy_of_question, field):
    """Return the mean accuracy of the rows that share a value of this field, for each value."""
    accuracies = collections.defaultdict(list)
    for row in rows:
        accuracies[row.get(field)].append(accuracy_of_question[row["id"]])
    return [statistics.fmean(group) for group in accuracies.values()]


def avg_at_k_over_cycles(rows, accuracy_of_question):
    """Return (mean, standard error) of a benchmark that asks each question in several cycles, with
    the options in another order, as the authors of HR-Bench score it.

    rows: trajectory rows. accuracy_of_question: {id: accuracy} of the scored ones. The score is the
    mean over cycles of the mean accuracy in a cycle. For the error, all forms of a question, which
    share an image, count as one.
    """
    rows_of_id = {row["id"]: row for row in rows if row["id"] in accuracy_of_question}
    questions = list(rows_of_id.values())
    mean = statistics.fmean(means_by_field(questions, accuracy_of_question, "cycle"))
    image_means = means_by_field(questions, accuracy_of_question, "image")
    error = 0.0
    if len(image_means) > 1:
        error = statistics.stdev(image_means) / math.sqrt(len(image_means))
    return mean, error
