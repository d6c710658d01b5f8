"""The agent's world, without torch: prompts, the zoom tool, turns, conversations as data, answers.

A conversation starts with a question about an image. In every turn the model thinks and then
either zooms, `<grounding>{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}</grounding>`,
and sees the crop as the next observation, or finishes with `<answer>...</answer>`. The teacher, the
trainer and the rollout engine all use the functions of this file.

How a conversation ends (finish_reason):
    answer        The model gave an answer.
    void          The turn has neither a call nor an answer, or it was cut at its token cap (the
                  word is SimpleTIR's, arXiv 2509.02479).
    over_turn     The model still called the tool when a cap on turns or images was reached.
    over_context  The next observation did not fit into the context (evaluate.py).

A bad call is *refused*: the tool answers with an error, and the conversation continues. A valid
zoom beyond a cap is *not carried out*, and the conversation ends. In the last allowed turn any
call, good or bad, ends it. So the last stored turn never has an observation. If it holds a zoom,
the zoom was beyond a cap (over_turn) or its crop did not fit (over_context): replay() skips it.

What differs from the Mini-o3 paper (arXiv 2509.07969) and its code:
1. Model output is parsed with json and explicit checks. A bad call is answered with one sentence
   that the model can act on.
2. Crops are cut from the *native* pixels of their source. Only what the model sees is resized.
3. Box corners are floored (near) and ceiled (far), so a box never loses pixels that it touches.
4. The prompts are our own words; `--prompts FILE` replaces them (see PROMPTS).

This file has no command of its own. Try it:
    python -c "import tools; print(tools.parse_turn('<answer>7</answer>'))"
"""

import json
import math
import os
import re
import tempfile
import unicodedata
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps, PngImagePlugin

# ---- Errors -------------------------------------------------------------------------------------


class ToolError(ValueError):
    """A zoom that is refused. Its text is one sentence that is sent back to the model."""


class InputError(ValueError):
    """A user's mistake in a file or a flag. Its text is one line: what is wrong and where."""


def check(condition, message):
    """Raise InputError(message) unless the condition is true. A check of a file's row need not say
    which row it is: read_jsonl adds file and line."""
    if not condition:
        raise InputError(message)


def first_line(error):
    """Return the first line of an exception's text, or the name of its type if it has no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# ---- Prompts ------------------------------------------------------------------------------------
# <image> marks where the picture goes. {question} and {error} are filled in. An observation may be
# called by {name} (observation_2), {number} (2) or {action} (the number of turns before the one
# that zoomed).

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

# Without these, the model would not be told the question, the picture or its mistake.
REQUIRED_PLACEHOLDERS = {"question": ["{question}", "<image>"], "observation": ["<image>"],
                         "error": ["{error}"]}


def load_prompts(path):
    """Return PROMPTS, some of them replaced by the JSON file at path (None: no file). Raise
    InputError if it is no such JSON object or if a prompt lacks a placeholder."""
    if path is None:
        return dict(PROMPTS)
    try:
        replacements = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read prompts as JSON: {error}") from None
    has_known_keys = isinstance(replacements, dict) and replacements.keys() <= PROMPTS.keys()
    check(has_known_keys and all(isinstance(text, str) for text in replacements.values()),
          f"{path}: prompts are a JSON object of strings with keys among {', '.join(PROMPTS)}")
    prompts = {**PROMPTS, **replacements}
    for key, placeholders in REQUIRED_PLACEHOLDERS.items():
        for placeholder in placeholders:
            check(prompts[key].count(placeholder) == 1,
                  f"{path}: '{key}' must contain {' and '.join(placeholders)} exactly once")
    return prompts


def system_text(row, prompts):
    """Return the system message: the row's own if it has one. An empty text means no message."""
    if row.get("system") is not None:
        return row["system"]
    return prompts["system"]


def question_text(row, prompts):
    """Return the first message to the policy: (text before the image, text after it)."""
    if row.get("user") is not None:  # an imported conversation has its own words
        return tuple(row["user"].split("<image>"))
    before_image, after_image = prompts["question"].split("<image>")
    return (before_image.replace("{question}", row["question"]),
            after_image.replace("{question}", row["question"]))


