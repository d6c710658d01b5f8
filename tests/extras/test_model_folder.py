"""Specification of extras/model_folder.py: what is wrong with a model folder is told in one line,
what is only written in another way is taken, and a model is replaced without a mixture."""

import argparse
import errno
import json
import os
import re
import shutil
import socket
import time

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

import sft
import tools
from extras import model_folder


@pytest.fixture
def folder(trained_folder, tmp_path):
    """A copy of a model folder, to be damaged."""
    return shutil.copytree(trained_folder, tmp_path / "model")


def edit(path, change):
    """Apply a function to the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder, change):
    """Replace the weights by change({name: tensor})."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_error(folder, **options):
    """Return the line that load_policy ends in."""
    with pytest.raises(tools.InputError) as error:
        sft.load_policy(str(folder), "cpu", **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


# ---- Where it is --------------------------------------------------------------------------------


@pytest.mark.parametrize("path, words", [
    ("chekpoints/base", "does not exist (did you mean checkpoints/base?)"),
    ("Checkpoints/bsae", "does not exist (did you mean checkpoints/base?)"),
    ("./nowhere/base", "does not exist (did you mean checkpoints/base?)"),
    ("base", "does not exist (did you mean checkpoints/base?)"),
    ("Tiny", "does not exist (did you mean tiny, which only sft.py takes?)"),
    ("mine/other", "so it holds no model; make it with: x.py; if it is an id on the hub: hf "
     "download mine/other --local-dir mine/other"),
    ("a/b/c", "a/b/c does not exist, so it holds no model"),
    ("~/model", "~/model does not exist, so it holds no model"),
    ("checkpoints", "checkpoints holds no model; make it with: x.py"),
    ("checkpoints/base/config.json", "is a file; name the folder that it is in"),
    ("mine/adapter", "holds an adapter (adapter_config.json), not a whole model"),
    ("mine/partial", "config.json is missing, so a copy or an export was interrupted"),
    ("mine/Gr\udcc3\udcbcn", "set PYTHONUTF8=1")])
def test_a_path_without_a_model_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(model_folder, "download")
    for name in ("checkpoints/base/config.json", "mine/adapter/adapter_config.json",
                 "mine/adapter/config.json", "mine/partial/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    error = load_error(path, hint="x.py")
    assert words in error
    assert "make it with: x.py" in error or "does not exist" not in error


def test_an_id_on_the_hub_is_downloaded_or_taken_from_the_cache(tmp_path, monkeypatch):
    """Without network only the cache is looked at, and one line says what was tried."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(hub_id, allow_patterns, local_files_only, **options):
        asked.append((hub_id, allow_patterns, local_files_only))
        if hub_id == "Qwen/absent":
            raise OSError("not there\nat all")
        return "cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(model_folder, "hub_answers", lambda: True)
    assert model_folder.find("Qwen/Qwen2.5-VL-3B-Instruct", files=["config.json"]) == "cache"
    assert "cannot download this model: not there at all" in load_error("Qwen/absent")
    monkeypatch.setattr(model_folder, "hub_answers", lambda: False)
    assert model_folder.find("Qwen/Qwen2.5-VL-3B-Instruct") == "cache"
    assert "does not answer (no network" in load_error("Qwen/absent")
    assert [local_files_only for _, _, local_files_only in asked] == [False, False, True, True]
    assert asked[0][1] == ["config.json"]


def test_a_hub_that_says_nothing_is_given_up(monkeypatch):
    """Also one that accepts the connection."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        start_time = time.time()
        assert not model_folder.hub_answers(seconds=0.2)
        assert time.time() - start_time < 3


# ---- What is in it ------------------------------------------------------------------------------


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def with_one(value):
    """One weight of the last layer's norm, a vector of ones, gets this value."""
    def change(weights):
        weights["model.norm.weight"][5] = value
        return weights
    return change


def narrow_head(weights):
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :64].contiguous()
    return weights


def quantize_head(weights):
    return {**weights, "lm_head.weight": (100 * weights["lm_head.weight"]).to(torch.int8)}


@pytest.mark.parametrize("change, words", [
    (quantize_head,
     "model.safetensors holds integers for 1 tensor(s): lm_head.weight; a quantized"),
    (without("lm_head"), "no weights for 1 tensor(s) of the model: lm_head.weight"),
    (without(".layers.2."), "no weights for 12 tensor(s) of the model: "
     "model.language_model.layers.2.input_layernorm.weight, "),
    (lambda weights: {f"base.{name}": tensor for name, tensor in weights.items()},
     "in their place the files have base.lm_head.weight, "),
    (narrow_head, "1 tensor(s) with another shape than config.json says: lm_head.weight ("),
    (with_one(torch.nan), "1 tensor(s) have weights that are not finite (NaN or infinite): "
     "model.language_model.norm.weight"),
    (with_one(-torch.inf), "not finite (NaN or infinite): model.language_model.norm.weight")])
def test_weights_that_are_missing_or_damaged_are_named(folder, change, words, capfd):
    """The library would draw random numbers, and print a table."""
    edit_weights(folder, change)
    assert words in load_error(folder)
    assert capfd.readouterr().err == ""


def test_weights_that_are_tied_by_the_inner_config_only_are_missing(released_folder, tmp_path):
    folder = shutil.copytree(released_folder("Qwen3-VL-4B"), tmp_path / "model")
    edit(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    edit(folder / "config.json",
         lambda config: config["text_config"].update(tie_word_embeddings=True))
    error = load_error(folder)
    assert "of the model: lm_head.weight; if they are tied, " in error
    assert '"tie_word_embeddings" belongs to the top of config.json' in error


def test_weights_that_are_not_used_are_a_note(folder, capfd):
    edit_weights(folder, lambda weights: {**weights, "adapter.weight": torch.ones(2)})
    sft.load_policy(str(folder), "cpu")
    output = capfd.readouterr()
    assert output.out.endswith(
        "1 tensor(s) are no part of the model and are not used: adapter.weight\n")
    assert output.err == ""


def set_preprocessor(**values):
    return lambda folder: edit(folder / "preprocessor_config.json",
                               lambda content: content.update(values))


def set_config(**values):
    return lambda folder: edit(folder / "config.json", lambda content: content.update(values))


def add_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new {number}>" for number in range(800)])
    tokenizer.save_pretrained(folder)


def lose_a_shard(folder):
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"),
                                                         "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("damage, words", [
    (add_tokens, "the tokenizer has ids up to .* but the model's embedding has"),
    (set_config(image_token_id=6), "has the id 5 in the tokenizer, 6 in config.json"),
    (set_config(quantization_config={"quant_method": "fp8"}), "a quantized model cannot be"),
    (lambda folder: edit(folder / "config.json", lambda config: config["text_config"].update(
        quantization_config={"quant_method": "awq", "bits": 4})), "a quantized model cannot be"),
    (set_preprocessor(patch_size=16), "has patch_size 16, the model 14"),
    (set_preprocessor(image_processor_type="CLIPImageProcessor"), "another family of models"),
    (set_preprocessor(size={"longest_edge": 9000}), "no min_pixels .*; give --min_pixels"),
    (set_preprocessor(size={"height": 9, "width": 9}), "no min_pixels .*; give --min"),
    (set_preprocessor(size={"min_pixels": 9, "max_pixels": "9"}), "no max_pixels .*'9'"),
    (set_preprocessor(size=224), "give --min_pixels and --max_pixels"),
    (lambda folder: (folder / "preprocessor_config.json").unlink(),
     "preprocessor_config.json is missing"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is damaged"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "g.json is no object"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"),
     r"model.safetensors \(23 bytes\) is damaged, or a pointer of Git LFS: .*; copy it again"),
    (lose_a_shard, "model-00001-of-00001.safetensors")])
