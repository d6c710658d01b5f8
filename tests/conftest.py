"""Fixtures shared by all tests. Launchers, servers and models that tests import are in support/.

    fixture           scope     what a test gets
    world             session   folder with images, train.jsonl, coldstart.jsonl, short.jsonl and
                                instruct.jsonl of the drawn world
    prompts           session   the project's prompts with a short system prompt
    make_tiny         session   make_tiny(dtype, seed) -> Policy with random weights
    trained_folder    session   Hugging Face folder of a tiny policy that has learned the protocol
    trained_policy    session   the policy of trained_folder in float64, not to be changed
    released_folder   session   released_folder(name) -> folder of a narrow Qwen2.5-VL or Qwen3-VL
    each_family       module    runs a test with trained_policy, and with a narrow policy like each
                                released model
"""

import functools
import json
import os
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.image_processing_auto import AutoImageProcessor

runpy.run_path(str(Path(__file__).resolve().parent.parent / "extras" / "root.py"))

import build_data
import collect_coldstart
import sft
import tools
from support import exact
from support.models import PREPROCESSORS, RELEASED, narrowed, overfit

exact.install()
# tiny models are slower on many threads
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A data folder with 12 questions (levels mixed) in train.jsonl, their trajectories in
    coldstart.jsonl, the shortest of them in short.jsonl, and single-view rows in instruct.jsonl."""
    out = tmp_path_factory.mktemp("world")
    levels = list(build_data.LEVELS)
    rows = [build_data.make_question(("train", i, levels[i % 3]), out, 0) for i in range(12)]
    tools.write_jsonl(out / "train.jsonl", rows)
    # a short system prompt keeps the tests fast
    prompts = dict(tools.PROMPTS, system="Look closer.")
    solved = [collect_coldstart.solve(job, out, prompts, 32, 0) for job in enumerate(rows)]
    # only trajectories that search: a guess has no zoom to look at
    solved = [row for row in solved if row["strategy"] != "guess"]
    solved.sort(key=lambda row: len(row["turns"]))
    tools.write_jsonl(out / "coldstart.jsonl", solved[:8])
    tools.write_jsonl(out / "short.jsonl", solved[:5])
    tools.write_jsonl(out / "instruct.jsonl", build_data.make_instructions(0, out, 0, 6000, 8000))
    return out


@pytest.fixture(scope="session")
def prompts():
    """The project's prompts with a short system prompt."""
    return dict(tools.PROMPTS, system="Look closer.")


@pytest.fixture(scope="session")
def make_tiny(world, prompts):
    """make_tiny(dtype, seed) -> a Policy with random weights."""
    texts = build_data.project_texts(tools.read_jsonl(world / "instruct.jsonl"))

    def make(dtype=torch.float64, seed=0):
        model, tokenizer, image_processor = build_data.build_tiny(texts, seed)
        return sft.make_policy(model.to(dtype), tokenizer, image_processor, "cpu", prompts)
    return make


@pytest.fixture(scope="session")
def trained_folder(world, make_tiny, tmp_path_factory):
    """Hugging Face folder of a policy that was over-fitted to a few short trajectories for some
    seconds. It zooms, makes calls that are refused, answers, and babbles, which a random policy
    never would."""
    out = tmp_path_factory.mktemp("trained")
    policy = make_tiny(torch.float32)
    overfit(policy, tools.read_jsonl(world / "coldstart.jsonl")[:4], world, 30)
    sft.export(policy, out)
    return out


@pytest.fixture(scope="session")
def trained_policy(trained_folder, prompts):
    """The policy of trained_folder in float64, not to be changed."""
    return sft.load_policy(str(trained_folder), "cpu", "float64", prompts)


@pytest.fixture(scope="session")
def released_folder(world, prompts, make_tiny, tmp_path_factory):
    """released_folder(name) -> folder of a policy that is built like a released model, but narrow.

    It was over-fitted to one trajectory with the project's small vocabulary. Random rows were added
    to the vocabulary afterwards, for one of them up to the released size, which is slow in float64.
    """
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
        image_processor = AutoImageProcessor.from_pretrained(out, backend="pil")
        policy = sft.make_policy(model, tokenizer, image_processor, "cpu", prompts,
                                 max_pixels=100_000)
        overfit(policy, tools.read_jsonl(world / "coldstart.jsonl")[:1], world, 40)
        text_config = RELEASED[name].get("text_config", RELEASED[name])
        vocab_size = len(tokenizer) + 1000
        if name == "Qwen2.5-VL-7B":
            vocab_size = text_config["vocab_size"]
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(
            ["<|im_end|>", "<|endoftext|>"])
        sft.export(sft.make_policy(model, tokenizer, image_processor, "cpu", prompts), out)
        return out
    return make


@pytest.fixture(scope="module", params=["tiny", *RELEASED])
def each_family(request, released_folder, prompts):
    """The trained tiny policy and one like each released model, in float64, not to be changed."""
    if request.param == "tiny":
        return request.getfixturevalue("trained_policy")
    return sft.load_policy(str(released_folder(request.param)), "cpu", "float64", prompts,
                           max_pixels=100_000)
