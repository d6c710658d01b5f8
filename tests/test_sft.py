"""Specification of sft.py, in the order of its functions: the policy, how conversations become
tensors, the loss, data parallel by hand, checkpoints, the training loop.

References: transformers' own positions, attention and logits; torch's DistributedDataParallel and
AdamW; one process.
"""

import copy
import functools
import itertools
import json
import math
import os
import random
import shlex
import shutil
import signal
import socket
import threading
import weakref
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import sft
import tools
from extras import crash, run_folder
from support.launch import ROOT, Forked, run_script
from support.memory import LiveBytes
from support.models import PREPROCESSORS, largest_difference, library_attention


@pytest.fixture(scope="module")
def policy(make_tiny):
    return make_tiny(torch.float64)


@pytest.fixture(scope="module")
def rows(world):
    return tools.read_jsonl(world / "coldstart.jsonl")


# ---- The policy ---------------------------------------------------------------------------------


def test_a_word_is_one_token_wherever_it_is_copied(policy):
    for word in (" top-left", " red", " square", "7", "observation_3", "0.333", "<think>",
                 '<grounding>{"bbox_2d": ['):
        assert len(policy.encode_text(word)) == 1, word


def test_a_message_with_and_without_a_picture(policy):
    with_image = policy.encode_message("user", "a", "b", num_image_tokens=3)
    text = "<|vision_start|>" + 3 * "<|image_pad|>" + "<|vision_end|>"
    assert policy.tokenizer.decode(with_image) == f"<|im_start|>user\na{text}b<|im_end|>\n"
    without_image = policy.encode_message("system", "a")
    assert policy.tokenizer.decode(without_image) == "<|im_start|>system\na<|im_end|>\n"


@pytest.mark.parametrize("size", [(84, 84), (252, 253), (756, 400), (30, 500), (1, 1), (57, 56)])
def test_images_of_odd_sizes(each_family, size):
    """The resized copy is a multiple of patch x merge within the limits, and its patches are those
    that the family's processor makes at that size."""
    image = Image.effect_noise(size, 60).convert("RGB")
    patch_size = each_family.resize_factor // 2
    [(patches, grid)] = each_family.preprocess_images([image])
    resized = tools.resize_for_model(image, each_family.min_pixels, each_family.max_pixels,
                                     2 * patch_size)
    assert grid == (1, resized.height // patch_size, resized.width // patch_size)
    assert grid == each_family.image_grid(image)
    assert patches.shape == (grid[1] * grid[2], 3 * 2 * patch_size**2)
    reference = each_family.image_processor(
        images=[resized], return_tensors="pt",
        size={"shortest_edge": 1, "longest_edge": 10**9})
    assert torch.equal(reference["pixel_values"].double(), patches)


@pytest.mark.parametrize("family, factor, limits", [
    ("qwen2_5_vl", 28, [3136, 12845056]), ("qwen3_vl", 32, [65536, 16777216])])
def test_views_are_as_large_as_the_familys_processor_makes_them(family, factor, limits, tmp_path):
    """Random sizes at the released limits. Strips are left out: the processor exceeds the limits
    there, our code does not."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[family]))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert [processor.size["shortest_edge"], processor.size["longest_edge"]] == limits
    generator = random.Random(0)
    for _ in range(300):
        width = round(2 ** generator.uniform(3, 14))
        height = round(2 ** generator.uniform(3, 14))
        if max(width, height) < 8 * min(width, height):
            w, h = tools.size_for_model(width, height, *limits, factor)
            num_patches = processor.get_number_of_image_patches(height, width)
            assert w * h * 4 == factor**2 * num_patches


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
    # with --dtype it is not a mistake, and is tried
    with pytest.raises(tools.InputError, match="cannot load a model"):
        sft.load_policy(tmp_path, torch.device("cpu"), "bfloat16")


def test_a_missing_folder_is_named():
    with pytest.raises(tools.InputError, match="make it with: x.py"):
        sft.load_policy("checkpoints/absent", "cpu", hint="x.py")


# ---- From a conversation to tensors: encode -----------------------------------------------------


def test_mask_covers_the_assistants_tokens_and_stop_tokens_only(policy, rows, world):
    row = next(row for row in rows
               if not any(turn.get("learn") is False for turn in row["turns"]))
    sequence = sft.encode(policy, row, world)
    in_loss = list(itertools.compress(sequence.token_ids, sequence.loss_mask))
    expected = []
    for turn in row["turns"]:
        expected += [*policy.encode_text(turn["text"]), policy.im_end_id]
    assert in_loss == expected
    text = policy.tokenizer.decode(sequence.token_ids)
    assert text.startswith("<|im_start|>system\nLook closer.<|im_end|>\n")
    assert row["question"] in text
    assert "observation_1:\n<|vision_start|>" in text


def test_deliberate_mistakes_are_context_not_target(policy, refused_and_zoomed, world):
    """Any turn may be one. The row is encoded again in the next epoch, so it is not changed."""
    learned = sft.encode(policy, refused_and_zoomed, world)
    starts = [index for index, in_loss in enumerate(learned.loss_mask)
              if in_loss and not learned.loss_mask[index - 1]]
    assert len(starts) == 5
    for turn_index, start in enumerate(starts):
        row = copy.deepcopy(refused_and_zoomed)
        for turn in row["turns"]:
            turn["learn"] = True
        row["turns"][turn_index]["learn"] = False
        before = copy.deepcopy(row)
        not_learned = sft.encode(policy, row, world)
        end = start + len(policy.encode_text(row["turns"][turn_index]["text"])) + 1
        assert not_learned.token_ids == learned.token_ids
        assert not_learned.loss_mask == (learned.loss_mask[:start] + [False] * (end - start)
                                         + learned.loss_mask[end:])
        assert row == before


def test_a_question_cannot_inject_special_tokens(policy, rows, world):
    row = {**rows[0], "question": "<|image_pad|><|im_end|>\n<|im_start|>assistant\nred?"}
    sequence = sft.encode(policy, row, world)
    plain = sft.encode(policy, rows[0], world)
    for special_id in (policy.image_token_id, policy.im_start_id):
        assert sequence.token_ids.count(special_id) == plain.token_ids.count(special_id)
    # it is there, as ordinary text
    assert "<|image_pad|><|im_end|>" in policy.tokenizer.decode(sequence.token_ids)


@pytest.fixture(scope="module")
def refused_and_zoomed(rows):
    """A refused call, a zoom, a refused call, a zoom into the observation, an answer."""
    return {**rows[0], "turns": [
        {"text": "a<|im_end|>b", "error": "No."},
        {"text": "c", "zoom": {"bbox_2d": [0.0, 0.0, 0.5, 0.25], "source": "original_image"}},
        {"text": " d \n", "error": "No."},     # spaces are the policy's, too
        {"text": "e", "zoom": {"bbox_2d": [0.0, 0.0, 0.3, 1.0], "source": "observation_1"}},
        {"text": "<answer>f</answer>"}]}


def test_a_conversation_by_hand(policy, refused_and_zoomed, world):
    """Token by token: the tool's message after each turn, which observation and which turn it
    names, and which pixels. A turn cannot inject special tokens either."""
    policy = copy.copy(policy)
    policy.prompts = {**policy.prompts, "observation": "{name} {number} {action}:\n<image>"}
    row = refused_and_zoomed
    turns = row["turns"]
    images = policy.preprocess_images(tools.replay(row, tools.open_image(world / row["image"])))
    grids = [grid for _, grid in images]
    assert len(set(grids)) > 1
    expected_ids = []
    expected_mask = []

    def expect(token_ids, in_loss):
        expected_ids.extend(token_ids)
        expected_mask.extend([in_loss] * len(token_ids))

    def expect_turn(turn):
        expect([*policy.encode_text(turn["text"]), policy.im_end_id], True)

    expect(policy.prompt_ids(row, grids[0]), False)
    expect_turn(turns[0])
    expect(policy.tool_message_ids(turns[0], 1, 0), False)
    expect_turn(turns[1])
    expect(policy.tool_message_ids(turns[1], 2, 1, grids[1]), False)
    expect_turn(turns[2])
    expect(policy.tool_message_ids(turns[2], 3, 1), False)
    expect_turn(turns[3])
    expect(policy.tool_message_ids(turns[3], 4, 2, grids[2]), False)
    expect_turn(turns[4])
    sequence = sft.encode(policy, row, world)
    assert sequence.token_ids == expected_ids
    assert sequence.loss_mask == expected_mask
    assert [grid for _, grid in sequence.images] == grids
    assert all(torch.equal(patches, expected) for (patches, _), (expected, _)
               in zip(sequence.images, images, strict=True))


def test_a_row_whose_images_cannot_be_made_is_an_input_error(policy, refused_and_zoomed, world):
    with pytest.raises(tools.InputError, match="absent.png: image is missing"):
        sft.encode(policy, {**refused_and_zoomed, "image": "absent.png"}, world)
    turns = copy.deepcopy(refused_and_zoomed["turns"])
    turns[1]["zoom"]["source"] = "observation_1"
    with pytest.raises(tools.InputError, match="no observation_1 yet"):
        sft.encode(policy, {**refused_and_zoomed, "turns": turns}, world)


@pytest.mark.parametrize("last", [0, 2, 3], ids=["the first turn again", "refused call", "zoom"])
def test_nothing_comes_after_the_last_turn(policy, refused_and_zoomed, world, last):
    """Neither after a refused call nor after a zoom, which is then not carried out."""
    turns = refused_and_zoomed["turns"]
    row = {**refused_and_zoomed, "turns": [*turns[:max(2, last)], turns[last]]}
    sequence = sft.encode(policy, row, world)
    assert sequence.token_ids[-1] == policy.im_end_id
    assert sequence.loss_mask[-1]
    assert len(sequence.images) == 2


# ---- From a conversation to tensors: M-RoPE positions -------------------------------------------


def test_positions_by_hand(policy):
    """Text 5, 6; a 2 x 3 image at 7: t = 7, rows 7 and 8, columns 7 to 9; then text at 7 + 3."""
    image_id = policy.image_token_id
    token_ids = [1, 1, *[image_id] * 6, 1]
    grids = [(1, 4, 6)]
    positions, next_position = sft.mrope_positions(token_ids, grids, image_id, 2, start=5)
    assert positions.tolist() == [[5, 6, 7, 7, 7, 7, 7, 7, 10],
                                  [5, 6, 7, 7, 7, 8, 8, 8, 10],
                                  [5, 6, 7, 8, 9, 7, 8, 9, 10]]
    assert next_position == 11
    assert positions.dtype == torch.long
    # what was given is not changed
    assert (token_ids, grids) == ([1, 1, *[image_id] * 6, 1], [(1, 4, 6)])
    # two images without text between them, 2 x 2 and 1 x 2
    positions, next_position = sft.mrope_positions([image_id] * 6 + [1], [(1, 4, 4), (1, 2, 4)],
                                                   image_id, 2)
    assert positions.tolist() == [[0, 0, 0, 0, 2, 2, 4],
                                  [0, 0, 1, 1, 2, 2, 4],
                                  [0, 1, 0, 1, 2, 3, 4]]
    assert next_position == 5


def test_positions_of_patches_that_are_not_merged_by_hand(policy):
    """Both families merge two by two; another model might not."""
    image_id = policy.image_token_id
    positions, _ = sft.mrope_positions([image_id] * 6 + [1], [(1, 2, 3)], image_id, 1)
    assert positions.tolist() == [[0, 0, 0, 0, 0, 0, 3],
                                  [0, 0, 0, 1, 1, 1, 3],
                                  [0, 1, 2, 0, 1, 2, 3]]


def test_positions_like_the_library(each_family):
    check_positions(each_family)


def test_positions_like_the_library_of_an_untrained_policy(policy):
    check_positions(policy)


def check_positions(policy):
    """Random layouts: zero to four images of random grids, with text before, between and after."""
    generator = random.Random(0)
    image_id = policy.image_token_id
    for _ in range(20):
        grids = [(1, 2 * generator.randint(1, 9), 2 * generator.randint(1, 9))
                 for _ in range(generator.randint(0, 4))]
        token_ids = [1] * generator.randint(1, 9)
        for _, height, width in grids:
            token_ids += [image_id] * (height * width // 4)
            token_ids += [1] * generator.randint(1, 9)
        input_ids = torch.tensor([token_ids])
        reference, delta = policy.model.model.get_rope_index(
            input_ids=input_ids, mm_token_type_ids=(input_ids == image_id).long(),
            image_grid_thw=torch.tensor(grids) if grids else None)
        positions, next_position = sft.mrope_positions(token_ids, grids, image_id,
                                                       policy.merge_size)
        assert torch.equal(positions, reference[:, 0])
        assert next_position == len(token_ids) + delta.item()
        shifted, shifted_next = sft.mrope_positions(token_ids, grids, image_id, policy.merge_size,
                                                    start=100)
        assert torch.equal(shifted, positions + 100) and shifted_next == next_position + 100


# ---- From a conversation to tensors: packed batches ---------------------------------------------


@pytest.fixture
def three_sequences(policy):
    """Nine tokens with an image of 4 x 6 patches, three without one, two with one of 2 x 2."""
    image_id = policy.image_token_id
    patches = torch.randn(24, 1176, dtype=torch.float64)
    first = sft.Sequence()
    first.append([101, 102, *[image_id] * 6], False, (patches, (1, 4, 6)))
    first.append([103], True)
    second = sft.Sequence()
    second.append([104], False)
    second.append([105, 106], True)
    third = sft.Sequence()
    third.append([image_id], False, (patches[:4], (1, 2, 2)))
    third.append([107], True)
    return [first, second, third]


def test_a_packed_batch_by_hand(policy, three_sequences):
    """Positions begin again in each conversation; the loss's positions count on over the row."""
    image_id = policy.image_token_id
    batch = sft.collate(policy, three_sequences)
    assert batch["input_ids"].tolist() == [
        [101, 102, *[image_id] * 6, 103, 104, 105, 106, image_id, 107]]
    assert batch["position_ids"].tolist() == [[[0, 1, 2, 2, 2, 2, 2, 2, 5, 0, 1, 2, 0, 1]],
                                              [[0, 1, 2, 2, 2, 3, 3, 3, 5, 0, 1, 2, 0, 1]],
                                              [[0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 1, 2, 0, 1]]]
    assert batch["loss_positions"].tolist() == [8, 10, 11, 13]
    patches = three_sequences[0].images[0][0]
    assert torch.equal(batch["pixel_values"], torch.cat([patches, patches[:4]]))
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6], [1, 2, 2]]
    assert "pixel_values" not in sft.collate(policy, three_sequences[1:2])
    assert torch.equal(sft.collate(policy, three_sequences[1:])["pixel_values"], patches[:4])
    assert {name: batch[name].dtype for name in batch if name not in ("attend", "pixel_values")} \
        == dict.fromkeys(["input_ids", "position_ids", "loss_positions", "image_grid_thw"],
                         torch.long)
    # what was given is not changed
    assert [len(sequence.images) for sequence in three_sequences] == [1, 0, 1]
    assert [len(sequence.token_ids) for sequence in three_sequences] == [9, 3, 2]


