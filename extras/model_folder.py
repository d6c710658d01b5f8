"""What can be wrong with a model folder, told in one line before it costs time: a path that does
not exist, weights that are missing or damaged, a tokenizer or an image processor of another model.

sft.py imports this file. It has no command of its own.
"""

import difflib
import errno
import filecmp
import json
import math
import os
import re
import threading
from pathlib import Path

import huggingface_hub
import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.image_processing_base import ImageProcessingMixin
# Since 5.17 the top-level name needs torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import tools
from build_data import SPECIAL_TOKENS
from extras import run_folder

# ---- Where it is --------------------------------------------------------------------------------

# What a model is loaded from. The small files are told by their kind, since models differ in them.
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"      # owner/name


def find(path, hint="", files=MODEL_FILES):
    """Return the folder of a model. path: a local folder, or an id on the hub, whose files are
    downloaded into the local cache. hint: the command that makes the folder. Raise InputError if
    there is no model."""
    path = str(path)
    how_to_make = f"; make it with: {hint}" if hint else ""
    # 1. The libraries need a name in UTF-8. Under LC_ALL=C Python cannot decode it.
    try:
        path.encode()
    except UnicodeEncodeError:
        raise tools.InputError(f"--model {path!a} has characters that this locale cannot read; set "
                               "PYTHONUTF8=1") from None
    # 2. There is a folder of this name, or a file.
    folder = Path(path)
    if folder.is_dir():
        check_folder(folder, how_to_make)
        return path
    tools.check(not folder.exists(), f"{path} is a file; name the folder that it is in")
    # 3. There is none.
    if is_hub_id(path):
        return download(path, files)
    if re.fullmatch(HUB_ID, path) and folder.parent.is_dir() and folder.parts[0] != "checkpoints":
        how_to_make += f"; if it is an id on the hub: hf download {path} --local-dir {path}"
    raise tools.InputError(f"{path} does not exist{similar_folders(path)}, so it holds no model"
                           f"{how_to_make}")


def check_folder(folder, how_to_make):
    """Raise InputError if a folder cannot hold a whole model."""
    has_adapter = (folder / "adapter_config.json").exists()
    tools.check(not has_adapter, f"{folder} holds an adapter (adapter_config.json), not a whole "
                "model; merge it into its model first")
    if (folder / "config.json").exists():
        return
    # See replace_model.
    is_partial = any(folder.glob("*.safetensors")) or (folder / ".export").exists()
    tools.check(not is_partial, f"{folder} holds no model: config.json is missing, so a copy or "
                "an export was interrupted; copy it again, or continue its training with --resume")
    raise tools.InputError(f"{folder} holds no model{similar_folders(folder)}{how_to_make}")


def is_hub_id(path):
    """Return whether a path that does not exist can be an id on the hub, "owner/name". It is taken
    for a mistyped local path if the owner's name is like that of a folder that is here."""
    if not re.fullmatch(HUB_ID, path):
        return False
    owner = path.split("/")[0].lower()
    local_names = ["checkpoints", *(entry.name.lower() for entry in Path().iterdir()
                                    if entry.is_dir())]
    return not difflib.get_close_matches(owner, local_names, n=1, cutoff=0.8)


def similar_folders(path):
    """Return which model may have been meant, in brackets, or "" if none has such a name."""
    paths = {"tiny": "tiny, which only sft.py takes"}       # by name
    for parent in (Path(path).parent, Path("checkpoints"), Path()):
        for config in sorted(parent.glob("*/config.json")):
            paths.setdefault(config.parent.name.lower(), str(config.parent))
    names = difflib.get_close_matches(Path(path).name.lower(), paths, n=3, cutoff=0.66)
    if not names:
        return ""
    return f" (did you mean {' or '.join(paths[name] for name in names)}?)"


def download(hub_id, files):
    """Return the folder of a hub id in the local cache. Without network it is what an earlier
    download has left there. Raise InputError if there is nothing."""
    is_online = hub_answers()
    try:
        return huggingface_hub.snapshot_download(
            hub_id, allow_patterns=files, ignore_patterns="*/*", local_files_only=not is_online)
    except Exception as error:      # of several libraries
        if is_online:
            raise tools.InputError(f"{hub_id}{similar_folders(hub_id)}: cannot download this "
                                   f"model: {one_line(error)}") from None
        raise tools.InputError(
            f"{hub_id} is not a local folder{similar_folders(hub_id)}; as an id on the hub it was "
            f"not downloaded before, and {huggingface_hub.constants.ENDPOINT} does not answer (no "
            "network, or HF_HUB_OFFLINE is set)") from None


def hub_answers(seconds=4):
    """Return whether the hub answers within this time. Its own client would try for half a minute.
    The request runs in a thread, since nothing else ends a slow look-up of the host's name."""
    answers = []

    def ask():
        """Note the hub's answer, if it comes."""
        try:
            session = huggingface_hub.utils.get_session()
            answers.append(session.head(huggingface_hub.constants.ENDPOINT, timeout=seconds))
        except Exception:       # of several libraries: no network, or told to be offline
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return len(answers) > 0


