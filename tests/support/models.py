"""Released model families made small, a policy over-fitted to a few trajectories, and how far two
models are apart."""

import contextlib
import copy

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

import sft


def overfit(policy, rows, root, steps):
    """Train the text model on a few trajectories for some seconds."""
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, freeze_vision=True), 3e-3, 0.0)
    batch = sft.collate(policy, [sft.encode(policy, row, root) for row in rows])
    for step in range(steps):
        optimizer.backward([batch], lambda batch: -sft.token_logprobs(policy, batch).mean())
        optimizer.step(3e-3 * min(1, (step + 1) / 10), 1.0)


def largest_difference(folder, other_folder):
    """Return how much a weight of one model differs from that of another one at most."""
    weights = load_file(folder / "model.safetensors")
    other_weights = load_file(other_folder / "model.safetensors")
    return max((weights[name] - other_weights[name]).abs().max().item() for name in weights)


# ---- Released models ----------------------------------------------------------------------------


def qwen2_5(hidden, layers, heads, kv, ff, vocabulary, tied):
    """Return config.json as released: the text model's fields are at top level, those of the rotary
    embedding have their old names."""
    return {"model_type": "qwen2_5_vl", "tie_word_embeddings": tied, "hidden_size": hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
            "intermediate_size": ff, "vocab_size": vocabulary,
            "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": {
                "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "num_heads": 16,
                "intermediate_size": 3420, "out_hidden_size": hidden, "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31]}}


def qwen3(hidden, ff, tied, vision_layers, vision_hidden, vision_ff, deepstack):
    """Return config.json as released."""
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


SPECIAL_TOKENS = {  # names in a configuration: tokens of the tokenizer
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    "eos_token_id": "<|im_end|>", "bos_token_id": "<|endoftext|>"}


def special_token_ids(tokenizer):
    """Return the fields of a configuration that name special tokens."""
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}


def narrowed(name, tokenizer):
    """Return a released model's configuration with two narrow layers of text and three of vision.
    Head size, rotary embedding, patches and windows stay; the vocabulary is the tokenizer's."""
    config = copy.deepcopy(RELEASED[name])
    # 1. the text model; a family either nests its configuration or has it at the top
    if "text_config" in config:
        text_config = config["text_config"]
        num_heads = 2
        hidden_size = 96
    else:
        text_config = config
        num_heads = 1
        hidden_size = 128
    text_config.update(vocab_size=len(tokenizer), hidden_size=hidden_size, num_hidden_layers=2,
                       num_attention_heads=num_heads, num_key_value_heads=1,
                       intermediate_size=128)
    # 2. the vision tower; its last layer attends to the whole image, and is merged into the text
    vision_config = config["vision_config"]
    vision_config.update(depth=3, hidden_size=64, num_heads=4, intermediate_size=96,
                         out_hidden_size=hidden_size)
    for field in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if field in vision_config:
            vision_config[field] = [0, 2]
    return AutoConfig.for_model(**{**config, **special_token_ids(tokenizer)})


def wide(name, tokenizer, device, num_layers=None, **text_fields):
    """Return a released Qwen2.5-VL at its own widths (or those in text_fields), with random weights
    in bfloat16 on the device. num_layers: of its text and of its tower (None: all)."""
    config = copy.deepcopy(RELEASED[name])
    config.update(text_fields)
    config["vision_config"].update(out_hidden_size=config["hidden_size"])
    if num_layers:
        config.update(num_hidden_layers=num_layers)
        config["vision_config"].update(depth=num_layers, fullatt_block_indexes=[num_layers - 1])
    config = AutoConfig.for_model(**{**config, **special_token_ids(tokenizer)})
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


@contextlib.contextmanager
def library_attention(policy):
    """Run a policy's model with transformers' own attention, in the text and in the vision
    tower."""
    config = policy.model.config
    ours = {"text_config": config.text_config._attn_implementation,
            "vision_config": config.vision_config._attn_implementation}
    policy.model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        policy.model.set_attn_implementation(ours)
