"""Fixtures shared by all tests: a small world, a tiny policy with random weights, and one that has
learned the protocol."""

import base64
import contextlib
import copy
import functools
import importlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.image_processing_auto import AutoImageProcessor

ROOT = Path(__file__).resolve().parent.parent
runpy.run_path(str(ROOT / "extras" / "root.py"))

import build_data
import collect_coldstart
import evaluate
import sft
import tools
from extras import crash
from support import exact  # noqa: F401

torch.set_num_threads(2)


def interrupted(code):
    """In the place of os._exit, with which a stage answers Ctrl-C: that would end pytest without a
    word."""
    raise KeyboardInterrupt


def run_here(script, *args):
    """Run a stage in this process, on one thread: what a new process would do, without its seconds
    for imports."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    threads, heeded = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.setattr("sys.argv", [script, *map(str, args)])
        patch.setattr("os._exit", interrupted)
        try:
            tools.run(importlib.import_module(Path(script).stem).main)
        except SystemExit as end:   # its text goes to stderr
            code = end.code if isinstance(end.code, int) else 1
            print(end.code, file=err)
        finally:
            torch.set_num_threads(threads)
            signal.signal(signal.SIGTERM, heeded)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


@functools.cache
def forks():
    """The process that forks stages, see forks.py; it ends with this one."""
    return subprocess.Popen([sys.executable, str(ROOT / "tests" / "support" / "forks.py")], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


class Forked:
    """A stage on `nproc` processes, as crash.launch starts it, but sooner, and allowed to ask a
    server; env: more variables. On one of several nodes, which meet at `port` of this machine.
    torchrun's agent starts it anew `restarts` times when a worker has died. It has what is used of
    a Popen."""

    def __init__(self, args, nproc=1, nodes=1, restarts=0, port=0, env=None):
        self.output = [tempfile.NamedTemporaryFile("r") for _ in ("out", "err")]
        self.pid, self.returncode = int(self.ask({
            "args": [str(ROOT / args[0]), *map(str, args[1:])], "nproc": nproc, "nodes": nodes,
            "restarts": restarts, "port": port, "folder": os.getcwd(), "env": env or {},
            "out": self.output[0].name, "err": self.output[1].name})), None

    def ask(self, question):
        print(json.dumps(question), file=forks().stdin, flush=True)
        return forks().stdout.readline().strip()

    def poll(self):
        if self.returncode is None:
            answer = self.ask(self.pid)
            self.returncode = int(answer) if answer else None
        return self.returncode

    def communicate(self, timeout=60):
        deadline = time.time() + timeout
        while self.poll() is None:
            if time.time() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return [file.read() for file in self.output]


def run_script(*args, nproc=1, env=None, check=True, timeout=300):
    """Run a stage as a user would, under torchrun's agent or, on one process, in this one; returns
    what subprocess.run would."""
    if nproc == 1 and env is None and args[0] in ("sft.py", "rl.py", "evaluate.py"):
        return checked(run_here(*args), check)
    process = Forked(args, nproc, env=env)
    try:
        done = subprocess.CompletedProcess(args, *crash.finish(process, timeout))
    except subprocess.TimeoutExpired:
        crash.kill(process)
        raise
    return checked(done, check)


def checked(done, check):
    if check and done.returncode != 0:
        raise AssertionError(f"{done.args} exited with {done.returncode}\n{done.stdout[-2000:]}\n"
                             f"{done.stderr[-4000:]}")
    return done


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages that were made inside and are alive; peak is the most
    there ever were. A process's memory (RSS) would say little: allocators keep what was freed."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def live(self):
        self.storages = {key: found for key, found in self.storages.items()
                         if not found[0].expired()}
        return sum(size for _, size in self.storages.values())

    def settled(self):
        """live(), when it has not changed for a while: gloo's thread lets go of a message a moment
        after the wait for it."""
        bytes_before = None
        while bytes_before != self.live():
            bytes_before = self.live()
            time.sleep(0.2)
        return bytes_before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0]
               if isinstance(t, torch.Tensor)}
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in old:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.live())
        return out


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A data folder with 12 questions (levels mixed) in train.jsonl, their trajectories in
    coldstart.jsonl, the shortest in short.jsonl, and single-view rows in instruct.jsonl."""
    out = tmp_path_factory.mktemp("world")
    levels = list(build_data.LEVELS)
    rows = [build_data.make_question(("train", i, levels[i % 3]), out, 0) for i in range(12)]
    tools.write_jsonl(out / "train.jsonl", rows)
    # a short system prompt keeps the tests fast
    prompts = dict(tools.PROMPTS, system="Look closer.")
    solved = [collect_coldstart.solve(job, out, prompts, 32, 0) for job in enumerate(rows)]
    # searches only: they hold what tests look at
    solved = [row for row in solved if row["strategy"] != "guess"]
    solved.sort(key=lambda row: len(row["turns"]))
    tools.write_jsonl(out / "coldstart.jsonl", solved[:8])
    tools.write_jsonl(out / "short.jsonl", solved[:5])
    tools.write_jsonl(out / "instruct.jsonl", build_data.make_instructions(0, out, 0, 6000, 8000))
    return out


