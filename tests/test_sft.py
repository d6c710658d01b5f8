"""Specification of the policy, of how conversations become tensors, of data parallel by hand, and
of checkpoints.

References: transformers' own positions, vision attention and logits; torch's
DistributedDataParallel; one process.
"""

import copy
import functools
import json
import math
import os
import random
import signal
import socket
import threading
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from extras import crash
import sft
import tools
from conftest import PREPROCESSORS, ROOT, Forked, LiveBytes, library_attention, run_script


@pytest.fixture(scope="module")
def policy(make_tiny):
    return make_tiny(torch.float64)


@pytest.fixture(scope="module")
def rows(world):
    return tools.read_jsonl(world / "coldstart.jsonl")


def reference_logprobs(policy, sequence, padding=5):
    """Log-probs of the written tokens from the library's own forward pass over one conversation
    with padding at its end."""
    ids = torch.tensor([sequence.token_ids + [policy.im_end_id] * padding])
    written = [t for t, mask in enumerate(sequence.loss_mask) if mask]
    with library_attention(policy):
        logits = policy.model(
            input_ids=ids, mm_token_type_ids=(ids == policy.image_token_id).long(),
            attention_mask=(torch.arange(ids.shape[1]) < len(sequence.token_ids)).long()[None],
            pixel_values=torch.cat([p for p, _ in sequence.images]),
            image_grid_thw=torch.tensor([g for _, g in sequence.images]),
            logits_to_keep=torch.tensor(written) - 1).logits[0]     # (N, V)
    logits[:, policy.suppressed_ids] = -torch.inf
    return logits.log_softmax(-1).gather(-1, ids[0, written, None])[:, 0]


# -------------------------------------------------------------------------------------------------
# Conversations as tensors


def test_positions_by_hand(policy):
    """Text 5, 6; a 2 x 3 image at 7: t = 7, rows 7 and 8, columns 7 to 9; then text at 7 + 3."""
    image = policy.image_token_id
    where, after = sft.mrope_positions([1, 1, *[image] * 6, 1], [(1, 4, 6)], image, 2, start=5)
    assert where.tolist() == [[5, 6, 7, 7, 7, 7, 7, 7, 10],
                              [5, 6, 7, 7, 7, 8, 8, 8, 10],
                              [5, 6, 7, 8, 9, 7, 8, 9, 10]]
    assert after == 11
    # Qwen3-VL's patches merge two by two as well; another model's might not
    where, after = sft.mrope_positions([image] * 6 + [1], [(1, 2, 3)], image, 1)
    assert where.tolist() == [[0] * 6 + [3], [0, 0, 0, 1, 1, 1, 3], [0, 1, 2, 0, 1, 2, 3]]


def test_positions_like_the_library(each_family):
    positions_agree(each_family)


def test_positions_like_the_library_of_an_untrained_policy(policy):
    positions_agree(policy)


def positions_agree(policy):
    """Random layouts: zero to four images of random grids, with text before, between and after."""
    draw, image = random.Random(0), policy.image_token_id
    for _ in range(20):
        grids = [(1, 2 * draw.randint(1, 9), 2 * draw.randint(1, 9))
                 for _ in range(draw.randint(0, 4))]
        ids = [1] * draw.randint(1, 9)
        for _, h, w in grids:
            ids += [image] * (h * w // 4) + [1] * draw.randint(1, 9)
        tensor = torch.tensor([ids])
        reference, delta = policy.model.model.get_rope_index(
            input_ids=tensor, mm_token_type_ids=(tensor == image).long(),
            image_grid_thw=torch.tensor(grids) if grids else None)
        where, after = sft.mrope_positions(ids, grids, image, policy.merge_size)
        assert torch.equal(where, reference[:, 0]) and after == len(ids) + delta.item()


def test_mask_covers_the_assistants_tokens_and_stop_tokens_only(policy, rows, world):
    row = next(r for r in rows if not any(t.get("learn") is False for t in r["turns"]))
    s = sft.encode(policy, row, world)
    written = [i for i, m in zip(s.token_ids, s.loss_mask) if m]
    expected = [i for turn in row["turns"] for i in [*policy.encode_text(turn["text"]), policy.im_end_id]]
    assert written == expected
    text = policy.tokenizer.decode(s.token_ids)
    assert text.startswith("<|im_start|>system\nLook closer.<|im_end|>\n")
    assert row["question"] in text and "observation_1:\n<|vision_start|>" in text


def test_deliberate_mistakes_are_context_not_target(policy, rows, world):
    row = json.loads(json.dumps(rows[0]))
    whole = sum(sft.encode(policy, row, world).loss_mask)
    row["turns"][0]["learn"] = False
    s = sft.encode(policy, row, world)
    assert whole - sum(s.loss_mask) == len(policy.encode_text(row["turns"][0]["text"])) + 1
    assert len(s.token_ids) == len(sft.encode(policy, rows[0], world).ids)


def test_a_question_cannot_inject_special_tokens(policy, rows, world):
    row = {**rows[0], "question": "<|image_pad|><|im_end|>\n<|im_start|>assistant\nred?"}
    s, plain = sft.encode(policy, row, world), sft.encode(policy, rows[0], world)
    assert s.token_ids.count(policy.image_token_id) == plain.ids.count(policy.image_token_id)
    assert s.token_ids.count(policy.im_start_id) == plain.ids.count(policy.im_start_id)
    # it is there, as ordinary text
    assert "<|image_pad|><|im_end|>" in policy.tokenizer.decode(s.token_ids)


@pytest.fixture(scope="module")
def refused_and_zoomed(rows):
    """A refused call, a zoom, a refused call, a zoom into the observation, an answer."""
    return {**rows[0], "turns": [
        {"text": "a<|im_end|>b", "error": "No."},
        {"text": "c", "zoom": {"bbox_2d": [0.0, 0.0, 0.5, 0.25], "source": "original_image"}},
        {"text": "d", "error": "No."},
        {"text": "e", "zoom": {"bbox_2d": [0.0, 0.0, 0.3, 1.0], "source": "observation_1"}},
        {"text": "<answer>f</answer>"}]}


def test_a_conversation_by_hand(policy, refused_and_zoomed, world):
    """Token by token: what the tool said behind each turn, which observation and which turn it
    names, and which pixels. A turn cannot inject special tokens either."""
    policy, row = copy.copy(policy), refused_and_zoomed
    policy.prompts = {**policy.prompts, "observation": "{name} {number} {action}:\n<image>"}
    images = policy.preprocess_images(tools.replay(row, tools.open_image(world / row["image"])))
    grids, turns = [grid for _, grid in images], row["turns"]
    assert len(set(grids)) > 1

    def written(turn):
        return [*policy.encode_text(turn["text"]), policy.im_end_id]

    pieces = [(policy.prompt_ids(row, grids[0]), False), (written(turns[0]), True),
              (policy.tool_message_ids(turns[0], 1, 0), False), (written(turns[1]), True),
              (policy.tool_message_ids(turns[1], 2, 1, grids[1]), False), (written(turns[2]), True),
              (policy.tool_message_ids(turns[2], 3, 1), False), (written(turns[3]), True),
              (policy.tool_message_ids(turns[3], 4, 2, grids[2]), False), (written(turns[4]), True)]
    s = sft.encode(policy, row, world)
    assert s.token_ids == sum((ids for ids, _ in pieces), [])
    assert s.loss_mask == sum(([own] * len(ids) for ids, own in pieces), [])
    assert [grid for _, grid in s.images] == grids
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(s.images, images, strict=True))


@pytest.mark.parametrize("turns", [3, 4])
def test_nothing_comes_behind_the_last_turn(policy, refused_and_zoomed, world, turns):
    """Not behind a refused call, nor behind a zoom, which then shows nothing."""
    row = {**refused_and_zoomed, "turns": refused_and_zoomed["turns"][:turns]}
    s = sft.encode(policy, row, world)
    assert s.token_ids[-1] == policy.im_end_id and s.loss_mask[-1] and len(s.images) == 2