def fingerprint(path):
    """Return name, size and time of change of every file that a local model is loaded from."""
    patterns = [*MODEL_FILES, "*.bin"]
    found = {file for pattern in patterns for file in Path(path).glob(pattern)}
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(found)]


# ---- What is in it ------------------------------------------------------------------------------


JSON_FILES = ["config.json", "tokenizer.json", "vocab.json", "tokenizer_config.json",
              "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json"]


def check_files(path, folder):
    """Raise InputError if a file besides the weights is missing or damaged. path: what the user
    calls the folder."""
    existing = [name for name in JSON_FILES if (Path(folder) / name).exists()]
    for file_name, other_name in [("tokenizer.json", "vocab.json"),
                                  ("preprocessor_config.json", "processor_config.json")]:
        tools.check(file_name in existing or other_name in existing, f"{path}: cannot load a "
                    f"model: {file_name} is missing; copy it from the model that this one was made "
                    "of")
    for name in existing:
        try:
            content = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise tools.InputError(f"{path}: cannot load a model: {name} is damaged: "
                                   f"{one_line(error)}") from None
        tools.check(isinstance(content, dict), f"{path}: cannot load a model: {name} is no object")
    for file in sorted(Path(folder).glob("*.safetensors")):
        check_weight_file(path, file)


def check_weight_file(path, file):
    """Raise InputError if the header of a file of weights is damaged, or if it stores integers: the
    library would take them for weights, where config.json does not say how to scale them."""
    try:
        with safe_open(file, "pt") as stored:
            quantized = [name for name in stored.keys()
                         if stored.get_slice(name).get_dtype() in ("I8", "U8")]
    except Exception as error:      # of the library's own kind
        raise tools.InputError(f"{path}: cannot load a model: {file.name} "
                               f"({file.stat().st_size} bytes) is damaged, or a pointer of Git "
                               f"LFS: {one_line(error)}; copy it again") from None
    tools.check(not quantized, f"{path}: {file.name} holds integers for {len(quantized)} tensor(s):"
                f" {some_of(quantized)}; a quantized model cannot be trained; use the one that it "
                "was made of")


# In these families both "edges" are areas in pixels, whatever their names say.
PIXEL_LIMITS = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}


def load_image_processor(folder):
    """Return the image processor of a folder. Its size has both names of PIXEL_LIMITS; a limit that
    the folder does not name is None."""
    # 1. The file; newer exports have it in processor_config.json.
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    except OSError:
        raise tools.InputError(f"{folder}: cannot load a model: preprocessor_config.json is missing"
                               "; copy it from the model that this one was made of") from None
    # 2. Where the file names a class that the library does not have (an early
    #    Qwen2_5_VLImageProcessor), `config` makes it take that of the model's family. It refuses
    #    some forms of a size, hence another one.
    image_processor = AutoImageProcessor.from_pretrained(
        folder, backend="pil", config=AutoConfig.from_pretrained(folder),
        size={"shortest_edge": 1, "longest_edge": 1})
    # 3. The size: beside "size", or in it, under the one name or the other.
    size = values.get("size", type(image_processor).size)
    if not isinstance(size, dict):
        size = {}
    image_processor.size = {}
    for edge, name in PIXEL_LIMITS.items():
        image_processor.size[edge] = values.get(name) or size.get(edge) or size.get(name)
    return image_processor


def pixel_limits(image_processor, min_pixels=None, max_pixels=None):
    """Return (min_pixels, max_pixels) of the views that a model is shown. Those that are None are
    the image processor's own. Raise InputError if it has none, or if they contradict each other."""
    limits = []
    names = []
    for (edge, name), limit in zip(PIXEL_LIMITS.items(), (min_pixels, max_pixels)):
        names.append(f"--{name}" if limit is not None else f"the model's {name}")
        if limit is None:
            limit = image_processor.size[edge]
        is_number = type(limit) in (int, float) and 1 <= limit < math.inf
        tools.check(is_number, f"the model's preprocessor_config.json has no {name} that is a "
                    f"number of pixels ({limit!r}); give --min_pixels and --max_pixels")
        limits.append(int(limit))
    min_pixels, max_pixels = limits
    tools.check(min_pixels <= max_pixels, f"{names[0]} {min_pixels} is above {names[1]} "
                f"{max_pixels}")
    return min_pixels, max_pixels