def test_each_conversation_of_a_packed_batch_attends_to_itself(policy, three_sequences):
    """attend against an explicit softmax with a mask, four query heads on two key heads."""
    batch = sft.collate(policy, three_sequences)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 14, 8, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, 1, 2, 14, 8, dtype=torch.float64, generator=generator)
    conversation = torch.tensor([0] * 9 + [1] * 3 + [2] * 2)
    is_visible = (conversation[:, None] == conversation).tril()                 # (T, T)
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.5      # (1, 4, T, T)
    weights = scores.masked_fill(~is_visible, -torch.inf).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    output = batch["attend"](query, key, value, 0.5)                            # (1, T, 4, 8)
    assert output.shape == (1, 14, 4, 8)
    assert (output - expected).abs().max() < 1e-12


def test_a_conversation_may_have_several_images(policy, three_sequences):
    first = three_sequences[0]
    patches = first.images[0][0]
    first.append([policy.image_token_id] * 4, False, (patches[:16], (1, 4, 4)))
    batch = sft.collate(policy, [first])
    assert batch["position_ids"][:, 0, -5:].tolist() == [[5, 6, 6, 6, 6],
                                                         [5, 6, 6, 7, 7],
                                                         [5, 6, 7, 6, 7]]
    assert batch["pixel_values"].shape == (40, 1176)
    assert batch["image_grid_thw"].shape == (2, 3)


def test_all_tensors_of_a_batch_are_on_the_policys_device(policy, three_sequences):
    """The device "meta" plays a GPU."""
    elsewhere = SimpleNamespace(image_token_id=policy.image_token_id, merge_size=2,
                                device=torch.device("meta"))
    batch = sft.collate(elsewhere, three_sequences)
    del batch["attend"]
    assert len(batch) == 5
    assert all(tensor.device.type == "meta" for tensor in batch.values())


def sequences_of(lengths):
    return [sft.Sequence(token_ids=[0] * length) for length in lengths]


@pytest.mark.parametrize("lengths, expected", [
    ([5, 30, 7, 12, 1, 12], [[5], [30], [7, 12, 1], [12]]),
    ([10, 14, 24, 1], [[10, 14], [24], [1]]),
    ([], [])], ids=["one is too long", "exactly full", "empty"])
def test_micro_batches_keep_every_conversation_within_the_budget(lengths, expected):
    """At most 24 tokens each."""
    micro_batches = list(sft.micro_batches(sequences_of(lengths), 24))
    assert [[len(sequence.token_ids) for sequence in micro_batch]
            for micro_batch in micro_batches] == expected


def test_prefetch_computes_one_item_ahead_in_a_thread():
    """Results are in order. While one is in use the next is computed, and no more than that."""
    started = []
    second_started = threading.Event()

    def square(number):
        started.append((number, threading.current_thread() is not threading.main_thread()))
        if number == 1:
            second_started.set()
        return 1 / 0 if number == 3 else number * number

    results = sft.prefetch(square, range(9))
    assert next(results) == 0
    assert second_started.wait(60)
    assert [next(results), next(results)] == [1, 4]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert started == [(0, True), (1, True), (2, True), (3, True)]
    assert list(sft.prefetch(square, [])) == []
    assert list(sft.prefetch(square, [1, 2])) == [1, 4]


# ---- The loss -----------------------------------------------------------------------------------


def test_suppressed_ids_have_no_probability(policy):
    logprobs = sft.vocab_logprobs(policy, torch.randn(5, 128, dtype=torch.float64))
    assert policy.image_token_id in policy.suppressed_ids
    assert policy.im_end_id not in policy.suppressed_ids
    assert (logprobs[:, policy.suppressed_ids] == -torch.inf).all()
    assert torch.allclose(logprobs.exp().sum(-1), torch.ones(5, dtype=torch.float64))