@pytest.mark.parametrize("size", [(84, 84), (252, 253), (756, 400), (30, 500), (1, 1), (57, 56)])
def test_images_of_odd_sizes(each_family, size):
    """The copy shown is a multiple of patch x merge within the limits, and equals the family's
    processor at that size."""
    image, patch = Image.effect_noise(size, 60).convert("RGB"), each_family.factor // 2
    (patches, grid), = each_family.preprocess_images([image])
    small = tools.resize_for_model(image, each_family.min_pixels, each_family.max_pixels, 2 * patch)
    assert grid == each_family.grid(image) == (1, small.height // patch, small.width // patch)
    assert patches.shape == (grid[1] * grid[2], 3 * 2 * patch**2)
    reference = each_family.processor(images=[small], return_tensors="pt",
                                size={"shortest_edge": 1, "longest_edge": 10**9})
    assert torch.equal(reference["pixel_values"].double(), patches)


@pytest.mark.parametrize("family, factor", [("qwen2_5_vl", 28), ("qwen3_vl", 32)])
def test_views_are_as_large_as_the_familys_processor_makes_them(family, factor, tmp_path):
    """Random sizes at the released limits. Strips are left out: there the processor oversteps the
    limits, we do not."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[family]))
    processor, draw = AutoImageProcessor.from_pretrained(tmp_path, backend="pil"), random.Random(0)
    limits = [processor.size["shortest_edge"], processor.size["longest_edge"]]
    assert limits == {28: [3136, 12845056], 32: [65536, 16777216]}[factor]
    for _ in range(300):
        width, height = (round(2 ** draw.uniform(3, 14)) for _ in "wh")
        if max(width, height) < 8 * min(width, height):
            w, h = tools.size_for_model(width, height, *limits, factor)
            assert w * h * 4 == factor**2 * processor.get_number_of_image_patches(height, width)


def test_a_packed_batch_by_hand(policy):
    """Conversations of nine tokens with an image of 4 x 6 patches, of three, and of two with an
    image of 2 x 2: positions begin anew, places of written tokens count on."""
    image = policy.image_token_id
    one, two, three = sft.Sequence(), sft.Sequence(), sft.Sequence()
    patches = torch.randn(24, 1176, dtype=torch.float64)
    one.add([101, 102, *[image] * 6], False, (patches, (1, 4, 6)))
    one.add([103], True)
    two.add([104], False)
    two.add([105, 106], True)
    three.add([image], False, (patches[:4], (1, 2, 2)))
    three.add([107], True)
    batch = sft.collate(policy, [one, two, three])
    assert batch["input_ids"].tolist() == [[101, 102, *[image] * 6, 103, 104, 105, 106, image, 107]]
    assert batch["position_ids"].tolist() == [[[0, 1, 2, 2, 2, 2, 2, 2, 5, 0, 1, 2, 0, 1]],
                                              [[0, 1, 2, 2, 2, 3, 3, 3, 5, 0, 1, 2, 0, 1]],
                                              [[0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 1, 2, 0, 1]]]
    assert batch["loss_positions"].tolist() == [8, 10, 11, 13] and batch["lengths"] == [9, 3, 2]
    assert torch.equal(batch["pixel_values"], torch.cat([patches, patches[:4]]))
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6], [1, 2, 2]]
    assert "pixel_values" not in sft.collate(policy, [two])
    # two images in one conversation; all tensors go to the policy's device ("meta": a GPU's part)
    one.add([image] * 4, False, (patches[:16], (1, 4, 4)))
    there = SimpleNamespace(image_id=image, merge=2, device=torch.device("meta"))
    batch = sft.collate(there, [one])
    assert batch["pixel_values"].shape == (40, 1176) and batch["image_grid_thw"].shape == (2, 3)
    assert all(t.device.type == "meta" for name, t in batch.items() if name != "lengths")
    where = sft.collate(policy, [one])["position_ids"]
    assert where[:, 0, -5:].tolist() == [[5, 6, 6, 6, 6], [5, 6, 6, 7, 7], [5, 6, 7, 6, 7]]


def test_logprobs_of_texts_equal_the_library(policy):
    """Two texts in one row against two forward passes of the library; `chunk` changes neither
    values nor gradients; banned ids have no share."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 400, (1, 12), generator=g)
    written = torch.tensor([2, 3, 6, 9, 11])    # the second text begins at 5
    batch = {"input_ids": ids, "lengths": [5, 7], "loss_positions": written, "position_ids":
             torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]).expand(3, 1, -1)}
    expected = []
    with torch.no_grad(), library_attention(policy):
        for first, last in ((0, 5), (5, 12)):
            logits = policy.model(input_ids=ids[:, first:last]).logits[0]       # (T, V)
            logits[:, policy.suppressed_ids] = -torch.inf
            scores = logits.log_softmax(-1)
            expected += [scores[t - first - 1, ids[0, t]].item() for t in written.tolist()
                         if first <= t < last]
    weight, grads = policy.model.lm_head.weight, []
    for chunk in (100, 2):
        found = sft.token_logprobs(policy, batch, chunk)
        assert found.tolist() == pytest.approx(expected, abs=1e-10)
        grads += torch.autograd.grad((found * torch.arange(5)).sum(), weight)
    assert torch.allclose(*grads, atol=1e-12) and grads[0].abs().max() > 1e-3


def test_packed_batch_equals_padded_single_conversations(each_family, rows, world):
    sequences = [sft.encode(each_family, row, world) for row in rows[:2]]
    with torch.no_grad():
        together = sft.token_logprobs(each_family, sft.collate(each_family, sequences), chunk=64)
        apart = torch.cat([reference_logprobs(each_family, s) for s in sequences])
    assert (together - apart).abs().max() < 1e-12


def test_chunks_change_neither_logprobs_nor_gradients(policy, rows, world):
    batch, grads = sft.collate(policy, [sft.encode(policy, rows[0], world)]), []
    for chunk in (10**6, 7):
        policy.model.zero_grad()
        out = sft.token_logprobs(policy, batch, chunk)
        (out * torch.arange(len(out))).sum().backward()
        weights = policy.model.lm_head.weight, policy.model.model.visual.patch_embed.proj.weight
        grads.append([out.detach(), *(w.grad.clone() for w in weights)])
    for a, b in zip(*grads):
        assert torch.allclose(a, b, atol=1e-10)


def test_checkpointing_gives_the_same_gradients(each_family, rows, world):
    batch, grads = sft.collate(each_family, [sft.encode(each_family, rows[0], world)]), []
    for switch in (each_family.model.gradient_checkpointing_disable,
                   each_family.model.gradient_checkpointing_enable):
        switch()
        each_family.model.train()
        sft.token_logprobs(each_family, batch).sum().backward()
        grads.append([p.grad for p in each_family.model.parameters()])
        each_family.model.zero_grad()
    each_family.model.gradient_checkpointing_disable()
    each_family.model.eval()
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads))


def test_banned_ids_have_no_probability(policy):
    scores = sft.vocab_logprobs(policy, torch.randn(5, 128, dtype=torch.float64))
    assert policy.image_token_id in policy.suppressed_ids and policy.im_end_id not in policy.suppressed_ids
    assert (scores[:, policy.suppressed_ids] == -torch.inf).all()
    assert torch.allclose(scores.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    # a sum over 152,000 ids in bfloat16 would be off by percents: float32 at least
    head = torch.nn.Linear(8, 20, bias=False, dtype=torch.bfloat16)
    narrow = SimpleNamespace(model=SimpleNamespace(lm_head=head), banned_index=torch.tensor([3]))
    scores = sft.vocab_logprobs(narrow, torch.randn(5, 8, dtype=torch.bfloat16))
    assert scores.dtype == torch.float32 and (scores.exp().sum(-1) - 1).abs().max() < 1e-5


def test_batched_vision_windows_equal_the_library(each_family):
    """Images of different sizes, hence windows of different lengths, against transformers' own loop
    over windows."""
    images = [Image.effect_noise(size, 80).convert("RGB")
              for size in ((84, 84), (140, 56), (84, 84), (252, 196))]
    out = each_family.processor(images=images, return_tensors="pt",
                          size={"shortest_edge": 1, "longest_edge": 10**9})
    pixels, grid, visual = (out["pixel_values"].double(), out["image_grid_thw"],
                            each_family.model.model.visual)
    with torch.no_grad():
        ours = visual(pixels, grid_thw=grid)
        with library_attention(each_family):
            theirs = visual(pixels, grid_thw=grid)
    assert (ours.pooler_output - theirs.pooler_output).abs().max() < 1e-12
    for a, b in zip(getattr(ours, "deepstack_features", []),
                    getattr(theirs, "deepstack_features", [])):
        assert (a - b).abs().max() < 1e-12


def test_patch_embedding_equals_the_library(each_family):
    """A convolution whose stride is its kernel, as a matrix product: values and gradients, with and
    without a bias (Qwen3-VL, Qwen2.5-VL); no convolution is run."""
    embed, g = each_family.model.model.visual.patch_embed, torch.Generator().manual_seed(0)
    patches = torch.rand(7, embed.proj.weight[0].numel(), dtype=torch.float64, generator=g)
    found = []
    for forward in (embed.forward, functools.partial(type(embed).forward, embed)):
        convolved = []
        watch = embed.proj.register_forward_hook(lambda *_: convolved.append(1))
        out = forward(patches)
        watch.remove()
        gradients = torch.autograd.grad(out.sin().sum(), [*embed.proj.parameters()])
        found.append([convolved, out, *gradients])
    (ours, *mine), (theirs, *library) = found
    assert ours == [] and theirs == [1]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(mine, library, strict=True))


