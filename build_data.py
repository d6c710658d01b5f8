"""Build questions: a synthetic Visual Probe world (default), published data sets (--import), a range of difficulty (--filter).

Each image is a wall of nine framed parts with nine places each. On some places lies an object: a shape in one of six
colours that carries a digit. The model sees every view at about 84 x 84 pixels, so it reads an image on three scales:

    whole image     which parts have red wallpaper                  (a hint: such a part holds something red)
    one part        which places hold something red                 (shape and digit are not legible)
    one place       "red square 7"

Two kinds of question share the search and differ in what decides it and in what is asked:
    digit   "What digit is on the red square?"                  look-alikes share the colour, not the shape
    shape   "Which shape is the red object with digit 7?"       look-alikes share the colour, not the digit

Levels differ as in the paper: target size, number of look-alikes, resolution (see LEVELS).

What differs from the paper's VisualProbe:
1. Drawn, not photographed, so that a 1.6 M parameter model can learn it in minutes without a network.
2. The layout of the scene is kept in the row ("objects", "walls"); only the scripted teacher reads it, never the policy.
3. `instruct.jsonl` holds single-view questions that stand in for what a pretrained VLM knows already: naming what is in
   a view, comparing it with what is wanted, keeping a list. It contains nothing of the multi-turn protocol.

Files written to --out: train.jsonl (all levels) and its parts train_easy.jsonl, train_medium.jsonl, train_hard.jsonl; the test
sets easy.jsonl, medium.jsonl, hard.jsonl; instruct.jsonl; images/, views/.

It also makes the model that is small enough for this world, a real Qwen2.5-VL with random weights (sft.py --model tiny).

--import NAME reads a downloaded data set under --source (real files, such as `hf download --local-dir` makes, not links) and
writes question rows, or for mini_o3_coldstart trajectories, into --out; its images are stored there unchanged, under a name
made from their content. Which file becomes what:
    visualprobe          VisualProbe_Hard/val.json -> hard.jsonl, and so on; in the same schema, another folder's train.json or
                         val.json -> the folder's name in lower case, as DeepEyes_train_4K -> deepeyes_train_4k.jsonl
    vstar                test_questions.jsonl or, without it, the JSON beside each image -> test.jsonl
    hrbench              .tsv or .parquet with 4k or 8k in its name -> 4k.jsonl, 8k.jsonl
    mme_realworld        .tsv or .parquet called MME-RealWorld, -Lite, -CN -> test.jsonl, lite.jsonl, cn.jsonl
    deepeyes             every .parquet -> train.jsonl
    mini_o3_coldstart    every .parquet -> coldstart.jsonl
What differs from the published data:
1. Options are texts without letters. The question lists them once, "(A) ...", in the source's order; only where the source
   always puts the right one first (V*: the JSON beside an image, or test_questions.jsonl if every label in it is A) are they
   shuffled, by --seed and id. What follows the options in V*'s text (answer with the letter) is left out: the prompts say
   how to answer. The answer is the right option's words, or its letter where another option reads the same.
2. A cold-start conversation keeps all of its own words ("system", "user", each turn's "reply"); rows that are the beginning of
   a longer conversation are merged into it. Of its images only the original is stored: crops follow from the zooms.
3. Nothing outside --source is read, and every image is decoded once. A row that cannot be used is skipped and counted.

--filter keeps the questions of --source (RL data of a suitable difficulty) whose pass rate lies in [LOW, HIGH] (--keep). At a
rate of 0.1 or 0.9, 16 rollouts of a question all agree, and so teach GRPO nothing, in 19 of 100 cases; beyond that it is soon
most cases. A rate measured with up to ten samples is then kept unless all of them were right or all were wrong.

Commands (all of this is CPU work: a GPU or more nodes change nothing):
    1 CPU            python build_data.py --workers 1
    any other        python build_data.py
    smaller          python build_data.py --train 300 --test 40 --scenes 100 --out /tmp/data
    RL data          python build_data.py --import visualprobe --source downloads      (the folder that holds VisualProbe_*)
    SFT data         python build_data.py --import mini_o3_coldstart --source downloads/coldstart
    a benchmark      python build_data.py --import hrbench --source downloads/HR-Bench --out data/hrbench
    not too hard     python build_data.py --filter results/sft/train.rates.jsonl --source data/train.jsonl --keep 0.1 0.9
"""

import argparse
import ast
import base64
import csv
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import string
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import tools
from tools import PHRASES, PLACES

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220),
           "yellow": (205, 175, 0), "purple": (150, 50, 180), "cyan": (0, 165, 185)}
SHAPES = ["circle", "square", "triangle", "star"]
# side of the image in pixels, radius of an object relative to its place, look-alikes of the target, other objects
LEVELS = {"easy": {"side": 504, "radius": 0.43, "lookalikes": 2, "others": 3},
          "medium": {"side": 630, "radius": 0.40, "lookalikes": 5, "others": 5},
          "hard": {"side": 756, "radius": 0.37, "lookalikes": 10, "others": 7}}
# a split's index enters its random seeds: they never overlap
SPLITS = ["train", "easy", "medium", "hard", "instruct", "val"]


# ---------------------------------------------------------------------------------------------------------------------
# The scene: places, objects, question


def place_box(place):
    """Relative box of one of the nine places of a view, as the teacher writes it: three decimals."""
    row, col = divmod(PLACES.index(place), 3)
    edges = [0.0, 0.333, 0.667, 1.0]
    return [edges[col], edges[row], edges[col + 1], edges[row + 1]]


def ask(kind, colour, shape, digit):
    """(question, answer, what to look for) about an object, for a kind of question: "digit" or "shape"."""
    if kind == "digit":
        return f"What digit is on the {colour} {shape}?", str(digit), shape
    return f"Which shape is the {colour} object with digit {digit}?", shape, str(digit)


