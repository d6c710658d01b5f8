"""The agent's world, without torch: prompts, the zoom tool, turns, conversations as data, answers.

A conversation starts with a question about an image. In every turn the model thinks and then either
zooms, `<grounding>{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}</grounding>`, and is
shown the crop as the next observation, or finishes with `<answer>...</answer>`. All that such a
conversation consists of is here; the teacher, the trainer and the rollout engine use it unchanged.

What differs from the Mini-o3 paper (arXiv 2509.07969) and its code:
1. Model output is parsed with json and explicit checks; a bad call is answered with one sentence
   that the model can act on.
2. Crops come from the *native* pixels of their source; only what the model sees is resized.
3. Box corners are floored (near) and ceiled (far), so a box never loses the pixels it touches.
4. The prompts are our own words; `--prompts FILE` puts others in their place (see PROMPTS).

This file has no command of its own. Try it:
    python -c "import tools; print(tools.parse_turn('<answer>7</answer>'))"
"""

import errno
import json
import math
import os
import re
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

# ---- Errors, for the model (ToolError) and for the person at the keyboard (InputError) ----------


class ToolError(ValueError):
    """A zoom that cannot be done; its text is one sentence that is sent back to the model."""


class InputError(ValueError):
    """A mistake in a file or a flag; its text is one line: what is wrong, where, and what to do."""


def check(right, wrong):
    """Raises InputError, saying what is wrong, unless something is right. About a row of a file the
    text names no row: whoever reads the file adds file:line, or counts the text as a reason."""
    if not right:
        raise InputError(wrong)


def run(main):
    """Run a stage and print how long it took. A user's mistake is one line on stderr and exit code
    1, not a traceback."""
    start, rank = time.time(), int(os.environ.get("RANK", "0"))
    name = Path(sys.argv[0]).name
    try:
        main()
    except InputError as error:
        sys.exit(f"{name}: error: {error}")
    except RuntimeError as error:
        # of torch.distributed: nothing is saved, since nobody knows what the others have done
        if not re.search("by peer|Broken pipe|Timed out waiting|remote process", str(error)):
            raise
        first, *more = [line.strip()[:160] for line in str(error).splitlines() if line.strip()]
        said = " ... ".join([first, *more[-1:]])  # NCCL's cause is its last line
        sys.exit(f"{name}: rank {rank} stops because another process has ended ({said})")
    except KeyboardInterrupt:  # at once: threads that wait for a server would hold up an exit
        sys.stdout.flush()
        print(f"{name}: interrupted; what was saved is kept", file=sys.stderr, flush=True)
        os._exit(130)
    except OSError as error:  # disk full, no permission; no file is half-written, see write_atomic
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; earlier files are untouched: free the disk or change --out and run again"
        sys.exit(f"{name}: error: {error.strerror or error} "
                 f"({error.filename or 'while writing'}){advice if full else ''}")
    if rank == 0:
        minutes, seconds = divmod(time.time() - start, 60)
        print(f"{name}: finished in {minutes:.0f} min {seconds:.0f} s", flush=True)


class PlainLines:
    """Where a progress bar goes that has no terminal, as in a log file: each state is a line."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass


def progress_bar(*args, **kwargs):
    """tqdm's bar on a terminal; anywhere else a plain line every half minute."""
    if not sys.stderr.isatty():
        kwargs.update(file=PlainLines(), mininterval=30, maxinterval=30,
                      bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]")
    return tqdm(*args, **kwargs)


# ---- Prompts ------------------------------------------------------------------------------------
# `<image>` marks where the picture goes; {question}, {error} and what names an observation
# are filled in: {name} (observation_2), {number} (2), {action} (turns before the one that zoomed).

PROMPTS = {
    "system": "You answer a question about a large image of which you see small views. Think "
              "between <think> and </think>, then either zoom into a box, in fractions of its "
              "source (original_image or an observation), "
              '<grounding>{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}</grounding>, '
              "or finish, <answer>your answer</answer>.",
    "question": "{question}\n<image>",
    "observation": "{name}:\n<image>",
    "error": "Error: {error}",
}