def test_a_new_model_in_bfloat16_has_the_positions_of_a_loaded_one(make_tiny, tmp_path):
    """Frequencies in bfloat16 would be 0.4 rad off at position 500."""
    policy = make_tiny(torch.float32)
    sft.cast_parameters(policy.model, torch.bfloat16)
    sft.export(policy, tmp_path)
    loaded = sft.load_policy(str(tmp_path), "cpu", "bfloat16")
    for one, other in zip(policy.model.buffers(), loaded.model.buffers(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert policy.model.dtype == loaded.model.dtype == torch.bfloat16


def test_the_softmax_of_a_bfloat16_model_is_in_float32():
    """A sum over 152,000 ids in bfloat16 would be off by percents."""
    lm_head = torch.nn.Linear(8, 20, bias=False, dtype=torch.bfloat16)
    policy = SimpleNamespace(model=SimpleNamespace(lm_head=lm_head),
                             suppressed_index=torch.tensor([3]))
    logprobs = sft.vocab_logprobs(policy, torch.randn(5, 8, dtype=torch.bfloat16))
    assert logprobs.dtype == torch.float32
    assert (logprobs.exp().sum(-1) - 1).abs().max() < 1e-5


def reference_logprobs(policy, sequence, padding=5):
    """Return the log-probs of the written tokens from the library's own forward pass over one
    conversation with padding at its end."""
    ids = torch.tensor([sequence.token_ids + [policy.im_end_id] * padding])
    written = torch.tensor(sequence.loss_mask).nonzero()[:, 0]
    with library_attention(policy):
        logits = policy.model(
            input_ids=ids, mm_token_type_ids=(ids == policy.image_token_id).long(),
            attention_mask=(torch.arange(ids.shape[1]) < len(sequence.token_ids)).long()[None],
            pixel_values=torch.cat([patches for patches, _ in sequence.images]),
            image_grid_thw=torch.tensor([grid for _, grid in sequence.images]),
            logits_to_keep=written - 1).logits[0]     # (N, V)
    logits[:, policy.suppressed_ids] = -torch.inf
    return logits.log_softmax(-1).gather(-1, ids[0, written, None])[:, 0]


def test_logprobs_of_texts_equal_the_library(policy):
    """Two texts in one row against two forward passes of the library. chunk_size changes neither
    values nor gradients; suppressed ids have no share."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 400, (12,), generator=generator).tolist()
    sequences = [sft.Sequence(ids[:5], [False, False, True, True, False]),
                 sft.Sequence(ids[5:], [False, True, False, False, True, False, True])]
    expected = []
    with torch.no_grad(), library_attention(policy):
        for sequence in sequences:
            logits = policy.model(input_ids=torch.tensor([sequence.token_ids])).logits[0]  # (T, V)
            logits[:, policy.suppressed_ids] = -torch.inf
            logprobs = logits.log_softmax(-1)
            expected += [logprobs[t - 1, sequence.token_ids[t]].item()
                         for t, in_loss in enumerate(sequence.loss_mask) if in_loss]
    # by hand, since collate is graded by itself
    batch = {"input_ids": torch.tensor([ids]), "loss_positions": torch.tensor([2, 3, 6, 9, 11]),
             "position_ids": torch.tensor([*range(5), *range(7)]).expand(3, 1, -1),
             "attend": functools.partial(sft.attend_packed, [5, 7])}
    gradients = []
    for chunk_size in (100, 2):
        logprobs = sft.token_logprobs(policy, batch, chunk_size)
        assert logprobs.tolist() == pytest.approx(expected, abs=1e-10)
        gradients += torch.autograd.grad((logprobs * torch.arange(5)).sum(),
                                         policy.model.lm_head.weight)
    assert torch.allclose(*gradients, atol=1e-12)
    assert gradients[0].abs().max() > 1e-3


def test_packed_batch_equals_padded_single_conversations(each_family, rows, world):
    sequences = [sft.encode(each_family, row, world) for row in rows[:2]]
    with torch.no_grad():
        batch = sft.collate(each_family, sequences)
        packed = sft.token_logprobs(each_family, batch, chunk_size=64)
        single = torch.cat([reference_logprobs(each_family, sequence) for sequence in sequences])
    assert (packed - single).abs().max() < 1e-12


def test_chunks_change_neither_logprobs_nor_gradients(policy, rows, world):
    batch = sft.collate(policy, [sft.encode(policy, rows[0], world)])
    weights = [policy.model.lm_head.weight,
               policy.model.model.visual.patch_embed.proj.weight]
    results = []
    for chunk_size in (10**6, 7):
        policy.model.zero_grad()
        logprobs = sft.token_logprobs(policy, batch, chunk_size)
        (logprobs * torch.arange(len(logprobs))).sum().backward()
        results.append([logprobs.detach(), *(weight.grad.clone() for weight in weights)])
    for whole, in_chunks in zip(*results):
        assert torch.allclose(whole, in_chunks, atol=1e-10)


def policy_with_hidden_states(hidden, inputs_seen):
    """Return a policy whose model computes these hidden states (T, D), with 20,000 ids.
    inputs_seen: a dict that gets what the model is called with."""
    output = SimpleNamespace(last_hidden_state=hidden[None])

    def body(**inputs):
        inputs_seen.update(inputs)
        return output

    lm_head = torch.nn.Linear(hidden.shape[1], 20_000, bias=False)
    return SimpleNamespace(suppressed_index=torch.tensor([3]),
                           model=SimpleNamespace(model=body, lm_head=lm_head))


def test_logits_never_exist_whole():
    """1,023 positions and a vocabulary of 20,000: whole float32 logits would take 82 MB; a chunk of
    64 takes 5 MB, and no more than a handful of its size live at once, forward and backward. The
    model gets all of the batch, and its gradient."""
    hidden = torch.randn(1024, 16, requires_grad=True)
    inputs_seen = {}
    batch = {"input_ids": torch.randint(4, 20_000, (1, 1024)),
             "loss_positions": torch.arange(1, 1024),
             "position_ids": torch.arange(3 * 1024).view(3, 1, 1024), "attend": object(),
             "pixel_values": torch.ones(4, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    policy = policy_with_hidden_states(hidden, inputs_seen)
    with LiveBytes() as memory:
        sft.token_logprobs(policy, batch, chunk_size=64).sum().backward()
    chunk_bytes = 64 * 20_000 * 4
    assert chunk_bytes < memory.peak < 6 * chunk_bytes
    assert hidden.grad.abs().sum() > 0
    for name in batch.keys() - {"loss_positions"}:
        assert inputs_seen[name] is batch[name]
    assert inputs_seen.keys() == batch.keys() - {"loss_positions"} | {"use_cache"}
    assert inputs_seen["use_cache"] is False


@pytest.mark.parametrize("num_positions, num_chunks", [(10, 3), (8, 2), (5, 2), (4, 1), (3, 1)])
def test_chunks_and_what_is_computed_again(num_positions, num_chunks):
    """At most four positions at a time. All of them are computed again in backward, if there are
    several chunks. Log-probs are in the order of loss_positions, whatever that is."""
    hidden = torch.randn(12, 16, requires_grad=True)
    policy = policy_with_hidden_states(hidden, {})
    lm_head = policy.model.lm_head
    num_computed = []

    def counted_head(hidden_states):
        num_computed.append(len(hidden_states))
        return lm_head(hidden_states)

    policy.model.lm_head = counted_head
    generator = torch.Generator().manual_seed(0)
    loss_positions = 1 + torch.randperm(11, generator=generator)[:num_positions]
    batch = {"input_ids": torch.randint(4, 20_000, (1, 12)), "loss_positions": loss_positions}
    logprobs = sft.token_logprobs(policy, batch, chunk_size=4)
    assert len(num_computed) == num_chunks
    assert sum(num_computed) == num_positions and max(num_computed) <= 4
    forward = sorted(num_computed)
    expected = [sft.vocab_logprobs(policy, hidden[t - 1])[batch["input_ids"][0, t]].item()
                for t in loss_positions]
    assert logprobs.tolist() == pytest.approx(expected)
    num_computed.clear()
    logprobs.sum().backward()
    assert sorted(num_computed) == (forward if num_chunks > 1 else [])


def test_logprobs_of_no_token_still_have_a_gradient():
    """A rank whose conversations are all masked still takes part in backward."""
    hidden = torch.randn(3, 16, requires_grad=True)
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long),
             "position_ids": torch.zeros(3, 1, 3),
             "loss_positions": torch.tensor([], dtype=torch.long)}
    logprobs = sft.token_logprobs(policy_with_hidden_states(hidden, {}), batch)
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("aggregation", ["token", "response"])
def test_the_loss_is_a_mean_over_tokens_or_over_responses(policy, rows, world, aggregation):
    """In float64 from each conversation's loss alone: l_1, l_2 over n_1, n_2 tokens give
    (n_1 l_1 + n_2 l_2) / (n_1 + n_2), or (l_1 + l_2) / 2; cut into micro-batches or not."""
    sequences = [sft.encode(policy, row, world) for row in rows[:2]]
    lengths = [sum(sequence.loss_mask) for sequence in sequences]
    losses = [-reference_logprobs(policy, sequence).mean().item() for sequence in sequences]
    assert lengths[0] != lengths[1]
    assert losses[0] != losses[1]
    expected = numpy.average(losses, weights=lengths if aggregation == "token" else None)
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, False), 0.0, 0.0)
    for micro_batch_tokens in (1, 10_000):
        args = SimpleNamespace(aggregation=aggregation, micro_batch_tokens=micro_batch_tokens,
                               max_grad_norm=1.0)
        loss, _, num_tokens = sft.train_step(policy, optimizer, sequences, 0.0, args)
        assert loss == pytest.approx(expected, rel=1e-12)
        assert num_tokens == sum(lengths)


# ---- Processes and collectives ------------------------------------------------------------------


def test_one_process_needs_no_group():
    assert sft.all_reduce([1, 2.5], "cpu") == [1.0, 2.5]
    assert sft.all_reduce_dict({"a": 1, "b": 2}, "cpu") == {"a": 1.0, "b": 2.0}
    items = [2, 1, 1]
    gathered = sft.all_gather_objects(items)
    assert gathered == [2, 1, 1] and gathered is not items
    assert sft.all_gather_objects([]) == []
    sft.broadcast_weights(torch.nn.Linear(1, 1))


def run_workers(script, folder, *args, nproc=2):
    """Run a Python text on several processes under torchrun. Returns what they print."""
    (folder / "worker.py").write_text(script)
    return run_script(folder / "worker.py", *args, nproc=nproc).stdout


COLLECTIVES = """
import torch
import sft
process = sft.setup_distributed()
rank = process.rank
assert (process.world_size, process.attempt) == (2, 1)
assert sft.all_reduce([rank + 1, 0.5], process.device) == [3.0, 1.0]
maximum = torch.distributed.ReduceOp.MAX
assert sft.all_reduce([rank, -rank], process.device, maximum) == [1.0, 0.0]
assert sft.all_reduce_dict({"a": rank, "b": 2}, process.device) == {"a": 1.0, "b": 4.0}
assert sft.all_gather_objects([10 * rank + i for i in range(rank + 1)]) == [0, 10, 11]
assert sft.all_gather_objects([1, 1, None, [rank]]) == [1, 1, None, [0], 1, 1, None, [1]]
assert sft.all_gather_objects([7] * rank) == [7]
module = torch.nn.Sequential(torch.nn.BatchNorm1d(2))      # it counts batches in an integer
module[0].bias.requires_grad_(False)
module.register_buffer("not_saved", torch.zeros(1), persistent=False)
tensors = [*module.parameters(), *module.buffers()]
for i, tensor in enumerate(tensors):
    tensor.data.fill_(rank + i)
sft.broadcast_weights(module)
assert all((tensor == i).all() for i, tensor in enumerate(tensors)), tensors
print("right", flush=True)
sft.close_distributed()
"""


def test_numbers_objects_and_weights_of_two_processes(tmp_path):
    assert run_workers(COLLECTIVES, tmp_path).count("right") == 2


# ---- Data parallel: the naive version and buckets -----------------------------------------------

NAIVE = """
from functools import partial
import torch
import sft
process = sft.setup_distributed()
torch.manual_seed(0)
starts = [torch.randn(shape, dtype=torch.float64) for shape in [(4, 3), (5,), (2, 6), (3, 3)]]
naive_params = [torch.nn.Parameter(start.clone()) for start in starts]
params = [torch.nn.Parameter(start.clone()) for start in starts]
naive_of = dict(zip(params, naive_params))
adam = torch.optim.AdamW(naive_params, 0.1, (0.9, 0.95), weight_decay=0.0)
optimizer = sft.Optimizer(params, 0.1, 0.0, megabytes=1e-4)
assert len(optimizer.buckets) > 2
# one micro-batch on rank 0, two on rank 1, which never reaches the last parameter
micro_batches = [0.3, 0.7][:process.rank + 1]


def loss_of(weights, factor):
    reached = weights if process.rank == 0 else weights[:-1]
    return sum((factor * weight).sin().sum() for weight in reached)


for step in range(3):
    for micro_batch in micro_batches:
        loss_of(naive_params, micro_batch).backward()
    sft.all_reduce_gradients(naive_params)
    optimizer.backward(micro_batches, partial(loss_of, params))
    for bucket in optimizer.buckets:
        for param, gradient in zip(bucket.params, bucket.views(bucket.master.grad)):
            assert torch.equal(gradient, naive_of[param].grad.flatten())
    norm = torch.nn.utils.clip_grad_norm_(naive_params, 0.5).item()
    adam.step()
    adam.zero_grad()
    assert abs(optimizer.step(0.1, 0.5) / norm - 1) < 1e-12
    assert max((a - b).abs().max() for a, b in zip(params, naive_params)) < 1e-12
print("right", flush=True)
sft.close_distributed()
"""


def test_naive_data_parallel_and_the_optimizer_give_the_same_gradients(tmp_path):
    """Bit for bit, and the same weights within rounding, on two processes, with another number of
    micro-batches on each and a parameter that only one of them reaches."""
    assert run_workers(NAIVE, tmp_path).count("right") == 2


HALF = torch.bfloat16
SINGLE = torch.float32
DOUBLE = torch.float64


@pytest.mark.parametrize("sizes, dtypes, num_bytes, expected", [
    # 400, 800, 200, 40, 1,200, 4 bytes
    ([100, 200, 50, 10, 300, 1], [SINGLE] * 6, 1000, [[100, 200], [50, 10, 300], [1]]),
    ([250, 1], [SINGLE] * 2, 1000, [[250, 1]]),
    ([130, 1], [DOUBLE] * 2, 1000, [[130], [1]]),
    ([300, 1], [HALF] * 2, 1000, [[300, 1]]),
    ([200, 60, 70], [SINGLE, DOUBLE, DOUBLE], 1000, [[200], [60, 70]]),
    ([1, 2, 3], [SINGLE, DOUBLE, SINGLE], 1000, [[1], [2], [3]]),
    ([1, 2, 3], [HALF, torch.float16, torch.float16], 1000, [[1], [2, 3]]),
    ([1_020_000, 10], [torch.uint8] * 2, 2**20, [[1_020_000, 10]]),
    ([], [], 1000, [])],
    ids=["several", "exactly the limit is not larger", "bytes, not numbers", "two bytes a number",
         "one dtype each", "three dtypes", "two dtypes of one width", "2**20 bytes are a megabyte",
         "empty"])
def test_buckets_by_hand(sizes, dtypes, num_bytes, expected):
    """A bucket is complete once it is larger than the limit, and where the dtype changes. Nothing
    is lost, and the order stays."""
    params = [torch.nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=False)
              for size, dtype in zip(sizes, dtypes)]
    buckets = list(sft.make_buckets(params, megabytes=num_bytes / 2**20))
    assert [[param.numel() for param in bucket] for bucket in buckets] == expected
    assert all(a is b for a, b in zip(sum(buckets, []), params, strict=True))


def test_buckets_of_random_parameters():
    """Each but the last is larger than the limit, or followed by another dtype, and none would be
    without its last parameter."""
    generator = random.Random(0)
    for _ in range(100):
        params = [torch.zeros(generator.randint(1, 90), dtype=generator.choice([SINGLE, DOUBLE]))
                  for _ in range(generator.randint(1, 30))]
        limit = generator.choice([0, 100, 500])
        buckets = list(sft.make_buckets(params, megabytes=limit / 2**20))
        assert all(a is b for a, b in zip(sum(buckets, []), params, strict=True))
        for bucket, following in itertools.zip_longest(buckets, buckets[1:]):
            num_bytes = sum(param.nbytes for param in bucket)
            assert len({param.dtype for param in bucket}) == 1
            assert num_bytes - bucket[-1].nbytes <= limit
            is_last = following is None or following[0].dtype != bucket[0].dtype
            assert is_last or num_bytes > limit


@pytest.mark.parametrize("dtype, master_dtype", [
    (DOUBLE, DOUBLE), (SINGLE, SINGLE), (HALF, SINGLE)], ids=str)
def test_a_bucket_by_hand(dtype, master_dtype):
    """Two parameters of 6 and 4 numbers, cut into three shards of 4: the last two of the twelve
    are padding."""
    matrix = torch.nn.Parameter(torch.arange(6.0).view(2, 3).to(dtype))
    vector = torch.nn.Parameter(torch.arange(6.0, 10.0).to(dtype))
    bucket = sft.Bucket([matrix, vector], num_shards=3, shard_index=1)
    assert bucket.size == 10
    other = sft.Bucket([torch.nn.Parameter(torch.ones(1))], 1, 0)
    assert bucket.params_pending == set() and bucket.params_pending is not other.params_pending
    assert bucket.flat.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]
    assert bucket.shard.tolist() == [4, 5, 6, 7]
    assert bucket.master.tolist() == [4, 5, 6, 7]
    assert bucket.master.dtype == master_dtype
    # parameters are views of the flat tensor, and so is the master, if it is as wide
    bucket.shard.add_(1.0)
    assert matrix.tolist() == [[0, 1, 2], [3, 5, 6]]
    assert vector.tolist() == [7, 8, 8, 9]
    assert bucket.master.tolist() == ([5, 6, 7, 8] if dtype == master_dtype else [4, 5, 6, 7])


def test_a_bucket_has_no_more_padding_than_it_needs():
    bucket = sft.Bucket([torch.nn.Parameter(torch.ones(4))], num_shards=2, shard_index=0)
    assert len(bucket.flat) == 4


def test_a_bucket_is_on_the_device_of_its_parameters():
    """The device "meta" plays a GPU."""
    bucket = sft.Bucket([torch.nn.Parameter(torch.ones(3, device="meta"))], 1, 0)
    assert bucket.flat.device.type == "meta"


@pytest.mark.parametrize("dtype, master_dtype", [
    (DOUBLE, DOUBLE), (SINGLE, SINGLE), (HALF, SINGLE)], ids=str)
@pytest.mark.parametrize("with_gradient, expected", [
    (0, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0] + [0.0] * 6),
    (1, [0.0] * 6 + [0.5, 1.0, 1.5, 2.0] + [0.0] * 2)], ids=["matrix", "vector"])
def test_gradients_of_a_bucket_by_hand(dtype, master_dtype, with_gradient, expected):
    """In the parameters' order and in the master's dtype, with padding; zeros for the parameter
    that has none. They are freed."""
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((2, 3), (4,))]
    param = params[with_gradient]
    param.grad = (torch.arange(1, param.numel() + 1).view_as(param) / 2).to(dtype)
    bucket = sft.Bucket(params, num_shards=3, shard_index=1)
    gradients = bucket.flatten_gradients()
    assert gradients.tolist() == expected
    assert gradients.dtype == master_dtype
    assert params[0].grad is None
    assert params[1].grad is None
    # what was returned is nobody else's
    assert bucket.flatten_gradients().tolist() == [0.0] * 12
    assert gradients.tolist() == expected


# ---- Data parallel: reductions that overlap with backward ---------------------------------------


def one_bucket_each(params, megabytes):
    return [[param] for param in params]


def one_bucket_for_all(params, megabytes):
    return [params] if params else []


def test_one_process_sums_its_micro_batches(monkeypatch):
    monkeypatch.setattr(sft, "make_buckets", one_bucket_each)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = sft.Optimizer([weight], 0.1, 0.0)
    loss = optimizer.backward([1.0, 2.0, 4.0], lambda factor: (weight * factor).sum())
    assert loss == 21.0
    assert optimizer.buckets[0].master.grad.tolist() == [7.0] * 3


def test_micro_batches_may_be_made_one_by_one(monkeypatch):
    """With their number given, none is made before the one before it is used."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = sft.Optimizer([weight], 0.1, 0.0)
    events = []

    def factors():
        for factor in (1.0, 2.0):
            events.append(("made", factor))
            yield factor

    def loss_of(factor):
        events.append(("used", factor))
        return (weight * factor).sum()

    optimizer.backward(factors(), loss_of, num_micro_batches=2)
    assert events == [("made", 1.0), ("used", 1.0), ("made", 2.0), ("used", 2.0)]
    assert optimizer.buckets[0].master.grad.tolist() == [3.0] * 3


GRADIENTS = """
import torch
import sft
process = sft.setup_distributed()
rank = process.rank
sft.make_buckets = lambda params, megabytes: [[param] for param in params]
all_reduce = torch.distributed.all_reduce
sent = []


def record(tensor, **options):
    if tensor.numel() > 1:      # else it is the number of micro-batches
        sent.append((tensor.numel(), options.get("async_op")))
    return all_reduce(tensor, **options)


torch.distributed.all_reduce = record
a, b, c = params = [torch.nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in (2, 3, 5)]
optimizer = sft.Optimizer(params, 0.1, 0.0)


def loss_of(micro_batch):       # a gets a gradient on rank 0 only
    loss = (b * (rank + 1)).sum() * 2.0 + (c * 10.0).sum()
    return loss + a.sum() if rank == 0 else loss


# rank 0 has one micro-batch, rank 1 two: b gets 2 + 4 + 4, c 10 + 20
optimizer.backward(range(rank + 1), loss_of)
gradients = {bucket.size: bucket.master.grad.tolist() for bucket in optimizer.buckets}
assert gradients == {2: [1.0] * 2, 3: [10.0] * 3, 5: [30.0] * 5}, gradients
# one message a bucket, in the order of the buckets, on both ranks
assert sent == [(5, True), (3, True), (2, True)], sent
assert all(param.grad is None for param in params)
print("right", flush=True)
sft.close_distributed()
"""


def test_gradients_of_two_processes_by_hand(tmp_path):
    """Another number of micro-batches on each, and a parameter that only one of them reaches."""
    assert run_workers(GRADIENTS, tmp_path).count("right") == 2


@pytest.fixture
def first_of_two_ranks(monkeypatch):
    """first_of_two_ranks(sizes, make_buckets) -> (parameters, their optimizer, a log of messages).
    The other rank sends nothing but zeros."""
    log = SimpleNamespace(sent=[], waited_for=[], most_in_flight=0)

    def all_reduce(flat, async_op):
        log.sent.append(len(flat))
        num_in_flight = len(log.sent) - len(log.waited_for)
        log.most_in_flight = max(log.most_in_flight, num_in_flight)
        return SimpleNamespace(wait=lambda: log.waited_for.append(len(flat)))

    def make(sizes, make_buckets=one_bucket_each):
        monkeypatch.setattr(sft, "make_buckets", make_buckets)
        params = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
        optimizer = sft.Optimizer(params, 0.1, 0.0)
        monkeypatch.setattr(sft, "world_size", lambda: 2)
        monkeypatch.setattr(sft, "all_reduce", lambda values, *options: values)
        monkeypatch.setattr(sft.dist, "all_reduce", all_reduce)
        return params, optimizer, log
    return make


def test_gradients_are_reduced_while_backward_runs(first_of_two_ranks):
    """Three layers in three buckets, last layer first: when the first layer's gradient is complete,
    the others are in flight. With three micro-batches nothing is reduced before the third."""
    layers, optimizer, log = first_of_two_ranks([(2, 3), (3, 4), (4, 5)])
    log.sent = events = []
    layers[0].register_post_accumulate_grad_hook(lambda param: events.append("first layer"))

    def loss_of(x):
        for layer in layers:
            x = x @ layer
        return x.sum()

    optimizer.backward([torch.ones(1, 2)], loss_of)
    # 20, 12 and 6 numbers; the last message may be sent before or after our own hook
    assert events in ([20, 12, 6, "first layer"], [20, 12, "first layer", 6])
    events.clear()
    optimizer.update_rule.zero_grad()
    optimizer.backward([torch.ones(1, 2)] * 3, loss_of)
    assert events[:2] == ["first layer"] * 2
    assert [event for event in events if event != "first layer"] == [20, 12, 6]
    assert (optimizer.buckets[0].master.grad == 3 * 6).all()    # 2 x 3 ways there, three times


def test_buckets_are_reduced_in_their_order(first_of_two_ranks):
    """The gradient of the first bucket is complete last: then all three are reduced at once, in the
    order that all ranks share."""
    params, optimizer, log = first_of_two_ranks([1, 2, 3])  # buckets 3, 2, 1; gradients 1, 2, 3
    sent_before_the_end = []
    params[2].register_post_accumulate_grad_hook(
        lambda param: sent_before_the_end.extend(log.sent))
    optimizer.backward([0], lambda _: params[2].sum() + params[1].sum() + params[0].sum())
    assert log.sent == sent_before_the_end == [3, 2, 1]


def test_a_bucket_is_reduced_once_all_its_gradients_are_complete(first_of_two_ranks):
    """In whatever order they come."""
    for order in itertools.permutations(range(3)):
        params, optimizer, log = first_of_two_ranks([1, 2, 4], one_bucket_for_all)
        log.sent.clear()
        optimizer.backward([0], lambda _: sum(params[index].sum() for index in order))
        assert log.sent == [7]
        assert optimizer.buckets[0].master.grad.tolist() == [1.0] * 7


def test_few_buckets_are_in_flight_and_all_are_waited_for(first_of_two_ranks):
    params, optimizer, log = first_of_two_ranks([1, 2, 3, 4, 5])
    optimizer.backward([0], lambda _: sum(param.sum() for param in params))
    # before a third one is started, or just after, the first one is waited for
    assert 2 <= log.most_in_flight <= 3
    assert log.waited_for == log.sent == [5, 4, 3, 2, 1]


def test_outside_of_the_optimizers_backward_nothing_is_reduced(first_of_two_ranks):
    params, _, log = first_of_two_ranks([1, 2, 3])
    sum(param.sum() for param in params).backward()
    assert log.sent == []
    assert all(param.grad is not None for param in params)


@pytest.mark.parametrize("shard", [True, False], ids=["sharded", "whole"])
@pytest.mark.parametrize("num_params", [1, 2, 5])
def test_which_messages_are_sent(monkeypatch, num_params, shard):
    """The first of two ranks whose gradients are the same, without the other. Three micro-batches:
    sharded, a reduce-scatter of every bucket after each; else one all-reduce a bucket, after the
    last. None waits for its end, at most two are in flight when another one starts, and what is
    sent lives until then. After the step, sharded, every bucket is gathered and waited for."""
    sent = []
    nums_in_flight = []

    def start(kind, gradients, async_op=False):
        sent.append((kind, async_op))
        nums_in_flight.append(len(optimizer.in_flight))
        what_is_sent = weakref.ref(gradients)

        def wait():
            assert what_is_sent() is not None

        return SimpleNamespace(wait=wait)

    def reduce_scatter(shard_gradient, gradients, **options):
        shard_gradient.copy_(2 * gradients[:len(shard_gradient)])
        return start("reduce_scatter", gradients, **options)

    def all_reduce(gradients, **options):
        gradients.mul_(2)
        return start("all_reduce", gradients, **options)

    def all_gather(weights, shard, async_op=False):
        what_is_sent = weakref.ref(shard)

        def wait():     # both ranks send the same
            weights.view(2, -1).copy_(what_is_sent())

        return SimpleNamespace(wait=wait) if async_op else wait()

    monkeypatch.setattr(sft, "world_size", lambda: 2)
    monkeypatch.setattr(sft, "all_reduce", lambda values, *options: values)
    monkeypatch.setattr(sft, "reduce_scatter", reduce_scatter)
    monkeypatch.setattr(sft, "all_gather", all_gather)
    monkeypatch.setattr(sft.dist, "all_reduce", all_reduce)
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(num_params)]
    optimizer = sft.Optimizer(params, 0.1, 0.0, shard=shard, megabytes=1e-6)
    optimizer.backward(range(3), lambda _: sum(param.sum() for param in params))
    assert all((bucket.master.grad == 6).all() for bucket in optimizer.buckets)
    if shard:
        assert sent == [("reduce_scatter", True)] * 3 * num_params
    else:
        assert sent == [("all_reduce", True)] * num_params
    assert max(nums_in_flight) == min(2, len(sent) - 1)
    optimizer.step(0.1, 1e9)
    for param in params:    # AdamW's first step is the rate
        assert param.tolist() == [pytest.approx([0.9] * 3)] * 2


TORCH_DDP = """
import sys
import torch
import torch.distributed as dist
import sft
import tools
folder, data = sys.argv[1:]
process = sft.setup_distributed()
rows = tools.read_jsonl(f"{data}/coldstart.jsonl")[:4]


def loss_of(policy):
    sequences = [sft.encode(policy, row, data) for row in rows[process.rank::2]]
    return -sft.token_logprobs(policy, sft.collate(policy, sequences)).sum() / 100


def train_ours():
    policy = sft.load_policy(folder, process.device, "float64")
    if process.rank == 1:       # broadcast must replace these weights
        for param in policy.model.parameters():
            param.data.add_(1.0)
    sft.broadcast_weights(policy.model)
    params = sft.trainable_parameters(policy, False)
    optimizer = sft.Optimizer(params, 1e-3, 0.0)
    for _ in range(3):
        optimizer.backward([policy], loss_of)
        optimizer.step(1e-3, 1e9)
    return torch.cat([param.detach().flatten() for param in params])


def train_torch():
    policy = sft.load_policy(folder, process.device, "float64")
    params = sft.trainable_parameters(policy, False)
    adam = torch.optim.AdamW(params, 1e-3, (0.9, 0.95), weight_decay=0)
    body = policy.model.model
    wrapped = torch.nn.parallel.DistributedDataParallel(body)
    for _ in range(3):
        policy.model.model = wrapped
        loss = loss_of(policy)
        policy.model.model = body
        loss.backward()
        # torch averages over ranks, and does not see the head outside the wrapped body
        for param in params:
            if any(param is other for other in policy.model.lm_head.parameters()):
                dist.all_reduce(param.grad)
            else:
                param.grad.mul_(2)
        adam.step()
        adam.zero_grad()
    return torch.cat([param.detach().flatten() for param in params])


print("difference", (train_ours() - train_torch()).abs().max().item(), flush=True)
sft.close_distributed()
"""


def test_gradient_sum_equals_torch_ddp(trained_folder, world, tmp_path):
    """Broadcast and summed gradients against DistributedDataParallel, three AdamW steps in float64,
    two processes."""
    printed = run_workers(TORCH_DDP, tmp_path, trained_folder, world)
    differences = [float(line.split()[1]) for line in printed.splitlines()
                   if line.startswith("difference")]
    assert len(differences) == 2
    assert max(differences) < 1e-10


# ---- Data parallel: the step, and the sharded optimizer -----------------------------------------


def test_a_gradient_within_the_limit_is_left_as_it_is():
    """Norms 1, 5 and 20 with a limit of 10, against AdamW on gradients clipped by hand: the moments
    remember how long they were."""
    direction = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    weight = torch.nn.Parameter(torch.ones(2, 1, dtype=torch.float64))
    reference = torch.nn.Parameter(torch.ones(2, 1, dtype=torch.float64))
    optimizer = sft.Optimizer([weight], 0.1, 0.0)
    adam = torch.optim.AdamW([reference], 0.1, (0.9, 0.95), weight_decay=0.0)
    for norm in (1.0, 5.0, 20.0):
        optimizer.backward([norm], lambda norm: (weight * direction * norm).sum())
        assert optimizer.step(0.1, 10.0) == pytest.approx(norm)
        reference.grad = direction * min(norm, 10.0)
        adam.step()
    assert (weight - reference).abs().max() < 1e-6


def test_the_squares_of_large_gradients_do_not_overflow():
    """Norm sqrt(4) x 1e25, whose square is no float32."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = sft.Optimizer([weight], 0.1, 0.0)
    optimizer.backward([None], lambda _: (weight * 1e25).sum())
    norm = optimizer.step(0.1, 1.0)
    assert type(norm) is float and norm == pytest.approx(2e25)
    assert optimizer.num_skipped == 0 and (weight < 1).all()


def same_state(bucket_state, other_state):
    """Return whether two buckets would save the same: {name: tensor or number} each."""
    return bucket_state.keys() == other_state.keys() and all(
        torch.equal(torch.as_tensor(bucket_state[name]), torch.as_tensor(other_state[name]))
        for name in bucket_state)


def test_an_unhealthy_step_changes_nothing():
    """Neither weights nor moments nor AdamW's number of steps; the gradient is freed, and the step
    is counted."""
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = sft.Optimizer([weight], 0.1, 0.1)

    def one_step(slope=1.0, healthy=True):
        optimizer.backward([None], lambda _: (weight * slope).sum())
        return optimizer.step(0.1, 1e9, healthy)

    def saved_state():
        return {name: torch.as_tensor(value).clone()
                for name, value in optimizer.state()[0].items()}

    one_step()
    before = saved_state()
    assert one_step(healthy=False) == pytest.approx(6**0.5)
    assert same_state(before, saved_state())
    assert math.isnan(one_step(slope=math.nan))
    assert same_state(before, saved_state())
    assert torch.equal(weight.detach().flatten(), before["master"])
    assert optimizer.num_skipped == 2
    assert one_step() == pytest.approx(6**0.5)
    assert optimizer.num_skipped == 0


@pytest.mark.parametrize("slope", [torch.inf, torch.nan])
def test_steps_that_are_not_finite_are_skipped_and_counted(slope):
    params = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = sft.Optimizer(params, 0.1, 0.0)
    for num_skipped in (1, 2):
        optimizer.backward([None], lambda _: sum((param * slope).sum() for param in params))
        assert not math.isfinite(optimizer.step(0.1, 1.0))
        assert optimizer.num_skipped == num_skipped
    assert all((param == 1).all() for param in params)
    optimizer.backward([None], lambda _: sum(param.sum() for param in params))
    assert optimizer.step(0.1, 1.0) == pytest.approx(8**0.5)
    assert optimizer.num_skipped == 0
    assert (params[0] < 1).all()


SHARDED = """
import json
from pathlib import Path
import torch
import sft
from support.memory import LiveBytes
process = sft.setup_distributed()
rank = process.rank
# buckets that neither two nor three processes share evenly
SHAPES = [(13, 7), (5,), (3, 11), (1, 1), (17,), (29, 3)]


def is_reached(i, micro_batch, other_rank):
    # rank r runs r + 1 micro-batches, the last one without the third parameter
    return (i, micro_batch) != (2, other_rank)


def train(dtype, shard, rule):
    master_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    torch.manual_seed(0)
    starts = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = sft.Optimizer(params, 0.0, 0.1, shard=shard, megabytes=2.5e-4, rule=rule)
    # the reference is one process that sees the sum of all
    reference = [torch.nn.Parameter(start.to(master_dtype)) for start in starts]
    groups = [dict(params=[p for p in reference if p.dim() > 1], weight_decay=0.1),
              dict(params=[p for p in reference if p.dim() == 1], weight_decay=0.0)]
    if rule == "sgd":
        peer = torch.optim.SGD(groups, lr=0.0)
    else:
        peer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(10):
        lr = 0.01 * (step + 1)
        # slopes[rank][micro-batch][parameter]
        slopes = [[[torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]
                   for micro_batch in range(other_rank + 1)]
                  for other_rank in range(process.world_size)]

        def loss_of(micro_batch):
            return sum((param * slope).sum()
                       for i, (param, slope) in enumerate(zip(params, slopes[rank][micro_batch]))
                       if is_reached(i, micro_batch, rank))

        optimizer.backward(range(rank + 1), loss_of)
        norm = optimizer.step(lr, 3.0)
        for i, param in enumerate(reference):
            param.grad = sum(slopes[other_rank][micro_batch][i].to(master_dtype)
                             for other_rank in range(process.world_size)
                             for micro_batch in range(other_rank + 1)
                             if is_reached(i, micro_batch, other_rank))
        expected = torch.nn.utils.clip_grad_norm_(reference, 3.0).item()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        assert abs(norm / expected - 1) < tolerance, (norm, expected)
        for group in peer.param_groups:
            group["lr"] = lr
        peer.step()
    sums = [param.detach().double().sum().item() for param in params]
    assert sft.all_gather_objects([sums]) == [sums] * process.world_size
    gap = max((param.detach().to(master_dtype) - other.detach()).abs().max().item()
              for param, other in zip(params, reference))
    rounding = max((other.detach().to(dtype).to(master_dtype) - other.detach()).abs().max().item()
                   for other in reference)
    return gap, rounding, len(optimizer.buckets)


# bytes per parameter that are alive after backward and after a step, and that are saved, each with
# its formula
def measure(dtype, shard, rule):
    num_shards = process.world_size if shard else 1
    weight_bytes = torch.finfo(dtype).bits // 8
    moment_bytes = 0 if rule == "sgd" else 8
    state_bytes = moment_bytes + (4 if dtype == torch.bfloat16 else 0)
    with LiveBytes() as memory:
        params = [torch.nn.Parameter(torch.randn(300, 101, dtype=dtype)) for _ in range(20)]
        num_numbers = sum(param.numel() for param in params)
        optimizer = sft.Optimizer(params, 0.1, 0.0, shard=shard, megabytes=0.2, rule=rule)
        optimizer.backward([0], lambda _: sum(param.sum() for param in params))
        optimizer.step(0.1, 1.0)
        optimizer.backward([0], lambda _: sum(param.sum() for param in params))
        after_backward = memory.settled() / num_numbers
        optimizer.step(0.1, 1.0)
        after_step = memory.settled() / num_numbers
    path = Path(__file__).parent / f"state.{rank}.pt"
    torch.save(optimizer.state(), path)
    saved = path.stat().st_size / num_numbers
    return [(after_backward, weight_bytes + (4 + state_bytes) / num_shards),
            (after_step, weight_bytes + state_bytes / num_shards),
            (saved, (moment_bytes + 4) / num_shards)]


results = {}
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    for shard in (True, False):
        for rule in ("adamw", "sgd"):
            results[f"{dtype} {shard} {rule}"] = train(dtype, shard, rule)
results["memory"] = []
for dtype in (torch.float32, torch.bfloat16):
    for shard in (True, False):
        for rule in ("adamw", "sgd"):
            results["memory"] += measure(dtype, shard, rule)
# one rank's gradient is not a number, in the last rank's shard only: no rank takes the step
params = [torch.nn.Parameter(torch.ones(3, 2))]
optimizer = sft.Optimizer(params, 0.1, 0.0, shard=True)
slope = torch.ones(3, 2)
if rank == 1:
    slope[2, 1] = float("nan")
optimizer.backward([0], lambda _: (params[0] * slope).sum())
optimizer.step(0.1, 1.0)
assert optimizer.num_skipped == 1
assert (params[0] == 1).all()
if rank == 0:
    print(json.dumps(results))
sft.close_distributed()
"""


@pytest.mark.parametrize("nproc", [2, 3])
def test_sharded_optimizer_equals_adamw_on_one_process(nproc, tmp_path):
    """And SGD. Ten steps with decay, clipping, another number of micro-batches on each rank, sizes
    that do not divide, and a parameter that gets no gradient in some of them. All ranks hold the
    same weights, bit for bit. bfloat16 weights are those of a float32 run, rounded. What each rank
    holds, and saves, is what the docstring of sft.Optimizer says, to 5%."""
    results = json.loads(run_workers(SHARDED, tmp_path, nproc=nproc))
    for measured, expected in results.pop("memory"):
        assert measured == pytest.approx(expected, rel=0.05)
    assert len(results) == 12
    for name, (gap, rounding, num_buckets) in results.items():
        assert num_buckets >= 2
        if "bfloat16" in name:      # gradients of many micro-batches add up in float32
            assert rounding > 1e-3
            assert gap <= 1.001 * rounding
        else:
            assert gap < (1e-10 if "float64" in name else 1e-6)


# ---- Data parallel: the optimizer's state under another number of ranks -------------------------


class EmptyBucket(sft.Bucket):
    """A bucket of zeros without Bucket.__init__, which is graded by itself."""

    def __init__(self, size, num_shards, shard_index, dtype):
        self.size = size
        self.sizes = [size]
        self.num_shards = num_shards
        self.shard_index = shard_index
        self.flat = torch.zeros(-(-size // num_shards) * num_shards, dtype=dtype)
        self.shard = self.shard_of(self.flat)
        master = self.shard.float() if dtype == torch.bfloat16 else self.shard
        self.master = torch.nn.Parameter(master)


def optimizer_of(size, num_shards=1, shard_index=0, dtype=torch.float32):
    """Return what Optimizer.load uses of an optimizer of one bucket, without the rest."""
    bucket = EmptyBucket(size, num_shards, shard_index, dtype)

    def all_gather_weights():
        if dtype == torch.bfloat16:     # else they are the same memory
            bucket.shard.copy_(bucket.master.data)

    return SimpleNamespace(
        buckets=[bucket], num_shards=num_shards, shard_index=shard_index, is_sharded=False,
        update_rule=torch.optim.AdamW([bucket.master], 0.1, weight_decay=0.1, fused=True),
        all_gather_weights=all_gather_weights)


def saved_shard(numbers):
    """Return what one rank saves of a bucket of 10 numbers."""
    numbers = torch.tensor(numbers)
    return [{"size": 10, "master": numbers, "exp_avg": numbers * 10, "exp_avg_sq": numbers * 20,
             "step": torch.tensor(7.0)}]


OF_TWO = [saved_shard([0.0, 1, 2, 3, 4]), saved_shard([5.0, 6, 7, 8, 9])]
OF_THREE = [saved_shard([0.0, 1, 2, 3]), saved_shard([4.0, 5, 6, 7]), saved_shard([8.0, 9, 0, 0])]


@pytest.mark.parametrize("saved, num_shards, shard_index, expected", [
    (OF_TWO, 3, 1, [4, 5, 6, 7]), (OF_TWO, 3, 2, [8, 9, 0, 0]), (OF_TWO, 2, 1, [5, 6, 7, 8, 9]),
    (OF_THREE, 2, 0, [0, 1, 2, 3, 4]), (OF_THREE, 1, 0, list(range(10)))],
    ids=["2 to 3, second", "2 to 3, last", "2 to 2", "3 to 2", "3 to 1"])
def test_state_is_resharded_by_hand(saved, num_shards, shard_index, expected):
    """A bucket of 10 numbers, saved by two ranks (5 + 5) or by three (4 + 4 + 4, two of them
    padding), loaded by three, two and one. The number of steps is not sharded."""
    optimizer = optimizer_of(10, num_shards, shard_index)
    sft.Optimizer.load(optimizer, saved)
    [bucket] = optimizer.buckets
    assert bucket.master.tolist() == expected
    state = optimizer.update_rule.state[bucket.master]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"] == 7
    assert state["exp_avg"].tolist() == [10 * number for number in expected]
    assert state["exp_avg_sq"].tolist() == [20 * number for number in expected]
    # a view of the whole would keep all of it
    assert state["exp_avg"].untyped_storage().nbytes() == 4 * len(expected)


def test_state_of_any_number_of_ranks_is_resharded():
    """However many ranks saved 0, 1, 2 ..., the shards of all ranks end to end are these numbers,
    and zeros."""
    for size, num_saved, num_shards in itertools.product((1, 2, 7, 12), (1, 2, 3, 5), (1, 2, 3, 5)):
        saved = EmptyBucket(size, num_saved, 0, torch.float32).flat
        saved[:size] = torch.arange(1.0, size + 1)
        shards = [EmptyBucket(size, num_shards, index, torch.float32).reshard(
                      list(saved.chunk(num_saved))) for index in range(num_shards)]
        whole = torch.cat(shards)
        assert whole[:size].tolist() == list(range(1, size + 1))
        assert len({len(shard) for shard in shards}) == 1 and (whole[size:] == 0).all()
        assert len(whole) - size < num_shards


def test_every_bucket_gets_its_own_state():
    optimizer = optimizer_of(2)
    optimizer.buckets = [optimizer_of(size).buckets[0] for size in (2, 3)]
    saved = [{"size": size, "master": torch.full((size,), 1.0 * size),
              "exp_avg": torch.full((size,), 10.0 * size), "step": torch.tensor(7.0 * size),
              "exp_avg_sq": torch.full((size,), 20.0 * size)} for size in (2, 3)]
    sft.Optimizer.load(optimizer, [saved])
    for size, bucket in zip((2, 3), optimizer.buckets):
        state = optimizer.update_rule.state[bucket.master]
        assert bucket.flat.tolist() == [size] * size and state["step"] == 7 * size
        assert state["exp_avg"].tolist() == [10 * size] * size
        assert state["exp_avg_sq"].tolist() == [20 * size] * size
    # what was given is not changed
    assert all(bucket_state.keys() == {"size", "master", "exp_avg", "exp_avg_sq", "step"}
               for bucket_state in saved)
    # another state replaces all of it; this one has no moments
    no_moments = [{"size": size, "master": torch.zeros(size)} for size in (2, 3)]
    sft.Optimizer.load(optimizer, [no_moments])
    assert all(not optimizer.update_rule.state[bucket.master] for bucket in optimizer.buckets)


@pytest.mark.parametrize("sizes", [[11], [10, 1], [10, 10], []],
                         ids=["size", "one more", "one more of that size", "none"])
def test_the_state_of_another_model_is_refused(sizes):
    optimizer = optimizer_of(10)
    optimizer.buckets = [optimizer_of(size).buckets[0] for size in sizes]
    with pytest.raises(ValueError, match="another model"):
        sft.Optimizer.load(optimizer, OF_TWO)
    assert all((bucket.flat == 0).all() for bucket in optimizer.buckets)


@pytest.mark.parametrize("sizes", [[10, 4], [9, 6]], ids=["second bucket", "as many numbers"])
def test_the_state_of_another_model_is_refused_before_anything_changes(sizes):
    """The state is of two buckets, 10 and 5 numbers."""
    optimizer = optimizer_of(10)
    optimizer.buckets = [optimizer_of(size).buckets[0] for size in sizes]
    saved = [{"size": length, "master": torch.ones(length)} for length in (10, 5)]
    with pytest.raises(ValueError, match="another model"):
        sft.Optimizer.load(optimizer, [saved])
    assert all((bucket.flat == 0).all() for bucket in optimizer.buckets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_loaded_state_continues_like_the_saved_one(dtype):
    """Saved by one rank after a step, loaded as two halves into another optimizer: its weights are
    the same at once and after one more step, and so is what it would save."""
    original = optimizer_of(6, dtype=dtype)
    loaded = optimizer_of(6, dtype=dtype)

    def step(optimizer, slope):
        [bucket] = optimizer.buckets
        bucket.master.grad = torch.full_like(bucket.master, slope)
        optimizer.update_rule.step()
        optimizer.all_gather_weights()
        return bucket.shard

    def half_of(bucket_state, first):
        return {name: value if name in ("size", "step") else value[first:first + 3].clone()
                for name, value in bucket_state.items()}

    # before any step there are no moments
    sft.Optimizer.load(loaded, [sft.Optimizer.state(original)])
    step(original, 1.0)
    [bucket_state] = sft.Optimizer.state(original)
    sft.Optimizer.load(loaded, [[half_of(bucket_state, 0)], [half_of(bucket_state, 3)]])
    assert torch.equal(original.buckets[0].shard, loaded.buckets[0].shard)
    assert torch.equal(step(original, 2.0), step(loaded, 2.0))
    assert same_state(sft.Optimizer.state(original)[0], sft.Optimizer.state(loaded)[0])


# ---- State of a run, and the exported model -----------------------------------------------------

COMMON = ["--dtype", "float64", "--batch_size", 4, "--lr", "1e-3", "--warmup_ratio", 0,
          "--micro_batch_tokens", 500, "--no-freeze_vision"]


def command_on(data, trained_folder, *flags):
    """Return an sft.py command in float64 that trains all of the trained policy."""
    return ["sft.py", "--model", trained_folder, "--data", data, *COMMON, *flags]


@pytest.fixture(scope="module")
def command(trained_folder, world):
    """command(*flags) -> such a command, on the shortest conversations."""
    return functools.partial(command_on, world / "short.jsonl", trained_folder)


def latest(out):
    """Return what the newest checkpoint says about itself."""
    return json.loads((run_folder.checkpoints(out)[0] / "checkpoint.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    """uninterrupted(nproc) -> (a command of eight steps, sharded on two processes; the folder of a
    run of it)."""
    @functools.cache
    def run(nproc):
        eight_steps = command("--steps", 8, "--dtype", "float32", "--save_every", 1)
        if nproc == 2:
            eight_steps.append("--shard_optimizer")
        out = tmp_path_factory.mktemp("whole")
        run_script(*eight_steps, "--out", out, nproc=nproc)
        return eight_steps, out
    return run


@pytest.mark.parametrize("nproc", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, nproc):
    """Two SIGKILLs at random moments (extras/crash.py: ten): the same weights, bit for bit, and one
    line per step in the log."""
    eight_steps, whole = uninterrupted(nproc)
    cut = tmp_path / "cut"
    assert crash.run_killed(eight_steps, nproc, cut, 2, 0.5, launch=Forked) == 2
    assert crash.same_weights(whole, cut)
    assert [json.loads(line)["step"] for line in (cut / "metrics.jsonl").open()] == [*range(1, 9)]
    assert len(list((cut / "state").glob("step_*"))) == 2      # --keep_checkpoints


def test_sharded_state_loads_under_another_world_size(command, tmp_path):
    """Two steps on three processes, the rest on two, against one process throughout; float64,
    within rounding."""
    four_steps = command("--shard_optimizer", "--save_every", 2, "--steps", 4)
    cut = tmp_path / "cut"
    process = Forked([*four_steps, "--out", cut], 3)
    crash.wait_until(process, lambda: run_folder.checkpoints(cut))
    crash.kill(process)
    assert latest(cut)["num_shards"] == 3
    completed = run_script(*four_steps, "--out", cut, "--resume", nproc=2)
    assert "was saved by 3 processes, now there are 2" in completed.stdout
    run_script(*four_steps, "--out", tmp_path / "one")
    assert largest_difference(tmp_path / "one", cut) < 1e-10


@pytest.mark.parametrize("keep_checkpoints, kept", [(1, [4]), (2, [3, 4]), (5, [1, 2, 3, 4])])
def test_the_last_checkpoints_are_kept(tmp_path, keep_checkpoints, kept):
    optimizer = sft.Optimizer([torch.nn.Parameter(torch.ones(3, 2))], 0.1, 0.0)
    for step in range(1, 5):
        sft.save_state(tmp_path, sft.TrainingRun(optimizer, {}, None), step, keep_checkpoints)
    folders = sorted(path.name for path in (tmp_path / "state").glob("step_*"))
    assert folders == [f"step_{step:07d}" for step in kept]


def test_disk_full_leaves_the_old_checkpoint(command, tmp_path):
    """A file-size limit stands in for a full disk: one line, and what was there before is still
    there, whole."""
    out = tmp_path / "out"
    flags = command("--out", out)[1:]
    run_script("sft.py", *flags, "--steps", 1)
    before = (out / "state/step_0000001/0.pt").read_bytes()
    (tmp_path / "sft.py").write_text(
        "import resource, sft\n"
        "from extras import terminal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "terminal.run(sft.main)\n")
    completed = run_script(tmp_path / "sft.py", *flags, "--steps", 2, "--resume", check=False)
    assert completed.returncode == 1
    assert "Traceback" not in completed.stderr
    last_line = completed.stderr.splitlines()[-1]
    assert "error:" in last_line
    assert "cannot save" in last_line or "too large" in last_line
    assert str(out) in last_line and "step 1 is saved: continue with --resume" in last_line
    assert (out / "state/step_0000001/0.pt").read_bytes() == before
    assert latest(out)["step"] == 1
    assert not list(out.glob(".*"))


def test_a_fresh_run_never_continues_an_older_one(command, tmp_path):
    """Killed before its first checkpoint and resumed, it starts again: the older run's state was
    moved away."""
    out = tmp_path / "out"
    run_script(*command("--steps", 2, "--seed", 1, "--out", out))
    old_shard = (out / "state/step_0000002/0.pt").read_bytes()
    process = Forked(command("--steps", 3, "--out", out))
    crash.wait_until(process, (out / "old_run_1").exists)
    crash.kill(process)
    assert (out / "old_run_1/state/step_0000002/0.pt").read_bytes() == old_shard
    assert not (out / "state").exists()
    run_script(*command("--steps", 3, "--out", out, "--resume"))
    run_script(*command("--steps", 3, "--out", tmp_path / "whole"))
    assert largest_difference(tmp_path / "whole", out) == 0


def stop_at_first_step(monkeypatch):
    """Make every run end after its first step, as if SIGTERM had come."""
    monkeypatch.setattr(sft.StopSignal, "received_by_any_rank", lambda *_: signal.SIGTERM)


def test_the_advice_after_a_forgotten_resume_works(command, tmp_path, monkeypatch):
    """Stopped after step 1 and started again without --resume: as told, the first run continues
    with its log, and ends like a run that was never stopped."""
    three_steps = command("--steps", 3)
    run_script(*three_steps, "--out", tmp_path / "whole")
    out = tmp_path / "my out"
    with monkeypatch.context() as patch:
        stop_at_first_step(patch)
        for seed in (0, 1):
            stopped = run_script(*three_steps, "--out", out, "--seed", seed, check=False)
            assert stopped.returncode == 143
            assert "finished" not in stopped.stdout + stopped.stderr
    assert "starts at step 0 of 3" in stopped.stdout
    advice = shlex.split(stopped.stdout.split("stop this one and give ")[1].splitlines()[0])
    assert advice == ["--resume", "--out", str(out / "old_run_1")]
    continued = run_script(*three_steps, *advice)
    assert f"sft: continues from step 1 of 3, checkpoint {advice[2]}" in continued.stdout
    assert f"sft: model written to {advice[2]}" in continued.stdout
    assert largest_difference(tmp_path / "whole", out / "old_run_1") == 0
    log = (out / "old_run_1/metrics.jsonl").read_text()
    assert log == (tmp_path / "whole/metrics.jsonl").read_text()
    assert latest(out)["flags"]["seed"] == 1    # the second run is still there, too


INFO = {"stage": "sft", "dtype": "float32", "num_parameters": 6, "flags": {"lr": 0.1, "seed": 0}}


def small_run(**info):
    """Return a run whose optimizer has six parameters in one bucket, before its first step."""
    optimizer = sft.Optimizer([torch.nn.Parameter(torch.zeros(3, 2))], 0.1, 0.0)
    return sft.TrainingRun(optimizer, {**INFO, **info}, None)


@pytest.fixture
def two_checkpoints(tmp_path):
    """(Folder of a run; its states at steps 4 and 6, of which there are checkpoints)."""
    run = small_run()
    states = {}
    for step in (2, 4, 6):
        run.optimizer.backward([None], lambda _: step * run.optimizer.buckets[0].params[0].sum())
        run.optimizer.step(0.1, 1.0)
        sft.save_state(tmp_path, run, step)
        states[step] = copy.deepcopy(run.optimizer.state()[0])
    return tmp_path, states


def truncate(folder):
    os.truncate(folder / "0.pt", 700)


def change_shard(folder, **changed):
    """Change some entries of a shard's one bucket."""
    shard = torch.load(folder / "0.pt")
    shard["optimizer"][0].update(changed)
    torch.save(shard, folder / "0.pt")


DAMAGES = {
    "a shard is cut": truncate,
    "a shard is empty": lambda folder: os.truncate(folder / "0.pt", 0),
    "a shard is missing": lambda folder: (folder / "0.pt").unlink(),
    "a shard is a folder": lambda folder: ((folder / "0.pt").unlink(), (folder / "0.pt").mkdir()),
    "something else": lambda folder: torch.save({"a": torch.ones(2)}, folder / "0.pt"),
    "a list": lambda folder: torch.save([1, 2], folder / "0.pt"),
    "a text": lambda folder: (folder / "0.pt").write_text("version https://git-lfs"),
    "the shard of another step": lambda folder: shutil.copy(
        folder.with_name("step_0000004") / "0.pt", folder),
    "another model": lambda folder: change_shard(folder, size=8),
    "moments are too short": lambda folder: change_shard(folder, exp_avg_sq=torch.ones(2)),
    "no description": lambda folder: (folder / "checkpoint.json").unlink(),
    "a cut description": lambda folder: os.truncate(folder / "checkpoint.json", 9),
    "an empty description": lambda folder: (folder / "checkpoint.json").write_text("{}"),
    "a list as description": lambda folder: (folder / "checkpoint.json").write_text("[1]"),
    "no list of buckets": lambda folder: torch.save({"step": 6, "optimizer": 1}, folder / "0.pt"),
    "a bucket without a size": lambda folder: torch.save({"step": 6, "optimizer": [{}]},
                                                         folder / "0.pt"),
    "of more shards": lambda folder: (folder / "checkpoint.json").write_text(
        (folder / "checkpoint.json").read_text().replace('"num_shards": 1', '"num_shards": 2'))}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(two_checkpoints, capsys, damage):
    """It is told in one sentence, and nothing of the damaged one is loaded. The run that continues
    can save the step again."""
    out, states = two_checkpoints
    damage(out / "state/step_0000006")
    run = small_run()
    assert sft.load_state(out, run, True, 10) == 4
    assert same_state(run.optimizer.state()[0], states[4])
    printed = capsys.readouterr().out
    assert "continues from step 4 of 10" in printed and "step_0000006" in printed
    sft.save_state(out, run, 6)
    assert sft.load_state(out, small_run(), True, 10) == 6


def test_all_ranks_take_the_checkpoint_that_all_can_read(two_checkpoints, capsys, monkeypatch):
    """Only another rank cannot read the newest."""
    out, _ = two_checkpoints
    answers = iter([run_folder.checkpoints(out), ["step_0000006 cannot be read (why)"], []])
    monkeypatch.setattr(sft, "all_gather_objects", lambda items: next(answers))
    assert sft.load_state(out, small_run(), True, 10) == 4
    assert "step_0000006 cannot be read (why): continues from step 4" in capsys.readouterr().out


def test_if_no_checkpoint_is_whole_the_run_is_refused(two_checkpoints):
    out, _ = two_checkpoints
    for folder in run_folder.checkpoints(out):
        truncate(folder)
    before = sorted(out.rglob("*"))
    with pytest.raises(tools.InputError, match="step_0000006 .*step_0000004 .*leave out --resume"):
        sft.load_state(out, small_run(), True, 10)
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("info, message", [
    ({"stage": "rl"}, "was saved by sft.py, and rl.py cannot continue it"),
    ({"dtype": "float64"}, "give --dtype float32"),
    ({"num_parameters": 8}, "trains 6 parameters, and this run 8")], ids=str)
def test_the_checkpoint_of_another_kind_of_run_is_refused(two_checkpoints, info, message):
    out, _ = two_checkpoints
    with pytest.raises(tools.InputError, match=message):
        sft.load_state(out, small_run(**info), True, 10)


def test_flags_that_differ_from_those_of_the_checkpoint_are_told(two_checkpoints, capsys):
    out, _ = two_checkpoints
    sft.load_state(out, small_run(), True, 10)
    assert "other flags" not in capsys.readouterr().out
    sft.load_state(out, small_run(flags={"lr": 9.0, "seed": 0}), True, 10)
    assert "other flags than those of the checkpoint: --lr 0.1 -> 9.0\n" in capsys.readouterr().out


def test_two_runs_do_not_share_a_folder(command, tmp_path):
    """The second ends with one line before it touches anything."""
    (tmp_path / "metrics.jsonl").write_text("of the first\n")
    with run_folder.lock_folder(tmp_path):
        second = run_script(*command("--out", tmp_path), check=False, env={"RANK": "0"})
    assert second.returncode == 1
    line = second.stderr.splitlines()[-1]
    assert line.startswith("sft.py: error: another run is writing to ") and str(tmp_path) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "metrics.jsonl"]