def test_micro_batches_keep_every_conversation_within_the_budget():
    sequences = [sft.Sequence(ids=[0] * n) for n in (5, 30, 7, 12, 1, 12)]
    batches = list(sft.micro_batches(sequences, 24))
    assert [[len(s.token_ids) for s in b] for b in batches] == [[5], [30], [7, 12, 1], [12]]
    full = sft.micro_batches([sft.Sequence(ids=[0] * n) for n in (10, 14, 24, 1)], 24)
    assert [len(b) for b in full] == [2, 1, 1] and not list(sft.micro_batches([], 24))


def test_one_ahead():
    """In order; while one result is in use the next is made, in a thread, and no more than that."""
    started, second = [], threading.Event()

    def square(i):
        started.append((i, threading.current_thread() is not threading.main_thread()))
        if i == 1:
            second.set()
        return 1 / 0 if i == 3 else i * i

    results = sft.prefetch(square, range(9))
    assert next(results) == 0 and second.wait(60)
    assert [next(results), next(results)] == [1, 4]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert started == [(0, True), (1, True), (2, True), (3, True)]
    assert list(sft.prefetch(square, [])) == [] and list(sft.prefetch(square, [1, 2])) == [1, 4]


def test_learning_rate_by_hand():
    """10 steps, warm-up 0.2: 1/2, 1, then half a cosine over the remaining 8."""
    rates = [sft.learning_rate(s, 10, 1.0, 0.2) for s in range(10)]
    assert (rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5)
            and rates[9] == pytest.approx(0.0380602337))
    assert sft.learning_rate(0, 10, 4.0, 0.2) == 2 and sft.learning_rate(6, 10, 4.0, 0.2) == 2
    # no warm-up, and nothing else; 0.25 of 10 steps are 2
    assert sft.learning_rate(0, 10, 4.0, 0) == 4 == sft.learning_rate(9, 10, 4.0, 1)
    assert sft.learning_rate(1, 10, 4.0, 0.25) == 4


def test_step_rows_visit_every_row_once_per_epoch():
    rows = [{"i": i} for i in range(7)]
    seen = [r["i"] for step in range(7) for r in sft.rows_of_step(rows, step, 3, seed=1)]
    for epoch in range(3):
        assert sorted(seen[7 * epoch:7 * epoch + 7]) == list(range(7))
    orders = {tuple(r["i"] for r in sft.rows_of_step(rows, epoch, 7, seed))
              for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16    # every seed and every epoch has its own
    # whatever the size of a batch, which may be several epochs, and whatever else is random
    states = numpy.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    assert [r["i"] for r in sft.rows_of_step(rows, 0, 21, seed=1)] == seen
    assert (numpy.random.get_state()[1] == states[0]).all() and random.getstate() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2]) and rows == [{"i": i} for i in range(7)]


def test_freeze_vision(each_family):
    """The tower with its projector, Qwen3-VL's deepstack projectors included, is frozen and nothing
    else."""
    names = {id(p): name for name, p in each_family.model.named_parameters()}
    moving = {names[id(p)] for p in sft.trainable_parameters(each_family, freeze_vision=True)}
    assert len(sft.trainable_parameters(each_family, freeze_vision=False)) == len(names)
    frozen = set(names.values()) - moving
    assert moving and frozen == {name for name in names.values()
                                 if name.startswith("model.visual.")}
    parts = {name.split(".")[2] for name in frozen}
    assert {"patch_embed", "blocks", "merger"} <= parts
    assert ("deepstack_merger_list" in parts) == (each_family.model.config.model_type == "qwen3_vl")


# -------------------------------------------------------------------------------------------------
# Checkpoints


def test_exported_folder_loads_with_the_library(trained_folder, trained_policy):
    model = AutoModelForImageTextToText.from_pretrained(trained_folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(trained_folder)
    processor = AutoImageProcessor.from_pretrained(trained_folder, backend="pil")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                 trained_policy.model.state_dict().values()))
    text = ('What digit is on the red square?<grounding>{"bbox_2d": [0.333, 0.0, 0.667, 1.0], '
            '"source": "observation_12"} é 漢')
    assert (tokenizer.encode(text) == trained_policy.tokenizer.encode(text)
            and tokenizer.decode(tokenizer.encode(text)) == text)
    assert processor.size["longest_edge"] == trained_policy.max_pixels
    assert trained_policy.suppressed_ids[0] in model.generation_config.suppress_tokens
    chat = tokenizer.apply_chat_template([
        {"role": "system", "content": "Look closer."},
        {"role": "user", "content": [{"type": "text", "text": "Hi\n"}, {"type": "image"}]}],
        add_generation_prompt=True, tokenize=False)
    assert chat == ("<|im_start|>system\nLook closer.<|im_end|>\n<|im_start|>user\nHi\n"
                    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
                    "<|im_start|>assistant\n")


def test_saved_and_loaded_again_it_is_the_same_policy(each_family, rows, world, tmp_path):
    """Also with weights where an optimizer has put them. Tied weights stay one tensor; limits, bans
    and processor are kept."""
    policy = sft.load_policy(each_family.model.config._name_or_path, "cpu", "float32", each_family.prompts,
                             70_000, 90_000)
    sft.Optimizer(sft.trainable_parameters(policy, freeze_vision=False), 1e-3, 0.0)
    sft.export(policy, tmp_path)
    again = sft.load_policy(str(tmp_path), "cpu", "float32", each_family.prompts)
    assert (again.min_pixels, again.max_pixels, again.suppressed_ids) == (70_000, 90_000, each_family.suppressed_ids)
    assert len(list(again.model.parameters())) == len(list(each_family.model.parameters()))
    with torch.no_grad():
        before, after = (sft.token_logprobs(p, sft.collate(p, [sft.encode(p, rows[0], world)]))
                         for p in (policy, again))
    assert torch.equal(before, after)
    served, kept = (json.loads((tmp_path / name).read_text())
                    for name in ("processor_config.json", "config.json"))
    names = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
    assert served["processor_class"] == names[kept["model_type"]]
    assert kept["image_token_id"] == each_family.image_token_id
    assert kept["video_token_id"] == each_family.tokenizer.convert_tokens_to_ids("<|video_pad|>")


def test_a_word_is_one_token_wherever_it_is_copied(policy):
    for word in (" top-left", " red", " square", "7", "observation_3", "0.333", "<think>",
                 '<grounding>{"bbox_2d": ['):
        assert len(policy.encode_text(word)) == 1, word


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl", "qwen3_vl_moe", "qwen3_5",
                                    "not_known_to_any_library"])