def check_number_flags(args, may_be_0=(), free=()):
    """Raises InputError unless all flags that are numbers are finite and above 0. may_be_0: names
    of those that may be 0, too; free: of those that may be any number."""
    for name, value in vars(args).items():
        if type(value) in (int, float) and name not in free:
            least = "of at least 0" if name in may_be_0 else "above 0"
            right = 0 < value < math.inf or (value == 0 and name in may_be_0)
            check(right, f"--{name} {value} must be a number {least}")


def load_prompts(path):
    """PROMPTS, with what a JSON file puts in their place (None: nothing). Raises InputError."""
    if path is None:
        return dict(PROMPTS)
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read prompts as JSON: {error}") from None
    right = isinstance(given, dict) and given.keys() <= PROMPTS.keys()
    check(right and all(isinstance(text, str) for text in given.values()),
         f"{path}: prompts are a JSON object of strings with keys among {', '.join(PROMPTS)}")
    prompts = {**PROMPTS, **given}
    for key, parts in {"question": ["{question}", "<image>"], "observation": ["<image>"],
                       "error": ["{error}"]}.items():
        check(all(prompts[key].count(part) == 1 for part in parts),
             f"{path}: '{key}' must contain {' and '.join(parts)} exactly once")
    return prompts


def system_text(row, prompts):
    """The row's own system text, or the prompts' one; empty for none."""
    return prompts["system"] if row.get("system") is None else row["system"]


def question_text(row, prompts):
    """The first message to the policy: (text before the image, text after it)."""
    if row.get("user") is not None:  # an imported conversation has its own words
        return tuple(row["user"].split("<image>"))
    parts = prompts["question"].split("<image>")
    return tuple(part.replace("{question}", row["question"]) for part in parts)


def tool_message(turn, turns, shown, prompts):
    """What the tool says after a turn, the conversation's `turns`-th, when `shown` observations
    have been seen: (text before the crop, text after it), or one text, why the call was refused."""
    text = turn.get("tool_message")  # an imported conversation has its own words
    if "zoom" not in turn:
        return prompts["error"].replace("{error}", turn["error"]) if text is None else text
    if text is None:
        text = prompts["observation"].replace("{name}", f"observation_{shown}")
        text = text.replace("{number}", str(shown)).replace("{action}", str(turns - 1))
    return tuple(text.split("<image>"))


# ---- Images -------------------------------------------------------------------------------------


def open_image(path):
    """An image file as RGB. Raises InputError if it is missing, damaged or absurdly large."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        wrong = "image is missing; run the stage that wrote this data again"
    except Exception as error:  # decoders raise nearly anything on broken data
        wrong = f"not a readable image ({error}); replace it or remove its rows"
    raise InputError(f"{path}: {wrong}")


def to_rgb(image):
    """A PIL image as RGB, as a viewer shows it: a camera's photo upright (EXIF), 16 bits scaled to
    8, white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def size_for_model(width, height, min_pixels, max_pixels, factor=28):
    """(width, height) of the copy of a view that the model is shown: multiples of `factor` (patch x
    merge), the area in [min_pixels, max_pixels] where that is possible, the aspect ratio kept as
    well as the grid allows. Sides are rounded (Python's round, one factor at least), and rounded
    anew towards the limit that this breaks, if it does; that may break the other one."""
    w, h = (max(factor, round(side / factor) * factor) for side in (width, height))
    if w * h > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        w, h = (max(factor, int(side / scale / factor) * factor) for side in (width, height))
        if w * h > max_pixels:  # a strip: its short side cannot shrink below one factor
            longest = max_pixels // factor // factor * factor
            w, h = (max(factor, min(side, longest)) for side in (w, h))
    elif w * h < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(side * scale / factor) * factor for side in (width, height))
    return w, h


def resize_for_model(image, min_pixels, max_pixels, factor=28):
    """The copy of a view that the model is shown, see size_for_model."""
    size = size_for_model(*image.size, min_pixels, max_pixels, factor)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


# ---- The zoom tool ------------------------------------------------------------------------------

MAX_ASPECT_RATIO = 200
SOURCE = re.compile(r"original_image|observation_([1-9][0-9]{0,5})")
FORMAT = '{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}'


