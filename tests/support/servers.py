"""Chat servers on loopback, for tests of served models."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from PIL import Image

import evaluate


class ChatServer(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on loopback.

    behave(body) says how it answers a request: a text is sent as a proper completion, a tuple
    (status, headers, bytes) is sent as it is, and "drop" closes the connection. requests collects
    (path, headers, body) of every request. models: names that GET /models lists (None: refused).
    """

    def __init__(self, behave, models=None):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.behave = behave
        self.models = models
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01},
                         daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class ChatHandler(BaseHTTPRequestHandler):
    """Answer one request as the server's behave() says."""

    def do_POST(self):
        """Answer a request."""
        # 1. what behave() says
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.behave(body)
        if answer == "drop":
            self.close_connection = True
            return
        if isinstance(answer, str):
            completion = {"choices": [{"index": 0, "finish_reason": "stop",
                                       "message": {"role": "assistant", "content": answer}}],
                          "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
            answer = 200, {}, json.dumps(completion).encode()
        # 2. send it
        self.send(*answer)

    def do_GET(self):
        """List the models."""
        if self.server.models is None:
            self.send(404, {}, b"")
        else:
            models = {"data": [{"id": name} for name in self.server.models]}
            self.send(200, {}, json.dumps(models).encode())

    def send(self, status, headers, content):
        """Send an answer."""
        self.send_response(status)
        for name, value in {"content-type": "application/json",
                            "content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:     # the client did not wait
            pass

    def log_message(self, *_):
        pass


def picture_of(message):
    """Return the picture of a user's message and the texts before and after it: (image, (before,
    after)). A message without a picture gives (None, text)."""
    content = message["content"]
    if isinstance(content, str):
        return None, content
    index = [part["type"] for part in content].index("image_url")
    header, data = content[index]["image_url"]["url"].split(",", 1)
    assert header in ("data:image/png;base64", "data:image/jpeg;base64")
    before_image = "".join(part["text"] for part in content[:index])
    after_image = "".join(part["text"] for part in content[index + 1:])
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    return image, (before_image, after_image)


def engine_behind_a_server(policy):
    """Return behave() for ChatServer: our own engine continues the messages greedily."""
    lock = threading.Lock()

    @torch.inference_mode()
    def behave(body):
        """Return a text as it is, and a reply that was cut as the server's whole response."""
        with lock:
            text, is_complete = continue_greedily(policy, body["messages"], body["max_tokens"])
        if is_complete:
            return text
        choice = {"finish_reason": "length", "message": {"content": text}}
        return 200, {}, json.dumps({"choices": [choice]}).encode()
    return behave


def continue_greedily(policy, messages, max_tokens):
    """Return the policy's reply to messages, and whether it ended before max_tokens tokens."""
    engine = evaluate.Engine(policy, evaluate.Limits(), max_num_seqs=1)
    engine.cache = evaluate.SlotCache(policy.model.config.text_config, 1, policy.model.dtype,
                                      policy.device, engine.limits.max_model_len)
    num_cached_tokens = 0
    position = 0

    def feed(token_ids, images=()):
        """Return log-probs (1, V) after these tokens."""
        nonlocal num_cached_tokens, position
        feeds = [evaluate.Feed(num_cached_tokens, position, token_ids, [], images)]
        logprobs, next_positions = engine.forward(feeds, first_slot=0)
        num_cached_tokens += len(token_ids)
        position = next_positions[0]
        return logprobs

    # 1. the messages, with their pictures
    for message in messages:
        view, text = picture_of(message)
        if view is None:
            feed(policy.encode_message(message["role"], text))
        else:
            before_image, after_image = text
            images = policy.preprocess_images([view])
            _, grid = images[0]
            feed(policy.encode_message(message["role"], before_image, after_image,
                                       policy.num_image_tokens(grid)), images)

    # 2. the reply, token by token
    logprobs = feed(policy.generation_prompt())
    reply_ids = []
    while len(reply_ids) < max_tokens:
        token_id = logprobs.argmax(-1).item()
        if token_id in policy.stop_ids:
            return policy.tokenizer.decode(reply_ids, skip_special_tokens=False), True
        reply_ids.append(token_id)
        logprobs = feed([token_id])
    return policy.tokenizer.decode(reply_ids, skip_special_tokens=False), False
