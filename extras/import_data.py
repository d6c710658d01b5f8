"""Published data sets."""

import ast
import base64
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import string
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import tools
from tools import check


def parsed(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None



def read_rows(path, columns):
    """Rows of a file, one by one: memory does not grow with them, except for .json."""
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
    # what is not UTF-8 becomes half a surrogate pair: one bad row does not stop the others
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix == ".tsv":
            csv.field_size_limit(2**31 - 1)  # a cell may hold an image
            yield from csv.DictReader(file, delimiter="\t", strict=True)
        elif path.suffix == ".jsonl":
            yield from (parsed(line) for line in file if line.strip())
        else:
            rows = parsed(file.read())
            yield from rows if isinstance(rows, list) else [rows]



def records(path, columns=None):
    """Yield ("file:row", row as a dict, or None if it is not readable) of a .jsonl, .json, .tsv or
    .parquet file. columns: the only ones to read of a .parquet file. Raises InputError if a file is
    broken as a whole."""
    try:
        number = 0
        for number, row in enumerate(read_rows(path, columns), 1):
            yield f"{path.name}:{number}", row if isinstance(row, dict) else None
        if number == 0:
            yield f"{path.name}:1", None  # so that a file without rows is counted
    except ImportError:
        message = "reading .parquet files needs pyarrow: pip install pyarrow"
        raise tools.InputError(message) from None
    except (ValueError, OSError, csv.Error) as error:
        message = f"{path}: cannot be read to its end ({error}); download it again"
        raise tools.InputError(message) from None



def text_of(record, key):
    """A field that must be there: its text."""
    value = record.get(key) if isinstance(record, dict) else None
    value = str(value) if type(value) is int else value  # not True, which is an int too
    check(isinstance(value, str) and value.strip(), f"field '{key}' is missing or not text")
    return value.strip()



def only_image(record):
    images = record.get("images")
    check(isinstance(images, list) and len(images) == 1, "not exactly one image")
    return images[0]



def inside(root, base, name):
    """Bytes of the file that an untrusted name means in folder `base`, if it lies in the folder
    `root`, also behind links."""
    check(isinstance(name, str) and name, "image is missing")
    path = base / name
    there = os.path.isfile(path)  # unlike Path.is_file, False for a name that no file can have
    straight = not Path(name).is_absolute() and ".." not in Path(name).parts
    check(straight and (not there or path.resolve().is_relative_to(root.resolve())),
         "image path leaves the folder of the data")
    check(there, "image is missing")
    return path.read_bytes()



SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}



def load(image):
    """(bytes, suffix, PIL image as every later stage will see it) of an image file, given as bytes,
    base64 text or {"bytes": either}. Images so large that PIL only warns are refused too."""
    data = image.get("bytes") if isinstance(image, dict) else image
    check(isinstance(data, (bytes, str)) and data, "image is missing")
    try:
        if isinstance(data, str):
            data = base64.b64decode(data.strip(), validate=True)
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(data), formats=list(SUFFIXES))
            suffix = SUFFIXES.get(image.format, "jpg")  # or MPO, a JPEG
            return data, suffix, tools.to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise tools.InputError("image has too many pixels") from None
    except Exception:  # PIL's decoders raise nearly anything on broken data
        raise tools.InputError("image cannot be decoded") from None



