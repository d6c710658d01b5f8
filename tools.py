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

import base64
import collections
import errno
import io
import json
import math
import os
import random
import re
import sys
import tempfile
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from PIL import Image, ImageOps
from tqdm import tqdm

# ---- Errors, for the model (ToolError) and for the person at the keyboard (InputError) ----------


class ToolError(ValueError):
    """A zoom that cannot be done; its text is one sentence that is sent back to the model."""


class InputError(ValueError):
    """A mistake in a file or a flag; its text is one line: what is wrong, where, and what to do."""


def need(right, wrong):
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


def Progress(*args, **kwargs):
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

# The small language of the scripted teacher, shared by the base model's data and the cold start: a
# word that has to be copied from one turn to the next must look the same in both.
PLACES = ["top-left", "top", "top-right", "left", "center", "right",
          "bottom-left", "bottom", "bottom-right"]
PHRASES = {
    "part": "I see {colour} in {places}.",         # a view of nine places: which hold this colour
    "no_part": "I see no {colour}.",
    "walls": "I see {colour} walls in {places}.",  # the whole image: walls hint at what is there
    "no_walls": "I see no {colour} walls.",
    "cell": "I see {colour} {shape} {digit}.",     # a view of one place
    "empty": "I see nothing.",
    "verdict": " Want {wanted}. {verdict}.",       # after a cell: is it what the question names?
    "answer": " Answer {answer}.",                 # what follows from a Yes
    "here": " In {source} {places}.",              # candidates still to be looked at, where seen
    "later": " Later {places}.",                   # parts of the image still to be looked at
    "go": " Go {place}.",
    "scan": " Scan.", "shuffle": " Shuffle.", "hint": " Hint.",      # the plan, said in turn one
    "guess": " Guess {answer}.",                   # an answer that nothing seen supports
    "again": " Not found. Scan again.",
    "back": " Wrong guess. Back.",
    "check": " Check.",
    "sorry": "That call was refused.",
}


def check_flags(args, may_be_0=(), free=()):
    """Raises InputError unless all flags that are numbers are finite and above 0. may_be_0: names
    of those that may be 0, too; free: of those that may be any number."""
    for name, value in vars(args).items():
        if type(value) in (int, float) and name not in free:
            least = "of at least 0" if name in may_be_0 else "above 0"
            right = 0 < value < math.inf or (value == 0 and name in may_be_0)
            need(right, f"--{name} {value} must be a number {least}")