@pytest.fixture(scope="session")
def prompts():
    return dict(tools.PROMPTS, system="Look closer.")


@pytest.fixture(scope="session")
def make_tiny(world, prompts):
    """make_tiny(dtype, seed) -> a Policy with random weights."""
    texts = build_data.project_texts(tools.read_jsonl(world / "instruct.jsonl"))

    def make(dtype=torch.float64, seed=0):
        model, tokenizer, processor = build_data.build_tiny(texts, seed)
        return sft.make_policy(model.to(dtype), tokenizer, processor, "cpu", prompts)
    return make


def overfit(policy, rows, root, steps):
    """Train the text model on a few trajectories for some seconds."""
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, freeze_vision=True), 3e-3, 0.0)
    batch = sft.collate(policy, [sft.encode(policy, row, root) for row in rows])
    for step in range(steps):
        optimizer.backward([batch], lambda batch: -sft.token_logprobs(policy, batch).mean())
        optimizer.step(3e-3 * min(1, (step + 1) / 10), 1.0)


@pytest.fixture(scope="session")
def trained_folder(world, make_tiny, tmp_path_factory):
    """Hugging Face folder of a policy that was over-fitted to a few short trajectories for some
    seconds: it zooms, makes calls that are refused, answers, and babbles, which a random policy
    never would."""
    out = tmp_path_factory.mktemp("trained")
    policy = make_tiny(torch.float32)
    overfit(policy, tools.read_jsonl(world / "coldstart.jsonl")[:4], world, 30)
    sft.export(policy, out)
    return out


@pytest.fixture(scope="session")
def trained_policy(trained_folder, prompts):
    """The same policy in float64, not to be changed."""
    return sft.load_policy(str(trained_folder), "cpu", "float64", prompts)


# -------------------------------------------------------------------------------------------------
# Served models