def validate_call(call):
    """([x0, y0, x1, y1] floats, source) of an untrusted call. Raises ToolError with a sentence."""
    if not isinstance(call, dict) or "bbox_2d" not in call or "source" not in call:
        raise ToolError(f"The call must be a JSON object such as {FORMAT}.")
    box, source = call["bbox_2d"], call["source"]
    if not isinstance(box, list) or [type(v) in (int, float) for v in box] != [True] * 4:
        raise ToolError("bbox_2d must be a list of four numbers.")
    x0, y0, x1, y1 = box
    # so that NaN fails too; huge integers are compared before they become floats and overflow
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ToolError("The box must satisfy 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1.")
    if not isinstance(source, str) or not SOURCE.fullmatch(source):
        raise ToolError("The source must be original_image or an earlier observation such as "
                        "observation_1.")
    return [float(v) for v in box], source


def source_index(source):
    """Which of a conversation's views a source names: 0 the original, i the observation i."""
    return int(SOURCE.fullmatch(source)[1] or 0)


def zoom(views, call):
    """Crop the box of `call` from its source at native resolution.

    views: PIL images, see source_index; call: {"bbox_2d": relative corners, "source": name}.
    Pixels: floor of the near corner, ceil of the far one. Raises ToolError with a sentence, which
    names a source that is not there, or says "narrow" where the crop's longer side has more than
    MAX_ASPECT_RATIO times the pixels of its shorter one.
    """
    (x0, y0, x1, y1), source = validate_call(call)
    index = source_index(source)
    if index >= len(views):
        raise ToolError(f"There is no {source} yet.")
    width, height = views[index].size
    left, top = math.floor(x0 * width), math.floor(y0 * height)
    # neighbouring floats may round to the same edge of a pixel
    right, bottom = max(math.ceil(x1 * width), left + 1), max(math.ceil(y1 * height), top + 1)
    w, h = right - left, bottom - top
    if max(w, h) > MAX_ASPECT_RATIO * min(w, h):
        raise ToolError("The box is too narrow: make it wider or higher.")
    return views[index].crop((left, top, right, bottom))


# ---- One turn of the model ----------------------------------------------------------------------

_THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)  # an unclosed thought runs to the end
_TAG = re.compile(r"<(grounding|answer)>")


def first_tag(text):
    """The first complete call or answer outside of thoughts, the one that opens first: (kind, what
    is inside as it is, where its closing tag ends in `text`); None if there is none."""
    text = _THINK.sub(lambda thought: " " * len(thought[0]), text)
    for match in _TAG.finditer(text):
        closing = f"</{match[1]}>"
        end = text.find(closing, match.end())
        if end >= 0:
            return match[1], text[match.end():end], end + len(closing)
    return None


def parse_turn(text):
    """What a turn asks for. Never raises.

    ("zoom", call) | ("answer", text) | ("error", sentence) | ("void", None: neither of these).
    A call holds bbox_2d, four floats, and source, no more; an answer may be empty. A sentence is
    one line of less than 200 characters with one full stop, at its end. Text inside <think>
    is ignored, thinking is optional, and the first complete tag wins.
    """
    tag = first_tag(text)
    if tag is None:
        return "void", None
    kind, body, _ = tag
    if kind == "answer":
        return "answer", body.strip()
    try:
        box, source = validate_call(json.loads(body))
    except ToolError as error:
        return "error", str(error)
    except (ValueError, RecursionError):  # not JSON, thousands of digits, or nested too deep
        return "error", f"The call is not valid JSON; write {FORMAT}."
    return "zoom", {"bbox_2d": box, "source": source}


def take_turn(views, text, number, max_turns, max_images):
    """Apply turn `number` (1-based) of a conversation: parse it, zoom, decide whether it is over.

    views: the images so far, original first; a successful crop is appended. max_images counts the
    original too. Returns (turn, finish, prediction): turn as stored in a row; finish None while it
    goes on, else "answer" | "void" | "over_turn". A refused call costs a turn, no more; on the last
    turn it is over_turn, too, and keeps its error.
    """
    kind, value = parse_turn(text)
    turn = {"text": text}
    if kind in ("answer", "void"):
        return turn, kind, value
    turn[kind] = value
    if number >= max_turns or (kind == "zoom" and len(views) >= max_images):
        return turn, "over_turn", None  # that turn keeps its refused zoom
    if kind == "zoom":
        try:
            views.append(zoom(views, value))
        except ToolError as error:
            turn = {"text": text, "error": str(error)}
    return turn, None, None


