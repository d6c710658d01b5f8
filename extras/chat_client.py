"""A client of one served model: any model behind an OpenAI-compatible chat endpoint.

Servers differ in their words, in the parameters that they take and in how they fail. All of that is
here: ChatClient.reply returns a usable message or raises an error that says why there is none. A
request that fails is sent again. extras/served.py makes a teacher, a player and a judge of it.
"""

import base64
import collections
import io
import json
import os
import random
import re
import sys
import threading
import time

from PIL import Image
from tqdm import tqdm

import tools

try:
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled
except ImportError:
    raise tools.InputError("a served model needs huggingface_hub; install it with: "
                           "pip install huggingface_hub") from None

START_SECONDS = 5.0  # a server that is asked for its models must at least accept the connection
HANG_SECONDS = 60.0  # a server that answers nobody for so long is away
PATIENCE_SECONDS = 90.0  # without a byte, before an attempt fails; slow servers are given more
OFFLINE_MESSAGE = "HF_HUB_OFFLINE forbids all requests, even to this machine: unset it"

# ---- What servers say ---------------------------------------------------------------------------

URL_PATTERN = re.compile(r"https?://([\w.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?(/[\w.~%/+-]*)?",
                         re.ASCII)
MODEL_FLAGS = {"teacher": "--teacher_model", "model": "--model_name", "judge": "--judge_model"}
COSTS = ["requests", "retries", "prompt_tokens", "completion_tokens"]

# Each server has its own words for a conversation that is too long.
WORDS = r"((?!image|picture|photo|url).){0,50}"  # a few words between two others
CONTEXT_FULL_PATTERN = re.compile("|".join([
    # "maximum context length is 9", "exceed context limit", "the context size has been exceeded"
    r"context.{0,3}(length|window|size|limit|overflow|full)",
    r"max_model_len|max_seq_len|session_len|n_ctx|tokens_limit_reached",
    # "prompt is too long", "the decoder prompt (length 9) is longer than"
    rf"(prompt|input|messages?|conversation|sequence)(?![a-z]){WORDS}"
    r"(too long|longer than|too many tokens)",
    # "`inputs` tokens + `max_new_tokens` must be <= 9", "Range of input length should be [1, 9]"
    rf"(prompt|inputs?)(?! valid)(?![a-z]){WORDS}(tokens?|length)(?![a-z]){WORDS}"
    r"(exceed|<=|should be|longer|limit|maximum|up to|too (large|many))",
    # "your request exceeded model token limit", "`inputs` must have less than 9 tokens"
    rf"(prompt|inputs?|request|messages?|sequence)(?! valid)(?![a-z]){WORDS}"
    r"(exceed|less than|at most).{0,40}(length|tokens?)\b",
    r"maximum.{0,12}(model|sequence|prompt|input) length|total.{0,20} tokens.{0,40}exceed",
    r"too many (input |prompt )?tokens|\d tokens? > \d",
    r"(reduce|shorten) (the |your )?(length of the )?(prompt|input|messages|conversation)",
    # "max_tokens must be at least 1, got -12": the server took the prompt off them
    r"max_(completion_)?tokens\b.{0,60}\bgot (0|-\d+)\b",
    r"上下文|超长|长度超|超过.{0,6}长度"]), re.IGNORECASE)
RATE_PATTERN = re.compile(r"per (second|minute|hour|day)|rate.?limit|quota|credits|please wait",
                          re.IGNORECASE)

# How servers refuse a parameter for its name, and how they refuse its value.
UNSUPPORTED_PATTERN = re.compile(
    r"unsupported|not.{0,12}(support|permit|allow|accept|recogni)|unrecogni[sz]ed|unknown|"
    r"unexpected|extra.?(input|field|forbidden)|extraneous|forbidden|cannot find|deprecated|"
    r"only the default", re.IGNORECASE)
VALUE_PATTERN = re.compile(r"must|should|range|invalid|only", re.IGNORECASE)

# Other reasons ("content_filter", "abort", "error") mean that the reply was broken off.
STOP_REASONS = {"", "none", "null", "stop", "eos", "eos_token", "end_turn", "stop_sequence",
                "stop_token", "complete", "completed", "finished"}