def test_parts_that_are_missing_damaged_or_of_another_model_are_named(folder, damage, words):
    damage(folder)
    assert re.search(words, load_error(folder))


@pytest.mark.parametrize("values, limits", [
    ({"size": {"min_pixels": 3136, "max_pixels": 9999}}, (3136, 9999)),
    ({"size": {"shortest_edge": 3136.0, "longest_edge": 9999}}, (3136, 9999)),
    ({"size": {"longest_edge": 9999}, "min_pixels": 3136}, (3136, 9999)),
    ({"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 31, "max_pixels": 99},
     (31, 99)),
    ({"min_pixels": 3136, "max_pixels": 9999}, (3136, 9999)),
    ({}, (56 * 56, 1280 * 28 * 28))], ids=str)
@pytest.mark.parametrize("class_name", ["Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"])
def test_pixel_limits_by_any_name_and_an_early_class_are_taken(folder, class_name, values, limits):
    path = folder / "preprocessor_config.json"
    edit(path, lambda content: content.pop("size"))
    edit(path, lambda content: content.update(values, image_processor_type=class_name))
    image_processor = model_folder.load_image_processor(folder)
    assert model_folder.pixel_limits(image_processor) == limits
    assert model_folder.pixel_limits(image_processor, max_pixels=10**8) == (limits[0], 10**8)
    assert image_processor.image_mean[0] == 0.48145466
    with pytest.raises(tools.InputError, match="--min_pixels 12345678 is above the model's max"):
        model_folder.pixel_limits(image_processor, min_pixels=12345678)


def test_limits_that_contradict_each_other_are_told_before_weights_are_read(folder):
    (folder / "model.safetensors").unlink()
    assert load_error(folder, min_pixels=9000, max_pixels=100) == (
        "--min_pixels 9000 is above --max_pixels 100")
    assert re.fullmatch(r"--min_pixels 90000000 is above the model's max_pixels \d+",
                        load_error(folder, min_pixels=90000000))


# ---- Writing it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [
    '{"do_sample": false, "temperature": 0.01, "top_p": 0.001, "eos_token_id": [2]}',
    '{"repetition_penalty": 1.05, "do_sample": true, "top_k": 1, "no_repeat_ngram_size": 3,'
    ' "num_beams": 4, "bad_words_ids": [[7]], "forced_eos_token_id": 3, "penalty_alpha": 0.6}',
    '{"cache_implementation": "unknown"}', "{", None])