class ChatServer(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on loopback. behave(body) says how it answers a request: a text
    is a proper completion, (status, headers, bytes) is sent as it is, and "drop" ends the
    connection. requests: (path, headers, body) of all."""

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.behave, self.requests, self.url = behave, [], f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01},
                         daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class ChatHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.behave(body)
        if answer == "drop":
            self.close_connection = True
            return
        if isinstance(answer, str):
            done = {"choices": [{"index": 0, "finish_reason": "stop",
                                 "message": {"role": "assistant", "content": answer}}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
            answer = 200, {}, json.dumps(done).encode()
        status, headers, content = answer
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
    """The picture in a user's message, and the texts before and after it; None and the text if
    there is none."""
    if isinstance(message["content"], str):
        return None, message["content"]
    kinds = [part["type"] for part in message["content"]]
    at = kinds.index("image_url")
    head, data = message["content"][at]["image_url"]["url"].split(",", 1)
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    before, after = ("".join(p["text"] for p in parts)
                     for parts in (message["content"][:at], message["content"][at + 1:]))
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), (before, after)


def engine_behind_a_server(policy):
    """behave() for ChatServer: our own engine goes on greedily from the messages."""
    lock = threading.Lock()

    @torch.inference_mode()
    def behave(body):
        pieces = []
        for message in body["messages"]:
            view, text = picture_of(message)
            image = policy.preprocess_images([view])[0] if view is not None else None
            ids = policy.encode_message(message["role"], text, image and policy.num_image_tokens(image[1]))
            pieces.append((ids, image))
        pieces.append((policy.generation_prompt(), None))
        with lock:
            engine, written = evaluate.Engine(policy, evaluate.Limits(), 1), []
            engine.slots = [evaluate.Rollout()]
            engine.cache = evaluate.SlotCache(
                policy.model.config.text_config, 1, policy.model.dtype, policy.device, 4096)
            for ids, image in pieces:
                logprobs, after = engine.forward([0], [ids], [image])
                engine.slots[0].num_cached_tokens, engine.slots[0].next_position = (
                    engine.slots[0].num_cached_tokens + len(ids), after[0])
            while len(written) < body["max_tokens"]:
                token = logprobs.argmax(-1).item()
                if token in policy.stop_ids:
                    return policy.tokenizer.decode(written, skip_special_tokens=False)
                written.append(token)
                logprobs, after = engine.forward([0], [[token]], [None])
                engine.slots[0].num_cached_tokens, engine.slots[0].next_position = (
                    engine.slots[0].num_cached_tokens + 1, after[0])
        text = policy.tokenizer.decode(written, skip_special_tokens=False)
        return 200, {}, json.dumps({"choices": [{"finish_reason": "length",
                                                 "message": {"content": text}}]}).encode()
    return behave


# -------------------------------------------------------------------------------------------------
# Released models


def qwen2_5(hidden, layers, heads, kv, ff, vocabulary, tied):
    """config.json as released: the text model's fields at top level, the rotary embedding's under
    their old names."""
    return {"model_type": "qwen2_5_vl", "tie_word_embeddings": tied, "hidden_size": hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
            "intermediate_size": ff, "vocab_size": vocabulary,
            "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": {
                "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "num_heads": 16,
                "intermediate_size": 3420, "out_hidden_size": hidden, "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31]}}


def qwen3(hidden, ff, tied, vision_layers, vision_hidden, vision_ff, deepstack):
    """config.json as released."""
    return {"model_type": "qwen3_vl", "tie_word_embeddings": tied, "text_config": {
                "model_type": "qwen3_vl_text", "hidden_size": hidden, "num_hidden_layers": 36,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                "intermediate_size": ff, "vocab_size": 151936, "max_position_embeddings": 262144,
                "tie_word_embeddings": tied, "rope_theta": 5000000,
                "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20],
                                 "mrope_interleaved": True}},
            "vision_config": {
                "model_type": "qwen3_vl", "depth": vision_layers, "hidden_size": vision_hidden,
                "num_heads": 16, "intermediate_size": vision_ff, "out_hidden_size": hidden,
                "deepstack_visual_indexes": deepstack}}


RELEASED = {
    "Qwen2.5-VL-7B": qwen2_5(3584, 28, 28, 4, 18944, 152064, tied=False),
    "Qwen2.5-VL-3B": qwen2_5(2048, 36, 16, 2, 11008, 151936, tied=True),
    "Qwen3-VL-8B": qwen3(4096, 12288, False, 27, 1152, 4304, [8, 16, 24]),
    "Qwen3-VL-4B": qwen3(2560, 9728, True, 24, 1024, 4096, [5, 11, 17])}

PREPROCESSORS = {   # preprocessor_config.json as released
    "qwen2_5_vl": {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14,
        "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711]},
    "qwen3_vl": {
        "image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16,
        "temporal_patch_size": 2, "merge_size": 2,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3}}


def narrowed(name, tokenizer):
    """A released model's configuration with two narrow layers of text and three of vision. Size of
    a head, rotary embedding, patches and windows stay; the vocabulary is the tokenizer's."""
    config = copy.deepcopy(RELEASED[name])
    text, heads, hidden = ((config["text_config"], 2, 96) if "text_config" in config
                           else (config, 1, 128))
    text.update(vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=2,
                num_attention_heads=heads, num_key_value_heads=1, intermediate_size=128)
    config["vision_config"].update(depth=3, hidden_size=64, num_heads=4, intermediate_size=96,
                                   out_hidden_size=hidden)
    layers = ("fullatt_block_indexes" if "fullatt_block_indexes" in config["vision_config"]
              else "deepstack_visual_indexes")
    config["vision_config"][layers] = [0, 2]
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for key, token in [
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"),
        ("vision_start_token_id", "vision_start"), ("vision_end_token_id", "vision_end"),
        ("eos_token_id", "im_end"), ("bos_token_id", "endoftext")]}
    return AutoConfig.for_model(**{**config, **ids})