LENGTH_REASONS = {"length", "max_tokens", "max_output_tokens", "max_completion_tokens",
                  "model_length", "model_context_window_exceeded"}


class ServerError(Exception):
    """A served model gave no usable reply to a request. The text is the reason, in one line."""


class ContextFull(ServerError):
    """The conversation is too long for the served model."""


class ServerAway(ServerError):
    """Nothing listens at the server's address any more, or it does not answer anybody."""


class TryAgain(ServerError):
    """An attempt failed, and another one may succeed. pause: the seconds that the server asks to
    wait. error: the exception if the server gave no answer at all."""

    def __init__(self, reason, pause=0.0, error=None):
        super().__init__(reason)
        self.pause = pause
        self.error = error


def shown_url(url):
    """Return a URL as it may be shown: without a password and without what follows a "?".

    >>> shown_url("http://me:secret@host/v1?key=secret")
    'http://***@host/v1?***'"""
    scheme, separator, rest = url.rpartition("://")
    if "@" in rest:
        rest = "***@" + rest.rpartition("@")[2]
    if "?" in rest:
        rest = rest.partition("?")[0] + "?***"
    return scheme + separator + rest


def endpoint(url, path):
    """Return the URL of a path such as "/models". Users give a server with or without /v1.

    >>> endpoint("http://host:8000", "/models")
    'http://host:8000/v1/models'"""
    base = url.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    if not base.endswith("/v1"):
        base += "/v1"
    return base + path


def texts_in(value):
    """Return all strings in a JSON value, except those that repeat the request."""
    if isinstance(value, str):
        return [value]
    texts = []
    if isinstance(value, dict):
        value = [part for name, part in value.items() if name != "input"]
    if isinstance(value, list):
        for part in value:
            texts += texts_in(part)
    return texts


def error_message(body, text):
    """Return what a server says about an error, in its own words: the message, where its answer has
    one, else the whole text. body: the text as JSON, None if it is none."""
    if isinstance(body, dict):
        error = body.get("error") or body
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail")
        message = " ".join(texts_in(error))
        if message:
            return message
    return re.sub(r"<[^<>]*>", " ", text)  # without the tags of a web page


def is_context_full(texts):
    """Return whether these words of a server mean that a conversation is too long."""
    text = " ".join(texts)[:20_000]
    return bool(CONTEXT_FULL_PATTERN.search(text)) and not RATE_PATTERN.search(text)


def refuses(texts, name):
    """Return whether these words of a server refuse the parameter of this name.

    The value of max_tokens may be wrong too ("must be <= 64"); then it must not be left out."""
    text = " ".join(texts)
    is_word = re.search(rf"(?<!\w){name}(?!\w)", text, re.IGNORECASE)
    is_quoted = name in texts or re.search(rf"[\"'`\[]{name}[\"'`\]]", text)
    if name in ("max_tokens", "max_completion_tokens"):
        return bool(is_word and UNSUPPORTED_PATTERN.search(text))
    is_explained = UNSUPPORTED_PATTERN.search(text) or VALUE_PATTERN.search(text)
    return bool(is_quoted or (is_word and is_explained))


def retry_after(headers):
    """Return for how many seconds a server asks to wait, 0.0 if it does not."""
    header = headers.get("retry-after", "")
    return float(header) if re.fullmatch(r"[0-9]{1,4}(\.[0-9]+)?", header) else 0.0


def is_timeout(error):
    """Return whether an exception says that time was up. (The library that sends requests has
    several such classes, and its name depends on its version.)"""
    return "Timeout" in type(error).__name__


def cannot_connect(error):
    """Return whether an exception says that no connection was made."""
    return type(error).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError")


def message_texts(message):
    """Return (thought, text) of a chat completion's message, None for what it does not have."""
    # 1. Some servers deliver the thought in a field of its own.
    thought = message.get("reasoning") or message.get("reasoning_content")
    text = message.get("content")
    # 2. Others deliver a list of parts, such as {"type": "text", "text": "Hello"}.
    if isinstance(text, list):
        parts = [part for part in text if isinstance(part, dict)]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        text = "".join(texts) if texts else None
        for part in parts:
            if "thinking" in part:
                _, thought = message_texts({"content": part["thinking"]})
    # 3. A thought without a text.
    if not isinstance(thought, str):
        thought = None
    if text is None and thought is not None:
        text = ""
    return thought, text