def make_scene(rng, level, lookalikes=None, others=None):
    """Draw lots for one image: its objects and its question. Returns the question row without id and image. lookalikes,
    others: numbers of objects, instead of the level's.

    objects: list of [part, place, colour, shape, digit], parts and places by index into PLACES, the target first.
    walls: the wallpaper of each part: the colour of one of its objects, or None where it has none.
    """
    lookalikes = LEVELS[level]["lookalikes"] if lookalikes is None else lookalikes
    others = LEVELS[level]["others"] if others is None else others
    kind = ["digit", "shape"][rng.integers(2)]
    colour, shape, digit = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), int(rng.integers(10))
    spots = rng.permutation(81)
    objects = [[*divmod(int(spots[0]), 9), colour, shape, digit]]
    for spot in spots[1:1 + lookalikes]:
        other_shape, other_digit = str(rng.choice(SHAPES)), int(rng.integers(10))
        if kind == "digit":  # the shape decides: no other red square
            other_shape = str(rng.choice([s for s in SHAPES if s != shape]))
        else:                # the digit decides: no other red 7
            other_digit = int(rng.choice([d for d in range(10) if d != digit]))
        objects.append([*divmod(int(spot), 9), colour, other_shape, other_digit])
    for spot in spots[1 + lookalikes:1 + lookalikes + others]:
        other = str(rng.choice([c for c in COLOURS if c != colour]))
        objects.append([*divmod(int(spot), 9), other, str(rng.choice(SHAPES)), int(rng.integers(10))])
    held = [[o[2] for o in objects if o[0] == part] for part in range(9)]
    walls = [str(rng.choice(colours)) if colours else None for colours in held]
    question, answer, wanted = ask(kind, colour, shape, digit)
    part, place = objects[0][:2]
    x, y = 3 * (part % 3) + place % 3, 3 * (part // 3) + place // 3
    return {"question": question, "answer": answer, "source": f"synthetic_{kind}", "level": level,
            "target_bbox": [round(v / 9, 4) for v in (x, y, x + 1, y + 1)],
            "colour": colour, "wanted": wanted, "objects": objects, "walls": walls}


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def draw_shape(draw, shape, x, y, radius, fill):
    """Fill one shape whose circumscribed circle has centre (x, y) and this radius, in pixels."""
    if shape == "circle":
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
        return
    if shape == "square":
        half = 0.86 * radius
        draw.rectangle([x - half, y - half, x + half, y + half], fill=fill)
        return
    if shape == "triangle":
        angles, radii = -np.pi / 2 + 2 * np.pi / 3 * np.arange(3), np.full(3, 1.15 * radius)
        y = y + 0.15 * radius
    else:  # a star with five points
        angles, radii = -np.pi / 2 + np.pi / 5 * np.arange(10), np.where(np.arange(10) % 2, 0.5, 1.12) * radius
    draw.polygon([(x + r * np.cos(a), y + r * np.sin(a)) for a, r in zip(angles, radii)], fill=fill)


def draw_scene(rng, scene):
    """Paint a scene: softly tinted noise, a thick frame around the wall, a thin one around each part, objects with digits."""
    side = LEVELS[scene["level"]]["side"]
    cell = side / 9
    noise = rng.integers(90, 160, size=(14, 14, 1)) + rng.integers(-8, 9, size=(14, 14, 3))
    image = Image.fromarray(noise.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    tint = [[0, 0, 0] if wall is None else [round(0.35 * (c - 128)) for c in COLOURS[wall]] for wall in scene["walls"]]
    third = np.bincount(np.arange(side) * 3 // side)                             # pixels of each part, along one axis
    paper = np.array(tint, dtype=np.int16).reshape(3, 3, 3).repeat(third, axis=0).repeat(third, axis=1)     # (side, side, 3)
    grain = rng.integers(-5, 6, size=(side, side, 1), dtype=np.int16)
    image = Image.fromarray(np.clip(np.asarray(image) + paper + grain, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    thin, thick = round(cell / 10), round(cell / 3.5)  # frames tell where in a view a place lies
    for part in range(9):
        x, y = side * (part % 3) // 3, side * (part // 3) // 3
        draw.rectangle([x, y, x + side // 3 - 1, y + side // 3 - 1], outline=(20, 20, 20), width=thin)
    draw.rectangle([0, 0, side - 1, side - 1], outline=(20, 20, 20), width=thick)
    font = ImageFont.load_default(size=0.58 * cell)
    for part, place, colour, shape, digit in scene["objects"]:
        x = (3 * (part % 3) + place % 3 + 0.5) * cell + rng.uniform(-0.02, 0.02) * cell
        y = (3 * (part // 3) + place // 3 + 0.5) * cell + rng.uniform(-0.02, 0.02) * cell
        radius = LEVELS[scene["level"]]["radius"] * cell * rng.uniform(0.94, 1.0)
        fill = tuple(int(np.clip(c + rng.integers(-15, 16), 0, 255)) for c in COLOURS[colour])
        draw_shape(draw, shape, x, y, radius, fill)
        draw.text((x, y), str(digit), font=font, fill=(255, 255, 255), anchor="mm",
                  stroke_width=max(1, round(cell / 42)), stroke_fill=(0, 0, 0))
    return image


def save_image(image, path, quality):
    """JPEG, put in place in one step so that a kill never leaves half an image. main() flushes them to disk together."""
    tools.write_atomic(path, lambda file: image.save(file, "JPEG", quality=quality, subsampling=0), sync=False)


def make_question(job, out, seed):
    """One question with its image. job: (split, index, level). Skips drawing where the image exists already (a rerun
    after a kill), so the layout and the painting use two separate random streams, and the image's name depends on what is
    to be drawn."""
    split, index, level = job
    scene = make_scene(np.random.default_rng([seed, SPLITS.index(split), index, 0]), level)
    digest = hashlib.sha256(json.dumps([scene, LEVELS[level]]).encode()).hexdigest()[:8]
    row = {"id": f"{split}_{index:05d}", "image": f"images/{split}_{seed}_{index:05d}_{digest}.jpg", **scene}
    if not (out / row["image"]).exists():
        save_image(draw_scene(np.random.default_rng([seed, SPLITS.index(split), index, 1]), scene),
                   out / row["image"], quality=85)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Instruction data: one view, one question, one reply in the words that the teacher uses


def places_with(objects, part, colour):
    """Names of the places of a part that hold this colour, in reading order."""
    return [PLACES[i] for i in sorted(o[1] for o in objects if o[0] == part and o[2] == colour)]


def describe_part(objects, part, colour):
    """"I see red in top left." / "I see no red." """
    places = places_with(objects, part, colour)
    return PHRASES["part" if places else "no_part"].format(colour=colour, places=" ".join(places))


def describe_walls(walls, colour):
    """"I see red walls in top left." / "I see no red walls." """
    places = [place for place, wall in zip(PLACES, walls) if wall == colour]
    return PHRASES["walls" if places else "no_walls"].format(colour=colour, places=" ".join(places))


def describe_cell(objects, part, place):
    """"I see red square 7." / "I see nothing." """
    for p, q, colour, shape, digit in objects:
        if (p, q) == (part, place):
            return PHRASES["cell"].format(colour=colour, shape=shape, digit=digit)
    return PHRASES["empty"]


def describe_all(describe, what, colours):
    """Every colour that is there, in the same words: one reply trains many places at once."""
    return " ".join(describe(what, colour) for colour in COLOURS if colour in colours) or PHRASES["empty"]


def describe_map(names):
    """"top-left red. top nothing. ..." All nine places in reading order: nine lessons in one reply on where a place is."""
    return " ".join(f"{place} {name or 'nothing'}." for place, name in zip(PLACES, names))


def make_sorting(rng):
    """Some objects, each compared with what is wanted: the verdicts of a search, as plain text, so that one reply holds
    many. Returns (question, reply)."""
    names = [(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), int(rng.integers(10))) for _ in range(rng.integers(2, 5))]
    kind = int(rng.choice([1, 2], p=[0.3, 0.7]))  # ten digits are harder to compare than four shapes
    wanted = str(names[0][kind])
    names = [name if rng.random() < 0.5 else (*name[:kind], names[0][kind], *name[kind + 1:]) for name in names]
    order, replies = rng.permutation(len(names)), []
    for colour, shape, digit in (names[i] for i in order):
        seen = PHRASES["cell"].format(colour=colour, shape=shape, digit=digit)
        verdict = "Yes" if wanted in (shape, str(digit)) else "No"
        replies.append(seen + PHRASES["verdict"].format(wanted=wanted, verdict=verdict))
    listed = ", ".join("{} {} {}".format(*names[i]) for i in order)
    return f"Want {wanted}: {listed}.", " ".join(replies)


def make_errand(rng):
    """A to-do list and what is left of it after one step: the bookkeeping of a search, as plain text. Returns (question,
    reply)."""
    later = rng.permutation(PLACES)[:rng.integers(0, 10)].tolist()
    here = [PLACES[i] for i in sorted(rng.permutation(9)[:rng.integers(0, 4)])]
    source = f"observation_{rng.integers(1, 32)}"

    def state():
        text = PHRASES["here"].format(source=source, places=" ".join(here)) if here else ""
        text += PHRASES["later"].format(places=" ".join(later)) if later else ""
        return text + (PHRASES["go"].format(place=(here or later)[0]) if here or later else " Nothing.")

    before = state()
    del (here or later)[:1]
    return f"Done:{before} What next?", f"Next:{state()}"


def make_comparison(rng, objects, part, place):
    """What is at one place: named, or also compared with what a question looks for. Returns (question, reply)."""
    seen, kind = describe_cell(objects, part, place), ["name", "digit", "shape"][rng.integers(3)]
    if kind == "name":
        return "What is this?", seen
    here = [o[2:] for o in objects if o[:2] == [part, place]]
    colour, shape, digit = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), int(rng.integers(10))
    if here:  # a search looks at objects of the right colour; every other time it has found what it looks for
        colour, shape, digit = here[0] if rng.random() < 0.5 else (here[0][0], shape, digit)
    question, _, wanted = ask(kind, colour, shape, digit)
    found = f" {wanted}" in seen
    reply = seen + PHRASES["verdict"].format(wanted=wanted, verdict="Yes" if found else "No")
    if found:
        reply += PHRASES["answer"].format(answer=here[0][2] if kind == "digit" else here[0][1])
    return question, reply


def make_instructions(index, out, seed, min_pixels, max_pixels):
    """Rows about one scene: views of some parts and places, and every other time of the whole image. Views are cut by the
    agent's own tool, written with the coordinates it will write, and stored at the size at which the model sees them.
    Scenes without a view of the whole are crowded: a reply then names many places, and each of them is a lesson."""
    rng = np.random.default_rng([seed, SPLITS.index("instruct"), index])
    level, crowded = list(LEVELS)[rng.integers(3)], index % 2 == 1
    scene = make_scene(rng, level, *((int(rng.integers(4, 16)), int(rng.integers(16, 40))) if crowded else ()))
    objects, image, rows = scene["objects"], draw_scene(rng, scene), []

    def save(view, name):
        path = f"views/{seed}_{index:05d}_{name}.jpg"
        save_image(tools.resize_for_model(view, min_pixels, max_pixels), out / path, quality=95)
        return path

    def add(path, question, reply):
        rows.append({"id": f"instruct_{index:05d}_{len(rows):02d}", "image": path, "question": question,
                     "answer": reply, "source": "synthetic_instruct", "system": "", "turns": [{"text": reply}]})

    def shuffled(first):  # the colours, the one that the scene is about first
        return [first, *(c for c in rng.permutation(list(COLOURS)).tolist() if c != first)]

    def some_question(colour):
        return ask(["digit", "shape"][rng.integers(2)], colour, str(rng.choice(SHAPES)), int(rng.integers(10)))[0]

    if not crowded:
        path, walls = save(image, "all"), scene["walls"]
        first, *more = shuffled(scene["colour"])[:3]
        add(path, some_question(first), describe_walls(walls, first))
        for colour in more:
            add(path, f"Which walls are {colour}?", describe_walls(walls, colour))
        add(path, "Which walls are what?", describe_all(describe_walls, walls, walls))
        named = [wall and f"{wall} walls" for wall in walls]
        add(path, "What is where?", describe_map(named))
        add(path, f"Which walls are {first}, place by place?",
            describe_map([wall == first and name for wall, name in zip(walls, named)]))
    for part in rng.permutation(9)[:6 if crowded else 3].tolist():
        path = save(tools.zoom([image], {"bbox_2d": place_box(PLACES[part]), "source": "original_image"}), f"p{part}")
        first, second = shuffled(scene["colour"])[:2]
        add(path, some_question(first), describe_part(objects, part, first))
        add(path, f"Where is {second}?", describe_part(objects, part, second))
        here = {o[2] for o in objects if o[0] == part}
        add(path, "Where is everything?", describe_all(partial(describe_part, objects), part, here))
        colour_at = {o[1]: o[2] for o in objects if o[0] == part}
        colours = [colour_at.get(place) for place in range(9)]
        if not crowded:
            add(path, "What is where?", describe_map(colours))
        add(path, f"Where is {second}, place by place?",
            describe_map([colour == second and colour for colour in colours]))
    filled = [objects[i][:2] for i in rng.permutation(len(objects))[:10]]
    for part, place in [*filled, [int(v) for v in rng.integers(9, size=2)]]:
        view = tools.zoom([image], {"bbox_2d": place_box(PLACES[part]), "source": "original_image"})
        view = tools.zoom([view], {"bbox_2d": place_box(PLACES[place]), "source": "original_image"})
        path = save(view, f"p{part}{place}")
        if rng.random() < 0.6:      # easier than the bookkeeping of text
            add(path, *make_comparison(rng, objects, part, place))
        add(path, *(make_errand(rng) if rng.random() < 0.4 else make_sorting(rng)))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The tiny model: a real Qwen2.5-VL of 1.6 M parameters and a tokenizer made from the project's own texts

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type in ['image', 'image_url'] %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer(texts, vocab_size=700):
    """Byte-level BPE over `texts`, with the protocol's strings as single tokens: a turn is short, and a word that must be
    copied is the same token everywhere. Returns a PreTrainedTokenizerFast."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?[A-Za-z]+(?:-[a-z]+)*|[0-9]|[ \n]|[^A-Za-z0-9 \n]+")  # a digit is always a token of its own
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_tokens(["<think>", "</think>", '<grounding>{"bbox_2d": [', '], "source": "', '"}</grounding>', "<answer>",
                          "</answer>", "0.0", "0.333", "0.667", "1.0", ", ", "original_image"]
                         + [f"observation_{i}" for i in range(63, 0, -1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=SPECIAL, clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_tiny(texts, seed):
    """A Qwen2.5-VL with random weights that can learn the default world in minutes. Returns (model, tokenizer,
    image processor).

    Rotary frequencies: M-RoPE gives the axes t, h, w consecutive blocks of theta^(-i/16). Neighbouring image columns must
    differ by roughly 0.3 rad or more, while many frequencies must stay near zero so that a word can be found by its content
    hundreds of positions back; hence no t block (images have one frame), a short h block and a moderate theta.
    """
    import torch  # here, so that drawing does not have to load it
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    tokenizer = build_tokenizer(texts)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32768, bos_token_id=None, eos_token_id=ids["<|im_end|>"],
            rope_parameters={"rope_type": "default", "rope_theta": 3000.0, "mrope_section": [0, 1, 15]}),
        vision_config=dict(
            depth=3, hidden_size=96, intermediate_size=256, num_heads=4, out_hidden_size=128, window_size=112,
            fullatt_block_indexes=[2]),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=False)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():  # the library's std 0.02 is made for wide models: at this width signals would vanish
        for name, param in model.named_parameters():
            if "embed_tokens" in name:
                param.normal_()
            elif param.dim() > 1:
                param.normal_(std=param[0].numel() ** -0.5)  # 1 / sqrt(fan in)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 6000, "longest_edge": 8000})
    return model, tokenizer, processor


def project_texts(data):
    """Texts from which the tiny tokenizer is made: prompts, the teacher's phrases, and the rows of `data`."""
    fixed = [*tools.PROMPTS.values(), *tools.PHRASES.values(), *(" " + place for place in tools.PLACES),
             "What digit is on the red square?", "Which shape is the red object with digit 7?", " Yes. No.", "user\nassistant\n"]
    said = [text for row in data for text in (row["question"], row["answer"], *(turn["text"] for turn in row["turns"]))]
    words = [word for text in said for word in text.strip(".?").split()]  # as in <answer>square</answer>: no space before it
    return fixed * 50 + said + words


# ---------------------------------------------------------------------------------------------------------------------
# Published data sets: reading. A row that cannot be used raises ValueError with a reason that names no row: reasons are counted


def records(path, columns=None):
    """Yield (place "file:row", row as a dict) of a .jsonl, .json, .tsv or .parquet file, one by one: memory does not grow with
    the number of rows, except for .json, which is text. columns: the only ones to read of a .parquet file. A row that is not
    JSON, or not an object, comes as None. Raises InputError if a table is broken as a whole."""
    def parsed(text):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return None

    try:  # what is not UTF-8 becomes half a surrogate pair, which complete() refuses: one bad row does not stop the others
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if path.suffix == ".parquet":
                rows = parquet_rows(path, columns)
            elif path.suffix == ".tsv":
                csv.field_size_limit(2**31 - 1)  # a cell may hold an image
                rows = csv.DictReader(file, delimiter="\t", strict=True)
            elif path.suffix == ".jsonl":
                rows = (parsed(line) for line in file if line.strip())
            else:
                rows = parsed(file.read())
                rows = rows if isinstance(rows, list) else [rows]
            for number, row in enumerate(rows, 1):
                yield f"{path.name}:{number}", row if isinstance(row, dict) else None
    except tools.InputError:
        raise
    except (ValueError, OSError, csv.Error) as error:
        raise tools.InputError(f"{path}: cannot be read to its end ({error}); download it again") from None


def parquet_rows(path, columns):
    """Rows of a .parquet file as dicts, None for one whose text is not UTF-8."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise tools.InputError("reading .parquet files needs pyarrow: pip install pyarrow") from None
    file = parquet.ParquetFile(path, buffer_size=2**16, pre_buffer=False)  # page by page, not a whole row group at once
    for batch in file.iter_batches(batch_size=1, columns=columns, use_threads=False):
        try:
            yield batch.to_pylist()[0]
        except UnicodeDecodeError:
            yield None


def text_of(record, key):
    """A field that must be there: its text."""
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field '{key}' is missing or not text")
    return value.strip()


def only_image(images):
    if not isinstance(images, list) or len(images) != 1:
        raise ValueError("not exactly one image")
    return images[0]


def inside(source, base, name):
    """The file that an untrusted name means in folder `base`, if it lies in the folder of `source`, also behind links."""
    root = source if source.is_dir() else source.parent
    if not isinstance(name, str) or not name:
        raise ValueError("image path is missing")
    path = base / name
    there = os.path.isfile(path)  # unlike Path.is_file, False for a name that no file can have
    if Path(name).is_absolute() or ".." in Path(name).parts or there and not path.resolve().is_relative_to(root.resolve()):
        raise ValueError("image path leaves the folder of the data")
    if not there:
        raise ValueError("image is missing")
    return path


def image_bytes(image):
    """The file's bytes, of a path, of bytes, of base64 text or of {"bytes": either}."""
    image = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(image, str) and image:
        try:
            return base64.b64decode(image.strip(), validate=True)
        except ValueError:
            raise ValueError("image is not base64") from None
    image = image.read_bytes() if isinstance(image, Path) else image
    if not isinstance(image, bytes) or not image:
        raise ValueError("image is missing")
    return image


SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}


def decode(data, whole=True):
    """Open an image file's bytes: a PIL image, decoded as every later stage will (whole False: its header only), with .format.
    Images so large that PIL only warns are refused too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=list(SUFFIXES))
            if whole:
                image.convert("RGB")
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError("image has too many pixels") from None
    except Exception:  # PIL's decoders raise nearly anything on broken data
        raise ValueError("image cannot be decoded") from None


def unlettered(options):
    """["(A) red", "(B) blue"] -> ["red", "blue"]"""
    found = [re.fullmatch(r"\(?([A-Z])[).:]\s*(.*\S)\s*", str(option), re.DOTALL) for option in options]
    if not found or [m and m[1] for m in found] != list(string.ascii_uppercase[:len(found)]):
        raise ValueError("options are not (A), (B), ... in this order")
    return [m[2] for m in found]


def literal_list(text):
    """A list that was written as text. literal_eval reads constants and runs nothing."""
    try:
        value = ast.literal_eval(text.strip()) if isinstance(text, str) and len(text) < 100_000 else text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise ValueError("options are not a list")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Published data sets: one importer each. It yields (stem of the output file, place, function that makes the raw item, or None): a
# question row with "image" as image_bytes() takes it and, if there are options, "right", the letter of the right one, instead
# of the answer. Files of one stem follow one another.


def each(source, stem, item):
    """All records of the files under source for which stem(path) is not None; item(record, path) makes the raw item. A record
    that cannot be read has None in its place."""
    for name, path in sorted((stem(path), path) for path in files(source) if stem(path) is not None):
        place = None
        for place, record in records(path):
            yield name, place, partial(item, record, path) if record is not None else None
        if place is None:
            print(f"{path}: no rows")


def files(source):
    return [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]


def table(pattern):
    """stem() of .tsv and .parquet files: what the pattern's group finds in the name, "test" if the group is not there."""
    def stem(path):
        found = re.search(pattern, path.name.lower()) if path.suffix in (".tsv", ".parquet") else None
        return found and (found[1] or "test")
    return stem


def visualprobe(source):
    def stem(path):
        folder = path.absolute().parent.name.lower()
        return folder.removeprefix("visualprobe_") if path.name in ("train.json", "val.json") else None

    def item(record, path):
        image = only_image(record.get("images"))  # its path starts at the parent of the folder
        row = {"id": text_of(record, "doc_id"), "image": inside(source, path.absolute().parent.parent, image),
               "question": text_of(record, "problem").replace("<image>", "", 1).strip(),
               "answer": text_of(record, "solution"), "source": text_of(record, "data_source")}
        return {**row, "level": stem(path)} if stem(path) in LEVELS else row

    return each(source, stem, item)


def vstar(source):
    listed = [path for path in files(source) if path.name == "test_questions.jsonl"]
    always_a = {path: all(r.get("label") == "A" for _, r in records(path) if r) for path in listed}

    def picture(path):
        found = (path.with_suffix(suffix) for suffix in (".jpg", ".jpeg", ".png", ".webp"))
        return next((p for p in found if p.is_file()), None)

    def stem(path):
        return "test" if path in listed or not listed and path.suffix == ".json" and picture(path) else None

    def item(record, path):
        if not listed:
            image, category = inside(source, path.parent, picture(path).name), path.parent.name
            return {"id": f"{category}/{path.stem}", "image": image, "question": text_of(record, "question"),
                    "options": record.get("options"), "right": "A", "shuffle": True, "source": "vstar", "category": category}
        name = text_of(record, "image")
        question, *options = re.split(r"\n(?=\([A-Z]\))", text_of(record, "text"))
        return {"id": str(Path(name).with_suffix("")), "image": inside(source, path.parent, name), "question": question,
                "options": unlettered([option.splitlines()[0] for option in options]), "right": text_of(record, "label"),
                "shuffle": always_a[path], "source": "vstar", "category": text_of(record, "category")}

    return each(source, stem, item)


def hrbench(source):
    stem = table("(4k|8k)")

    def item(record, path):
        return {"id": f"hrbench_{stem(path)}_{text_of(record, 'index')}", "image": record.get("image"),
                "question": text_of(record, "question"), "options": [text_of(record, letter) for letter in "ABCD"],
                "right": text_of(record, "answer"), "source": f"hrbench_{stem(path)}",
                "category": text_of(record, "category"), "cycle": text_of(record, "cycle_category")}

    return each(source, stem, item)


def mme_realworld(source):
    stem = table(r"mme.?realworld(?:.(lite|cn)\b)?")

    def item(record, path):
        return {"id": text_of(record, "index"), "image": record.get("image"), "question": text_of(record, "question"),
                "options": unlettered(literal_list(record.get("multi-choice options"))), "right": text_of(record, "answer"),
                "source": f"mme_realworld_{stem(path)}", "category": text_of(record, "category")}

    return each(source, stem, item)


def deepeyes(source):
    def stem(path):
        return "train" if path.suffix == ".parquet" else None

    def item(record, path):
        info, kind = record.get("extra_info"), text_of(record, "data_source")  # the index counts within a file and a kind
        return {"id": f"{path.stem}_{kind}_{text_of(info, 'index')}", "image": only_image(record.get("images")),
                "question": text_of(info, "question").replace("<image>", "", 1).strip(),
                "answer": text_of(record.get("reward_model"), "ground_truth"), "source": f"deepeyes_{kind}"}

    return each(source, stem, item)


def mini_o3_coldstart(source):
    """Rows are the beginnings of conversations, one per reply. A first pass over the texts keeps a hash of each beginning that
    goes on in some row; in the second pass those are left out."""
    def stem(path):
        return "coldstart" if path.suffix == ".parquet" else None

    longer, columns = set(), ["conversations", "sample_index", "rollout_index"]
    paths = [path for path in files(source) if stem(path)]
    for path in tools.Progress(paths, desc="beginnings", unit=" files"):
        for _, record in records(path, columns):
            try:
                longer.update(beginnings(record)[1][:-1])
            except ValueError:
                pass  # counted when it is read again

    def item(record, path):
        texts, digests = beginnings(record)
        if digests[-1] in longer:
            raise ValueError("the beginning of a longer conversation, merged into it")
        sample, rollout = text_of(record, "sample_index"), text_of(record, "rollout_index")
        images = record.get("images")
        if not isinstance(images, list) or not images:
            raise ValueError("image is missing")
        # a hash, since conversations of the same rollout that are not one another's beginning are all kept
        return {"id": f"mini_o3_{sample}_{rollout}_{digests[-1].hex()[:8]}", "image": images[0], "conversation": texts,
                "seen": images[1:], "source": str(record.get("data_source") or "mini_o3_coldstart")}

    return each(source, stem, item)


def beginnings(record):
    """Read a cold-start row: (texts [system, user, reply, user, ..., reply], digest of the conversation up to each reply)."""
    try:
        messages = json.loads((record or {}).get("conversations"))
    except (TypeError, ValueError, RecursionError):
        raise ValueError("conversations is not JSON") from None
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("value"), str) for m in messages):
        raise ValueError("conversations is not a list of texts")
    if messages and messages[0].get("from") != "system":
        messages.insert(0, {"from": "system", "value": ""})
    if len(messages) < 3 or [m.get("from") for m in messages[1:]] != ["human", "gpt"] * (len(messages) // 2):
        raise ValueError("conversation is not system, human, gpt, ..., gpt in turn")
    texts = [m["value"] for m in messages]
    chain = hashlib.sha256(repr([record.get("sample_index"), record.get("rollout_index")]).encode())
    digests = []
    for number, text in enumerate(texts):
        chain.update(json.dumps(text).encode())
        if number > 1 and number % 2 == 0:
            digests.append(chain.digest()[:16])
    return texts, digests


# expected: what the error says if nothing of it is there
IMPORTERS = {
    "visualprobe": (visualprobe, "folders such as VisualProbe_Hard with train.json or val.json and data/*.jpg"),
    "vstar": (vstar, "test_questions.jsonl, or folders of images with a JSON file beside each"),
    "hrbench": (hrbench, "hr_bench_4k or hr_bench_8k as .tsv or .parquet"),
    "mme_realworld": (mme_realworld, "MME-RealWorld, -Lite or -CN as .tsv or .parquet"),
    "deepeyes": (deepeyes, "the .parquet files of DeepEyes-Datasets-47k"),
    "mini_o3_coldstart": (mini_o3_coldstart, "the .parquet files of the Mini-o3 cold start"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Published data sets: from raw items to rows


def add_options(row, seed):
    """Raw item with options -> list them in the question, replace "right" by the answer."""
    options, right, shuffle = row["options"], row.pop("right").upper(), row.pop("shuffle", False)
    if not isinstance(options, list) or not options or not all(isinstance(o, str) and o.strip() for o in options):
        raise ValueError("options are missing or not texts")
    if len(right) != 1 or right not in string.ascii_uppercase[:len(options)]:
        raise ValueError("the label is not the letter of an option")
    right = string.ascii_uppercase.index(right)
    if shuffle:
        key = int.from_bytes(hashlib.sha256(row["id"].encode("utf-8", "replace")).digest()[:8], "big")
        order = np.random.default_rng([seed, key]).permutation(len(options)).tolist()
        options, right = [options[i] for i in order], order.index(right)
    row["options"] = options = [option.strip() for option in options]
    listed = [f"({letter}) {option}" for letter, option in zip(string.ascii_uppercase, options)]
    row["question"] = "\n".join([row["question"], *listed])
    alone = [i for i, option in enumerate(options) if tools.match_answer(option, options[right], options)] == [right]
    row["answer"] = options[right] if alone else f"({string.ascii_uppercase[right]})"
    if not tools.match_answer(listed[right], row["answer"], options):
        raise ValueError("the right option cannot be told from another one")


def add_turns(row, image):
    """Raw item with a conversation -> trajectory fields. Replays the zooms on the image; returns how many stored observations
    have another shape than our crops."""
    (system, user, *texts), seen, views, turns = row.pop("conversation"), row.pop("seen"), [image], []
    if user.count("<image>") != 1:
        raise ValueError("the first message does not show exactly one image")
    for text, reply in itertools.zip_longest(texts[::2], texts[1::2]):
        turn, finish, prediction = tools.take_turn(views, text, len(turns) + 1, max_turns=math.inf, max_images=math.inf)
        turns.append(turn)
        if reply is None:
            break
        if finish == "answer":
            raise ValueError("the conversation goes on after an answer")
        if "zoom" in turn and reply.count("<image>") != 1:
            raise ValueError("a zoom without its observation")
        if "zoom" not in turn and "<image>" in reply:
            raise ValueError("an observation although there was no zoom, or an impossible one")
        turn |= {"reply": reply} if "zoom" in turn else {"error": reply, "reply": reply}
    if finish != "answer" or not prediction:
        raise ValueError("no final answer")
    if len(seen) != len(views) - 1:
        raise ValueError("images and observations differ in number")
    # kept conversations are correct ones and there is no column with the truth, so what was answered is the answer
    row |= {"question": user.replace("<image>", "").strip(), "answer": prediction, "system": system, "user": user,
            "turns": turns, "finish": "answer", "prediction": prediction, "reward": 1.0, "teacher": "mini_o3"}
    return sum(not same_shape(stored, view.size) for stored, view in zip(seen, views[1:]))


def same_shape(stored, size):
    """Whether a stored observation has our crop's aspect ratio, to first order: its sides may have been rounded to multiples of
    28 for the model, the crop's edges by up to two pixels in all."""
    try:
        (w, h), (width, height) = decode(image_bytes(stored), whole=False).size, size
    except ValueError:
        return False
    ratio = w * height / (h * width)
    return max(ratio, 1 / ratio) <= 1 + 28 / min(w, h) + 2 / min(width, height)


def complete(make, out, seed, ids):
    """Raw item -> (row, differing observations); stores its image, once for all rows that share it. ids: those of earlier rows.
    Raises ValueError with the reason for which the row cannot be used."""
    if make is None:
        raise ValueError("not a readable row")
    row, differing = make(), 0
    if row["id"] in ids:
        raise ValueError("id stands in an earlier row too")
    data = image_bytes(row["image"])
    image = decode(data)
    row["image"] = f"images/{hashlib.sha256(data).hexdigest()[:20]}.{SUFFIXES.get(image.format, 'jpg')}"  # or MPO, a JPEG
    if "options" in row:
        add_options(row, seed)
    if "conversation" in row:
        differing = add_turns(row, image)
    try:
        tools.json_line(row).encode()
    except UnicodeEncodeError:
        raise ValueError("text is not UTF-8") from None
    (tools.check_trajectory if "turns" in row else tools.check_question)(row)
    if not (out / row["image"]).exists():
        tools.write_atomic(out / row["image"], lambda file: file.write(data), sync=False)
    return row, differing


def import_rows(items, out, seed, path):
    """Yield the rows of one output file, then print what was read, written and skipped. Raises InputError if no row is left."""
    ids, read, notes = set(), 0, {}  # notes: {what: [how often, the first place]}

    def note(what, place, number=1):
        notes.setdefault(what, [0, place])[0] += number

    for read, (_, place, make) in enumerate(items, 1):
        try:
            row, differing = complete(make, out, seed, ids)
        except ValueError as reason:
            note(f"skipped: {reason}", place)
            continue
        if differing:
            note("stored observations differ in shape from our crops; their rows are kept", place, differing)
        ids.add(row["id"])
        yield row
    print(f"{path}: {read} rows read, {len(ids)} written")
    for what, (number, place) in notes.items():
        print(f"    {number} {what} (first: {place})")
    if not ids:
        raise tools.InputError(f"{path} is not written, since no row can be used; the reasons stand above")
    os.sync()  # the images, before the rows that name them


def import_data(name, source, out, seed):
    """Write the rows of a published data set, one file after the other. Raises InputError if there is none of it."""
    importer, expected = IMPORTERS[name]
    stem = None
    for stem, items in itertools.groupby(importer(source), key=lambda item: item[0]):
        path = out / f"{stem}.jsonl"
        items = tools.Progress(items, desc=stem, unit=" rows")
        tools.write_jsonl(path, import_rows(items, out, seed, path))
    if stem is None:
        raise tools.InputError(f"{source}: nothing to import; {name} expects {expected}")


# ---------------------------------------------------------------------------------------------------------------------
# Questions of a suitable difficulty


def filter_questions(rates, source, low, high):
    """Write the questions of `source` whose pass rate lies in [low, high] beside it, each with its "pass_rate". rates: files of
    {"id", "pass_rate"} rows. Raises InputError."""
    known = {}

    def check(row):
        name, rate = row.get("id"), row.get("pass_rate")
        if not isinstance(name, str) or isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise tools.InputError("a row of rates has an 'id' and a 'pass_rate' from 0 to 1")
        if known.setdefault(name, rate) != rate:
            raise tools.InputError(f"id '{name}' has another pass_rate, {known[name]}, in an earlier line or file")

    for path in rates:
        tools.read_jsonl(path, check, hint="python evaluate.py")
    kept, counts = [], {"below": 0, "above": 0, "without a rate": 0}
    for row in tools.read_questions(source, hint="python build_data.py"):
        rate = known.pop(row["id"], None)
        if rate is not None and low <= rate <= high:
            kept.append({**row, "pass_rate": rate})
        else:
            counts["without a rate" if rate is None else "below" if rate < low else "above"] += 1
    out = source.with_name(f"{source.stem}_filtered.jsonl")
    print(f"{out}: {len(kept)} questions kept with a pass rate from {low} to {high}, left out: "
          + ", ".join(f"{number} {why}" for why, number in counts.items()) + f"; {len(known)} rates belong to no question")
    if not kept:
        raise tools.InputError(f"no question of {source} is left: widen --keep or evaluate these questions; nothing written")
    tools.write_jsonl(out, kept)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parallel(function, jobs, workers, title, initial=0):
    """Map over processes, with a progress bar; yields results in order, whatever the number of workers. initial: jobs that
    were done before. Raises InputError if a worker is killed."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
            yield from tools.Progress(pool.map(function, jobs, chunksize=16), initial=initial,
                                      total=initial + len(jobs), desc=title)
    except BrokenProcessPool:
        raise tools.InputError(f"a worker process of '{title.strip()}' was killed, perhaps for lack of memory; run the command "
                               "again, it goes on where it was, or with fewer --workers") from None


def _end_with_parent():
    """A worker whose parent was killed must not wait for work forever."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def parse_args():
    parser = argparse.ArgumentParser(description="Draw the synthetic world, import a published data set, or filter questions.")
    group = parser.add_argument_group("what to draw")
    group.add_argument("--train", type=int, default=4600, help="training questions, levels mixed")
    group.add_argument("--test", type=int, default=200, help="questions in each of easy, medium and hard")
    group.add_argument("--val", type=int, default=240, help="questions, levels mixed, by which rl.py chooses its "
                       "checkpoint: no other stage sees them")
    group.add_argument("--scenes", type=int, default=1000, help="scenes for the instruction data, about 38 rows each")
    group.add_argument("--min_pixels", type=int, default=6000, help="smallest stored instruction view, in pixels")
    group.add_argument("--max_pixels", type=int, default=8000, help="largest stored instruction view, in pixels")
    group.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw")
    group = parser.add_argument_group("import a data set instead")
    group.add_argument("--import", dest="data_set", choices=IMPORTERS, help="which one")
    group.add_argument("--source", type=Path, help="folder it was downloaded to; with --filter: questions (data/train.jsonl)")
    group = parser.add_argument_group("filter questions instead")
    group.add_argument("--filter", type=Path, nargs="+", metavar="RATES", help="files of pass rates, made by evaluate.py")
    group.add_argument("--keep", type=float, nargs=2, metavar=("LOW", "HIGH"), help="pass rates to keep (0.1 0.9)")
    group = parser.add_argument_group("common")
    group.add_argument("--seed", type=int, default=0, help="another seed draws another world; it also shuffles options")
    group.add_argument("--out", type=Path, help="folder to write to (data, or data/NAME with --import)")
    args = parser.parse_args()
    if min(args.train, args.test, args.val, args.scenes, args.workers) < 1 or args.seed < 0:
        raise tools.InputError("--train, --test, --val, --scenes and --workers must be at least 1, --seed at least 0")
    if not 1 <= args.min_pixels <= args.max_pixels:
        raise tools.InputError("--min_pixels must be at least 1 and --max_pixels at least --min_pixels")
    check_mode(args, {flag for flag in vars(args) if getattr(args, flag) != parser.get_default(flag)})
    return args


def check_mode(args, given):
    """Raises InputError if flags that were given do not belong together; fills in the defaults that depend on others."""
    mode = "with --import" if args.data_set else "with --filter" if args.filter else "without --import or --filter"
    fitting = {"with --import": {"data_set", "source", "seed", "out"}, "with --filter": {"filter", "source", "keep"}}
    wrong = sorted(given - fitting.get(mode, given - {"source", "keep"}))
    if wrong:
        raise tools.InputError(f"{' and '.join(f'--{flag}' for flag in wrong)} cannot be used {mode}")
    if args.data_set and args.source is None:
        raise tools.InputError("--import needs --source, the folder that the data set was downloaded to")
    if args.data_set and not args.source.exists():
        raise tools.InputError(f"--source {args.source} does not exist")
    args.source, args.keep = args.source or Path("data/train.jsonl"), args.keep or [0.1, 0.9]
    if not 0 <= args.keep[0] <= args.keep[1] <= 1:
        raise tools.InputError("--keep must be two pass rates, 0 <= LOW <= HIGH <= 1")
    args.out = args.out or Path("data", args.data_set or "")


def draw_world(args):
    """Write the questions of the synthetic world, then the instruction data."""
    levels = list(LEVELS)
    counts = {"train": args.train, "val": args.val, **dict.fromkeys(levels, args.test)}
    for split, count in counts.items():
        jobs = [(split, i, split if split in levels else levels[i % 3]) for i in range(count)]
        rows = list(parallel(partial(make_question, out=args.out, seed=args.seed), jobs, args.workers, f"{split:8}"))
        os.sync()  # the images, before the rows that name them
        tools.write_jsonl(args.out / f"{split}.jsonl", rows)
        kinds = {k: sum(r["source"] == k for r in rows) for k in ("synthetic_digit", "synthetic_shape")}
        print(f"{args.out / split}.jsonl: {len(rows)} questions, {kinds}")
        for level in levels if split == "train" else []:  # the same questions once more, for RL on a level or a mixture
            tools.write_jsonl(args.out / f"train_{level}.jsonl", [row for row in rows if row["level"] == level])
    make = partial(make_instructions, out=args.out, seed=args.seed, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    rows = [row for rows in parallel(make, range(args.scenes), args.workers, "instruct") for row in rows]
    os.sync()
    tools.write_jsonl(args.out / "instruct.jsonl", rows)
    print(f"{args.out / 'instruct.jsonl'}: {len(rows)} single-view questions")


def main():
    args = parse_args()
    if args.data_set:
        import_data(args.data_set, args.source, args.out, args.seed)
    elif args.filter:
        filter_questions(args.filter, args.source, *args.keep)
    else:
        draw_world(args)


if __name__ == "__main__":
    tools.run(main)