def test_a_state_beyond_the_steps_of_the_run_is_refused(command, tmp_path):
    run_script(*command("--steps", 3, "--out", tmp_path))
    completed = run_script(*command("--steps", 2, "--out", tmp_path, "--resume"), check=False)
    assert completed.returncode == 1
    assert "is at step 3, beyond the 2 steps" in completed.stderr
    assert "Traceback" not in completed.stderr


def test_exported_folder_loads_with_the_library(trained_folder, trained_policy):
    model = AutoModelForImageTextToText.from_pretrained(trained_folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(trained_folder)
    processor = AutoImageProcessor.from_pretrained(trained_folder, backend="pil")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                 trained_policy.model.state_dict().values()))
    text = ('What digit is on the red square?<grounding>{"bbox_2d": [0.333, 0.0, 0.667, 1.0], '
            '"source": "observation_12"} é 漢')
    assert tokenizer.encode(text) == trained_policy.tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
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
    """Also with weights where an optimizer has put them. Tied weights stay one tensor; limits,
    suppressed ids and processor are kept."""
    policy = sft.load_policy(each_family.model.config._name_or_path, "cpu", "float32",
                             each_family.prompts, 70_000, 90_000)
    sft.Optimizer(sft.trainable_parameters(policy, freeze_vision=False), 1e-3, 0.0)
    sft.export(policy, tmp_path)
    again = sft.load_policy(str(tmp_path), "cpu", "float32", each_family.prompts)
    assert (again.min_pixels, again.max_pixels) == (70_000, 90_000)
    assert again.suppressed_ids == each_family.suppressed_ids
    assert len(list(again.model.parameters())) == len(list(each_family.model.parameters()))

    def logprobs(policy):
        with torch.no_grad():
            return sft.token_logprobs(
                policy, sft.collate(policy, [sft.encode(policy, rows[0], world)]))

    assert torch.equal(logprobs(policy), logprobs(again))
    config = json.loads((tmp_path / "config.json").read_text())
    for_servers = json.loads((tmp_path / "processor_config.json").read_text())
    processors = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
    assert for_servers["processor_class"] == processors[config["model_type"]]
    assert config["image_token_id"] == each_family.image_token_id
    video_token_id = each_family.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert config["video_token_id"] == video_token_id