def replay(row, image):
    """Views of a stored trajectory: [original, observation 1, ...]; crops follow from the zooms. A
    zoom on the last turn was refused (turn or image cap). Raises InputError on an impossible zoom.
    """
    views = [image]
    for number, turn in enumerate(row["turns"][:-1], 1):
        if "zoom" in turn:
            try:
                views.append(zoom(views, turn["zoom"]))
            except ToolError as error:
                raise InputError(f"trajectory {row['id']}, turn {number}: {error}") from None
    return views


# ---- JSONL --------------------------------------------------------------------------------------


def parse_json(text):
    """json.loads of what must be JSON to others too. Raises ValueError, also for NaN, infinities
    and halves of a surrogate pair."""
    try:
        value = json.loads(text)
        json_line(value).encode("utf-8")
    except RecursionError as error:
        raise ValueError(str(error)) from None
    return value


def read_jsonl(path, check_row=None, hint=""):
    """Rows of a JSONL file, a list of dicts. Raises InputError naming file:line for a bad row and,
    for a missing file, saying what to do (hint: the command that makes it). check_row(row) may raise
    InputError with what is wrong in the row."""
    path, rows = Path(path), []
    if not path.is_file():
        wrong = "is not a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {wrong}" + (f"; make it with: {hint}" if hint else ""))
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8"))
                check(isinstance(row, dict), "a row must be a JSON object")
                if check_row is not None:
                    check_row(row)
            except ValueError as error:
                raise InputError(f"{path}:{number}: {error}; mend or remove this line") from None
            rows.append(row)
    return rows


def write_atomic(path, write, sync=True):
    """Call write(file) on a temporary binary file beside `path`, flush it to disk, then put it in
    place in one step. sync False does not flush: a kill does no harm, but a power failure could."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def json_line(row):
    """One row as a line of strict JSON (NaN and infinities are refused)."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path, rows):
    """Write rows atomically: the file is either the old one or the complete new one."""
    write_atomic(path, lambda file: file.writelines(json_line(row).encode("utf-8", "replace")
                                                    for row in rows))


class Journal:
    """Rows that long work appends to a file as they are finished, so that a kill loses none. rows:
    what is there already, in this file and in `others`, those of other processes."""

    def __init__(self, path, others=()):
        self.path, self.rows = Path(path), []
        for file in sorted({self.path, *others}):
            # complete lines only: a kill may have cut the last
            lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
            try:
                self.rows += [parse_json(line.decode("utf-8")) for line in lines]
            except ValueError as error:
                raise InputError(f"{file}: damaged ({error}); delete it") from None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a", encoding="utf-8")
        # without a line that was cut; in place, since another process may be writing too
        os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def add(self, *rows):
        self.file.writelines(map(json_line, rows))
        self.file.flush()


def check_question(row):
    """Raises InputError unless `row` is a question whose image lies inside the data's folder."""
    for key in ("id", "image", "question", "answer"):
        check(isinstance(row.get(key), str) and row[key].strip(),
             f"field '{key}' must be a non-empty string")
    path, options, user = Path(row["image"]), row.get("options"), row.get("user")
    check(not path.is_absolute() and ".." not in path.parts,
         f"image path '{row['image']}' must stay inside the folder of this file")
    if options is not None:
        check(isinstance(options, list) and options and all(isinstance(o, str) for o in options),
             "field 'options' must be a list of strings or absent")
        check(option_index(row["answer"], options) is not None, f"the answer '{row['answer']}' is none "
             "of the options, neither by letter nor by its words")
    check(isinstance(row.get("system", ""), (str, type(None))),
         "field 'system' must be a string or absent")
    check(user is None or (isinstance(user, str) and user.count("<image>") == 1),
         "field 'user' must be a string with <image> exactly once, or absent")
    check(all(isinstance(row.get(key, ""), str) for key in ("source", "category", "cycle")),
         "fields 'source', 'category' and 'cycle' must be strings or absent")
    check(row.get("level") in (None, "easy", "medium", "hard"),
         "field 'level' must be easy, medium, hard or absent")