def tool_message(turn, turn_number, num_observations, prompts):
    """Return the tool's answer to a turn: (text before the crop, text after it). The crop is
    observation number `num_observations`. After a refused call it is (error text, None)."""
    message = turn.get("tool_message")  # an imported conversation has its own words
    if "zoom" not in turn:
        if message is None:
            message = prompts["error"].replace("{error}", turn["error"])
        return message, None
    if message is None:
        message = prompts["observation"]
        message = message.replace("{name}", f"observation_{num_observations}")
        message = message.replace("{number}", str(num_observations))
        message = message.replace("{action}", str(turn_number - 1))
    return tuple(message.split("<image>"))


# ---- Images -------------------------------------------------------------------------------------

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000"]  # that are read
MAX_PIXELS = 89_478_485  # of an image; to decode more takes gigabytes
Image.MAX_IMAGE_PIXELS = None  # check_header has this limit, and says what to do
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes; image generators store their long prompts


def check_header(image):
    """Raise InputError if an image that was opened should not be decoded."""
    num_pixels = image.width * image.height
    check(num_pixels <= MAX_PIXELS, f"image has too many pixels ({num_pixels:,}, the limit is "
          f"{MAX_PIXELS:,}); make it smaller, or raise MAX_PIXELS in tools.py")
    # White may be 1, 255, 65535 or anything else.
    check(image.mode not in ("I", "F") or image.format == "PNG", "image has numbers of 32 bits, "
          "and nobody knows which one is white; save it with 8 or 16 bits")


def to_rgb(image):
    """Convert a PIL image to RGB, as an image viewer shows it. Raise InputError as check_header."""
    check_header(image)
    # A camera's photo is turned upright.
    image = ImageOps.exif_transpose(image)
    # 16 bits a pixel are scaled to 8.
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda pixel_value: pixel_value * (1 / 256)).convert("L")
    # Transparent pixels become white.
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white_image = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white_image, image)
    return image.convert("RGB")