def test_an_exported_copy_samples_as_the_policy_does(folder, tmp_path, published):
    """Whatever the model's own defaults were; also those in an old config.json."""
    path = folder / "generation_config.json"
    path.unlink()
    if published is not None:
        path.write_text(published)
    edit(folder / "config.json", lambda config: config.update(temperature=0.3, top_k=5,
                                                              do_sample=True))
    policy = sft.load_policy(str(folder), "cpu")
    sft.check_export(policy, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    sft.export(policy, tmp_path / "out")
    exported = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    del exported["transformers_version"]
    assert exported == {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,
        "eos_token_id": sorted(policy.stop_ids), "pad_token_id": 0,
        "suppress_tokens": policy.suppressed_ids}
    # The library takes nothing else from anywhere.
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.generation_config == GenerationConfig(**exported)


@pytest.mark.parametrize("error, advice", [
    (OSError(errno.ENOSPC, "No space left on device"), True),
    (Exception("I/O error: No space left on device (os error 28)"), True),
    (OSError(errno.EACCES, "Permission denied"), False),
    (ValueError("GenerationConfig is invalid: \n- `temperature`: 0.01"), False)], ids=str)
def test_a_model_that_cannot_be_saved_is_told_before_training(trained_folder, tmp_path, monkeypatch,
                                                              error, advice):
    """With the true reason: only a full disk is told to be freed."""
    policy = sft.load_policy(str(trained_folder), "cpu")

    def save_pretrained(*args, **options):
        raise error

    monkeypatch.setattr(policy.tokenizer, "save_pretrained", save_pretrained)
    args = argparse.Namespace(out=tmp_path)
    with pytest.raises(tools.InputError) as told:
        sft.start_training("sft", policy, args, argparse.Namespace(attempt=1), False, 1)
    reason = " ".join(str(error).split())
    assert f"cannot save a model to {tmp_path}: " in str(told.value)
    assert reason in str(told.value)
    assert ("free disk space" in str(told.value)) is advice
    assert list(tmp_path.iterdir()) == []


OLD_MODEL = {"config.json": "old", "tokenizer.json": "same", "model.safetensors.index.json": "old",
             "model-00001-of-00002.safetensors": "old", "model-00002-of-00002.safetensors": "old",
             "pytorch_model.bin": "old", "adapter_config.json": "old"}
NEW_MODEL = {"config.json": "new", "tokenizer.json": "same", "model.safetensors": "new"}


def write_files(folder, contents):
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_text(content)


def read_files(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("old", [
    OLD_MODEL, {**NEW_MODEL, "model.safetensors": "old"}, {**NEW_MODEL, "config.json": "old"},
    {**NEW_MODEL, "config.json": "old", "model.safetensors": "old"}, NEW_MODEL, {}],
    ids=["shards", "weights", "config", "both", "nothing", "empty"])
def test_a_model_is_replaced_without_a_mixture(tmp_path, monkeypatch, old):
    """Killed after any number of changes to the folder, it holds the old model, the new one, or,
    recognisably, none. A folder in which one file differs always holds one."""
    library_replace = os.replace
    library_unlink = type(tmp_path).unlink
    num_left = 0

    class Killed(Exception):
        pass

    def killed_in_time(change):
        def wrapper(*args, **options):
            nonlocal num_left
            if num_left == 0:
                raise Killed
            num_left -= 1
            return change(*args, **options)
        return wrapper

    is_done = False
    for num_changes in range(20):
        case = tmp_path / str(num_changes)
        write_files(case, {**old, "metrics.jsonl": "log"})
        write_files(case / ".export", NEW_MODEL)
        num_left = num_changes
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed_in_time(library_replace))
            patch.setattr(type(tmp_path), "unlink", killed_in_time(library_unlink))
            try:
                model_folder.replace_model(case / ".export", case)
                is_done = True
            except Killed:
                pass
        files = read_files(case)
        assert files.pop("metrics.jsonl") == "log"
        if "config.json" in files or old in (NEW_MODEL, {**NEW_MODEL, "model.safetensors": "old"}):
            assert files in (old, NEW_MODEL)
        if is_done:
            break
    assert read_files(case) == {**NEW_MODEL, "metrics.jsonl": "log"}
    assert not (case / ".export").exists()


def test_the_files_that_decide_about_samples(tmp_path):
    """A change of any of them starts an evaluation over."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json",
             "tokenizer.json", "preprocessor_config.json", "model.safetensors.index.json",
             "pytorch_model.bin", "chat_template.jinja"]
    for name in [*names, "metrics.jsonl"]:
        (tmp_path / name).write_text(name)
    fingerprints = [model_folder.fingerprint(tmp_path)]
    for name in names:
        times = (tmp_path / name).stat()
        os.utime(tmp_path / name, ns=(times.st_atime_ns, times.st_mtime_ns + 1000))
        fingerprints.append(model_folder.fingerprint(tmp_path))
    (tmp_path / "config.json").unlink()
    fingerprints.append(model_folder.fingerprint(tmp_path))
    assert len({json.dumps(fingerprint) for fingerprint in fingerprints}) == len(names) + 2
    (tmp_path / "metrics.jsonl").write_text("more")
    assert model_folder.fingerprint(tmp_path) == fingerprints[-1]
    assert model_folder.fingerprint("http://localhost:8000/v1") == []