def check_trajectory(row):
    """Raises InputError unless `row` is a question with turns: texts, each with a zoom, an error,
    or neither at the end."""
    check_question(row)
    turns, shown = row.get("turns"), 0
    check(isinstance(turns, list) and turns, "field 'turns' must be a non-empty list")
    for number, turn in enumerate(turns, 1):
        at, last = f"turn {number}", number == len(turns)
        check(isinstance(turn, dict) and isinstance(turn.get("text"), str),
             f"{at} must be an object with a 'text'")
        check(isinstance(turn.get("learn", True), bool),
             f"{at}: 'learn' must be true, false or absent")
        if "zoom" in turn:
            try:
                _, source = validate_call(turn["zoom"])
            except ToolError as error:
                raise InputError(f"{at}: {error}") from None
            check(last or source_index(source) <= shown, f"{at}: there is no {source} yet")
            shown += 1
        else:
            check(isinstance(turn.get("error", ""), str), f"{at}: 'error' must be a string")
            check(last or "error" in turn,
                 f"{at} has neither 'zoom' nor 'error' and is not the last")
        reply, images = turn.get("tool_message"), int("zoom" in turn)
        if reply is not None:
            check(not last and isinstance(reply, str) and reply.count("<image>") == images,
                 f"{at}: 'reply' must be a string with <image> {images} times, and absent on the "
                 "last turn")


def without_layout(row):
    """A question row as all but the scripted teacher may see it: without where things lie."""
    return {k: v for k, v in row.items() if k not in ("objects", "wallpaper")}


def read_questions(path, hint="", check_row=check_question):
    """Question rows of a file. Raises InputError as read_jsonl does, and for an id met twice."""
    seen = set()

    def check_new(row):
        check_row(row)
        check(row["id"] not in seen, f"id '{row['id']}' stands in an earlier line too")
        seen.add(row["id"])

    return read_jsonl(path, check_new, hint)


# ---- Answers ------------------------------------------------------------------------------------


def normalise(text):
    """Lower case, Unicode forms folded, without articles, outer punctuation and extra spaces."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"\b(a|an|the)\s+(?=\W*\w)", " ", text)  # "the fox", but not in "vitamin A"
    words = re.sub(r"(?<!\w)(?:(?!\.\d)[^\w\s+-])+|[^\w\s+-]+(?!\w)", " ", text).split()
    return " ".join(words) or text.strip()  # punctuation only ("?") is compared as it stands


def option_index(text, options):
    """Index of the option that `text` names by its words or by letter ("B", "(B)", "B. red"); None
    if it names none, as a letter in front of other words than its option's does."""
    words = [normalise(option) for option in options]
    if normalise(text) in words:
        return words.index(normalise(text))
    match = re.fullmatch(r"\s*\(?([A-Za-z])\)?\s*(?:[.:)]\s*(.*))?", text, re.DOTALL) \
        or re.fullmatch(r"\s*\(([A-Za-z])\)\s*(.*)", text, re.DOTALL)
    if match is None:
        return None
    index, rest = ord(match[1].upper()) - ord("A"), normalise(match[2] or "")
    fits = index < len(options) and rest in ("", words[index])
    return index if fits else None


def is_decided(prediction, options=None):
    """Whether match_answer can tell right from wrong: there is no prediction, or it names one of
    the options. Otherwise other words may mean the same, which only a judge can tell."""
    return not prediction or bool(options and option_index(prediction, options) is not None)


def match_answer(prediction, answer, options=None):
    """Whether the prediction is the answer. With options: whether both name the same one, and what
    names none is wrong. Without: whether their normalised words are the same."""
    if prediction is None:
        return False
    if options:
        chosen = option_index(prediction, options)
        return chosen is not None and chosen == option_index(answer, options)
    return normalise(prediction) == normalise(answer)