def read_verdict(text):
    """Return 1.0 or 0.0 if a text is nothing but the verdict, else None. A thought before it and a
    fence around it, which models like to put around JSON, are allowed."""
    text = text.rpartition("</think>")[2].strip()
    fenced = re.fullmatch(r"```(?:json)?\s(.*)```", text, re.DOTALL)
    try:
        verdict = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(verdict, dict) or verdict.keys() != {"same"}:
        return None
    return float(verdict["same"]) if isinstance(verdict["same"], bool) else None


# ---- The client ---------------------------------------------------------------------------------


class ChatClient:
    """A model behind an OpenAI-compatible chat endpoint. Many threads may use one client.

    url: the server, with or without /v1. name: the model's name on the server.
    role: "teacher", "model" or "judge"; the key is read from <ROLE>_API_KEY.
    min_pixels, max_pixels, max_image_bytes: limits of the pictures that are sent.
    attempts: how often a request is sent before it has failed.
    pause: seconds before the second attempt. It doubles with each attempt, up to 60, and is longer
        if the server asks for it.
    timeout: most seconds without a byte until an attempt has failed, see patience.

    used counts replies, retries, tokens (see COSTS) and failures by their reason.
    num_failures counts failures in a row.
    sent_as: {parameter: the name under which it is sent, None if it is left out}.
    stopped is set when no more requests are to be sent.
    InputError is raised if the URL or the key cannot be valid.
    """

    def __init__(self, url, name=None, role="model", min_pixels=40_000, max_pixels=2_000_000,
                 max_image_bytes=1_500_000, attempts=6, pause=1.0, timeout=300.0):
        # 1. What the user may have got wrong.
        key_variable = f"{role.upper()}_API_KEY"
        tools.check(URL_PATTERN.fullmatch(url), f"{role} '{shown_url(url)}' must be a URL such as "
                    "http://localhost:8000/v1; a key belongs into the environment variable "
                    f"{key_variable}")
        tools.check(min_pixels <= max_pixels,
                    f"--min_pixels {min_pixels} is above --max_pixels {max_pixels}")
        self.key = os.environ.get(key_variable, "").strip()
        tools.check(all("!" <= letter <= "~" for letter in self.key),
                    f"the key in {key_variable} contains characters that no key has")
        # 2. What does not change.
        self.headers = {"authorization": f"Bearer {self.key or 'none'}"}
        self.url = url
        self.role = role
        self.name = name or "default"
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.max_image_bytes = max_image_bytes
        self.attempts = attempts
        self.pause = pause
        self.timeout = timeout
        # 3. What this client learns of its server, and what it counts.
        self.sent_as = {"max_tokens": "max_tokens", "temperature": "temperature", "seed": "seed"}
        self.used = collections.Counter()
        self.num_failures = 0
        self.told = set()               # topics of tell_once
        self.last_answer = 0.0          # the time when the server last answered
        self.slowest_seconds = 0.0      # until an answer
        self.has_tried = False          # whether the first request has ended, in whatever way
        self.has_gone = False           # whether the server was found to be away, see is_away
        # 4. For threads.
        self.lock = threading.Lock()    # of all that changes
        self.first_request = threading.Lock()
        self.stopped = threading.Event()

    def count(self, name, amount=1):
        """Add to one of the counts in `used`."""
        with self.lock:
            self.used[name] += amount

    def tell_once(self, topic, text):
        """Print a line about a topic, unless one was printed before."""
        with self.lock:
            is_new = topic not in self.told
            self.told.add(topic)
        if is_new:
            tqdm.write(f"{self.role} at {self.url}: {text}", file=sys.stderr)

    def one_line(self, text):
        """Return the beginning of a text as one line, without the key: some servers repeat it."""
        if self.key:
            text = text.replace(self.key, "***")
        return " ".join(text.split())[:200]

    def failures(self, max_reasons=5):
        """Return how often requests failed for which reason, in one line. Rare reasons are only
        counted."""
        reasons = collections.Counter({reason: count for reason, count in self.used.items()
                                       if reason not in COSTS})
        shown = reasons.most_common(max_reasons)
        texts = [f"{count} x {reason}" for reason, count in shown]
        num_others = reasons.total() - sum(count for _, count in shown)
        if num_others:
            texts.append(f"{num_others} x other reasons")
        return "; ".join(texts)

    # ---- Is a server there? ----

    def ask_for_models(self):
        """Send one small request, GET /models. Return (its response, None), or (None, an exception)
        if there is none. Any response will do: not all servers know this request."""
        try:
            response = get_session().get(endpoint(self.url, "/models"), headers=self.headers,
                                         timeout=START_SECONDS)
            return response, None
        except OfflineModeIsEnabled:
            raise tools.InputError(OFFLINE_MESSAGE) from None
        except Exception as error:  # broken connections and garbage raise a dozen exceptions
            return None, error

    def check_server(self):
        """Look for the server before all work. If no name was given, take the name of its model, if
        it has one only. Return the name. Raise InputError if no connection can be made."""
        response, error = self.ask_for_models()
        if error is not None and cannot_connect(error):
            raise tools.InputError(
                f"{self.role}: no connection to {self.url} ({self.one_line(str(error))}); check "
                "the URL, and that the server has started")
        body = tools.parse_json_or_none(response.text) if response is not None else None
        models = body.get("data") if isinstance(body, dict) else None
        if isinstance(models, list) and len(models) == 1 and isinstance(models[0], dict):
            if self.name == "default" and isinstance(models[0].get("id"), str):
                self.name = models[0]["id"]
        return self.name

    def is_away(self, error, silent_since, is_last_attempt):
        """Return whether the server has gone, after an attempt without any answer. silent_since:
        the time since when it has answered nobody."""
        is_silent = time.monotonic() - silent_since >= HANG_SECONDS
        if is_timeout(error) and not cannot_connect(error):
            self.has_gone = self.has_gone or is_silent
        elif is_silent or is_last_attempt:
            _, error = self.ask_for_models()
            self.has_gone = error is not None and (cannot_connect(error) or is_timeout(error))
        return self.has_gone

    # ---- Requests ----

    def reply(self, messages, max_tokens, temperature=1.0, seed=None, attempts=None):
        """Return the model's next message: (text, whether it was cut at max_tokens).

        The first request of all goes alone: what is wrong with a server shows only once.
        Raise ServerError if all attempts fail or if the server refuses this request, ServerAway if
        it is away, ContextFull if it refuses the request for its length, InputError if it refuses
        all requests.
        """
        arguments = messages, max_tokens, temperature, seed, attempts or self.attempts
        if not self.has_tried:
            with self.first_request:
                if not self.has_tried:
                    try:
                        return self.reply_after_attempts(*arguments)
                    finally:
                        self.has_tried = True
        return self.reply_after_attempts(*arguments)

    def reply_after_attempts(self, messages, max_tokens, temperature, seed, attempts):
        """Send a request until there is a usable reply. Return and raise what reply does."""
        start = time.monotonic()
        pause = self.pause
        reason = "stopped"
        for attempt in range(attempts):
            # 1. Wait before another attempt. Threads wait for different times.
            delay = 0.0
            if attempt > 0:
                delay = min(60.0, pause) * random.uniform(0.8, 1.2)
                self.tell_once("retry", f"{reason}; it is asked again, up to {attempts} times "
                               "(told only once)")
            if self.stopped.wait(delay):
                break
            if attempt > 0:
                self.count("retries")
            # 2. Send the request, and find out whether another attempt makes sense.
            try:
                return self.read(self.send(messages, max_tokens, temperature, seed))
            except TryAgain as failure:
                reason = self.one_line(str(failure))
                is_last_attempt = attempt == attempts - 1
                silent_since = max(start, self.last_answer)
                if failure.error is not None and self.is_away(failure.error, silent_since,
                                                              is_last_attempt):
                    raise ServerAway(reason) from None
                # 3. Be more patient.
                pause = max(2 * pause, failure.pause)
        raise ServerError(reason)

    def send(self, messages, max_tokens, temperature, seed):
        """Send a request once, and return the chat completion as JSON. It is sent once more for
        each parameter that the server refuses. Raise what reply does, and TryAgain."""
        while True:
            # 1. The parameters, under the names that this server accepts.
            values = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
            parameters = {}
            for name, value in values.items():
                if value is not None and self.sent_as[name] is not None:
                    parameters[self.sent_as[name]] = value
            # 2. The answer. An error may come with status 200.
            request = {"model": self.name, "messages": messages, **parameters}
            response, text = self.post(request, max_tokens)
            body = tools.parse_json_or_none(text)
            status = response.status_code
            if status == 200 and isinstance(body, dict) and body.get("choices"):
                return body
            if status == 200 and isinstance(body, dict) and isinstance(body.get("error"), dict):
                code = body["error"].get("code")
                status = code if isinstance(code, int) and 400 <= code < 600 else 200
            # 3. What is wrong?
            texts = texts_in(body) or [text]
            if status in (400, 422) and self.adapt(parameters, texts):
                continue
            message = error_message(body, text)
            reason = f"HTTP {status}: {message}"
            if status == 200:
                reason = f"no chat completion: {message.strip() or 'the answer is empty'}"
            if response.history:
                reason += f" (redirected to {shown_url(str(response.url))})"
            self.check_status(status, self.one_line(reason), texts)
            raise TryAgain(reason, retry_after(response.headers))

    def post(self, request, max_tokens):
        """Send a request. Return (its response, the text of it). Raise TryAgain if there is no
        whole response."""
        # 1. Time to connect, to read, to write, and to wait for one of the library's connections.
        start = time.monotonic()
        seconds = self.patience(max_tokens)
        limits = min(10.0, seconds), seconds, seconds, None
        # 2. Read the answer as it comes. Some servers send a blank now and then, for ever.
        content = b""
        try:
            with get_session().stream("POST", endpoint(self.url, "/chat/completions"), json=request,
                                      headers=self.headers, timeout=limits) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() - start > 2 * seconds:
                        raise TimeoutError
        except OfflineModeIsEnabled:
            raise tools.InputError(OFFLINE_MESSAGE) from None
        except Exception as error:  # broken connections and garbage raise a dozen exceptions
            reason = f"no reply ({type(error).__name__}: {error})"
            if is_timeout(error):
                reason = f"no reply within {time.monotonic() - start:.0f} s"
            raise TryAgain(reason, error=error) from None
        # 3. The server is there, and this is how long it takes.
        with self.lock:
            self.has_gone = False
            self.last_answer = time.monotonic()
            if response.status_code == 200:
                self.slowest_seconds = max(self.slowest_seconds, self.last_answer - start)
        return response, content.decode("utf-8-sig", "replace")

    def patience(self, max_tokens):
        """Return for how many seconds without a byte an attempt is waited for. A reply takes a
        while: 20 tokens a second are slow, and nothing should take five times as long as the
        slowest answer so far."""
        return min(self.timeout,
                   max(PATIENCE_SECONDS, max_tokens / 20, 5 * self.slowest_seconds))

    def adapt(self, parameters, texts):
        """Rename or leave out a parameter that a server refuses, in all further requests. Return
        whether the request is worth sending once more. texts: what the server says."""
        for sent_name in parameters:
            if not refuses(texts, sent_name):
                continue
            new_name = "max_completion_tokens" if sent_name == "max_tokens" else None
            with self.lock:
                # Another thread may have been faster.
                for name, current_name in self.sent_as.items():
                    if current_name == sent_name:
                        self.sent_as[name] = new_name
            meaning = {"max_tokens": "max_completion_tokens is sent instead",
                       "max_completion_tokens": "it is left out: a turn may be of any length",
                       "temperature": "it is left out: the server samples at its own temperature "
                                      "(mostly 1), even where the most likely reply is wanted",
                       "seed": "it is left out: another run gives other replies"}[sent_name]
            self.tell_once(sent_name, f"the server refuses {sent_name} "
                           f"({self.one_line(' '.join(texts))}); {meaning}")
            return True
        return False

    def check_status(self, status, reason, texts):
        """Raise an error for an answer that another attempt would not change, see reply. texts:
        all that the server says."""
        # A 403 after good replies is about this request only: a question that is "moderated".
        if status in (401, 404, 405) or (status == 403 and not self.used["requests"]):
            raise tools.InputError(f"{self.url} refuses all requests ({reason}); check the URL, "
                                   f"{MODEL_FLAGS[self.role]} ('{self.name}') and the key in "
                                   f"{self.role.upper()}_API_KEY")
        if status in (408, 409, 429):
            return
        if is_context_full(texts):
            raise ContextFull(reason)
        if 300 <= status < 500:
            raise ServerError(reason)

    def read(self, completion):
        """Return (text, whether it was cut) of a chat completion. Raise TryAgain if it is none."""
        # 1. Count the cost, also of replies that cannot be used.
        usage = completion.get("usage")
        for name in ("prompt_tokens", "completion_tokens"):
            num_tokens = usage.get(name) if isinstance(usage, dict) else None
            if isinstance(num_tokens, int):
                self.count(name, num_tokens)
        # 2. The message, and how it ended.
        choices = completion["choices"]
        choice = choices[0] if isinstance(choices, list) else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise TryAgain(f"no message in the reply ({json.dumps(completion)[:100]})")
        finish_reason = str(choice.get("finish_reason") or "").lower()
        if finish_reason not in STOP_REASONS | LENGTH_REASONS:
            details = " ".join(texts_in(choice.get("error")) + texts_in(message.get("refusal")))
            raise TryAgain(f"reply broken off, finish_reason '{finish_reason}' {details}")
        thought, text = message_texts(message)
        if not isinstance(text, str):
            raise TryAgain(f"no text in the reply ({json.dumps(message)[:100]})")
        is_cut = finish_reason in LENGTH_REASONS
        # 3. Put a thought back in front of the text. If there is no text, it may be no thought.
        if thought is not None and not text.strip() and not is_cut and self.is_whole(thought):
            self.tell_once("reasoning", "whole replies come as reasoning, and are taken as replies;"
                           " the server's reasoning parser does not fit the model: switch it off")
            text = thought
        elif thought is not None:
            text = f"<think>{thought}</think>{text}"
        self.count("requests")
        # 4. Half a surrogate pair, which JSON allows, becomes "?".
        return text.encode("utf-8", "replace").decode(), is_cut

    def is_whole(self, text):
        """Return whether a text has what this model is asked for: a call, an answer, a verdict."""
        if self.role == "judge":
            return read_verdict(text) is not None
        return tools.first_tag(text) is not None

    # ---- Messages ----

    def user_message(self, before_image, after_image=None, view=None):
        """Return a user's message: a text, or a view between two texts if after_image is not
        None."""
        if after_image is None:
            return {"role": "user", "content": before_image}
        small_view = tools.resize_for_model(view, self.min_pixels, self.max_pixels)
        image_url = data_url(small_view, self.max_image_bytes)
        content = [{"type": "image_url", "image_url": {"url": image_url}}]
        if before_image:
            content.insert(0, {"type": "text", "text": before_image})
        if after_image:
            content.append({"type": "text", "text": after_image})
        return {"role": "user", "content": content}