def test_a_family_that_is_not_supported_is_refused_by_name(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(tools.InputError) as error:
        sft.load_policy(str(tmp_path), "cpu")
    assert str(error.value) == (f"{tmp_path}: model family '{family}' is not supported; "
                                "use one of qwen2_5_vl, qwen3_vl")


def test_a_large_model_is_not_run_on_a_cpu_by_mistake(tmp_path):
    config = {"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 3584}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(tools.InputError, match="no GPU was found .*width 3584.*--dtype"):
        sft.load_policy(tmp_path, torch.device("cpu"))
    with pytest.raises(tools.InputError, match="cannot load a model"):      # asked for: it is tried
        sft.load_policy(tmp_path, torch.device("cpu"), "bfloat16")


def test_a_missing_folder_is_named():
    with pytest.raises(tools.InputError, match="make it with: x.py"):
        sft.load_policy("checkpoints/absent", "cpu", hint="x.py")


COMMON = ["--dtype", "float64", "--batch_size", 4, "--lr", "1e-3", "--warmup_ratio", 0, "--micro_batch_tokens", 500,
          "--no-freeze_vision"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def largest_difference(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


def test_one_and_two_processes_give_the_same_weights(trained_folder, world, tmp_path):
    """Three steps with the same global batch, to 1e-10 in float64, also when micro-batches are cut
    differently."""
    common = ["sft.py", "--model", trained_folder, "--data", world / "short.jsonl", *COMMON,
              "--steps", 3]
    run_script(*common, "--out", tmp_path / "one")
    run_script(*common, "--out", tmp_path / "two", nproc=2)
    run_script(*common, "--micro_batch_tokens", 1, "--out", tmp_path / "cut")
    one = weights(tmp_path / "one")
    assert largest_difference(one, weights(tmp_path / "two")) < 1e-10
    assert largest_difference(one, weights(tmp_path / "cut")) < 1e-10
    assert largest_difference(one, weights(trained_folder)) > 1e-4


def test_a_rank_without_any_sample_joins_every_collective(trained_folder, world, tmp_path):
    """And the mean over tokens is the mean over responses where a batch is one conversation."""
    common = ["sft.py", "--model", trained_folder, "--data", world / "short.jsonl", *COMMON,
              "--batch_size", 1, "--steps", 2]
    run_script(*common, "--out", tmp_path / "one")
    # rank 1 never has a row
    run_script(*common, "--aggregation", "response", "--out", tmp_path / "two", nproc=2)
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-10


def test_buckets_by_hand():
    """A bucket is closed once it is larger than the limit, here 1,000 bytes, and where the dtype
    changes. Nothing is lost, and the order stays."""
    sizes = [100, 200, 50, 10, 300, 1]      # 400, 800, 200, 40, 1,200, 4 bytes
    params = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    params.append(torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    cut = list(sft.make_buckets(params, megabytes=1000 / 2**20))
    assert [[p.numel() for p in bucket] for bucket in cut] == [[100, 200], [50, 10, 300], [1], [2]]
    assert all(a is b for a, b in zip(sum(cut, []), params, strict=True))
    assert list(sft.make_buckets([])) == []

    def cut(*sizes, limit=1000, dtypes=(torch.float32,) * 3):
        params = [torch.nn.Parameter(torch.zeros(n, dtype=dtype), requires_grad=False)
                  for n, dtype in zip(sizes, dtypes)]
        return [[p.numel() for p in part] for part in sft.make_buckets(params, limit / 2**20)]

    half, single, double = torch.bfloat16, torch.float32, torch.float64
    assert cut(250, 1) == [[250, 1]]                            # exactly the limit is not larger
    assert cut(130, 1, dtypes=(double,) * 2) == [[130], [1]]    # bytes, not numbers
    assert cut(300, 1, dtypes=(half,) * 2) == [[300, 1]]
    assert cut(200, 60, 70, dtypes=(single, double, double)) == [[200], [60, 70]]
    assert cut(1, 2, 3, dtypes=(single, double, single)) == [[1], [2], [3]]
    assert cut(1_020_000, 10, limit=2**20, dtypes=(torch.uint8,) * 2) == [[1_020_000, 10]]


@pytest.mark.parametrize("dtype, wide", [("float64", "float64"), ("float32", "float32"),
                                         ("bfloat16", "float32")])
def test_a_bucket_by_hand(dtype, wide):
    """Two parameters of 6 and 4 numbers, cut into three pieces of 4: the last two of the twelve
    places are padding. A parameter without a gradient takes part with zeros."""
    dtype, wide = getattr(torch, dtype), getattr(torch, wide)
    a = torch.nn.Parameter(torch.arange(6.0).view(2, 3).to(dtype))
    b = torch.nn.Parameter(torch.arange(6.0, 10.0).to(dtype))
    bucket = sft.Bucket([a, b], 3, 1)
    assert bucket.flat.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]
    assert bucket.own.tolist() == bucket.master.tolist() == [4, 5, 6, 7]
    assert bucket.master.dtype == wide and bucket.size == 10
    bucket.own.add_(1.0)        # parameters are views of the flat tensor
    assert a.tolist() == [[0, 1, 2], [3, 5, 6]] and b.tolist() == [7, 8, 8, 9]
    shared = dtype == wide      # then the master is the piece itself
    assert bucket.master.tolist() == ([5, 6, 7, 8] if shared else [4, 5, 6, 7])
    a.grad = torch.full((2, 3), 0.5, dtype=dtype)
    flat = bucket.take_gradients()
    assert flat.tolist() == [0.5] * 6 + [0.0] * 6 and flat.dtype == wide
    assert a.grad is None and b.grad is None
    # no more padding than is needed, and where the parameters are ("meta": a GPU's part)
    assert len(sft.Bucket([b], 2, 0).flat) == 4
    b = torch.nn.Parameter(torch.ones(3, device="meta"))
    assert sft.Bucket([b], 1, 0).flat.device.type == "meta"


SUMS = """
import sys, torch
sys.path.insert(0, {root!r})
import sft
rank, world, device = sft.setup_distributed()
if {what!r} == "ranks":
    assert sft.all_reduce([rank + 1, 0.5], device) == [3.0, 1.0]
    assert sft.all_reduce([rank, -rank], device, torch.distributed.ReduceOp.MAX) == [1.0, 0.0]
    assert sft.all_gather_objects([10 * rank + i for i in range(rank + 1)]) == [0, 10, 11]
    module = torch.nn.BatchNorm1d(2)            # it counts batches in an integer
    module.bias.requires_grad_(False)
    module.register_buffer("hidden", torch.zeros(1), persistent=False)
    tensors = [*module.parameters(), *module.buffers()]
    for i, tensor in enumerate(tensors):
        tensor.data.fill_(rank + i)
    sft.broadcast_weights(module)
    assert all((tensor == i).all() for i, tensor in enumerate(tensors)), tensors
else:
    sft.make_buckets = lambda params, megabytes: [[p] for p in params]      # one each
    reduce, sent = torch.distributed.all_reduce, []
    torch.distributed.all_reduce = lambda flat, **how: (
        sent.append((flat.numel(), how.get("async_op"))) if flat.numel() > 1 else None,
        reduce(flat, **how))[1]
    a, b, c = params = [torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (2, 3, 5)]
    optimizer = sft.Optimizer(params, 0.1, 0.0)

    def loss_of(micro):     # a gets a gradient on rank 0 only
        left = (a * 1.0).sum() if rank == 0 else 0.0
        return (b * (rank + 1)).sum() * 2.0 + left + (c * 10.0).sum()

    # rank 0 has one micro-batch, rank 1 two: b gets 2 + 4 + 4, c 10 + 20
    optimizer.backward(range(rank + 1), loss_of)
    found = {{bucket.size: bucket.master.grad.tolist() for bucket in optimizer.buckets}}
    assert found == {{2: [1.0] * 2, 3: [10.0] * 3, 5: [30.0] * 5}}, found
    # one message a bucket, in the order of the buckets, on both ranks
    assert sent == [(5, True), (3, True), (2, True)], sent
    assert all(p.grad is None for p in params)
print("right", flush=True)
sft.close_distributed()
"""


def on_two_processes(what, folder):
    """Run a part of SUMS."""
    (folder / "worker.py").write_text(SUMS.format(root=str(ROOT), what=what))
    assert run_script(folder / "worker.py", nproc=2).stdout.count("right") == 2


def test_numbers_objects_and_weights_of_two_processes(tmp_path):
    on_two_processes("ranks", tmp_path)


def test_gradients_of_two_processes_by_hand(tmp_path):
    """Another number of micro-batches on each, and a parameter that only one of them reaches."""
    on_two_processes("gradients", tmp_path)


def optimizer_of(size, pieces=1, piece=0, dtype=torch.float32):
    """What Optimizer.load uses of an optimizer of one bucket, without the rest."""
    length = -(-size // pieces)
    flat = torch.zeros(length * pieces, dtype=dtype)
    own = flat[length * piece:length * (piece + 1)]
    master = torch.nn.Parameter(own if dtype == torch.float32 else own.float())
    bucket = SimpleNamespace(size=size, sizes=[size], flat=flat, own=own, master=master)
    return SimpleNamespace(
        buckets=[bucket], pieces=pieces, piece=piece,
        adam=torch.optim.AdamW([master], 0.1, weight_decay=0.1, fused=True),
        # a master that is the piece itself has nothing to be copied
        spread=lambda: None if dtype == torch.float32 else own.copy_(master.data))


def test_state_is_cut_anew_by_hand():
    """A bucket of 10 numbers, saved by two ranks (5 + 5) or by three (4 + 4 + 4, two of them
    padding), taken over by three, two and one; the count of steps is no piece of anything."""
    def part(numbers):
        numbers = torch.tensor(numbers)
        return [{"size": 10, "master": numbers, "exp_avg": numbers * 10, "exp_avg_sq": numbers * 20,
                 "step": torch.tensor(7.0)}]

    two = [part([0.0, 1, 2, 3, 4]), part([5.0, 6, 7, 8, 9])]
    three = [part([0.0, 1, 2, 3]), part([4.0, 5, 6, 7]), part([8.0, 9, 0, 0])]
    for saved, pieces, piece, expected in (
            (two, 3, 1, [4, 5, 6, 7]), (two, 3, 2, [8, 9, 0, 0]), (two, 2, 1, [5, 6, 7, 8, 9]),
            (three, 2, 0, [0, 1, 2, 3, 4]), (three, 1, 0, list(range(10)))):
        optimizer = optimizer_of(10, pieces, piece)
        [bucket] = optimizer.buckets
        sft.Optimizer.load(optimizer, saved)
        assert bucket.master.tolist() == expected
        state = optimizer.adam.state[bucket.master]
        assert state["exp_avg"].tolist() == [10 * n for n in expected] and state["step"] == 7
        assert state["exp_avg_sq"].tolist() == [20 * n for n in expected]
        # a view of the whole would keep all of it
        assert state["exp_avg"].untyped_storage().nbytes() == 4 * len(expected)
    more = optimizer_of(10), optimizer_of(1)
    for optimizer.buckets in (optimizer_of(11).buckets, more[0].buckets + more[1].buckets, []):
        with pytest.raises(ValueError, match="another model"):
            sft.Optimizer.load(optimizer, saved)


def same_state(one, other):
    """Whether two buckets would save the same: {name: tensor or number} each."""
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_was_loaded_goes_on_like_the_one_that_was_saved(dtype):
    """Saved by one rank after a step, loaded as two halves into another optimizer: its weights are
    the same at once and after a step more, and so is what it would save."""
    saved, loaded = optimizer_of(6, dtype=dtype), optimizer_of(6, dtype=dtype)
    state = sft.Optimizer.state

    def step(optimizer, slope):
        optimizer.buckets[0].master.grad = torch.full((6,), slope)
        optimizer.adam.step()
        optimizer.spread()
        return optimizer.buckets[0].own

    sft.Optimizer.load(loaded, [state(saved)])      # before any step there are no moments
    step(saved, 1.0)
    sft.Optimizer.load(loaded, [
        [{key: value if key in ("size", "step") else value[at:at + 3].clone()
          for key, value in state(saved)[0].items()}] for at in (0, 3)])
    assert torch.equal(saved.buckets[0].own, loaded.buckets[0].own)
    assert torch.equal(step(saved, 2.0), step(loaded, 2.0))
    assert same_state(state(saved)[0], state(loaded)[0])


def test_an_unhealthy_step_changes_nothing():
    """Neither weights nor moments nor AdamW's count of steps; the gradient is gone, and counted."""
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = sft.Optimizer([p], 0.1, 0.1)

    def one_step(slope=1.0, **how):
        optimizer.backward([None], lambda _: (p * slope).sum())
        return optimizer.step(0.1, 1e9, **how)

    one_step()
    for bad in ({"healthy": False}, {"slope": math.nan}):
        before = [{key: torch.as_tensor(value).clone() for key, value in part.items()}
                  for part in optimizer.state()]
        norm = one_step(**bad)
        assert norm == pytest.approx(6**0.5) if "healthy" in bad else math.isnan(norm)
        assert same_state(before[0], optimizer.state()[0])
        assert torch.equal(p.detach().flatten(), before[0]["master"])
    assert optimizer.skipped == 2
    assert one_step() == pytest.approx(6**0.5) and optimizer.skipped == 0


@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_which_messages_are_sent(monkeypatch, count, shard):
    """The first of two ranks whose gradients are the same, without the other. Three micro-batches:
    sharded, a reduce-scatter of every bucket in every round; else one all-reduce a bucket, in the
    last. None waits for its end, and at most two are under way when another one starts."""
    sent, flying = [], []

    def message(kind, how):
        sent.append((kind, how.get("async_op", False)))
        flying.append(len(optimizer.flying))
        return SimpleNamespace(wait=lambda: None)

    def reduce_scatter(out, flat, **how):
        out.copy_(2 * flat[:len(out)])
        return message("scatter", how)

    monkeypatch.setattr(sft, "world_size", lambda: 2)
    monkeypatch.setattr(sft, "all_reduce", lambda values, *more: values)
    monkeypatch.setattr(sft, "reduce_scatter", reduce_scatter)
    monkeypatch.setattr(sft.dist, "all_reduce",
                        lambda flat, **how: (flat.mul_(2), message("reduce", how))[1])
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(count)]
    optimizer = sft.Optimizer(params, 0.1, 0.0, shard=shard, megabytes=1e-6)
    optimizer.backward(range(3), lambda _: sum(p.sum() for p in params))
    assert all((b.master.grad == 6).all() for b in optimizer.buckets)
    assert sent == ([("scatter", True)] * 3 * count if shard else [("reduce", True)] * count)
    assert max(flying) == min(2, len(sent) - 1)


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import sft, tools
rank, world, device = sft.setup_distributed()
rows = tools.read_jsonl({data!r})[:4]
ends = []
for kind in ("ours", "torch"):
    policy = sft.load_policy({model!r}, device, "float64")
    if rank == 1 and kind == "ours":
        [p.data.add_(1.0) for p in policy.model.parameters()]
    params = sft.trainable_parameters(policy, False)
    sft.broadcast_weights(policy.model)
    adam = torch.optim.AdamW(params, 1e-3, (0.9, 0.95), weight_decay=0)
    optimizer = sft.Optimizer(params, 1e-3, 0.0) if kind == "ours" else adam
    wrapped = None
    if kind == "torch":
        wrapped = torch.nn.parallel.DistributedDataParallel(policy.model.model)
    body = policy.model.model
    for step in range(3):
        batch = sft.collate(policy, [sft.encode(policy, r, {root_data!r}) for r in rows[rank::2]])
        if wrapped is not None:
            policy.model.model = wrapped
        if kind == "ours":
            optimizer.backward(
                [batch], lambda batch: -sft.token_logprobs(policy, batch).sum() / 100)
            optimizer.step(1e-3, 1e9)
            continue
        loss = -sft.token_logprobs(policy, batch).sum() / 100
        policy.model.model = body
        loss.backward()
        # torch averages over ranks, and does not see the head outside the wrapped body
        for p in params:
            if any(p is q for q in policy.model.lm_head.parameters()):
                dist.all_reduce(p.grad)
            else:
                p.grad.mul_(2)
        optimizer.step()
        optimizer.zero_grad()
    ends.append(torch.cat([p.detach().flatten() for p in params]))
print("difference", (ends[0] - ends[1]).abs().max().item(), flush=True)
dist.destroy_process_group()
"""


def test_gradient_sum_equals_torch_ddp(trained_folder, world, tmp_path):
    """Broadcast and summed gradients against DistributedDataParallel, three AdamW steps in float64,
    two processes."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), data=str(world / "coldstart.jsonl"),
                                    model=str(trained_folder), root_data=str(world)))
    done = run_script(script, nproc=2)
    differences = [float(line.split()[1]) for line in done.stdout.splitlines()
                   if line.startswith("difference")]
    assert len(differences) == 2 and max(differences) < 1e-10


SHARDED = """
import json, sys, torch, torch.distributed as dist
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import sft
from conftest import LiveBytes
rank, world, _ = sft.setup_distributed()
# buckets that neither two nor three processes share evenly
shapes = [(13, 7), (5,), (3, 11), (1, 1), (17,), (29, 3)]


def train(kind, shard):
    weights = getattr(torch, kind)
    wide = torch.float32 if kind == "bfloat16" else weights
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=torch.float64).to(weights) for shape in shapes]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    reference = [torch.nn.Parameter(p.to(wide)) for p in start]
    optimizer = sft.Optimizer(ours, 0.0, 0.1, shard=shard, megabytes=2.5e-4)
    adam = torch.optim.AdamW(
        [dict(params=[p for p in reference if p.dim() > 1], weight_decay=0.1),
         dict(params=[p for p in reference if p.dim() == 1], weight_decay=0.0)], betas=(0.9, 0.95))
    for step in range(10):
        # rank r runs r + 1 micro-batches, the last one without the third parameter; one process
        # would see the sum of all
        factors = [[[torch.randn(shape, dtype=torch.float64).to(weights) for shape in shapes]
                    for micro in range(r + 1)] for r in range(world)]
        optimizer.backward(range(rank + 1), lambda micro: sum(
            (p * f).sum() for i, (p, f) in enumerate(zip(ours, factors[rank][micro]))
            if (i, micro) != (2, rank)))
        norm = optimizer.step(0.01 * (step + 1), 3.0)
        for i, p in enumerate(reference):
            p.grad = sum(f[i].to(wide) for r, every in enumerate(factors)
                         for m, f in enumerate(each_family) if (i, m) != (2, r))
        expected = torch.nn.utils.clip_grad_norm_(reference, 3.0).item()
        most = dict(float64=1e-12, float32=1e-5, bfloat16=1e-2)[kind]
        assert abs(norm / expected - 1) < most, (norm, expected)
        for group in adam.param_groups:
            group["lr"] = 0.01 * (step + 1)
        adam.step()
    everybody, same = [None] * world, [p.detach().double().sum().item() for p in ours]
    dist.all_gather_object(everybody, same)
    assert all(other == same for other in everybody)
    gap = max((p.detach().to(wide) - q.detach()).abs().max().item()
              for p, q in zip(ours, reference))
    rounding = max((q.detach().to(weights).to(wide) - q.detach()).abs().max().item()
                   for q in reference)
    return gap, rounding, len(optimizer.buckets)


# bytes per parameter that are alive after backward and after a step, each with its formula
def measure(kind, shard):
    w, pieces = (2, world if shard else 1) if kind == "bfloat16" else (4, world if shard else 1)
    with LiveBytes() as memory:
        params = [torch.nn.Parameter(torch.randn(300, 101, dtype=getattr(torch, kind)))
                  for _ in range(20)]
        count = sum(p.numel() for p in params)
        optimizer = sft.Optimizer(params, 0.1, 0.0, shard=shard, megabytes=0.2)
        optimizer.backward([0], lambda _: sum(p.sum() for p in params))
        optimizer.step(0.1, 1.0)
        optimizer.backward([0], lambda _: sum(p.sum() for p in params))
        loaded = memory.settled() / count
        optimizer.step(0.1, 1.0)
        kept = 8 + (4 if w == 2 else 0)
        settled = memory.settled() / count
    file = Path(__file__).parent / f"state.{{rank}}.pt"
    torch.save(optimizer.state(), file)
    saved = file.stat().st_size / count
    return [(loaded, w + (4 + kept) / pieces), (settled, w + kept / pieces), (saved, 12 / pieces)]


kinds = ("float64", "float32", "bfloat16")
found = dict((f"{{kind}} {{shard}}", train(kind, shard))
             for kind in kinds for shard in (True, False))
# one rank's gradient is not a number: no rank takes the step
params = [torch.nn.Parameter(torch.ones(3, 2))]
optimizer = sft.Optimizer(params, 0.1, 0.0, shard=True)
optimizer.backward([0], lambda _: (params[0] * (float("nan") if rank == 1 else 1.0)).sum())
optimizer.step(0.1, 1.0)
assert optimizer.skipped == 1 and (params[0] == 1).all()
found["memory"] = [measure(kind, shard)
                   for kind in ("float32", "bfloat16") for shard in (True, False)]
if rank == 0:
    print(json.dumps(found))
sft.close_distributed()
"""


@pytest.mark.parametrize("nproc", [2, 3])
def test_sharded_optimizer_equals_adamw_on_one_process(nproc, tmp_path):
    """Ten steps with decay, clipping, another number of micro-batches on each rank, sizes that do
    not divide, and a parameter that gets no gradient in some of them. All ranks hold the same
    weights, bit for bit. bfloat16 weights are those of a float32 run, rounded. What each rank
    holds, and saves, is what the docstring of sft.Optimizer says, to 5%."""
    script = tmp_path / "worker.py"
    script.write_text(SHARDED.format(root=str(ROOT)))
    found = json.loads(run_script(script, nproc=nproc).stdout)
    for measured, expected in sum(found.pop("memory"), []):
        assert measured == pytest.approx(expected, rel=0.05)
    for kind, (gap, rounding, count) in found.items():
        assert count >= 2
        if kind.startswith("bfloat16"):     # gradients of many micro-batches add up in float32
            assert rounding > 1e-3 and gap <= 1.001 * rounding
        else:
            assert gap < {"float64": 1e-10, "float32": 1e-6}[kind.split()[0]]


@pytest.fixture(scope="module")
def uninterrupted(trained_folder, world, tmp_path_factory):
    """uninterrupted(nproc) -> (a command of eight steps, sharded on two processes; the folder of a
    run of it)."""
    @functools.cache
    def run(nproc):
        command = ["sft.py", "--model", trained_folder, "--data", world / "short.jsonl",
                   *COMMON, "--steps", 8,
                   "--dtype", "float32", "--save_every", 1,
                   *(["--shard_optimizer"] if nproc == 2 else [])]
        out = tmp_path_factory.mktemp("whole")
        run_script(*command, "--out", out, nproc=nproc)
        return command, out
    return run


@pytest.mark.parametrize("nproc", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, nproc):
    """Two SIGKILLs at random moments (extras/crash.py: ten): the same weights, bit for bit, and one
    line per step in the log."""
    command, whole = uninterrupted(nproc)
    assert crash.run_killed(command, nproc, tmp_path / "cut", 2, 0.5, launch=Forked) == 2
    assert crash.same_weights(whole, tmp_path / "cut")
    assert [json.loads(line)["step"]
            for line in (tmp_path / "cut/metrics.jsonl").open()] == list(range(1, 9))
    assert len(list((tmp_path / "cut/state").glob("step_*"))) == 2      # the last --keep


def test_sharded_state_loads_under_another_world_size(trained_folder, world, tmp_path):
    """Two steps on three processes, the rest on two, against one process throughout; float64,
    within rounding."""
    common = ["sft.py", "--model", trained_folder, "--data", world / "short.jsonl", *COMMON,
              "--shard_optimizer", "--save_every", 2]
    process = Forked([*common, "--steps", 4, "--out", tmp_path / "cut"], 3)
    crash.wait_until(process, (tmp_path / "cut/state/latest.json").exists)
    crash.kill(process)
    assert json.loads((tmp_path / "cut/state/latest.json").read_text())["pieces"] == 3
    done = run_script(*common, "--steps", 4, "--out", tmp_path / "cut", "--resume", nproc=2)
    assert "was saved by 3 processes, now there are 2" in done.stdout
    run_script(*common, "--steps", 4, "--out", tmp_path / "one")
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "cut")) < 1e-10