def load_prompts(path):
    """PROMPTS, with what a JSON file puts in their place (None: nothing). Raises InputError."""
    if path is None:
        return dict(PROMPTS)
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read prompts as JSON: {error}") from None
    right = isinstance(given, dict) and given.keys() <= PROMPTS.keys()
    need(right and all(isinstance(text, str) for text in given.values()),
         f"{path}: prompts are a JSON object of strings with keys among {', '.join(PROMPTS)}")
    prompts = {**PROMPTS, **given}
    for key, parts in {"question": ["{question}", "<image>"], "observation": ["<image>"],
                       "error": ["{error}"]}.items():
        need(all(prompts[key].count(part) == 1 for part in parts),
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


def reply_text(turn, turns, shown, prompts):
    """What the tool says after a turn, the conversation's `turns`-th, when `shown` observations
    have been seen: (text before the crop, text after it), or one text, why the call was refused."""
    text = turn.get("reply")  # an imported conversation has its own words
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
            return as_shown(image)
    except FileNotFoundError:
        wrong = "image is missing; run the stage that wrote this data again"
    except Exception as error:  # decoders raise nearly anything on broken data
        wrong = f"not a readable image ({error}); replace it or remove its rows"
    raise InputError(f"{path}: {wrong}")


def as_shown(image):
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

MAX_ASPECT = 200
SOURCE = re.compile(r"original_image|observation_([1-9][0-9]{0,5})")
FORMAT = '{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}'


def check_call(call):
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
    MAX_ASPECT times the pixels of its shorter one.
    """
    (x0, y0, x1, y1), source = check_call(call)
    index = source_index(source)
    if index >= len(views):
        raise ToolError(f"There is no {source} yet.")
    width, height = views[index].size
    left, top = math.floor(x0 * width), math.floor(y0 * height)
    # neighbouring floats may round to the same edge of a pixel
    right, bottom = max(math.ceil(x1 * width), left + 1), max(math.ceil(y1 * height), top + 1)
    w, h = right - left, bottom - top
    if max(w, h) > MAX_ASPECT * min(w, h):
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
        box, source = check_call(json.loads(body))
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


# ---- Served models: one client for teacher, judge and evaluated model ---------------------------


class ServerError(Exception):
    """A served model gave no usable reply to a request; the text is one line: why."""


class ContextFull(ServerError):
    """The conversation has become too long for the served model."""


COSTS = ["requests", "retries", "prompt_tokens", "completion_tokens"]
GIVE_UP = 20  # conversations in a row without a usable reply
URL = re.compile(r"https?://([\w.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?(/[\w.~%/+-]*)?", re.ASCII)


def print_cost(role, numbers):
    requests, retries, prompt, completion = map(int, numbers)
    print(f"{role}: {requests} replies, {retries} retries, {prompt} prompt and {completion} "
          "completion tokens")


class ChatClient:
    """A model behind an OpenAI-compatible chat endpoint; many threads may use one client.

    url: the server, with or without /v1; name: the model's name there; role: its key is read from
    the environment variable <ROLE>_API_KEY and kept nowhere else. Pictures are shown at min_pixels
    to max_pixels, in at most image_bytes each. A request is tried `attempts` times in all, timeout:
    seconds without a byte; before it is tried again it waits `pause` seconds, twice as long each
    time, or as long as the server asks, 60 s at most. Raises InputError if the URL or the key
    cannot be right.
    """

    def __init__(self, url, name=None, role="model", min_pixels=40_000, max_pixels=2_000_000,
                 image_bytes=1_500_000, attempts=6, pause=1.0, timeout=300.0):
        variable = f"{role.upper()}_API_KEY"
        need(URL.fullmatch(url), f"{role} '{url}' must be a URL such as http://localhost:8000/v1; "
             f"a key belongs into the environment variable {variable}")
        need(min_pixels <= max_pixels,
             f"--min_pixels {min_pixels} is above --max_pixels {max_pixels}")
        self.secret = os.environ.get(variable, "").strip()
        need(all("!" <= letter <= "~" for letter in self.secret),
             f"the key in {variable} contains characters that no key has")
        # without a key the library would send the one saved for the Hugging Face Hub, to any URL
        self.client = InferenceClient(base_url=url, api_key=self.secret or "none", timeout=timeout)
        self.url, self.role, self.name = url, role, name or "default"
        self.min_pixels, self.max_pixels, self.image_bytes = min_pixels, max_pixels, image_bytes
        self.attempts, self.pause, self.used = attempts, pause, collections.Counter()
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def count(self, **numbers):
        with self.lock:
            self.used.update(numbers)

    def reply(self, messages, max_tokens, temperature=1.0, seed=None, attempts=None):
        """The model's next message: (text, whether it was cut at max_tokens). Raises ServerError
        when all attempts have failed or this request is refused (ContextFull: for its length),
        InputError when every request would be."""
        pause, why = self.pause, "stopped"
        for attempt in range(attempts or self.attempts):
            wait = min(60.0, pause) * random.uniform(0.8, 1.2)  # threads do not come all at once
            if self.stopped.wait(wait if attempt else 0):
                break
            self.count(retries=int(attempt > 0))
            asked = ""
            try:
                return self.read(self.client.chat_completion(
                    messages, model=self.name, max_tokens=max_tokens, temperature=temperature,
                    seed=seed))
            except OfflineModeIsEnabled:
                raise InputError("HF_HUB_OFFLINE forbids all requests, even to this machine: unset "
                                 "it") from None
            except HfHubHTTPError as error:
                status = error.response.status_code
                why = self.line(f"HTTP {status}: {said_by(error)}")
                self.check_status(status, why)
                asked = error.response.headers.get("retry-after", "")
            except Exception as error:  # the transport; garbage is any of a dozen exceptions
                why = self.line(f"no chat completion ({type(error).__name__}: {error})")
            seconds = float(asked) if re.fullmatch(r"[0-9]{1,4}(\.[0-9]+)?", asked) else 0.0
            pause = max(2 * pause, seconds)
        raise ServerError(why)

    def check_status(self, status, why):
        """Raises what reply() raises for an HTTP status after which one need not try again."""
        if status in (401, 403, 404, 405):
            raise InputError(f"{self.url} refuses all requests ({why}); check the URL, "
                             f"--{self.role}_model or _name ('{self.name}') and "
                             f"{self.role.upper()}_API_KEY") from None
        if status not in (408, 409, 429) and status < 500:
            full = r"context.(length|window|size)|too long|maximum.{0,20}length"
            raise (ContextFull if re.search(full, why, re.I) else ServerError)(why) from None

    def read(self, out):
        """reply()'s result from a chat completion; raises anything if it is none. A thought that
        the server keeps apart is put back."""
        choice, message = out.choices[0], out.choices[0].message
        thought = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None)
        thought = f"<think>{thought}</think>" if isinstance(thought, str) else ""
        text = "" if message.content is None and thought else message.content
        if not isinstance(text, str):
            raise ValueError("it has no text")
        used = {k: getattr(out.usage, k, 0) for k in ("prompt_tokens", "completion_tokens")}
        self.count(requests=1, **{k: v for k, v in used.items() if isinstance(v, int)})
        text = (thought + text).encode("utf-8", "replace").decode()  # half a surrogate pair
        return text, choice.finish_reason == "length"

    def line(self, text):
        """The beginning of a text on one line, without the key: some servers repeat a wrong one."""
        return " ".join((text.replace(self.secret, "***") if self.secret else text).split())[:200]

    def failures(self):
        return "; ".join(f"{n} x {what}" for what, n in self.used.items() if what not in COSTS)

    def show(self, text, view=None):
        """A user's message: text, with a picture between its two parts if it is (before, after)."""
        if isinstance(text, str):
            return {"role": "user", "content": text}
        small = resize_for_model(view, self.min_pixels, self.max_pixels)
        image = {"type": "image_url", "image_url": {"url": data_url(small, self.image_bytes)}}
        before, after = ({"type": "text", "text": part} for part in text)
        parts = [part for part in (before, image, after) if part.get("text") != ""]
        return {"role": "user", "content": parts}


def said_by(error):
    """The text of the reply that an HTTP error is about."""
    try:
        error.response.read()
        return error.response.text
    except Exception:  # the connection broke before the text had come, or it is not text
        return ""


def in_threads(client, work, jobs, count):
    """Map over threads that wait for a server: yields (job, result) as they come; result None, with
    its reason counted in client.used, if the server gave no usable reply. After GIVE_UP of these in
    a row the rest is not played."""
    def attempt(job):
        try:
            return work(job)
        except ServerError as error:
            client.count(**{str(error)[:160]: 1})

    pool, failures = ThreadPoolExecutor(count), 0
    waiting = {pool.submit(attempt, job): job for job in jobs}
    try:
        for future in as_completed(waiting):
            yield waiting[future], future.result()
            failures = 0 if future.result() is not None else failures + 1
            if failures >= GIVE_UP:
                break
        else:
            waiting = {}
    finally:  # on an error, too, nothing more is sent
        if waiting:
            client.stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


def data_url(image, most):
    """An image as a data URL of at most `most` characters: PNG if that fits, else JPEG, smaller and
    smaller until it does."""
    kind, file = "png", io.BytesIO()
    image.save(file, "PNG")
    while 4 * len(file.getvalue()) / 3 + 40 > most and image.size != (1, 1):
        if kind == "jpeg":
            smaller = [max(1, int(side * 0.7)) for side in image.size]
            image = image.resize(smaller, Image.Resampling.BICUBIC)
        kind, file = "jpeg", io.BytesIO()
        image.save(file, "JPEG", quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def play(client, row, image, prompts, limits, seed=None, before=(), cut=False, temperature=1.0):
    """A conversation of a served model about one question, with the same tool as everybody's.

    limits: max_turns, max_images, max_turn_tokens (evaluate.Limits); before: messages that come
    first (default: the system prompt); cut: what the model writes after its call or answer is taken
    off, since it can only be made up. Returns (turns, finish, prediction). Raises as client.reply.
    """
    system = system_text(row, prompts)
    before = before or ([{"role": "system", "content": system}] if system else [])
    messages = [*before, client.show(question_text(row, prompts), image)]
    views, turns, finish, prediction = [image], [], None, None
    while finish is None:
        try:
            text, too_long = client.reply(messages, limits.max_turn_tokens, temperature, seed)
        except ContextFull:
            if not turns:
                raise
            return turns, "over_context", None
        tag = first_tag(text)
        text = text[:tag[2]] if cut and tag else text
        if too_long and not tag:
            turn, finish = {"text": text}, "void"
        else:
            turn, finish, prediction = take_turn(
                views, text, len(turns) + 1, limits.max_turns, limits.max_images)
        turns.append(turn)
        messages.append({"role": "assistant", "content": text})
        if finish is None:
            said = reply_text(turn, len(turns), len(views) - 1, prompts)
            messages.append(client.show(said, views[-1]))
    return turns, finish, prediction


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


def read_jsonl(path, check=None, hint=""):
    """Rows of a JSONL file, a list of dicts. Raises InputError naming file:line for a bad row and,
    for a missing file, saying what to do (hint: the command that makes it). check(row) may raise
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
                need(isinstance(row, dict), "a row must be a JSON object")
                if check is not None:
                    check(row)
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
        self.path, self.lock, self.rows = Path(path), threading.Lock(), []
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
        with self.lock:
            self.file.writelines(map(json_line, rows))
            self.file.flush()


def check_question(row):
    """Raises InputError unless `row` is a question whose image lies inside the data's folder."""
    for key in ("id", "image", "question", "answer"):
        need(isinstance(row.get(key), str) and row[key].strip(),
             f"field '{key}' must be a non-empty string")
    path, options, user = Path(row["image"]), row.get("options"), row.get("user")
    need(not path.is_absolute() and ".." not in path.parts,
         f"image path '{row['image']}' must stay inside the folder of this file")
    if options is not None:
        need(isinstance(options, list) and options and all(isinstance(o, str) for o in options),
             "field 'options' must be a list of strings or absent")
        need(_option(row["answer"], options) is not None, f"the answer '{row['answer']}' is none "
             "of the options, neither by letter nor by its words")
    need(isinstance(row.get("system", ""), (str, type(None))),
         "field 'system' must be a string or absent")
    need(user is None or (isinstance(user, str) and user.count("<image>") == 1),
         "field 'user' must be a string with <image> exactly once, or absent")
    need(all(isinstance(row.get(key, ""), str) for key in ("source", "category", "cycle")),
         "fields 'source', 'category' and 'cycle' must be strings or absent")
    need(row.get("level") in (None, "easy", "medium", "hard"),
         "field 'level' must be easy, medium, hard or absent")


def check_trajectory(row):
    """Raises InputError unless `row` is a question with turns: texts, each with a zoom, an error,
    or neither at the end."""
    check_question(row)
    turns, shown = row.get("turns"), 0
    need(isinstance(turns, list) and turns, "field 'turns' must be a non-empty list")
    for number, turn in enumerate(turns, 1):
        at, last = f"turn {number}", number == len(turns)
        need(isinstance(turn, dict) and isinstance(turn.get("text"), str),
             f"{at} must be an object with a 'text'")
        need(isinstance(turn.get("learn", True), bool),
             f"{at}: 'learn' must be true, false or absent")
        if "zoom" in turn:
            try:
                _, source = check_call(turn["zoom"])
            except ToolError as error:
                raise InputError(f"{at}: {error}") from None
            need(last or source_index(source) <= shown, f"{at}: there is no {source} yet")
            shown += 1
        else:
            need(isinstance(turn.get("error", ""), str), f"{at}: 'error' must be a string")
            need(last or "error" in turn,
                 f"{at} has neither 'zoom' nor 'error' and is not the last")
        reply, images = turn.get("reply"), int("zoom" in turn)
        if reply is not None:
            need(not last and isinstance(reply, str) and reply.count("<image>") == images,
                 f"{at}: 'reply' must be a string with <image> {images} times, and absent on the "
                 "last turn")


def without_layout(row):
    """A question row as all but the scripted teacher may see it: without where things lie."""
    return {k: v for k, v in row.items() if k not in ("objects", "walls")}


def read_questions(path, hint="", check=check_question):
    """Question rows of a file. Raises InputError as read_jsonl does, and for an id met twice."""
    seen = set()

    def check_new(row):
        check(row)
        need(row["id"] not in seen, f"id '{row['id']}' stands in an earlier line too")
        seen.add(row["id"])

    return read_jsonl(path, check_new, hint)


# ---- Answers ------------------------------------------------------------------------------------


def normalise(text):
    """Lower case, Unicode forms folded, without articles, outer punctuation and extra spaces."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"\b(a|an|the)\s+(?=\W*\w)", " ", text)  # "the fox", but not in "vitamin A"
    words = re.sub(r"(?<!\w)(?:(?!\.\d)[^\w\s+-])+|[^\w\s+-]+(?!\w)", " ", text).split()
    return " ".join(words) or text.strip()  # punctuation only ("?") is compared as it stands


def _option(text, options):
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


def decided(prediction, options=None):
    """Whether match_answer can tell right from wrong: there is no prediction, or it names one of
    the options. Otherwise other words may mean the same, which only a judge can tell."""
    return not prediction or bool(options and _option(prediction, options) is not None)


def match_answer(prediction, answer, options=None):
    """Whether the prediction is the answer. With options: whether both name the same one, and what
    names none is wrong. Without: whether their normalised words are the same."""
    if prediction is None:
        return False
    if options:
        chosen = _option(prediction, options)
        return chosen is not None and chosen == _option(answer, options)
    return normalise(prediction) == normalise(answer)