def data_url(image, max_bytes):
    """Return an image as a data URL of at most max_bytes characters: PNG if that fits, else JPEG,
    made smaller and smaller until it fits."""
    image_format = "png"
    file = io.BytesIO()
    image.save(file, "PNG")
    # Base64 writes three bytes as four characters.
    while 4 * len(file.getvalue()) / 3 + 40 > max_bytes and image.size != (1, 1):
        if image_format == "jpeg":
            smaller_size = [max(1, int(side * 0.7)) for side in image.size]
            image = image.resize(smaller_size, Image.Resampling.BICUBIC)
        image_format = "jpeg"
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
    encoded = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{image_format};base64,{encoded}"


def print_cost(role, costs, failures=""):
    """Print what a served model has cost, and why requests failed. costs: the numbers of COSTS."""
    num_replies, num_retries, num_prompt_tokens, num_completion_tokens = map(int, costs)
    print(f"{role}: {num_replies} replies, {num_retries} retries, {num_prompt_tokens} prompt and "
          f"{num_completion_tokens} completion tokens")
    if failures:
        print(f"{role}: no usable reply for {failures}")


def report_cost(client, device, rank):
    """Print what a served model has cost on all ranks together, and why requests failed. Every rank
    must call this."""
    import sft  # here, since a teacher on one process needs no torch
    costs = sft.all_reduce([client.used[name] for name in COSTS], device)
    failures = sft.all_gather_objects([client.failures()])
    if rank == 0:
        print_cost(client.role, costs, "; ".join(filter(None, failures)))