def wait_for_steps(process, out, count):
    """Wait until a run has logged so many steps."""
    log = out / "metrics.jsonl"
    crash.wait_until(process, lambda: log.exists() and log.read_bytes().count(b"\n") >= count)


def test_sigterm_to_one_rank_stops_all_at_the_same_step(trained_folder, world, tmp_path):
    common = ["sft.py", "--model", trained_folder, "--data", world / "short.jsonl", *COMMON,
              "--steps", 40]
    run = tmp_path / "run"
    process = crash.launch([*common, "--out", run], 2)      # by torchrun itself, not by its agent
    wait_for_steps(process, run, 2)
    os.kill(crash.processes(process.pid)[-1], signal.SIGTERM)
    code, out, err = crash.finish(process)
    step = json.loads((run / "state/latest.json").read_text())["step"]
    assert code == 0 and f"stopped after step {step}" in out and 2 <= step < 40
    assert (len((run / "metrics.jsonl").read_bytes().splitlines()) == step
            and not (run / "model.safetensors").exists())


def test_a_killed_worker_is_restarted_and_goes_on(uninterrupted, tmp_path):
    command, whole = uninterrupted(2)
    process = Forked([*command, "--out", tmp_path / "run"], 2, restarts=1)
    wait_for_steps(process, tmp_path / "run", 3)
    os.kill(crash.processes(process.pid)[-1], signal.SIGKILL)
    code, out, err = crash.finish(process)
    assert code == 0 and crash.same_weights(tmp_path / "run", whole)