def wide(name, tokenizer, device, layers=None, **text):
    """A released Qwen2.5-VL at its own widths (or those in `text`), with random weights in bfloat16
    on the device. layers: of its text and of its tower (None: all). Special tokens are the
    tokenizer's."""
    config = copy.deepcopy(RELEASED[name])
    config.update(text)
    config["vision_config"].update(out_hidden_size=config["hidden_size"])
    if layers:
        config.update(num_hidden_layers=layers)
        config["vision_config"].update(depth=layers, fullatt_block_indexes=[layers - 1])
    known = narrowed(name, tokenizer).to_dict()
    ids = {key: known[key] for key in known if key.endswith("_token_id")}
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**{**config, **ids}),
                                                       dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def released_folder(world, prompts, make_tiny, tmp_path_factory):
    """released_folder(name) -> folder of a policy made like a released model, but narrow. It was
    over-fitted to a trajectory with the project's small vocabulary, which was filled up with random
    rows after: to the released size of one of them, which is slow in float64."""
    @functools.cache
    def make(name):
        out = tmp_path_factory.mktemp(name)
        (out / "preprocessor_config.json").write_text(
            json.dumps(PREPROCESSORS[RELEASED[name]["model_type"]]))
        tokenizer = make_tiny().tokenizer
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(narrowed(name, tokenizer))
        for p in model.parameters():
            if p.dim() > 1:
                p.data.normal_(std=p[0].numel() ** -0.5)
        processor = AutoImageProcessor.from_pretrained(out, backend="pil")
        overfit(sft.make_policy(model, tokenizer, processor, "cpu", prompts, max_pixels=100_000),
                tools.read_jsonl(world / "coldstart.jsonl")[:1], world, 40)
        text = RELEASED[name].get("text_config", RELEASED[name])
        size = text["vocab_size"] if name == "Qwen2.5-VL-7B" else len(tokenizer) + 1000
        model.resize_token_embeddings(size, mean_resizing=False)
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(
            ["<|im_end|>", "<|endoftext|>"])
        sft.export(sft.make_policy(model, tokenizer, processor, "cpu", prompts), out)
        return out
    return make


@pytest.fixture(scope="module", params=["tiny", *RELEASED])
def each_family(request, released_folder, prompts):
    """The trained tiny policy and one like each released model, in float64, not to be changed."""
    if request.param == "tiny":
        return request.getfixturevalue("trained_policy")
    return sft.load_policy(str(released_folder(request.param)), "cpu", "float64", prompts,
                           max_pixels=100_000)


@contextlib.contextmanager
def library_attention(policy):
    """Run a policy's model with transformers' own attention, in the text and in the vision
    tower."""
    policy.model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        policy.model.set_attn_implementation(
            {"text_config": "conversations", "vision_config": "windows_flash"})