def open_image(path, convert=to_rgb):
    """Open an image file and return it as RGB, or what convert(file) makes of it. Raise InputError
    if it is missing, damaged or absurdly large."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return convert(image)
    except FileNotFoundError:
        problem = "image is missing; run the stage that wrote this data again"
    except InputError as error:
        problem = error
    except Exception as error:  # decoders raise nearly anything on broken data
        problem = (f"not a readable image ({first_line(error)}); replace it by a whole one "
                   f"({', '.join(FORMATS)}) or remove its rows")
    raise InputError(f"{path}: {problem}")


def size_for_model(width, height, min_pixels, max_pixels, factor=28):
    """Return (width, height) of the resized copy of a view that the model sees.

    Both sides are rounded to the nearest multiple of `factor` (patch size x merge size), a half to
    the even one, at least one factor. If their area is not between min_pixels and max_pixels, both
    are scaled to it. Rounding may step over a limit if the two are close: 252 x 84 between 6000 and
    8000 pixels becomes 140 x 28. A strip whose short side is one factor, and cannot shrink, gives
    way in length, to the largest multiple with which max_pixels holds (at least one factor).

    >>> size_for_model(756, 756, min_pixels=6000, max_pixels=8000)
    (84, 84)"""
    # 1. Round both sides to the nearest multiple.
    model_width = max(factor, round(width / factor) * factor)
    model_height = max(factor, round(height / factor) * factor)

    # 2. Too large: scale to max_pixels and round down.
    if model_width * model_height > max_pixels:
        shrink_factor = math.sqrt(width * height / max_pixels)
        model_width = max(factor, int(width / shrink_factor / factor) * factor)
        model_height = max(factor, int(height / shrink_factor / factor) * factor)
        # The short side of a strip cannot shrink below one factor: cut the long side instead.
        if model_width * model_height > max_pixels:
            longest_side = max_pixels // factor // factor * factor
            model_width = max(factor, min(model_width, longest_side))
            model_height = max(factor, min(model_height, longest_side))

    # 3. Too small: scale to min_pixels and round up.
    elif model_width * model_height < min_pixels:
        growth_factor = math.sqrt(min_pixels / (width * height))
        model_width = math.ceil(width * growth_factor / factor) * factor
        model_height = math.ceil(height * growth_factor / factor) * factor
    return model_width, model_height


def resize_for_model(image, min_pixels, max_pixels, factor=28):
    """Return the copy of a view that the model sees, see size_for_model."""
    model_size = size_for_model(image.width, image.height, min_pixels, max_pixels, factor)
    if model_size == image.size:
        return image
    return image.resize(model_size, Image.Resampling.BICUBIC)


# ---- The zoom tool ------------------------------------------------------------------------------

MAX_ASPECT_RATIO = 200  # of a crop, in pixels
SOURCE_PATTERN = re.compile(r"original_image|observation_([1-9][0-9]{0,5})")
CALL_EXAMPLE = '{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}'


def validate_call(call):
    """Return (box, source) of a call that the model wrote; box is a list of four floats. Raise
    ToolError with a sentence for the model if the call is bad in itself."""
    if not isinstance(call, dict) or "bbox_2d" not in call or "source" not in call:
        raise ToolError(f"The call must be a JSON object such as {CALL_EXAMPLE}.")
    box = call["bbox_2d"]
    source = call["source"]
    # type() and not isinstance(), since True is an int for isinstance.
    is_list_of_four = isinstance(box, list) and len(box) == 4
    if not is_list_of_four or any(type(number) not in (int, float) for number in box):
        raise ToolError("bbox_2d must be a list of four numbers.")
    # "not (a < b)" is true for NaN, too. A huge integer is compared before float() overflows.
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ToolError("The box must satisfy 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1.")
    if not isinstance(source, str) or not SOURCE_PATTERN.fullmatch(source):
        raise ToolError("The source must be original_image or an earlier observation such as "
                        "observation_1.")
    return [float(number) for number in box], source


def source_index(source):
    """Return the index of a source among the views: original_image 0, observation_3 3."""
    observation_number = SOURCE_PATTERN.fullmatch(source)[1]
    return int(observation_number or 0)


def zoom(views, call):
    """Return the crop that `call` asks for, at the native resolution of its source.

    views: PIL images, [original, observation 1, ...].
    call: {"bbox_2d": corners as fractions of the source, "source": its name}.
    Raise ToolError with a sentence for the model if the call is bad, if the source does not exist
    yet, or if one side of the crop is more than MAX_ASPECT_RATIO times the other."""
    (x0, y0, x1, y1), source = validate_call(call)
    if source_index(source) >= len(views):
        raise ToolError(f"There is no {source} yet.")
    source_view = views[source_index(source)]

    # Every pixel that the box touches: floor of the near corner, ceil of the far one.
    left = math.floor(x0 * source_view.width)
    top = math.floor(y0 * source_view.height)
    # At least one pixel: two neighbouring floats may give the same edge.
    right = max(math.ceil(x1 * source_view.width), left + 1)
    bottom = max(math.ceil(y1 * source_view.height), top + 1)

    short_side, long_side = sorted([right - left, bottom - top])
    if long_side > MAX_ASPECT_RATIO * short_side:
        raise ToolError("The box is too narrow: make it wider or higher.")
    return source_view.crop((left, top, right, bottom))


# ---- One turn of the model ----------------------------------------------------------------------
# Stored as a dict: {"text": all that the model wrote}, and with it "zoom" (a valid call) or "error"
# (why the tool refused the call). A turn that ends the conversation by itself has neither.

THOUGHT_PATTERN = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)  # unclosed: up to the end
TAG_PATTERN = re.compile(r"<(grounding|answer)>")


class TurnResult(NamedTuple):
    turn: dict                  # as it is stored in a row
    finish_reason: str | None   # "answer", "void" or "over_turn"; None: the conversation continues
    prediction: str | None      # the answer, if there is one


def first_tag(text):
    """Return (name, content, end) of the first complete call or answer, or None if there is none.
    First is the one that opens first. Tags inside thoughts do not count, and a thought within a
    call or an answer is read as spaces. Text before a </think> that no <think> opened is a thought,
    too (some servers leave the opening tag out). end: index after the closing tag.

    >>> first_tag("<think>Is it <answer>1</answer>?</think><answer>7</answer> More.")
    ('answer', '7', 58)"""
    # Thoughts become spaces, so that all positions stay the same.
    visible_text = THOUGHT_PATTERN.sub(lambda thought: " " * len(thought[0]), text)
    thought, closing_think_tag, visible_text = visible_text.rpartition("</think>")
    visible_text = " " * len(thought + closing_think_tag) + visible_text
    for opening_tag in TAG_PATTERN.finditer(visible_text):
        tag_name = opening_tag[1]
        closing_tag = f"</{tag_name}>"
        content_start = opening_tag.end()
        content_end = visible_text.find(closing_tag, content_start)
        if content_end >= 0:
            content = visible_text[content_start:content_end]
            return tag_name, content, content_end + len(closing_tag)
    return None


def parse_turn(text):
    """Return what the model asks for in a turn. Never raise.

    ("zoom", call)       call has bbox_2d (four floats) and source, nothing else
    ("answer", answer)   without white space around it; may be empty
    ("error", sentence)  one line of less than 200 characters, with one full stop, at its end
    ("void", None)       neither a call nor an answer

    Text inside <think> is ignored, thinking is optional, and the first complete tag wins."""
    tag = first_tag(text)
    if tag is None:
        return "void", None
    tag_name, content, _ = tag
    if tag_name == "answer":
        return "answer", content.strip()
    try:
        box, source = validate_call(json.loads(content))
    except ToolError as error:
        return "error", str(error)
    except (ValueError, RecursionError):  # not JSON, thousands of digits, or nested too deep
        return "error", f"The call is not valid JSON; write {CALL_EXAMPLE}."
    return "zoom", {"bbox_2d": box, "source": source}


def take_turn(views, text, turn_number, max_turns, max_images):
    """Apply a turn of the model to the conversation and return its TurnResult.

    views: the images so far, original first; the crop of a successful zoom is appended.
    turn_number: 1 for the first turn. max_images counts the original, too.
    A refused call uses up one turn and the conversation continues. In the last allowed turn any
    call ends it as over_turn, and so does a zoom if no image is left; neither is carried out, so a
    zoom's source need not exist. Stored is {"text": text}, of a call with "zoom": the call that
    parse_turn reads, or "error": the sentence of parse_turn or of zoom."""
    # 1. An answer, or neither answer nor call, ends the conversation.
    kind, content = parse_turn(text)
    if kind in ("answer", "void"):
        return TurnResult({"text": text}, finish_reason=kind, prediction=content)

    # 2. So does any call in the last allowed turn, and a zoom at the image cap. The zoom is stored,
    #    but not carried out.
    turn = {"text": text, kind: content}  # kind is "zoom" or "error"
    is_last_allowed_turn = turn_number >= max_turns
    needs_too_many_images = kind == "zoom" and len(views) >= max_images
    if is_last_allowed_turn or needs_too_many_images:
        return TurnResult(turn, finish_reason="over_turn", prediction=None)

    # 3. Zoom. The tool may still refuse the call.
    if kind == "zoom":
        try:
            views.append(zoom(views, content))
        except ToolError as error:
            turn = {"text": text, "error": str(error)}
    return TurnResult(turn, finish_reason=None, prediction=None)


def replay(row, image):
    """Return the views of a stored trajectory: [original, observation 1, ...]. Raise InputError if
    a zoom is impossible. (Crops are not stored: they follow from the image and the zooms.)"""
    views = [image]
    # The last stored turn has no observation.
    for turn_number, turn in enumerate(row["turns"][:-1], start=1):
        if "zoom" in turn:
            try:
                views.append(zoom(views, turn["zoom"]))
            except ToolError as error:
                raise InputError(f"trajectory {row['id']}, turn {turn_number}: {error}") from None
    return views


def view_boxes(row):
    """Return the box of every view of a stored trajectory, [original, observation 1, ...], as
    fractions of the original image. No image is needed. Zooms may be nested:

    >>> half = {"bbox_2d": [0.0, 0.0, 0.5, 0.5], "source": "original_image"}
    >>> corner = {"bbox_2d": [0.5, 0.5, 1.0, 1.0], "source": "observation_1"}
    >>> view_boxes({"turns": [{"zoom": half}, {"zoom": corner}, {"text": "an answer"}]})
    [(0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.5, 0.5)]"""
    boxes = [(0.0, 0.0, 1.0, 1.0)]
    # The last stored turn has no observation.
    for turn in row["turns"][:-1]:
        if "zoom" in turn:
            left, top, right, bottom = boxes[source_index(turn["zoom"]["source"])]
            x0, y0, x1, y1 = turn["zoom"]["bbox_2d"]
            width = right - left
            height = bottom - top
            boxes.append((left + x0 * width, top + y0 * height,
                          left + x1 * width, top + y1 * height))
    return boxes


def black_picture(view):
    """Return a black picture of the size of a view: what evaluate.py --blank_crops shows."""
    return Image.new("RGB", view.size)


# ---- JSONL: one row a line ----------------------------------------------------------------------


def json_line(row):
    """Return a row as a line of strict JSON. Raise ValueError for NaN and infinities."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(text):
    """Parse strict JSON. Raise ValueError also for NaN, infinities and half a surrogate pair."""
    try:
        value = json.loads(text)
        json_line(value).encode("utf-8")  # refuses NaN and infinities; half a surrogate pair
    except RecursionError as error:
        raise ValueError(str(error)) from None
    return value