def check_weights(path, report, config):
    """Raise InputError if weights were missing, which the library fills with random numbers. Print
    a note of those that it did not use. report: the library's output_loading_info."""
    # 1. Missing, or of another shape.
    advice = ""
    if report["unexpected_keys"]:
        advice = f"; in their place the files have {some_of(report['unexpected_keys'])}"
    elif getattr(config.text_config, "tie_word_embeddings", False):
        advice = '; if they are tied, "tie_word_embeddings" belongs to the top of config.json'
    missing = report["missing_keys"]
    tools.check(not missing, f"{path}: no weights for {len(missing)} tensor(s) of the model: "
                f"{some_of(missing)}{advice}")
    reshaped = [f"{name} {tuple(stored)} instead of {tuple(expected)}"
                for name, stored, expected in report["mismatched_keys"]]
    tools.check(not reshaped, f"{path}: {len(reshaped)} tensor(s) with another shape than "
                f"config.json says: {some_of(reshaped)}")
    # 2. Not used.
    unused = report["unexpected_keys"]
    if unused and os.environ.get("RANK", "0") == "0":
        print(f"{path}: {len(unused)} tensor(s) are no part of the model and are not used: "
              f"{some_of(unused)}", flush=True)


def check_finite(path, model):
    """Raise InputError if a weight is NaN or infinite: a diverged run, or a damaged copy."""
    damaged = [name for name, param in model.named_parameters()
               if not math.isfinite(torch.linalg.vector_norm(param.detach(), math.inf))]
    tools.check(not damaged, f"{path}: {len(damaged)} tensor(s) have weights that are not finite "
                f"(NaN or infinite): {some_of(damaged)}; use an older model or copy it again")


def check_parts(config, tokenizer, image_processor):
    """Raise InputError if tokenizer or image processor belong to another model than this config."""
    # 1. Tokens.
    vocabulary = tokenizer.get_vocab()      # {token: id}
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    tools.check(not missing, f"the tokenizer has no token {some_of(missing)}")
    largest_id = max(vocabulary.values())
    num_rows = config.text_config.vocab_size
    tools.check(largest_id < num_rows, f"the tokenizer has ids up to {largest_id}, but the model's "
                f"embedding has {num_rows} rows only; resize the model's embeddings "
                "(resize_token_embeddings) or take the tokenizer that belongs to it")
    image_token_id = vocabulary["<|image_pad|>"]
    tools.check(image_token_id == config.image_token_id, "<|image_pad|> has the id "
                f"{image_token_id} in the tokenizer, {config.image_token_id} in config.json")
    # 2. Patches.
    class_name = type(image_processor).__name__
    tools.check("image_grid_thw" in image_processor.model_input_names, "the image processor "
                f"{class_name} belongs to another family of models")
    names = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size",
             "merge_size": "spatial_merge_size"}
    for name, config_name in names.items():
        ours = getattr(image_processor, name, None)
        expected = getattr(config.vision_config, config_name)
        tools.check(ours == expected, f"the image processor {class_name} has {name} {ours}, the "
                    f"model {expected}: it belongs to another model")


def some_of(names):
    """Return the first names of a collection as a text."""
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first}, ..."


# ---- Writing it ---------------------------------------------------------------------------------

# Weights that a loader may take before, or beside, those that export writes.
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin",
                "pytorch_model.bin.index.json", "adapter_*"]


def replace_model(new_folder, folder):
    """Move all files of a new model into a folder, and remove the weights of an older one there,
    which may have other names. new_folder is removed."""
    new_files = sorted(new_folder.iterdir())
    old_weights = {path for pattern in WEIGHT_FILES for path in folder.glob(pattern)}
    old_weights -= {folder / path.name for path in new_files}
    changed = [path for path in new_files if not is_same(path, folder / path.name)]
    # One file is replaced in one step, and a kill leaves the old model or the new one. That is what
    # rl.py does when it finds a better model. Several files are not: then config.json, without
    # which a folder holds no model, goes first and comes last.
    if len(changed) + len(old_weights) > 1:
        (folder / "config.json").unlink(missing_ok=True)
    for path in old_weights:
        path.unlink()
    for path in sorted(new_files, key=lambda path: path.name == "config.json"):
        path.chmod(0o644)       # safetensors writes 0600
        os.replace(path, folder / path.name)
    new_folder.rmdir()


def is_same(path, other):
    """Return whether two files have the same content."""
    return other.exists() and filecmp.cmp(path, other, shallow=False)


def cannot_save(folder, error):
    """Return the InputError that says why a model could not be saved."""
    # Safetensors and tokenizers have exceptions of their own: only their text tells a full disk.
    has_number = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    has_words = re.search("no space left|quota exceeded|file too large", str(error).lower())
    is_full = has_number or has_words
    advice = f"; free disk space; {run_folder.what_is_saved(folder)}" if is_full else ""
    return tools.InputError(f"cannot save a model to {folder}: {one_line(error)}{advice}")


def one_line(error, max_length=300):
    """Return an exception's text as one line, without the rest of a very long one."""
    text = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, RuntimeError)):      # 'x' alone explains nothing
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= max_length else text[:max_length] + " ..."