def test_one_rank_that_raises_stops_all_with_its_line(trained_folder, world, tmp_path):
    rows = tools.read_jsonl(world / "coldstart.jsonl")[:2]
    (tmp_path / "images").mkdir()
    (tmp_path / rows[0]["image"]).write_bytes((world / rows[0]["image"]).read_bytes())
    # the other row's image is missing: one rank of two fails
    tools.write_jsonl(tmp_path / "rows.jsonl", rows)
    done = run_script("sft.py", "--model", trained_folder, "--data", tmp_path / "rows.jsonl",
                      *COMMON, "--batch_size", 2, "--steps", 3,
                      "--out", tmp_path / "out", nproc=2, check=False, timeout=120)
    assert done.returncode != 0 and done.stderr.count("image is missing") == 1
    assert not (tmp_path / "out/state/latest.json").exists()
    mine = [line for line in done.stderr.splitlines() if line.startswith("sft.py: ")]
    assert len(mine) <= 2 and all("error: " in line or "another process has ended" in line
                                  for line in mine)


def two_nodes(args, restarts=0):
    """Start a stage under two of torchrun's agents that meet over loopback, one process each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [Forked(args, nodes=2, restarts=restarts, port=port) for _ in range(2)]


def test_two_nodes_equal_one(trained_folder, world, tmp_path):
    """Two torchrun agents that meet over loopback, one process each, against one agent with two
    processes: to 1e-10 in float64, since an agent gives its only process both cores, and two
    threads add up in another order than one."""
    common = ["sft.py", "--model", trained_folder, "--data", world / "short.jsonl", *COMMON,
              "--steps", 3, "--shard_optimizer"]
    run_script(*common, "--out", tmp_path / "one", nproc=2)
    nodes = two_nodes([*common, "--out", tmp_path / "two"])
    assert [crash.finish(node)[0] for node in nodes] == [0, 0]
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-10


def test_a_worker_killed_on_the_second_node_is_restarted(trained_folder, world, tmp_path):
    """Its agent counts a restart, the other one may not: all meet again nevertheless, and go on."""
    common = ["sft.py", "--model", trained_folder, "--data", world / "short.jsonl", *COMMON,
              "--save_every", 1, "--steps", 8, "--out", tmp_path / "o"]
    nodes = two_nodes(common, restarts=2)
    wait_for_steps(nodes[0], tmp_path / "o", 3)
    os.kill(crash.processes(nodes[1].pid)[-1], signal.SIGKILL)
    assert [crash.finish(node)[0] for node in nodes] == [0, 0]
    lines = (tmp_path / "o/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


@pytest.mark.parametrize("aggregation", ["token", "response"])
def test_the_loss_is_a_mean_over_tokens_or_over_responses(policy, rows, world, aggregation):
    """In float64 from each conversation's loss alone: l_1, l_2 over n_1, n_2 tokens give
    (n_1 l_1 + n_2 l_2) / (n_1 + n_2), or (l_1 + l_2) / 2; cut into micro-batches or not."""
    two = [sft.encode(policy, row, world) for row in rows[:2]]
    counts = [sum(s.loss_mask) for s in two]
    alone = [-reference_logprobs(policy, s).mean().item() for s in two]
    expected = (numpy.average(alone, weights=counts) if aggregation == "token" else sum(alone) / 2)
    assert counts[0] != counts[1] and alone[0] != alone[1]
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, False), 0.0, 0.0)
    for tokens in (1, 10_000):
        args = SimpleNamespace(aggregation=aggregation, tokens=tokens, max_norm=1.0)
        loss, _, count = sft.train_step(policy, optimizer, two, 0.0, args)
        assert loss == pytest.approx(expected, rel=1e-12) and count == sum(counts)


def test_a_gradient_within_the_limit_is_left_as_it_is():
    """Norms 1, 5 and 20 with a limit of 10, against AdamW on gradients cut by hand: the moments
    remember how long they were."""
    direction = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(torch.ones(2, 1, dtype=torch.float64)) for _ in "ab")
    optimizer = sft.Optimizer([ours], 0.1, 0.0)
    adam = torch.optim.AdamW([theirs], 0.1, (0.9, 0.95), weight_decay=0.0)
    for norm in (1.0, 5.0, 20.0):
        optimizer.backward([norm], lambda norm: (ours * direction * norm).sum())
        assert optimizer.step(0.1, 10.0) == pytest.approx(norm)
        theirs.grad = direction * min(norm, 10.0)
        adam.step()
    assert (ours - theirs).abs().max() < 1e-6


def test_steps_that_are_not_finite_are_skipped_and_counted():
    params = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = sft.Optimizer(params, 0.1, 0.0)
    for bad in (torch.inf, torch.nan):
        optimizer.backward([None], lambda _: sum((p * bad).sum() for p in params))
        assert not math.isfinite(optimizer.step(0.1, 1.0))
    assert optimizer.skipped == 2 and all((p == 1).all() for p in params)
    optimizer.backward([None], lambda _: sum(p.sum() for p in params))
    assert (optimizer.step(0.1, 1.0) == pytest.approx(8**0.5) and optimizer.skipped == 0
            and (params[0] < 1).all())
    for _ in range(sft.MAX_SKIPPED):
        optimizer.backward([None], lambda _: sum(p.sum() for p in params))
        optimizer.step(0.1, 1.0, healthy=False)
    with pytest.raises(tools.InputError, match="step 7: .* not finite 5 times in a row"):
        sft.end_step(None, optimizer, 7, 9, "cpu")


def test_sigterm_in_the_last_step_does_not_stop_a_run_before_it_is_exported(tmp_path, monkeypatch):
    """Before it the state is saved and the run stops; after it nothing is left to stop."""
    monkeypatch.setattr(sft, "stop_signals", [1.0])
    optimizer = sft.Optimizer([torch.nn.Parameter(torch.ones(3, 2))], 0.1, 0.0)
    args = SimpleNamespace(out=tmp_path, save_every=10, keep=2)
    for done, stops in ((1, True), (2, False)):
        assert sft.end_step(args, optimizer, done, 2, "cpu") == stops
        assert json.loads((tmp_path / "state/latest.json").read_text())["step"] == done


def test_gradients_of_a_bucket_by_hand():
    """Where the parameter stands, a parameter without one or not; in the master's type, padding
    included."""
    a, b = (torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (6, 4))
    b.grad = torch.full((4,), 0.5, dtype=torch.bfloat16)
    flat = sft.Bucket([a, b], 3, 1).take_gradients()
    assert flat.dtype == torch.float32 and flat.tolist() == [0.0] * 6 + [0.5] * 4 + [0.0] * 2
    assert b.grad is None


@pytest.fixture
def travel(monkeypatch):
    """travel(sizes, together) -> (parameters, the optimizer of the first of two ranks, a log of
    messages); a bucket each, or one for all. The other rank sends nothing but zeros."""
    log = SimpleNamespace(sent=[], waited=[], most=0)

    def all_reduce(flat, async_op):
        log.sent.append(len(flat))
        log.most = max(log.most, len(log.sent) - len(log.waited))
        return SimpleNamespace(wait=lambda: log.waited.append(len(flat)))

    def make(sizes, together=False):
        monkeypatch.setattr(sft, "buckets", lambda params, megabytes: (
            [params] * bool(params) if together else [[p] for p in params]))
        monkeypatch.setattr(sft.dist, "all_reduce", all_reduce)
        params = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
        optimizer = sft.Optimizer(params, 0.1, 0.0)
        optimizer.world = 2
        return params, optimizer, log
    return make


def test_buckets_travel_in_their_order(travel):
    """The gradient of the first bucket arrives last: then all three are sent at once, in the order
    that all ranks know."""
    params, optimizer, log = travel([1, 2, 3])      # buckets 3, 2, 1; gradients 1, 2, 3
    seen = []
    params[2].register_post_accumulate_grad_hook(lambda p: seen.extend(log.sent))
    optimizer.backward([0], lambda _: params[2].sum() + params[1].sum() + params[0].sum())
    assert log.sent == seen == [3, 2, 1]


def test_a_bucket_travels_whole_and_few_at_once(travel):
    """Once all of its gradients are there, and at most two are under way; all are waited for, in
    their order. Outside of Optimizer.backward nothing is sent."""
    params, optimizer, log = travel([1, 2], together=True)
    optimizer.backward([0], lambda _: params[0].sum() + params[1].sum())
    assert log.sent == [3] and optimizer.buckets[0].master.grad.tolist() == [1.0] * 3
    log.sent.clear(), log.waited.clear()
    params, optimizer, log = travel([1, 2, 3, 4, 5])
    sum(p.sum() for p in params).backward()
    assert log.sent == [] and all(p.grad is not None for p in params)
    optimizer.backward([0], lambda _: sum(p.sum() for p in params))
    # a third may make room for itself before or behind its start
    assert 2 <= log.most <= 3 and log.waited == log.sent == [5, 4, 3, 2, 1]


def test_one_process_needs_no_group():
    assert sft.all_gather_objects([1, 2]) == [1, 2]
    sft.broadcast_weights(torch.nn.Linear(1, 1))


def test_one_process_sums_its_micro_batches(monkeypatch):
    monkeypatch.setattr(sft, "buckets", lambda params, megabytes: [[p] for p in params])
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = sft.Optimizer([w], 0.1, 0.0)
    optimizer.backward([1.0, 2.0, 4.0], lambda x: (w * x).sum())
    assert optimizer.buckets[0].master.grad.tolist() == [7.0] * 3


def test_gradients_are_sent_while_backward_runs(monkeypatch):
    """Three layers in three buckets, last layer first: when the first layer's gradient arrives, the
    others are on their way. With three micro-batches nothing is sent before the third."""
    sizes, log = [(2, 3), (3, 4), (4, 5)], []
    layers = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    layer_of = {rows * columns: i for i, (rows, columns) in enumerate(sizes)}
    monkeypatch.setattr(sft, "buckets", lambda params, megabytes: [[p] for p in params])
    optimizer = sft.Optimizer(layers, 0.1, 0.0)
    optimizer.world = 2

    def all_reduce(flat, async_op):
        log.append(layer_of[len(flat)])
        return SimpleNamespace(wait=lambda: None)

    def loss_of(x):
        for layer in layers:
            x = x @ layer
        return x.sum()

    monkeypatch.setattr(sft.dist, "all_reduce", all_reduce)
    layers[0].register_post_accumulate_grad_hook(lambda p: log.append("first layer arrived"))
    optimizer.backward([torch.ones(1, 2)], loss_of)
    assert log == [2, 1, 0, "first layer arrived"] or log == [2, 1, "first layer arrived", 0]
    log.clear()
    optimizer.adam.zero_grad()
    optimizer.backward([torch.ones(1, 2)] * 3, loss_of)
    assert [x for x in log if x != "first layer arrived"] == [2, 1, 0]
    assert log[:2] == ["first layer arrived"] * 2
    assert (optimizer.buckets[0].master.grad == 3 * 6).all()    # 2 x 3 ways there, three times


def modelled(hidden, seen):
    """A policy whose model computes these (T, D), with 20,000 ids; seen: what it got."""
    body = SimpleNamespace(last_hidden_state=hidden[None])
    return SimpleNamespace(banned_index=torch.tensor([3]), model=SimpleNamespace(
        model=lambda **inputs: seen.update(inputs) or body,
        lm_head=torch.nn.Linear(hidden.shape[1], 20_000, bias=False)))


def test_logits_never_exist_whole():
    """1,023 positions and a vocabulary of 20,000: whole float32 logits would take 82 MB; a chunk of
    64 takes 5 MB, and no more than a handful of its size live at once, forward and backward. The
    model gets all of the batch, and its gradient."""
    hidden, seen = torch.randn(1024, 16, requires_grad=True), {}
    batch = {"input_ids": torch.randint(4, 20_000, (1, 1024)), "loss_positions": torch.arange(1, 1024),
             "position_ids": torch.arange(3 * 1024).view(3, 1, 1024), "lengths": [1024],
             "pixel_values": torch.ones(4, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    policy = modelled(hidden, seen)
    with LiveBytes() as memory:
        sft.token_logprobs(policy, batch, chunk=64).sum().backward()
    chunk = 64 * 20_000 * 4
    assert chunk < memory.peak < 6 * chunk and hidden.grad.abs().sum() > 0
    assert seen["lengths"] == [1024] and all(
        torch.equal(seen[name], batch[name]) for name in batch.keys() - {"loss_positions", "lengths"})


def test_nothing_written_is_still_connected():
    """A rank whose conversations are masked still takes part in backward."""
    hidden = torch.randn(3, 16, requires_grad=True)
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long), "lengths": [3],
             "position_ids": torch.zeros(3, 1, 3), "loss_positions": torch.tensor([], dtype=torch.long)}
    scores = sft.token_logprobs(modelled(hidden, {}), batch)
    assert scores.shape == (0,)
    scores.sum().backward()
    assert (hidden.grad == 0).all()


def test_disk_full_leaves_the_old_checkpoint(trained_folder, world, tmp_path):
    """A file-size limit stands in for a full disk: one line, and what was there before is still
    there, whole."""
    common = ["sft.py", "--model", trained_folder, "--data", world / "short.jsonl", *COMMON,
              "--out", tmp_path / "o"]
    run_script(*common, "--steps", 1)
    before = (tmp_path / "o/state/step_0000001/0.pt").read_bytes()
    (tmp_path / "sft.py").write_text(
        "import resource, sft, tools\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "tools.run(sft.main)\n")
    done = run_script(tmp_path / "sft.py", *common[1:], "--steps", 2, "--resume", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert ("error:" in done.stderr.splitlines()[-1]
            and ("cannot save" in done.stderr or "too large" in done.stderr))
    assert (tmp_path / "o/state/step_0000001/0.pt").read_bytes() == before
    assert json.loads((tmp_path / "o/state/latest.json").read_text())["step"] == 1
    assert not list((tmp_path / "o").glob(".*"))


def test_a_fresh_run_never_goes_on_from_an_older_one(trained_folder, world, tmp_path):
    """Killed before its first checkpoint and resumed, it starts anew: the older run's state was set
    aside."""
    common = ["sft.py", "--model", trained_folder, "--data", world / "short.jsonl", *COMMON]
    run_script(*common, "--steps", 2, "--seed", 1, "--out", tmp_path / "o")
    old = (tmp_path / "o/state/step_0000002/0.pt").read_bytes()
    process = Forked([*common, "--steps", 3, "--out", tmp_path / "o"])
    crash.wait_until(process, (tmp_path / "o/old_state").exists)
    crash.kill(process)
    assert ((tmp_path / "o/old_state/step_0000002/0.pt").read_bytes() == old
            and not (tmp_path / "o/state").exists())
    run_script(*common, "--steps", 3, "--out", tmp_path / "o", "--resume")
    run_script(*common, "--steps", 3, "--out", tmp_path / "whole")
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "o")) == 0
    done = run_script(*common, "--steps", 2, "--out", tmp_path / "o", "--resume", check=False)
    assert (done.returncode == 1 and "is at step 3, beyond the 2 steps" in done.stderr
            and "Traceback" not in done.stderr)


@pytest.mark.parametrize("flags", [
    ["--lr", "nan"], ["--lr", -1], ["--epochs", "inf"], ["--warmup_ratio", "nan"], ["--seed", -1],
    ["--steps", 0], ["--max_grad_norm", 0], ["--weight_decay", "nan"], ["--max_pixels", -5]], ids=str)
def test_nonsense_numbers_are_refused_by_flag(monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["sft.py", *map(str, flags)])
    with pytest.raises(tools.InputError, match=flags[0]):
        sft.parse_args()


def test_a_run_that_diverges_stops_before_it_saves(trained_folder, world, tmp_path):
    wild = ["--steps", 6, "--lr", 1e30, "--warmup_ratio", 0, "--max_grad_norm", 1e30]
    done = run_script("sft.py", "--model", trained_folder, "--data", world / "short.jsonl",
                      *COMMON, *wild,
                      "--out", tmp_path / "o", check=False)
    assert (done.returncode == 1 and "not finite 5 times in a row" in done.stderr
            and "Traceback" not in done.stderr)
    assert not (tmp_path / "o/model.safetensors").exists()


def test_mistakes_are_one_line(trained_folder, world, tmp_path, monkeypatch):
    def error(*args):
        monkeypatch.setattr("sys.argv", ["sft.py", *map(str, args), "--out", str(tmp_path / "o")])
        with pytest.raises(tools.InputError) as found:
            sft.main()
        return str(found.value)

    assert "python collect_coldstart.py" in error("--data", "data/nothing.jsonl")
    assert "sft.py --model tiny" in error("--model", "checkpoints/nothing",
                                          "--data", world / "coldstart.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text((world / "coldstart.jsonl").read_text().splitlines()[0] + "\n{\"id\": 3}\n")
    assert f"{bad}:2: field 'id'" in error("--data", bad)
    done = run_script("sft.py", "--model", trained_folder, "--data", world / "coldstart.jsonl",
                      "--max_seq_len", 50, "--out", tmp_path / "o", check=False)
    assert (done.returncode == 1 and "Traceback" not in done.stderr
            and "--max_seq_len" in done.stderr.splitlines()[-1])