# ---- The training loop --------------------------------------------------------------------------


def test_freeze_vision(each_family):
    """The tower with its projector, Qwen3-VL's deepstack projectors included, is frozen and nothing
    else."""
    names = {id(param): name for name, param in each_family.model.named_parameters()}
    trained = {names[id(param)]
               for param in sft.trainable_parameters(each_family, freeze_vision=True)}
    assert len(sft.trainable_parameters(each_family, freeze_vision=False)) == len(names)
    frozen = set(names.values()) - trained
    assert trained
    assert frozen == {name for name in names.values() if name.startswith("model.visual.")}
    modules = {name.split(".")[2] for name in frozen}
    assert {"patch_embed", "blocks", "merger"} <= modules
    is_qwen3 = each_family.model.config.model_type == "qwen3_vl"
    assert ("deepstack_merger_list" in modules) == is_qwen3


def test_learning_rate_by_hand():
    """10 steps, warm-up 0.2: 1/2, 1, then half a cosine over the remaining 8."""
    rates = [sft.learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[3:] == pytest.approx([0.9619397663, 0.8535533906, 0.6913417162, 0.5, 0.3086582838,
                                       0.1464466094, 0.0380602337])
    assert sft.learning_rate(0, 1, 1.0, 0.5) == 1.0


@pytest.mark.parametrize("step, warmup_ratio, expected", [
    (0, 0.2, 2), (6, 0.2, 2), (0, 0, 4), (1, 0, 4), (9, 1, 4),
    (1, 0.25, 4), (0, 0.16, 2)],
    ids=["warm-up has the peak", "cosine has the peak", "no warm-up", "no warm-up is one step",
         "nothing but warm-up", "2.5 steps are 2", "1.6 steps are 2"])
def test_learning_rate_with_a_peak_of_4_by_hand(step, warmup_ratio, expected):
    rate = sft.learning_rate(step, 10, 4.0, warmup_ratio)
    assert rate == pytest.approx(expected, rel=1e-12)   # a square of a cosine is right, too


def indices_of_step(step, batch_size, seed):
    """Return which of seven rows a step trains on."""
    rows = [{"index": index} for index in range(7)]
    return [row["index"] for row in sft.rows_of_step(rows, step, batch_size, seed)]


def test_steps_visit_every_row_once_per_epoch():
    visited = sum([indices_of_step(step, 3, seed=1) for step in range(7)], [])
    for epoch in range(3):
        assert sorted(visited[7 * epoch:7 * epoch + 7]) == list(range(7))
    # whatever the size of a batch, which may be several epochs, and what was asked for before
    assert indices_of_step(0, 21, seed=1) == visited
    assert sorted(sft.rows_of_step(list("abcd"), 0, 4, seed=1)) == list("abcd")
    assert sorted(sft.rows_of_step(list("abcdefghi"), 0, 9, seed=1)) == list("abcdefghi")


def test_every_seed_and_every_epoch_has_its_own_order():
    orders = {tuple(indices_of_step(epoch, 7, seed)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_of_rows_leaves_other_random_streams_alone():
    numpy_state = numpy.random.get_state()[1].copy()
    python_state = random.getstate()
    torch_state = torch.get_rng_state()
    indices_of_step(0, 21, seed=1)
    assert (numpy.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    # nor are the rows themselves changed
    rows = [{"index": index} for index in range(7)]
    sft.rows_of_step(rows, 0, 21, seed=1)
    assert rows == [{"index": index} for index in range(7)]


def test_checkpointing_gives_the_same_gradients(each_family, rows, world):
    batch = sft.collate(each_family, [sft.encode(each_family, rows[0], world)])
    gradients = []
    for switch in (each_family.model.gradient_checkpointing_disable,
                   each_family.model.gradient_checkpointing_enable):
        switch()
        each_family.model.train()
        sft.token_logprobs(each_family, batch).sum().backward()
        gradients.append([param.grad for param in each_family.model.parameters()])
        each_family.model.zero_grad()
    each_family.model.gradient_checkpointing_disable()
    each_family.model.eval()
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients))


def test_one_and_two_processes_give_the_same_weights(command, trained_folder, tmp_path):
    """Three steps with the same global batch, to 1e-10 in float64, also when micro-batches are cut
    differently."""
    three_steps = command("--steps", 3)
    run_script(*three_steps, "--out", tmp_path / "one")
    run_script(*three_steps, "--out", tmp_path / "two", nproc=2)
    run_script(*three_steps, "--micro_batch_tokens", 1, "--out", tmp_path / "cut")
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-10
    assert largest_difference(tmp_path / "one", tmp_path / "cut") < 1e-10
    assert largest_difference(tmp_path / "one", trained_folder) > 1e-4


def test_a_rank_without_any_sample_joins_every_collective(command, tmp_path):
    """And the mean over tokens is the mean over responses where a batch is one conversation."""
    one_row = command("--batch_size", 1, "--steps", 2)
    run_script(*one_row, "--out", tmp_path / "one")
    # rank 1 never has a row
    run_script(*one_row, "--aggregation", "response", "--out", tmp_path / "two", nproc=2)
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-10


def test_one_rank_that_raises_stops_all_with_its_line(trained_folder, world, rows, tmp_path):
    """The image of one of two rows is damaged in the middle, which shows when it is decoded: one
    rank of two fails."""
    (tmp_path / "images").mkdir()
    (tmp_path / rows[0]["image"]).write_bytes((world / rows[0]["image"]).read_bytes())
    noise = numpy.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(tmp_path / rows[1]["image"], "PNG")
    content = (tmp_path / rows[1]["image"]).read_bytes()
    (tmp_path / rows[1]["image"]).write_bytes(content[:9000] + bytes(900) + content[9900:])
    tools.write_jsonl(tmp_path / "rows.jsonl", rows[:2])
    command = command_on(tmp_path / "rows.jsonl", trained_folder, "--batch_size", 2, "--steps", 3)
    completed = run_script(*command, "--out", tmp_path / "out", nproc=2, check=False, timeout=120)
    assert completed.returncode != 0
    assert completed.stderr.count("not a readable image") == 1
    assert not run_folder.checkpoints(tmp_path / "out")
    our_lines = [line for line in completed.stderr.splitlines() if line.startswith("sft.py: ")]
    assert len(our_lines) <= 2
    assert all("error: " in line or "another process has ended" in line for line in our_lines)


def test_a_run_that_diverges_stops_before_it_saves(command, tmp_path):
    wild = command("--steps", 6, "--lr", 1e30, "--max_grad_norm", 1e30, "--out", tmp_path)
    completed = run_script(*wild, check=False)
    assert completed.returncode == 1
    assert "not finite 5 times in a row" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("num_skipped, total_steps, stops", [
    (4, 9, False), (5, 9, True), (7, 7, True), (2, 2, True), (1, 2, False)])
def test_too_many_skipped_steps_in_a_row_end_the_run(num_skipped, total_steps, stops, tmp_path):
    """They are five, or all steps of a shorter run: nothing was trained."""
    run = sft.TrainingRun(SimpleNamespace(num_skipped=num_skipped), {},
                          SimpleNamespace(received_by_any_rank=lambda device: 0))
    args = SimpleNamespace(out=tmp_path, save_every=1)
    if stops:
        with pytest.raises(tools.InputError, match=f"not finite {num_skipped} times in a row.*; no "
                           "step of this run is saved"):
            sft.end_step(run, args, num_skipped, total_steps, "cpu")
    else:
        sft.end_step(run, args, num_skipped, total_steps, "cpu")
    # the weights may be broken: nothing was saved
    assert not list(tmp_path.iterdir())


def test_unhealthy_steps_in_a_row_end_the_run(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = sft.Optimizer([weight], 0.1, 0.0)
    for _ in range(sft.MAX_SKIPPED_STEPS):
        optimizer.backward([None], lambda _: weight.sum())
        optimizer.step(0.1, 1.0, healthy=False)
    args = SimpleNamespace(out=tmp_path, save_every=7)
    with pytest.raises(tools.InputError, match="step 7: .* not finite 5 times in a row"):
        sft.end_step(sft.TrainingRun(optimizer, {}, None), args, 7, 9, "cpu")


def two_nodes(args, restarts=0):
    """Start a stage under two of torchrun's agents that meet over loopback, one process each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [Forked(args, nodes=2, restarts=restarts, port=port) for _ in range(2)]


def test_two_nodes_equal_one(command, tmp_path):
    """Two torchrun agents that meet over loopback, one process each, against one agent with two
    processes: to 1e-10 in float64, since an agent gives its only process both cores, and two
    threads add up in another order than one."""
    three_steps = command("--steps", 3, "--shard_optimizer")
    run_script(*three_steps, "--out", tmp_path / "one", nproc=2)
    nodes = two_nodes([*three_steps, "--out", tmp_path / "two"])
    assert [crash.finish(node)[0] for node in nodes] == [0, 0]
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-10


# ---- Flags and mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    ["--lr", "nan"], ["--lr", -1], ["--epochs", "inf"], ["--warmup_ratio", "nan"], ["--seed", -1],
    ["--steps", 0], ["--max_grad_norm", 0], ["--weight_decay", "nan"], ["--max_pixels", -5],
    ["--warmup_ratio", 50]],
    ids=str)
def test_nonsense_numbers_are_refused_by_flag(monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["sft.py", *map(str, flags)])
    with pytest.raises(tools.InputError, match=flags[0]):
        sft.parse_args()


def test_steps_and_epochs_together_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sft.py", "--steps", "3", "--epochs", "1.5"])
    with pytest.raises(SystemExit):
        sft.parse_args()
    assert "--epochs: not allowed with argument --steps" in capsys.readouterr().err


@pytest.fixture
def error_of(monkeypatch, tmp_path):
    """error_of(*flags) -> the text of the InputError that sft.py raises with these flags."""
    def run(*flags):
        argv = ["sft.py", *map(str, flags), "--out", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(tools.InputError) as error:
            sft.main()
        return str(error.value)
    return run


def test_rows_that_cannot_be_used_are_told_before_training(error_of, world, rows, tmp_path):
    """A missing image, an impossible zoom, and a file of questions, which has no turns."""
    path = tmp_path / "rows.jsonl"
    (tmp_path / "images").symlink_to(world / "images")
    tools.write_jsonl(path, [rows[0], {**rows[1], "image": "images/gone.jpg"}])
    assert f"{path}:2: {tmp_path}/images/gone.jpg: image is missing" in error_of("--data", path)

    narrow_zoom = {"bbox_2d": [0, 0, 1, 1e-9], "source": "original_image"}
    turns = [{"text": "a", "zoom": narrow_zoom}, {"text": "b"}]
    tools.write_jsonl(path, [rows[0], rows[1], {**rows[2], "turns": turns}])
    message = f"{path}:3: trajectory {rows[2]['id']}, turn 1: The box is too narrow"
    assert message in error_of("--data", path)

    message = error_of("--data", world / "train.jsonl")
    assert "train.jsonl:1: it has no 'turns': it is a question, not a trajectory" in message
    assert "make another file with: python collect_coldstart.py" in message


def test_missing_data_names_the_command_that_makes_it(error_of):
    assert "python collect_coldstart.py" in error_of("--data", "data/nothing.jsonl")
    assert "python build_data.py" in error_of("--data", "data/nothing/instruct.jsonl")


def test_a_missing_model_names_the_command_that_makes_it(error_of, world):
    """It is the command of the page about the stages."""
    error = error_of("--model", "checkpoints/nothing", "--data", world / "coldstart.jsonl")
    command = error.split("make it with: ")[1]
    assert "sft.py --model tiny" in command
    page = (ROOT / "docs/stages.md").read_text().replace("\\\n", " ")
    assert command in " ".join(page.split())


def test_the_folder_of_the_model_is_not_trained_in(error_of, tmp_path):
    (tmp_path / "out").mkdir()
    assert "is the folder of --model" in error_of("--model", f"{tmp_path}/./out")
    (tmp_path / "out").rmdir()
    (tmp_path / "out").touch()
    assert "out is a file" in error_of()


def test_a_wrong_row_is_named_by_file_and_line(error_of, world, tmp_path):
    first_line = (world / "coldstart.jsonl").read_text().splitlines()[0]
    path = tmp_path / "bad.jsonl"
    path.write_text(first_line + "\n{\"id\": 3}\n")
    assert f"{path}:2: field 'id'" in error_of("--data", path)


def test_a_conversation_that_is_too_long_names_the_flag(command, tmp_path):
    completed = run_script(*command("--max_seq_len", 50, "--out", tmp_path), check=False)
    assert completed.returncode == 1
    assert "Traceback" not in completed.stderr
    assert "--max_seq_len" in completed.stderr.splitlines()[-1]


# ---- Two faster parts of the library's vision tower ---------------------------------------------


@pytest.fixture
def vision_inputs(each_family):
    """Patches and grids of images of different sizes, hence of windows of different lengths."""
    images = [Image.effect_noise(size, 80).convert("RGB")
              for size in ((84, 84), (140, 56), (84, 84), (252, 196))]
    features = each_family.image_processor(
        images=images, return_tensors="pt", size={"shortest_edge": 1, "longest_edge": 10**9})
    return features["pixel_values"].double(), features["image_grid_thw"]


@torch.no_grad()
def test_batched_vision_windows_equal_the_library(each_family, vision_inputs):
    """Against transformers' own loop over windows."""
    patches, grids = vision_inputs
    visual = each_family.model.model.visual
    ours = visual(patches, grid_thw=grids)
    with library_attention(each_family):
        library = visual(patches, grid_thw=grids)
    assert (ours.pooler_output - library.pooler_output).abs().max() < 1e-12
    for feature, expected in zip(getattr(ours, "deepstack_features", []),
                                 getattr(library, "deepstack_features", []), strict=True):
        assert (feature - expected).abs().max() < 1e-12


@torch.no_grad()
def test_windows_are_planned_once_per_forward_pass(each_family, vision_inputs):
    """Making the plan waits for the GPU. Qwen2.5-VL has two: some layers see whole images."""
    patches, grids = vision_inputs
    visual = each_family.model.model.visual
    has_windows = each_family.model.config.model_type == "qwen2_5_vl"
    before = sft.plan_windows.cache_info()
    visual(patches, grid_thw=grids)
    after = sft.plan_windows.cache_info()
    assert after.misses - before.misses == (2 if has_windows else 1)
    num_layers = len(visual.blocks)
    assert after.hits + after.misses - before.hits - before.misses == num_layers


def test_patch_embedding_equals_the_library(each_family):
    """A convolution whose stride is its kernel, as a matrix product: values and gradients, with and
    without a bias (Qwen3-VL, Qwen2.5-VL); no convolution is run."""
    embed = each_family.model.model.visual.patch_embed
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(7, embed.proj.weight[0].numel(), dtype=torch.float64, generator=generator)
    results = []
    nums_convolutions = []
    for forward in (embed.forward, functools.partial(type(embed).forward, embed)):
        convolutions = []
        hook = embed.proj.register_forward_hook(lambda *_: convolutions.append(1))
        output = forward(patches)
        hook.remove()
        nums_convolutions.append(len(convolutions))
        gradients = torch.autograd.grad(output.sin().sum(), [*embed.proj.parameters()])
        results.append([output, *gradients])
    assert nums_convolutions == [0, 1]
    assert all((ours - library).abs().max() < 1e-12
               for ours, library in zip(*results, strict=True))


# ---- SIGTERM and restarts by torchrun -----------------------------------------------------------


@pytest.fixture
def stop_signal(tmp_path):
    """A StopSignal, whose handlers are removed after the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)    # tests may run in the background
    yield sft.StopSignal(tmp_path)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_last_step_does_not_stop_a_run_before_it_is_exported(
        tmp_path, stop_signal, capsys, number, code):
    """Before it the state is saved and the run ends with the exit code of the signal; after it
    nothing is left to stop."""
    optimizer = sft.Optimizer([torch.nn.Parameter(torch.ones(3, 2))], 0.1, 0.0)
    run = sft.TrainingRun(optimizer, {}, stop_signal)
    os.kill(os.getpid(), number)
    args = SimpleNamespace(out=tmp_path, save_every=10, keep_checkpoints=2)
    with pytest.raises(SystemExit) as end:
        sft.end_step(run, args, 1, 2, "cpu")
    assert end.value.code == code and latest(tmp_path)["step"] == 1
    assert f"stopped after step 1 of 2, as {number.name} asks" in capsys.readouterr().out
    sft.end_step(run, args, 2, 2, "cpu")
    assert latest(tmp_path)["step"] == 2


@pytest.mark.parametrize("num_restarts, max_restarts, code", [(0, 0, 143), (1, 3, 0), (3, 3, 143)])
def test_torchrun_does_not_restart_a_run_that_was_asked_to_stop(
        monkeypatch, num_restarts, max_restarts, code):
    """It would after any other exit code than 0."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(num_restarts))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(max_restarts))
    assert sft.exit_code(signal.SIGTERM) == code


@pytest.mark.parametrize("saved, message", [
    (None, "no step of this run is saved"), (3, "step 3 is saved: continue with --resume")])
def test_a_second_ctrl_c_ends_at_once_and_says_what_is_saved(tmp_path, stop_signal, saved, message):
    if saved:
        optimizer = sft.Optimizer([torch.nn.Parameter(torch.ones(2))], 0.1, 0.0)
        run = sft.TrainingRun(optimizer, {}, None)
        sft.save_state(tmp_path, run, saved)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=message):
        os.kill(os.getpid(), signal.SIGINT)


def wait_for_steps(process, out, num_steps):
    """Wait until a run has logged so many steps."""
    log = out / "metrics.jsonl"
    crash.wait_until(process, lambda: log.exists() and log.read_bytes().count(b"\n") >= num_steps)


def test_sigterm_to_one_rank_stops_all_at_the_same_step(command, tmp_path):
    process = crash.launch(command("--steps", 40, "--out", tmp_path), 2)    # by torchrun itself
    wait_for_steps(process, tmp_path, 2)
    os.kill(crash.processes(process.pid)[-1], signal.SIGTERM)
    exit_code, stdout, _ = crash.finish(process)
    step = latest(tmp_path)["step"]
    assert exit_code == 1       # torchrun's; so what follows after && is not started
    assert f"stopped after step {step} of 40, as SIGTERM asks" in stdout
    assert "finished in" not in stdout
    assert 2 <= step < 40
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == step
    assert not (tmp_path / "model.safetensors").exists()


def test_a_killed_worker_is_restarted_and_continues(uninterrupted, tmp_path):
    eight_steps, whole = uninterrupted(2)
    process = Forked([*eight_steps, "--out", tmp_path], 2, restarts=1)
    wait_for_steps(process, tmp_path, 3)
    os.kill(crash.processes(process.pid)[-1], signal.SIGKILL)
    assert crash.finish(process)[0] == 0
    assert crash.same_weights(tmp_path, whole)


def test_a_worker_killed_on_the_second_node_is_restarted(command, tmp_path):
    """Its agent counts a restart, the other one may not: all meet again nevertheless, and
    continue."""
    eight_steps = command("--save_every", 1, "--steps", 8, "--out", tmp_path)
    nodes = two_nodes(eight_steps, restarts=2)
    wait_for_steps(nodes[0], tmp_path, 3)
    os.kill(crash.processes(nodes[1].pid)[-1], signal.SIGKILL)
    assert [crash.finish(node)[0] for node in nodes] == [0, 0]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