def unlettered(options):
    """["(A) red", "(B) blue"], or the text of such a list, -> ["red", "blue"]."""
    try:  # literal_eval reads constants and runs nothing
        if isinstance(options, str) and len(options) < 100_000:
            options = ast.literal_eval(options.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass  # a text is no list
    options = options if isinstance(options, list) else []
    found = [re.fullmatch(r"\(?([A-Z])[).:]\s*(.*\S)\s*", str(o), re.DOTALL) for o in options]
    letters = list(string.ascii_uppercase[:len(found)])
    check(found and [m and m[1] for m in found] == letters,
         "options are not a list of (A), (B), ... in this order")
    return [m[2] for m in found]



def conversation(record):
    """A cold-start row's texts [system, user, reply, user, reply, ...], hashes up to each reply."""
    try:
        said = [(m["from"], m["value"]) for m in json.loads(record["conversations"])]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise tools.InputError("conversations is not a JSON list of messages") from None
    if said and said[0][0] != "system":
        said.insert(0, ("system", ""))
    roles, texts = [role for role, _ in said], [text for _, text in said]
    check(len(said) > 2 and roles[1:] == ["human", "gpt"] * (len(said) // 2)
         and all(isinstance(text, str) for text in texts),
         "conversation is not texts by system, human, gpt, ..., gpt in turn")
    rollout = repr([record.get("sample_index"), record.get("rollout_index")])
    parts = [rollout, *map(json.dumps, texts)]
    return texts, [hashlib.sha256("".join(parts[:end]).encode()).hexdigest()
                   for end in range(4, len(parts) + 1, 2)]



def visualprobe(record, path, stem, root, known):
    folder = path.absolute().parent.parent  # the path of an image begins with its data set's folder
    row = {"id": text_of(record, "doc_id"), "image": inside(root, folder, only_image(record)),
           "question": text_of(record, "problem").replace("<image>", "", 1).strip(),
           "answer": text_of(record, "solution"), "source": text_of(record, "data_source")}
    return {**row, "level": stem} if stem in ("easy", "medium", "hard") else row



def vstar(record, path, stem, root, known):
    """A row of the table, or the JSON beside an image. known: the files in which the right option
    always comes first, as it does in every JSON; there the options are shuffled."""
    if path.suffix == ".json":
        pictures = (path.with_suffix(suffix) for suffix in (".jpg", ".jpeg", ".png", ".webp"))
        image = next((picture.name for picture in pictures if picture.is_file()), None)
        name, category, label = f"{path.parent.name}/{path.stem}", path.parent.name, "A"
        question, options = text_of(record, "question"), record.get("options")
    else:
        image, category = text_of(record, "image"), text_of(record, "category")
        name, label = str(Path(image).with_suffix("")), text_of(record, "label")
        question, *options = re.split(r"\n(?=\([A-Z]\))", text_of(record, "text"))
        # what follows the options (answer with the letter) goes: the prompts say how to answer
        options = unlettered([option.splitlines()[0] for option in options])
    return {"id": name, "image": inside(root, path.parent, image), "question": question,
            "options": options, "right": label, "shuffle": path in known, "source": "vstar",
            "category": category}



def hrbench(record, path, stem, root, known):
    return {"id": f"hrbench_{stem}_{text_of(record, 'index')}", "image": record.get("image"),
            "question": text_of(record, "question"),
            "options": [text_of(record, letter) for letter in "ABCD"],
            "right": text_of(record, "answer"), "source": f"hrbench_{stem}",
            "category": text_of(record, "category"), "cycle": text_of(record, "cycle_category")}



def mme_realworld(record, path, stem, root, known):
    return {"id": text_of(record, "index"), "image": record.get("image"),
            "question": text_of(record, "question"),
            "options": unlettered(record.get("multi-choice options")),
            "right": text_of(record, "answer"), "source": f"mme_realworld_{stem}",
            "category": text_of(record, "category")}



def deepeyes(record, path, stem, root, known):
    info, kind = record.get("extra_info"), text_of(record, "data_source")
    name = f"{path.stem}_{kind}_{text_of(info, 'index')}"  # it counts within a file and a kind
    return {"id": name, "image": only_image(record),
            "question": text_of(info, "question").replace("<image>", "", 1).strip(),
            "answer": text_of(record.get("reward_model"), "ground_truth"),
            "source": f"deepeyes_{kind}"}



def mini_o3_coldstart(record, path, stem, root, known):
    """Rows are the beginnings of conversations, one per reply: only the longest stays."""
    texts, digests = conversation(record)
    check(digests[-1] not in known, "the beginning of a longer conversation, merged into it")
    sample, rollout = text_of(record, "sample_index"), text_of(record, "rollout_index")
    images = record.get("images")
    check(images and isinstance(images, list), "image is missing")
    # a hash, since conversations of one rollout that are not another's beginning are all kept
    return {"id": f"mini_o3_{sample}_{rollout}_{digests[-1][:8]}",
            "image": images[0], "conversation": texts, "seen": images[1:],
            "source": str(record.get("data_source") or "mini_o3_coldstart")}



def always_a(files):
    """First pass over V*: the files in which every label is A, or there is none."""
    return {path for path in files
            if all(record.get("label", "A") == "A" for _, record in records(path) if record)}



def going_on(files):
    """First pass over the cold start's texts: hashes of all beginnings that go on in some row."""
    found, columns = set(), ["conversations", "sample_index", "rollout_index"]
    for path in tools.progress_bar(files, desc="beginnings", unit=" files"):
        for _, record in records(path, columns):
            try:
                found.update(conversation(record or {})[1][:-1])
            except ValueError:
                pass  # counted when it is read again
    return found



# name: (what a record becomes; which files: {pattern of "folder/name" in lower case: stem of what
# is written, if the pattern's group finds none}, the first that fits any; what the error says)
TABLE = r"[^/]*\.(?:tsv|parquet)$"



IMPORTERS = {
    "visualprobe": (visualprobe, {r"^(?:visualprobe_)?(.+)/(?:train|val)\.json$": None},
                    "folders such as VisualProbe_Hard with train.json or val.json and data/*.jpg"),
    "vstar": (vstar, {r"/test_questions\.jsonl$": "test", r"\.json$": "test"},
              "test_questions.jsonl, or folders of images with a JSON file beside each"),
    "hrbench": (hrbench, {"(4k|8k)" + TABLE: None}, "hr_bench_4k or _8k as .tsv or .parquet"),
    "mme_realworld": (mme_realworld, {r"mme[^/]?realworld(?:[^/](lite|cn)\b)?" + TABLE: "test"},
                      "MME-RealWorld, -Lite or -CN as .tsv or .parquet"),
    "deepeyes": (deepeyes, {r"\.parquet$": "train"}, "the .parquet files of DeepEyes-Datasets-47k"),
    "mini_o3_coldstart": (mini_o3_coldstart, {r"\.parquet$": "coldstart"},
                          "the .parquet files of the Mini-o3 cold start"),
}



FIRST_PASS = {"vstar": always_a, "mini_o3_coldstart": going_on}



def add_options(row, seed):
    """List the options in the question, put the answer in the place of "right"."""
    options, label, shuffle = row["options"], row.pop("right").upper(), row.pop("shuffle", False)
    check(isinstance(options, list) and options
         and all(isinstance(option, str) and option.strip() for option in options),
         "options are missing or not texts")
    letters = list(string.ascii_uppercase[:len(options)])
    check(label in letters, "the label is not the letter of an option")
    right = letters.index(label)
    if shuffle:  # by the seed and the id, whatever the other rows are
        key = hashlib.sha256(row["id"].encode("utf-8", "replace")).digest()[:8]
        rng = np.random.default_rng([seed, int.from_bytes(key, "big")])
        order = rng.permutation(len(options)).tolist()
        options, right = [options[i] for i in order], order.index(right)
    row["options"] = options = [option.strip() for option in options]
    listed = [f"({letter}) {option}" for letter, option in zip(letters, options)]
    row["question"] = "\n".join([row["question"], *listed])
    alike = sum(tools.match_answer(option, options[right], options) for option in options)
    row["answer"] = options[right] if alike == 1 else f"({letters[right]})"
    check(tools.match_answer(listed[right], row["answer"], options),
         "the right option cannot be told from another one")



def add_turns(row, image):
    """Turn a conversation into a trajectory's fields. Replays the zooms on the image; returns how
    many stored observations have another shape than our crops."""
    (system, user, *texts), seen = row.pop("conversation"), row.pop("seen")
    views, turns = [image], []
    for text, reply in itertools.zip_longest(texts[::2], texts[1::2]):
        turn, finish, prediction = tools.take_turn(views, text, 1, math.inf, math.inf)
        turns.append(turn)
        if reply is None:
            break
        check(finish != "answer", "the conversation goes on after an answer")
        if "zoom" not in turn:
            turn["error"] = reply
        turn["tool_message"] = reply
    # that each zoom, and nothing else, is shown an image is left to check_trajectory
    check(finish == "answer" and prediction, "no final answer")
    check(len(seen) == len(views) - 1, "images and observations differ in number")
    # kept conversations are correct and there is no column with the truth: what was answered is it
    row |= {"question": user.replace("<image>", "").strip(), "answer": prediction, "system": system,
            "user": user, "turns": turns, "finish_reason": "answer", "prediction": prediction,
            "reward": 1.0, "teacher": "mini_o3"}
    return sum(not same_shape(stored, view.size) for stored, view in zip(seen, views[1:]))



def same_shape(stored, size):
    """Whether a stored observation has our crop's aspect ratio, to first order: its sides may have
    been rounded to multiples of 28 for the model, the crop's edges by up to two pixels in all."""
    try:
        w, h = load(stored)[-1].size
    except ValueError:
        return False
    ratio = w * size[1] / (h * size[0])
    return max(ratio, 1 / ratio) <= 1 + 28 / min(w, h) + 2 / min(size)



def complete(row, out, seed):
    """Make a row of what a record became, in place, and store its image, once for all rows that
    share it. Returns the number of observations that differ. Raises ValueError if it is no use."""
    data, suffix, image = load(row["image"])
    row["image"] = f"images/{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"
    if "options" in row:
        add_options(row, seed)
    differing = add_turns(row, image) if "conversation" in row else 0
    tools.json_line(row).encode()  # half a surrogate pair raises UnicodeEncodeError
    (tools.check_trajectory if "turns" in row else tools.check_question)(row)
    if not (out / row["image"]).exists():
        tools.write_atomic(out / row["image"], lambda file: file.write(data), sync=False)
    return differing



def import_rows(make, files, path, seed):
    """Yield the rows of one output file, then print what was read, written and skipped. make:
    (record, its file) -> what it becomes."""
    ids, notes = set(), {}  # notes: {what: [how often, the first place]}
    found = tools.progress_bar(((file, *row) for file in files for row in records(file)),
                           desc=path.stem, unit=" rows")
    for read, (file, place, record) in enumerate(found, 1):
        try:
            check(record is not None, "not a readable row")
            row = make(record, file)
            check(row["id"] not in ids, "id stands in an earlier row too")
            differing = complete(row, path.parent, seed)
        except ValueError as error:
            reason = "text is not UTF-8" if isinstance(error, UnicodeError) else error
            notes.setdefault(f"skipped: {reason}", [0, place])[0] += 1
            continue
        if differing:
            what = "stored observations differ in shape from our crops; their rows are kept"
            notes.setdefault(what, [0, place])[0] += differing
        ids.add(row["id"])
        yield row
    print(f"{path}: {read} rows read, {len(ids)} written")
    for what, (number, place) in notes.items():
        print(f"    {number} {what} (first: {place})")
    check(ids, f"{path} is not written, since no row can be used; the reasons stand above")
    os.sync()  # the images, before the rows that name them



def import_data(name, source, out, seed):
    """Write the rows of a published data set, one file per stem."""
    check(name in IMPORTERS, f"--import {name}: known are {', '.join(IMPORTERS)}")
    make, patterns, expected = IMPORTERS[name]
    root = source if source.is_dir() else source.parent
    paths = sorted(source.rglob("*")) if source.is_dir() else [source]
    found = {}  # {stem of what is written: the files that it is made from}
    for pattern, stem in patterns.items():
        if found:
            break  # the earlier pattern fits
        for path in paths:
            match = re.search(pattern, f"{path.absolute().parent.name}/{path.name}".lower())
            if match and path.is_file():
                found.setdefault(next(filter(None, match.groups()), stem), []).append(path)
    check(found, f"{source}: nothing to import; {name} expects {expected}")
    known = FIRST_PASS[name](sum(found.values(), [])) if name in FIRST_PASS else None
    for stem, files in sorted(found.items()):
        of_stem = partial(make, stem=stem, root=root, known=known)
        path = out / f"{stem}.jsonl"
        tools.write_jsonl(path, import_rows(of_stem, files, path, seed))



def filter_questions(rates, source, low, high):
    """Write the questions of `source` whose pass rate lies in [low, high] beside it, each with its
    "pass_rate". rates: files of {"id", "pass_rate"} rows. Raises InputError.

    At a rate of 0.1 or 0.9, 16 rollouts of a question all agree, and so teach GRPO nothing, in 19
    of 100 cases; beyond that it is soon most cases."""
    known = {}

    def check_rate(row):
        name, rate = row.get("id"), row.get("pass_rate")
        check(isinstance(name, str) and type(rate) in (int, float) and 0 <= rate <= 1,
             "a row of rates has an 'id' and a 'pass_rate' from 0 to 1")
        before = known.setdefault(name, rate)
        check(before == rate,
             f"id '{name}' has another pass_rate, {before}, in an earlier line or file")

    for path in rates:
        tools.read_jsonl(path, check_rate, hint="python evaluate.py")
    rows = tools.read_questions(source, hint="python build_data.py")
    rated = [{**row, "pass_rate": known.pop(row["id"])} for row in rows if row["id"] in known]
    below = sum(row["pass_rate"] < low for row in rated)
    above = sum(row["pass_rate"] > high for row in rated)
    kept = [row for row in rated if low <= row["pass_rate"] <= high]
    out = source.with_name(f"{source.stem}_filtered.jsonl")
    print(f"{out}: {len(kept)} questions kept with a pass rate from {low} to {high}, left out: "
          f"{below} below, {above} above, {len(rows) - len(rated)} without a rate; {len(known)} "
          "rates belong to no question")
    check(kept, f"no question of {source} is left: widen --keep or evaluate these questions; "
               "nothing written")
    tools.write_jsonl(out, kept)