def parse_json_or_none(text):
    """Return the value of a JSON text of somebody else's program, None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def parse_line(line):
    """Return the row of a line of bytes. Raise ValueError if there is none."""
    text = line.decode("utf-8").strip()
    try:
        row = parse_json(text)
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(text) or error.msg.startswith("Unterminated")
        problem = "cut off, or a JSON object over several lines" if is_cut else "not JSON"
        raise InputError(f"{problem} ({error.msg}, column {error.colno})") from None
    check(isinstance(row, dict), "a row must be a JSON object")
    return row


def read_jsonl(path, check_row=None, hint=""):
    """Return the rows of a JSONL file, a list of dicts. check_row(row) may raise InputError with
    what is wrong in a row. hint: the command that makes the file, told if it does not exist."""
    # 1. Is there such a file?
    path = Path(path)
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        advice = f"; make it with: {hint}" if hint else ""
        raise InputError(f"{path} {problem}{advice}")
    # 2. Its rows. Whatever is wrong with one is told with its line.
    rows = []
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            if line_number == 1:  # on Windows a file of UTF-8 may begin with a mark
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = parse_line(line)
                if check_row is not None:
                    check_row(row)
            except ValueError as error:  # InputError is one
                advice = "fix or remove this line"
                if hint and not rows:  # perhaps it is a file of another kind
                    advice += f", or make another file with: {hint}"
                problem = str(error).rstrip(".")
                raise InputError(f"{path}:{line_number}: {problem}; {advice}") from None
            rows.append(row)
    return rows


def write_atomic(path, write):
    """Write a file in one step, so that a kill leaves the old file or the new one, never a part.
    write(file) writes to a temporary binary file next to `path`, which is then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file_handle, temporary_path = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(file_handle, "wb") as file:
            write(file)
        umask = os.umask(0o022)  # can only be read by setting it
        os.umask(umask)
        os.chmod(temporary_path, 0o666 & ~umask)  # mkstemp lets only its owner read it
        os.replace(temporary_path, path)
    except BaseException as error:
        Path(temporary_path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk tells no file, others the temporary one
        raise


def write_jsonl(path, rows):
    """Write rows to a JSONL file in one step, see write_atomic."""
    def write_rows(file):
        for row in rows:
            file.write(json_line(row).encode("utf-8", "replace"))

    write_atomic(path, write_rows)


class Journal:
    """A JSONL file to which long work appends rows as they are finished, so that a kill loses none.
    rows: what this file and those of other processes (other_paths) held when it was opened. There
    is no lock: a user with several threads needs one."""

    def __init__(self, path, other_paths=()):
        self.path = Path(path)
        self.rows = []
        for journal_path in sorted({self.path, *other_paths}):
            if journal_path.exists():
                self.rows += self.read_complete_lines(journal_path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a", encoding="utf-8")
        # Cut off the last line if a killed run wrote only half of it. Not by writing a new file:
        # a second run of the same command may have it open and append to it.
        os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def read_complete_lines(self, journal_path):
        """Return the rows of a journal, without a last line that was cut short. Raise InputError
        if another line is damaged."""
        complete_lines = journal_path.read_bytes().split(b"\n")[:-1]
        try:
            return [parse_json(line.decode("utf-8")) for line in complete_lines]
        except ValueError as error:
            raise InputError(f"{journal_path}: damaged ({error}); delete it") from None

    def add(self, *rows):
        for row in rows:
            self.file.write(json_line(row))
        self.file.flush()


# ---- Rows: questions and trajectories -----------------------------------------------------------
# A question (the image's path is relative to the file's folder):
#     {"id": "1", "image": "images/1.jpg", "question": "What digit ...?", "answer": "7"}
# It may have "options" (a list of strings), "system" and "user" (instead of the prompts' texts),
# and what evaluate.py groups by: "source" (the data set; not a zoom's source), "level", "category"
# and "cycle" (HR-Bench asks a question several times). A drawn one has its layout, see
# build_data.make_scene.
# A trajectory is a question with "turns" (see "One turn of the model"). A turn may have "learn"
# (false keeps its text out of the loss: a teacher's deliberate mistake) and, if imported,
# "tool_message" (the tool's words after it).


def check_question(row):
    """Raise InputError unless the row is a question whose image is inside the data's folder."""
    # What every question has.
    for field in ("id", "image", "question", "answer"):
        value = row.get(field)
        check(isinstance(value, str) and value.strip(),
              f"field '{field}' must be a non-empty string")
    check(plain_answer(row["answer"]), "field 'answer' has nothing inside its tags")
    image_path = Path(row["image"])
    check(not image_path.is_absolute() and ".." not in image_path.parts,
          f"image path '{row['image'][:80]}' must stay inside the folder of this file: copy the "
          "image there")

    # The answer must be one of the options.
    options = row.get("options")
    if options is not None:
        is_filled_list = isinstance(options, list) and len(options) > 0
        check(is_filled_list and all(isinstance(option, str) for option in options),
              "field 'options' must be a list of strings or absent")
        check(option_index(row["answer"], options) is not None,
              f"the answer '{row['answer']}' is none of the options, neither by letter nor by its "
              "words")

    # What only some questions have.
    for field in ("system", "source", "category", "cycle"):
        check(row.get(field) is None or isinstance(row[field], str),
              f"field '{field}' must be a string or absent")
    check(row.get("level") in (None, "easy", "medium", "hard"),
          "field 'level' must be easy, medium, hard or absent")
    if row.get("user") is not None:
        check(isinstance(row["user"], str) and row["user"].count("<image>") == 1,
              "field 'user' must be a string with <image> exactly once, or absent")


def check_trajectory(row):
    """Raise InputError unless the row is a question with turns that fit one another."""
    check_question(row)
    check("turns" in row, "it has no 'turns': it is a question, not a trajectory")
    turns = row.get("turns")
    check(isinstance(turns, list) and turns, "field 'turns' must be a non-empty list")
    num_observations = 0
    for turn_number, turn in enumerate(turns, start=1):
        try:
            check_turn(turn, num_observations, is_last=turn_number == len(turns))
        except (InputError, ToolError) as error:
            raise InputError(f"turn {turn_number}: {error}") from None
        if "zoom" in turn:
            num_observations += 1


def check_turn(turn, num_observations, is_last):
    """Raise InputError or ToolError unless the turn may come after so many observations."""
    check(isinstance(turn, dict) and isinstance(turn.get("text"), str),
          "it must be an object with a 'text'")
    check(isinstance(turn.get("learn", True), bool), "'learn' must be true, false or absent")
    # Every stored turn but the last has a zoom or an error. The zoom of the last one may not have
    # been carried out: its source need not exist.
    if "zoom" in turn:
        _, source = validate_call(turn["zoom"])
        check(is_last or source_index(source) <= num_observations, f"there is no {source} yet")
    else:
        check(is_last or "error" in turn, "it has neither 'zoom' nor 'error' and is not the last")
        check(isinstance(turn.get("error", ""), str), "'error' must be a string")
    message = turn.get("tool_message")
    if message is not None:
        num_images = 1 if "zoom" in turn else 0
        check(not is_last and isinstance(message, str) and message.count("<image>") == num_images,
              f"'tool_message' must be a string with <image> {num_images} times, and absent on the "
              "last turn")


def without_layout(row):
    """Return a question without the layout of its image, which only the scripted teacher sees."""
    return {key: value for key, value in row.items() if key not in ("objects", "wallpaper")}


def read_questions(path, check_row=check_question, hint=""):
    """Return the question rows of a file. Raise InputError as read_jsonl, and if an id repeats."""
    known_ids = set()

    def check_new_row(row):
        check_row(row)
        check(row["id"] not in known_ids, f"id '{row['id']}' is in an earlier line, too")
        known_ids.add(row["id"])

    return read_jsonl(path, check_new_row, hint)


# ---- Answers ------------------------------------------------------------------------------------

# What may be written around an answer: tags, "The answer is", LaTeX. The group is what is inside.
OPTION_WORD = "answer|option|choice|答案|选项|选择|选"
WRAPPINGS = [r".*<answer>(.*?)</answer>.*",
             r"\W*(?:(?:the|my|best|correct|right|final)\s+|正确)*"
             rf"(?:{OPTION_WORD})(?:\s+is\b|[是为]|\W*[:：])(.*)",
             r".*\\boxed\{(.*)\}.*", r"[\s$]*\\(?:text|math)\w*\{(.*)\}[\s$]*"]
# "The", and "a" at the beginning, after a comma or a word such as "and": not that of "Gate A 5".
ARTICLE = re.compile(
    r"\bthe\s+(?=\W*\w)|(^\W*|[,;:.]\s+|\b(?:and|at|behind|by|for|from|in|near|of|on|or|to|under|"
    r"with)\s+)an? +(?=['\"*]*[a-z])")
SIGNS = "+<>≤≥≠±×÷√-"  # no punctuation: "B+", "-5", "√2"
# An option's letter, and perhaps the option's words after it. The sign of "B+" or "-5" is no pause.
PAUSE = rf"(?:[^\w{SIGNS}]|_|[<>](?! ?\d)|-\s)*"
OPTION_LETTER = re.compile(rf"{PAUSE}(?:(?:{OPTION_WORD}){PAUSE})?([A-Z])(?![a-z0-9+-]){PAUSE}(.*)",
                           re.IGNORECASE | re.DOTALL)


def plain_answer(text):
    """Return what is inside of WRAPPINGS: "7" for "<answer>7</answer>" and "$\\boxed{7}$"."""
    for wrapping in WRAPPINGS:
        text = re.sub(rf"\A{wrapping}\Z", r"\1", text, flags=re.IGNORECASE | re.DOTALL)
    return text.strip()


def normalise(text):
    """Return the text as answers are compared: plain, in lower case, Unicode forms folded, without
    articles, outer punctuation and extra spaces. "The 'red' fox!" becomes "red fox"."""
    text = re.sub("(?<=[0-9])(?=[²³¹⁰-⁹])", "^", plain_answer(text))  # 10² is not 102
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    # Hyphens, spaces and emoji selectors that nobody sees.
    text = re.sub("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe0e\ufe0f\ufeff]", "", text)
    text = re.sub(r"[\u2212\u2013](?=\.?\d)", "-", text)  # a printed minus
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)   # 1,000
    text = ARTICLE.sub(r"\1", text)
    # Marks on letters, such as vowel signs of Hindi, are no \w, but belong to the word.
    marks = "".join(character for character in re.findall(r"(?<=\S)\W", text)
                    if unicodedata.category(character) in ("Mn", "Mc"))
    # Punctuation before a word, but not the point of ".5" and no sign.
    bare_text = re.sub(rf"(?<![\w{marks}])(?:(?!\.\d)[^\w{marks}\s{SIGNS}])+", " ", text)
    # Punctuation after a word, but not that of "C#".
    bare_text = re.sub(rf"[^\w{marks}\s#{SIGNS}]+(?![\w{marks}])", " ", bare_text)
    return " ".join(bare_text.split()) or text.strip()  # only punctuation ("?") is kept as it is


def option_index(text, options):
    """Return the index of the option that `text` names, or None if it names none. It may use the
    option's words ("red") or letter ("B", "(B)", "**B**", "B. red", "Option B"), but not a letter
    with other words."""
    # 1. The words of an option come first, even if they look like the letter of another one.
    text = plain_answer(text)
    if text in options:  # "$5", where "5%" is another one
        return options.index(text)
    option_words = [normalise(option) for option in options]
    if option_words.count(normalise(text)) == 1:  # "5 %" is not told from "5"
        return option_words.index(normalise(text))

    # 2. A letter, with nothing or the same option's words after it.
    letter_match = OPTION_LETTER.fullmatch(unicodedata.normalize("NFKC", text))
    if letter_match is None:
        return None
    letter_index = ord(letter_match[1].upper()) - ord("A")
    words_after_letter = normalise(letter_match[2])
    if letter_index >= len(options) or words_after_letter not in ("", option_words[letter_index]):
        return None
    return letter_index


def is_decided(prediction, options=None):
    """Return whether match_answer can decide if the prediction is correct. It can if there is no
    prediction or if it names an option. Else only a judge can tell if other words mean the same."""
    if not prediction:
        return True
    return bool(options) and option_index(prediction, options) is not None


def match_answer(prediction, answer, options=None):
    """Return whether the prediction is the answer. With options, both must name the same one;
    without (None, []) their normalised words must be the same. No prediction (None) is wrong."""
    if prediction is None:
        return False
    if not options:
        return normalise(prediction) == normalise(answer)
    predicted_index = option_index(prediction, options)
    return predicted_index is not None and predicted_index == option_index(answer, options)
