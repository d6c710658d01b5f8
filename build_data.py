"""Questions: a drawn Visual Probe world (default), published data sets (--import), or those of a
suitable difficulty (--filter).

Each image is a wall of nine framed parts with nine places each. On some places lies an object: a
shape in one of six colours that carries a digit. The model sees every view at about 84 x 84
pixels, so it reads an image on three scales:
    whole image     which parts have red wallpaper        (a hint: such a part holds something red)
    one part        which places hold something red       (shape and digit are not legible)
    one place       "red square 7"

Look-alikes of the target share its colour, and differ in what decides the question: the shape in
"What digit is on the red square?", the digit in "Which shape is the red object with digit 7?".

What differs from the paper's VisualProbe:
1. Drawn, not photographed, so that a 1.6 M parameter model, which is made here too (sft.py --model
   tiny), can learn it in minutes without a network.
2. A row keeps the layout of its scene ("objects", "walls"); only the scripted teacher reads it.
3. `instruct.jsonl` holds single-view questions that stand in for what a pretrained VLM knows.

What differs from the published data: options are texts that the question lists once, (A), (B), ...;
of a cold-start conversation only the original image is stored, since crops follow from its zooms;
an image is named after its content. A row that cannot be used is skipped and counted.

Commands (all of this is CPU work: a GPU or more nodes change nothing):
    1 CPU         python build_data.py --workers 1
    any other     python build_data.py
    smaller       python build_data.py --train 300 --test 40 --scenes 100 --out /tmp/data
    RL data       python build_data.py --import visualprobe --source downloads
    SFT data      python build_data.py --import mini_o3_coldstart --source downloads/coldstart
    a benchmark   python build_data.py --import hrbench --source downloads/HR-Bench
    not too hard  python build_data.py --filter results/sft/train.rates.jsonl --keep 0.1 0.9
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
from tools import PHRASES, PLACES, need

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220),
           "yellow": (205, 175, 0), "purple": (150, 50, 180), "cyan": (0, 165, 185)}
SHAPES = ["circle", "square", "triangle", "star"]
# side of the image in pixels, a multiple of 9; radius of an object relative to its place; numbers
LEVELS = {"easy": {"side": 504, "radius": 0.43, "lookalikes": 2, "others": 3},
          "medium": {"side": 630, "radius": 0.40, "lookalikes": 5, "others": 5},
          "hard": {"side": 756, "radius": 0.37, "lookalikes": 10, "others": 7}}
# a split's index enters its random seeds: they never overlap
SPLITS = ["train", "easy", "medium", "hard", "instruct", "val"]


# ---- A scene and its picture --------------------------------------------------------------------


def place_box(place):
    """Relative box of one of the nine places of a view, as the teacher writes it."""
    row, col = divmod(PLACES.index(place), 3)
    edges = [0.0, 0.333, 0.667, 1.0]
    return [edges[col], edges[row], edges[col + 1], edges[row + 1]]


def ask(kind, colour, shape, digit):
    """(question, answer, what to look for) about an object, for a kind: "digit" or "shape"."""
    if kind == "digit":
        return f"What digit is on the {colour} {shape}?", str(digit), shape
    return f"Which shape is the {colour} object with digit {digit}?", shape, str(digit)


def any_object(rng):
    """(colour, shape, digit), all equally likely."""
    return str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), int(rng.integers(10))


def make_scene(rng, level, lookalikes=None, others=None):
    """Draw lots for one image. Returns its question row without id and image. lookalikes, others:
    numbers of objects, instead of the level's.

    objects: [part, place, colour, shape, digit] of each, parts and places by index into PLACES, the
    target first. walls: the wallpaper of each part, the colour of one of its objects, or None."""
    lookalikes = LEVELS[level]["lookalikes"] if lookalikes is None else lookalikes
    others = LEVELS[level]["others"] if others is None else others
    kind = ["digit", "shape"][rng.integers(2)]
    colour, shape, digit = any_object(rng)
    spots = [divmod(spot, 9) for spot in rng.permutation(81).tolist()]
    objects = [[*spots[0], colour, shape, digit]]
    for spot in spots[1:1 + lookalikes]:
        other_shape, other_digit = str(rng.choice(SHAPES)), int(rng.integers(10))
        if kind == "digit":  # the shape decides: no other red square
            other_shape = str(rng.choice([s for s in SHAPES if s != shape]))
        else:                # the digit decides: no other red 7
            other_digit = int(rng.choice([d for d in range(10) if d != digit]))
        objects.append([*spot, colour, other_shape, other_digit])
    for spot in spots[1 + lookalikes:1 + lookalikes + others]:
        other = str(rng.choice([c for c in COLOURS if c != colour]))
        objects.append([*spot, other, str(rng.choice(SHAPES)), int(rng.integers(10))])
    held = [[o[2] for o in objects if o[0] == part] for part in range(9)]
    walls = [str(rng.choice(colours)) if colours else None for colours in held]
    question, answer, wanted = ask(kind, colour, shape, digit)
    part, place = spots[0]
    x, y = 3 * (part % 3) + place % 3, 3 * (part // 3) + place // 3
    return {"question": question, "answer": answer, "source": f"synthetic_{kind}", "level": level,
            "target_bbox": [round(v / 9, 4) for v in (x, y, x + 1, y + 1)],
            "colour": colour, "wanted": wanted, "objects": objects, "walls": walls}


def draw_shape(draw, shape, x, y, radius, fill):
    """Fill one shape whose circumscribed circle has centre (x, y) and this radius, in pixels."""
    if shape == "circle":
        draw.circle((x, y), radius, fill=fill)
    elif shape == "square":
        half = 0.86 * radius
        draw.rectangle([x - half, y - half, x + half, y + half], fill=fill)
    elif shape == "triangle":
        angles, y = -np.pi / 2 + 2 * np.pi / 3 * np.arange(3), y + 0.15 * radius
        corners = [(x + 1.15 * radius * np.cos(a), y + 1.15 * radius * np.sin(a)) for a in angles]
        draw.polygon(corners, fill=fill)
    else:  # a star with five points
        angles = -np.pi / 2 + np.pi / 5 * np.arange(10)
        radii = np.where(np.arange(10) % 2, 0.5, 1.12) * radius
        corners = [(x + r * np.cos(a), y + r * np.sin(a)) for a, r in zip(angles, radii)]
        draw.polygon(corners, fill=fill)


def draw_scene(rng, scene):
    """Paint a scene: tinted noise, a frame around the wall and each part, objects with digits."""
    side = LEVELS[scene["level"]]["side"]
    third, cell = side // 3, side / 9  # sides of a part and of a place
    noise = rng.integers(90, 160, size=(14, 14, 1)) + rng.integers(-8, 9, size=(14, 14, 3))
    image = Image.fromarray(noise.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    tint = {colour: [round(0.35 * (c - 128)) for c in rgb] for colour, rgb in COLOURS.items()}
    paper = np.array([tint.get(wall, [0, 0, 0]) for wall in scene["walls"]], dtype=np.int16)
    paper = paper.reshape(3, 3, 3).repeat(third, axis=0).repeat(third, axis=1)    # (side, side, 3)
    grain = rng.integers(-5, 6, size=(side, side, 1), dtype=np.int16)
    image = Image.fromarray(np.clip(np.asarray(image) + paper + grain, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    thin, thick = round(cell / 10), round(cell / 3.5)  # frames tell where in a view a place lies
    for part in range(9):
        x, y = third * (part % 3), third * (part // 3)
        box = [x, y, x + third - 1, y + third - 1]
        draw.rectangle(box, outline=(20, 20, 20), width=thin)
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
    """A JPEG, never half of one. draw_world() flushes them to disk together."""
    write = partial(image.save, format="JPEG", quality=quality, subsampling=0)
    tools.write_atomic(path, write, sync=False)


def make_question(job, out, seed):
    """One question with its image. job: (split, index, level). Skips drawing where the image exists
    already (a rerun after a kill), so the layout and the painting use two separate random streams,
    and the image's name depends on what is to be drawn."""
    split, index, level = job
    key = [seed, SPLITS.index(split), index]
    scene = make_scene(np.random.default_rng([*key, 0]), level)
    digest = hashlib.sha256(json.dumps([scene, LEVELS[level]]).encode()).hexdigest()[:8]
    image = f"images/{split}_{seed}_{index:05d}_{digest}.jpg"
    if not (out / image).exists():
        picture = draw_scene(np.random.default_rng([*key, 1]), scene)
        save_image(picture, out / image, quality=85)
    return {"id": f"{split}_{index:05d}", "image": image, **scene}


# ---- Instruction data: one view, one question, one reply in the teacher's words -----------------


def colours_of(objects, part):
    """The colours, or None, at the nine places of a part."""
    held = {o[1]: o[2] for o in objects if o[0] == part}
    return [held.get(place) for place in range(9)]


def places_with(objects, part, colour):
    """Names of the places of a part that hold this colour, in reading order."""
    return [place for place, held in zip(PLACES, colours_of(objects, part)) if held == colour]


def describe(kind, colours, wanted):
    """Where in a view of nine a colour is, in the words for a kind: "part" or "walls"."""
    places = [place for place, colour in zip(PLACES, colours) if colour == wanted]
    phrase = PHRASES[kind if places else f"no_{kind}"]
    return phrase.format(colour=wanted, places=" ".join(places))


def describe_part(objects, part, colour):
    """"I see red in top left." / "I see no red." """
    return describe("part", colours_of(objects, part), colour)


def describe_walls(walls, colour):
    """"I see red walls in top left." / "I see no red walls." """
    return describe("walls", walls, colour)


def describe_cell(objects, part, place):
    """"I see red square 7." / "I see nothing." """
    for p, q, colour, shape, digit in objects:
        if (p, q) == (part, place):
            return PHRASES["cell"].format(colour=colour, shape=shape, digit=digit)
    return PHRASES["empty"]


def lessons_on_nine(kind, colours, question, asked, crowded):
    """(question, reply) pairs about a view of nine: a part, or the walls of the whole image.
    question: of the world, about the first of the colours `asked`."""
    where, everything, noun, mapped = "Where is", "everything", "", asked[-1]
    if kind == "walls":
        where, everything, noun, mapped = "Which walls are", "what", " walls", asked[0]
    yield question, describe(kind, colours, asked[0])
    for colour in asked[1:]:
        yield f"{where} {colour}?", describe(kind, colours, colour)
    every = [describe(kind, colours, colour) for colour in COLOURS if colour in colours]
    yield f"{where} {everything}?", " ".join(every) or PHRASES["empty"]

    def place_by_place(shown):  # nine lessons in one reply on where a place is
        names = [colour + noun if colour in shown else "nothing" for colour in colours]
        return " ".join(f"{place} {name}." for place, name in zip(PLACES, names))

    if not crowded:
        yield "What is where?", place_by_place(COLOURS)
    yield f"{where} {mapped}, place by place?", place_by_place([mapped])


def lesson_on_sorting(rng):
    """(question, reply): objects, each compared with what is wanted: many verdicts in one reply."""
    names = [any_object(rng) for _ in range(rng.integers(2, 5))]
    kind = int(rng.choice([1, 2], p=[0.3, 0.7]))  # ten digits are harder to tell than four shapes
    wanted = names[0][kind]
    names = [name if rng.random() < 0.5 else (*name[:kind], wanted, *name[kind + 1:])
             for name in names]
    names = [names[i] for i in rng.permutation(len(names))]
    replies = []
    for colour, shape, digit in names:
        seen = PHRASES["cell"].format(colour=colour, shape=shape, digit=digit)
        verdict = "Yes" if wanted in (shape, digit) else "No"
        replies.append(seen + PHRASES["verdict"].format(wanted=wanted, verdict=verdict))
    listed = ", ".join("{} {} {}".format(*name) for name in names)
    return f"Want {wanted}: {listed}.", " ".join(replies)


def lesson_on_errands(rng):
    """(question, reply): a search's to-do list, and what is left of it after one step."""
    later = rng.permutation(PLACES)[:rng.integers(0, 10)].tolist()
    here = [PLACES[i] for i in sorted(rng.permutation(9)[:rng.integers(0, 4)])]
    source = f"observation_{rng.integers(1, 32)}"

    def state():
        text = PHRASES["here"].format(source=source, places=" ".join(here)) if here else ""
        text += PHRASES["later"].format(places=" ".join(later)) if later else ""
        go = PHRASES["go"].format(place=(here or later)[0]) if here or later else " Nothing."
        return text + go

    before = state()
    del (here or later)[:1]
    return f"Done:{before} What next?", f"Next:{state()}"


def lesson_on_a_place(rng, objects, part, place):
    """(question, reply): what is at a place, perhaps compared with what a question looks for."""
    reply, kind = describe_cell(objects, part, place), ["name", "digit", "shape"][rng.integers(3)]
    if kind == "name":
        return "What is this?", reply
    here = [o[2:] for o in objects if o[:2] == [part, place]]
    colour, shape, digit = any_object(rng)
    if here:  # a search looks at objects of the right colour; every other time it has found its own
        colour, shape, digit = here[0] if rng.random() < 0.5 else (here[0][0], shape, digit)
    question, _, wanted = ask(kind, colour, shape, digit)
    found = f" {wanted}" in reply
    reply += PHRASES["verdict"].format(wanted=wanted, verdict="Yes" if found else "No")
    if found:
        reply += PHRASES["answer"].format(answer=here[0][2] if kind == "digit" else here[0][1])
    return question, reply


def make_instructions(index, out, seed, min_pixels, max_pixels):
    """Rows about one scene: views of some parts and places, and every other time of the whole
    image, stored at the size at which the model sees them. Scenes without a view of the whole are
    crowded: a reply then names many places, and each of them is a lesson."""
    rng = np.random.default_rng([seed, SPLITS.index("instruct"), index])
    level, crowded = list(LEVELS)[rng.integers(3)], index % 2 == 1
    numbers = [rng.integers(4, 16), rng.integers(16, 40)] if crowded else []
    scene = make_scene(rng, level, *numbers)
    objects, image, rows = scene["objects"], draw_scene(rng, scene), []

    def add(view, name, lessons):
        path = f"views/{seed}_{index:05d}_{name}.jpg"
        save_image(tools.resize_for_model(view, min_pixels, max_pixels), out / path, quality=95)
        for question, reply in lessons:
            rows.append({"id": f"instruct_{index:05d}_{len(rows):02d}", "image": path,
                         "question": question, "answer": reply, "source": "synthetic_instruct",
                         "system": "", "turns": [{"text": reply}]})

    def add_nine(view, name, kind, colours, count):
        others = [c for c in rng.permutation(list(COLOURS)).tolist() if c != scene["colour"]]
        asked = [scene["colour"], *others][:count]  # what the scene is about comes first
        which = ["digit", "shape"][rng.integers(2)]
        question = ask(which, asked[0], str(rng.choice(SHAPES)), int(rng.integers(10)))[0]
        add(view, name, lessons_on_nine(kind, colours, question, asked, crowded))

    def closer(view, place):  # cut by the agent's own tool at its usual coordinates
        call = {"bbox_2d": place_box(PLACES[place]), "source": "original_image"}
        return tools.zoom([view], call)

    if not crowded:
        add_nine(image, "all", "walls", scene["walls"], 3)
    for part in rng.permutation(9)[:6 if crowded else 3].tolist():
        add_nine(closer(image, part), f"p{part}", "part", colours_of(objects, part), 2)
    filled = [objects[i][:2] for i in rng.permutation(len(objects))[:10]]
    for part, place in [*filled, rng.integers(9, size=2).tolist()]:
        # naming is easier than the bookkeeping of text
        named = [lesson_on_a_place(rng, objects, part, place)] if rng.random() < 0.6 else []
        text = lesson_on_errands(rng) if rng.random() < 0.4 else lesson_on_sorting(rng)
        add(closer(closer(image, part), place), f"p{part}{place}", [*named, text])
    return rows


# ---- The tiny model: a Qwen2.5-VL of 1.6 M parameters, a tokenizer made from our texts ----------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type in ['image', 'image_url'] %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer(texts):
    """Byte-level BPE over `texts`, with the protocol's strings as single tokens: a turn is short,
    and a word that must be copied is the same token everywhere."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    # a digit is always a token of its own
    words = Regex(r" ?[A-Za-z]+(?:-[a-z]+)*|[0-9]|[ \n]|[^A-Za-z0-9 \n]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"),
        byte_level(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=byte_level.alphabet(),
        show_progress=False))
    tokenizer.add_tokens([
        "<think>", "</think>", '<grounding>{"bbox_2d": [', '], "source": "', '"}</grounding>',
        "<answer>", "</answer>", "0.0", "0.333", "0.667", "1.0", ", ", "original_image",
        *(f"observation_{i}" for i in range(63, 0, -1))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL, clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE)


def build_tiny(texts, seed):
    """(model, tokenizer, image processor): a Qwen2.5-VL with random weights that can learn the
    default world in minutes.

    Rotary frequencies: M-RoPE gives the axes t, h, w consecutive blocks of theta^(-i/16).
    Neighbouring image columns must differ by roughly 0.3 rad or more, while many frequencies must
    stay near zero so that a word can be found by its content hundreds of positions back; hence no
    t block (images have one frame), a short h block and a moderate theta.
    """
    import torch  # here, so that drawing does not have to load it
    from transformers import (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
                              Qwen2VLImageProcessorPil)

    tokenizer = build_tokenizer(texts)
    pad, _, end, vision_start, vision_end, image, video = tokenizer.convert_tokens_to_ids(SPECIAL)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768,
            bos_token_id=None, eos_token_id=end, rope_parameters={
                "rope_type": "default", "rope_theta": 3000.0, "mrope_section": [0, 1, 15]}),
        vision_config=dict(
            depth=3, hidden_size=96, intermediate_size=256, num_heads=4, out_hidden_size=128,
            window_size=112, fullatt_block_indexes=[2]),
        image_token_id=image, video_token_id=video, vision_start_token_id=vision_start,
        vision_end_token_id=vision_end, tie_word_embeddings=False)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():  # the library's std 0.02 is for wide models: here signals would vanish
        for name, param in model.named_parameters():
            if "embed_tokens" in name:
                param.normal_()
            elif param.dim() > 1:
                param.normal_(std=param[0].numel() ** -0.5)  # 1 / sqrt(fan in)
    model.generation_config.eos_token_id = [end, pad]
    model.generation_config.pad_token_id = pad
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 6000, "longest_edge": 8000})
    return model, tokenizer, processor


def project_texts(data):
    """The tiny tokenizer's texts: prompts, the teacher's phrases, and the rows of `data`."""
    fixed = [*tools.PROMPTS.values(), *PHRASES.values(), *(f" {place}" for place in PLACES),
             "What digit is on the red square?", "Which shape is the red object with digit 7?",
             " Yes. No.", "user\nassistant\n"]
    said = [text for row in data
            for text in (row["question"], row["answer"], *(turn["text"] for turn in row["turns"]))]
    # words alone, as in <answer>square</answer>: no space before it
    words = [word for text in said for word in text.strip(".?").split()]
    return fixed * 50 + said + words


# ---- Published data sets: reading ---------------------------------------------------------------


def parsed(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_rows(path, columns):
    """Rows of a file, one by one: memory does not grow with them, except for .json."""
    if path.suffix == ".parquet":
        from pyarrow import parquet
        # page by page, not a whole row group at once
        file = parquet.ParquetFile(path, buffer_size=2**16, pre_buffer=False)
        for batch in file.iter_batches(batch_size=1, columns=columns, use_threads=False):
            try:
                yield batch.to_pylist()[0]
            except UnicodeDecodeError:
                yield None
        return
    # what is not UTF-8 becomes half a surrogate pair: one bad row does not stop the others
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix == ".tsv":
            csv.field_size_limit(2**31 - 1)  # a cell may hold an image
            yield from csv.DictReader(file, delimiter="\t", strict=True)
        elif path.suffix == ".jsonl":
            yield from (parsed(line) for line in file if line.strip())
        else:
            rows = parsed(file.read())
            yield from rows if isinstance(rows, list) else [rows]


def records(path, columns=None):
    """Yield ("file:row", row as a dict, or None if it is not readable) of a .jsonl, .json, .tsv or
    .parquet file. columns: the only ones to read of a .parquet file. Raises InputError if a file is
    broken as a whole."""
    try:
        number = 0
        for number, row in enumerate(read_rows(path, columns), 1):
            yield f"{path.name}:{number}", row if isinstance(row, dict) else None
        if number == 0:
            yield f"{path.name}:1", None  # so that a file without rows is counted
    except ImportError:
        message = "reading .parquet files needs pyarrow: pip install pyarrow"
        raise tools.InputError(message) from None
    except (ValueError, OSError, csv.Error) as error:
        message = f"{path}: cannot be read to its end ({error}); download it again"
        raise tools.InputError(message) from None


def text_of(record, key):
    """A field that must be there: its text."""
    value = record.get(key) if isinstance(record, dict) else None
    value = str(value) if type(value) is int else value  # not True, which is an int too
    need(isinstance(value, str) and value.strip(), f"field '{key}' is missing or not text")
    return value.strip()


def only_image(record):
    images = record.get("images")
    need(isinstance(images, list) and len(images) == 1, "not exactly one image")
    return images[0]


def inside(root, base, name):
    """Bytes of the file that an untrusted name means in folder `base`, if it lies in the folder
    `root`, also behind links."""
    need(isinstance(name, str) and name, "image is missing")
    path = base / name
    there = os.path.isfile(path)  # unlike Path.is_file, False for a name that no file can have
    straight = not Path(name).is_absolute() and ".." not in Path(name).parts
    need(straight and (not there or path.resolve().is_relative_to(root.resolve())),
         "image path leaves the folder of the data")
    need(there, "image is missing")
    return path.read_bytes()


SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}


def load(image):
    """(bytes, suffix, PIL image as every later stage will see it) of an image file, given as bytes,
    base64 text or {"bytes": either}. Images so large that PIL only warns are refused too."""
    data = image.get("bytes") if isinstance(image, dict) else image
    need(isinstance(data, (bytes, str)) and data, "image is missing")
    try:
        if isinstance(data, str):
            data = base64.b64decode(data.strip(), validate=True)
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(data), formats=list(SUFFIXES))
            suffix = SUFFIXES.get(image.format, "jpg")  # or MPO, a JPEG
            return data, suffix, tools.as_shown(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise tools.InputError("image has too many pixels") from None
    except Exception:  # PIL's decoders raise nearly anything on broken data
        raise tools.InputError("image cannot be decoded") from None


def unlettered(options):
    """["(A) red", "(B) blue"], or the text of such a list, -> ["red", "blue"]."""
    try:  # literal_eval reads constants and runs nothing
        if isinstance(options, str) and len(options) < 100_000:
            options = ast.literal_eval(options.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass  # a text is no list
    options = options if isinstance(options, list) else []
    found = [re.fullmatch(r"\(?([A-Z])[).:]\s*(.*\S)\s*", str(o), re.DOTALL) for o in options]
    letters = list(string.ascii_uppercase[:len(found)])
    need(found and [m and m[1] for m in found] == letters,
         "options are not a list of (A), (B), ... in this order")
    return [m[2] for m in found]


def conversation(record):
    """A cold-start row's texts [system, user, reply, user, reply, ...], hashes up to each reply."""
    try:
        said = [(m["from"], m["value"]) for m in json.loads(record["conversations"])]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise tools.InputError("conversations is not a JSON list of messages") from None
    if said and said[0][0] != "system":
        said.insert(0, ("system", ""))
    roles, texts = [role for role, _ in said], [text for _, text in said]
    need(len(said) > 2 and roles[1:] == ["human", "gpt"] * (len(said) // 2)
         and all(isinstance(text, str) for text in texts),
         "conversation is not texts by system, human, gpt, ..., gpt in turn")
    rollout = repr([record.get("sample_index"), record.get("rollout_index")])
    parts = [rollout, *map(json.dumps, texts)]
    return texts, [hashlib.sha256("".join(parts[:end]).encode()).hexdigest()
                   for end in range(4, len(parts) + 1, 2)]


# ---- Published data sets: what a record becomes, a question row ---------------------------------
# "image" is as load() takes it; if there are options, "right", the letter of the right one, takes
# the place of the answer. stem: of the file that is written; root: the folder that images must not
# leave; known: see FIRST_PASS


def visualprobe(record, path, stem, root, known):
    folder = path.absolute().parent.parent  # the path of an image begins with its data set's folder
    row = {"id": text_of(record, "doc_id"), "image": inside(root, folder, only_image(record)),
           "question": text_of(record, "problem").replace("<image>", "", 1).strip(),
           "answer": text_of(record, "solution"), "source": text_of(record, "data_source")}
    return {**row, "level": stem} if stem in LEVELS else row


def vstar(record, path, stem, root, known):
    """A row of the table, or the JSON beside an image. known: the files in which the right option
    always comes first, as it does in every JSON; there the options are shuffled."""
    if path.suffix == ".json":
        pictures = (path.with_suffix(suffix) for suffix in (".jpg", ".jpeg", ".png", ".webp"))
        image = next((picture.name for picture in pictures if picture.is_file()), None)
        name, category, label = f"{path.parent.name}/{path.stem}", path.parent.name, "A"
        question, options = text_of(record, "question"), record.get("options")
    else:
        image, category = text_of(record, "image"), text_of(record, "category")
        name, label = str(Path(image).with_suffix("")), text_of(record, "label")
        question, *options = re.split(r"\n(?=\([A-Z]\))", text_of(record, "text"))
        # what follows the options (answer with the letter) goes: the prompts say how to answer
        options = unlettered([option.splitlines()[0] for option in options])
    return {"id": name, "image": inside(root, path.parent, image), "question": question,
            "options": options, "right": label, "shuffle": path in known, "source": "vstar",
            "category": category}


def hrbench(record, path, stem, root, known):
    return {"id": f"hrbench_{stem}_{text_of(record, 'index')}", "image": record.get("image"),
            "question": text_of(record, "question"),
            "options": [text_of(record, letter) for letter in "ABCD"],
            "right": text_of(record, "answer"), "source": f"hrbench_{stem}",
            "category": text_of(record, "category"), "cycle": text_of(record, "cycle_category")}


def mme_realworld(record, path, stem, root, known):
    return {"id": text_of(record, "index"), "image": record.get("image"),
            "question": text_of(record, "question"),
            "options": unlettered(record.get("multi-choice options")),
            "right": text_of(record, "answer"), "source": f"mme_realworld_{stem}",
            "category": text_of(record, "category")}


def deepeyes(record, path, stem, root, known):
    info, kind = record.get("extra_info"), text_of(record, "data_source")
    name = f"{path.stem}_{kind}_{text_of(info, 'index')}"  # it counts within a file and a kind
    return {"id": name, "image": only_image(record),
            "question": text_of(info, "question").replace("<image>", "", 1).strip(),
            "answer": text_of(record.get("reward_model"), "ground_truth"),
            "source": f"deepeyes_{kind}"}


def mini_o3_coldstart(record, path, stem, root, known):
    """Rows are the beginnings of conversations, one per reply: only the longest stays."""
    texts, digests = conversation(record)
    need(digests[-1] not in known, "the beginning of a longer conversation, merged into it")
    sample, rollout = text_of(record, "sample_index"), text_of(record, "rollout_index")
    images = record.get("images")
    need(images and isinstance(images, list), "image is missing")
    # a hash, since conversations of one rollout that are not another's beginning are all kept
    return {"id": f"mini_o3_{sample}_{rollout}_{digests[-1][:8]}",
            "image": images[0], "conversation": texts, "seen": images[1:],
            "source": str(record.get("data_source") or "mini_o3_coldstart")}


def always_a(files):
    """First pass over V*: the files in which every label is A, or there is none."""
    return {path for path in files
            if all(record.get("label", "A") == "A" for _, record in records(path) if record)}


def going_on(files):
    """First pass over the cold start's texts: hashes of all beginnings that go on in some row."""
    found, columns = set(), ["conversations", "sample_index", "rollout_index"]
    for path in tools.Progress(files, desc="beginnings", unit=" files"):
        for _, record in records(path, columns):
            try:
                found.update(conversation(record or {})[1][:-1])
            except ValueError:
                pass  # counted when it is read again
    return found


# name: (what a record becomes; which files: {pattern of "folder/name" in lower case: stem of what
# is written, if the pattern's group finds none}, the first that fits any; what the error says)
TABLE = r"[^/]*\.(?:tsv|parquet)$"
IMPORTERS = {
    "visualprobe": (visualprobe, {r"^(?:visualprobe_)?(.+)/(?:train|val)\.json$": None},
                    "folders such as VisualProbe_Hard with train.json or val.json and data/*.jpg"),
    "vstar": (vstar, {r"/test_questions\.jsonl$": "test", r"\.json$": "test"},
              "test_questions.jsonl, or folders of images with a JSON file beside each"),
    "hrbench": (hrbench, {"(4k|8k)" + TABLE: None}, "hr_bench_4k or _8k as .tsv or .parquet"),
    "mme_realworld": (mme_realworld, {r"mme[^/]?realworld(?:[^/](lite|cn)\b)?" + TABLE: "test"},
                      "MME-RealWorld, -Lite or -CN as .tsv or .parquet"),
    "deepeyes": (deepeyes, {r"\.parquet$": "train"}, "the .parquet files of DeepEyes-Datasets-47k"),
    "mini_o3_coldstart": (mini_o3_coldstart, {r"\.parquet$": "coldstart"},
                          "the .parquet files of the Mini-o3 cold start"),
}
FIRST_PASS = {"vstar": always_a, "mini_o3_coldstart": going_on}


def add_options(row, seed):
    """List the options in the question, put the answer in the place of "right"."""
    options, label, shuffle = row["options"], row.pop("right").upper(), row.pop("shuffle", False)
    need(isinstance(options, list) and options
         and all(isinstance(option, str) and option.strip() for option in options),
         "options are missing or not texts")
    letters = list(string.ascii_uppercase[:len(options)])
    need(label in letters, "the label is not the letter of an option")
    right = letters.index(label)
    if shuffle:  # by the seed and the id, whatever the other rows are
        key = hashlib.sha256(row["id"].encode("utf-8", "replace")).digest()[:8]
        rng = np.random.default_rng([seed, int.from_bytes(key, "big")])
        order = rng.permutation(len(options)).tolist()
        options, right = [options[i] for i in order], order.index(right)
    row["options"] = options = [option.strip() for option in options]
    listed = [f"({letter}) {option}" for letter, option in zip(letters, options)]
    row["question"] = "\n".join([row["question"], *listed])
    alike = sum(tools.match_answer(option, options[right], options) for option in options)
    row["answer"] = options[right] if alike == 1 else f"({letters[right]})"
    need(tools.match_answer(listed[right], row["answer"], options),
         "the right option cannot be told from another one")


def add_turns(row, image):
    """Turn a conversation into a trajectory's fields. Replays the zooms on the image; returns how
    many stored observations have another shape than our crops."""
    (system, user, *texts), seen = row.pop("conversation"), row.pop("seen")
    views, turns = [image], []
    for text, reply in itertools.zip_longest(texts[::2], texts[1::2]):
        turn, finish, prediction = tools.take_turn(views, text, 1, math.inf, math.inf)
        turns.append(turn)
        if reply is None:
            break
        need(finish != "answer", "the conversation goes on after an answer")
        if "zoom" not in turn:
            turn["error"] = reply
        turn["reply"] = reply
    # that each zoom, and nothing else, is shown an image is left to check_trajectory
    need(finish == "answer" and prediction, "no final answer")
    need(len(seen) == len(views) - 1, "images and observations differ in number")
    # kept conversations are correct and there is no column with the truth: what was answered is it
    row |= {"question": user.replace("<image>", "").strip(), "answer": prediction, "system": system,
            "user": user, "turns": turns, "finish": "answer", "prediction": prediction,
            "reward": 1.0, "teacher": "mini_o3"}
    return sum(not same_shape(stored, view.size) for stored, view in zip(seen, views[1:]))


def same_shape(stored, size):
    """Whether a stored observation has our crop's aspect ratio, to first order: its sides may have
    been rounded to multiples of 28 for the model, the crop's edges by up to two pixels in all."""
    try:
        w, h = load(stored)[-1].size
    except ValueError:
        return False
    ratio = w * size[1] / (h * size[0])
    return max(ratio, 1 / ratio) <= 1 + 28 / min(w, h) + 2 / min(size)


def complete(row, out, seed):
    """Make a row of what a record became, in place, and store its image, once for all rows that
    share it. Returns the number of observations that differ. Raises ValueError if it is no use."""
    data, suffix, image = load(row["image"])
    row["image"] = f"images/{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"
    if "options" in row:
        add_options(row, seed)
    differing = add_turns(row, image) if "conversation" in row else 0
    tools.json_line(row).encode()  # half a surrogate pair raises UnicodeEncodeError
    (tools.check_trajectory if "turns" in row else tools.check_question)(row)
    if not (out / row["image"]).exists():
        tools.write_atomic(out / row["image"], lambda file: file.write(data), sync=False)
    return differing


def import_rows(make, files, path, seed):
    """Yield the rows of one output file, then print what was read, written and skipped. make:
    (record, its file) -> what it becomes."""
    ids, notes = set(), {}  # notes: {what: [how often, the first place]}
    found = tools.Progress(((file, *row) for file in files for row in records(file)),
                           desc=path.stem, unit=" rows")
    for read, (file, place, record) in enumerate(found, 1):
        try:
            need(record is not None, "not a readable row")
            row = make(record, file)
            need(row["id"] not in ids, "id stands in an earlier row too")
            differing = complete(row, path.parent, seed)
        except ValueError as error:
            reason = "text is not UTF-8" if isinstance(error, UnicodeError) else error
            notes.setdefault(f"skipped: {reason}", [0, place])[0] += 1
            continue
        if differing:
            what = "stored observations differ in shape from our crops; their rows are kept"
            notes.setdefault(what, [0, place])[0] += differing
        ids.add(row["id"])
        yield row
    print(f"{path}: {read} rows read, {len(ids)} written")
    for what, (number, place) in notes.items():
        print(f"    {number} {what} (first: {place})")
    need(ids, f"{path} is not written, since no row can be used; the reasons stand above")
    os.sync()  # the images, before the rows that name them


def import_data(name, source, out, seed):
    """Write the rows of a published data set, one file per stem."""
    make, patterns, expected = IMPORTERS[name]
    root = source if source.is_dir() else source.parent
    paths = sorted(source.rglob("*")) if source.is_dir() else [source]
    found = {}  # {stem of what is written: the files that it is made from}
    for pattern, stem in patterns.items():
        if found:
            break  # the earlier pattern fits
        for path in paths:
            match = re.search(pattern, f"{path.absolute().parent.name}/{path.name}".lower())
            if match and path.is_file():
                found.setdefault(next(filter(None, match.groups()), stem), []).append(path)
    need(found, f"{source}: nothing to import; {name} expects {expected}")
    known = FIRST_PASS[name](sum(found.values(), [])) if name in FIRST_PASS else None
    for stem, files in sorted(found.items()):
        of_stem = partial(make, stem=stem, root=root, known=known)
        path = out / f"{stem}.jsonl"
        tools.write_jsonl(path, import_rows(of_stem, files, path, seed))


# ---- The command --------------------------------------------------------------------------------


def filter_questions(rates, source, low, high):
    """Write the questions of `source` whose pass rate lies in [low, high] beside it, each with its
    "pass_rate". rates: files of {"id", "pass_rate"} rows. Raises InputError.

    At a rate of 0.1 or 0.9, 16 rollouts of a question all agree, and so teach GRPO nothing, in 19
    of 100 cases; beyond that it is soon most cases."""
    known = {}

    def check(row):
        name, rate = row.get("id"), row.get("pass_rate")
        need(isinstance(name, str) and type(rate) in (int, float) and 0 <= rate <= 1,
             "a row of rates has an 'id' and a 'pass_rate' from 0 to 1")
        before = known.setdefault(name, rate)
        need(before == rate,
             f"id '{name}' has another pass_rate, {before}, in an earlier line or file")

    for path in rates:
        tools.read_jsonl(path, check, hint="python evaluate.py")
    rows = tools.read_questions(source, hint="python build_data.py")
    rated = [{**row, "pass_rate": known.pop(row["id"])} for row in rows if row["id"] in known]
    below = sum(row["pass_rate"] < low for row in rated)
    above = sum(row["pass_rate"] > high for row in rated)
    kept = [row for row in rated if low <= row["pass_rate"] <= high]
    out = source.with_name(f"{source.stem}_filtered.jsonl")
    print(f"{out}: {len(kept)} questions kept with a pass rate from {low} to {high}, left out: "
          f"{below} below, {above} above, {len(rows) - len(rated)} without a rate; {len(known)} "
          "rates belong to no question")
    need(kept, f"no question of {source} is left: widen --keep or evaluate these questions; "
               "nothing written")
    tools.write_jsonl(out, kept)


def parallel(function, jobs, workers, title, initial=0):
    """Map over processes, with a progress bar; yields results in order, whatever the number of
    workers. initial: jobs that were done before. Raises InputError if a worker is killed."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
            yield from tools.Progress(pool.map(function, jobs, chunksize=16), desc=title,
                                      initial=initial, total=initial + len(jobs))
    except BrokenProcessPool:
        raise tools.InputError(
            f"a worker process of '{title.strip()}' was killed, perhaps for lack of memory; run "
            "the command again, it goes on where it was, or with fewer --workers") from None


def _end_with_parent():
    """A worker whose parent was killed must not wait for work forever."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def parse_args():
    parser = argparse.ArgumentParser(
        description="Draw the synthetic world, import a published data set, or filter questions.")
    add = parser.add_argument_group("what to draw").add_argument
    add("--train", type=int, default=4600, help="training questions, levels mixed")
    add("--test", type=int, default=200, help="questions in each of easy, medium and hard")
    add("--val", type=int, default=240, help="questions by which rl.py chooses its checkpoint")
    add("--scenes", type=int, default=1000, help="scenes for instruction data, about 39 rows each")
    add("--min_pixels", type=int, default=6000, help="smallest stored instruction view, in pixels")
    add("--max_pixels", type=int, default=8000, help="largest stored instruction view, in pixels")
    add("--workers", type=int, default=os.cpu_count(), help="processes that draw")
    add = parser.add_argument_group("import a data set instead").add_argument
    add("--import", dest="data_set", choices=IMPORTERS, help="which one")
    add("--source", type=Path, help="its folder; with --filter: questions (data/train.jsonl)")
    add = parser.add_argument_group("filter questions instead").add_argument
    add("--filter", type=Path, nargs="+", metavar="RATES", help="pass rates, from evaluate.py")
    add("--keep", type=float, nargs=2, metavar=("LOW", "HIGH"), help="rates to keep (0.1 0.9)")
    add = parser.add_argument_group("common").add_argument
    add("--seed", type=int, default=0, help="another seed draws another world, shuffles anew")
    add("--out", type=Path, help="folder to write to (data, or data/NAME with --import)")
    args = parser.parse_args()
    given = {flag for flag in vars(args) if getattr(args, flag) != parser.get_default(flag)}
    tools.check_flags(args, ["seed"])
    need(args.min_pixels <= args.max_pixels, "--max_pixels must be at least --min_pixels")
    mode, fitting = "without --import or --filter", given - {"source", "keep"}
    if args.data_set:
        mode, fitting = "with --import", {"data_set", "source", "seed", "out"}
    elif args.filter:
        mode, fitting = "with --filter", {"filter", "source", "keep"}
    wrong = " and ".join(f"--{flag}" for flag in sorted(given - fitting))
    need(not wrong, f"{wrong} cannot be used {mode}")
    if args.data_set:
        need(args.source, "--import needs --source, the folder that the data set was downloaded to")
        need(args.source.exists(), f"--source {args.source} does not exist")
    args.source, args.keep = args.source or Path("data/train.jsonl"), args.keep or [0.1, 0.9]
    need(0 <= args.keep[0] <= args.keep[1] <= 1,
         "--keep must be two pass rates, 0 <= LOW <= HIGH <= 1")
    args.out = args.out or Path("data", args.data_set or "")
    return args


def draw_world(args):
    """Write every file of the synthetic world: questions, then the instruction data."""
    def write(name, rows, what):
        os.sync()  # the images, before the rows that name them
        tools.write_jsonl(args.out / f"{name}.jsonl", rows)
        print(f"{args.out / name}.jsonl: {len(rows)} {what}")

    levels, make = list(LEVELS), partial(make_question, out=args.out, seed=args.seed)
    counts = {"train": args.train, "val": args.val, **dict.fromkeys(levels, args.test)}
    for split, count in counts.items():
        jobs = [(split, i, split if split in levels else levels[i % 3]) for i in range(count)]
        rows = list(parallel(make, jobs, args.workers, f"{split:8}"))
        write(split, rows, "questions")
        for level in levels if split == "train" else []:  # once more: for RL on a level or a mix
            write(f"train_{level}", [row for row in rows if row["level"] == level], "questions")
    make = partial(make_instructions, out=args.out, seed=args.seed, min_pixels=args.min_pixels,
                   max_pixels=args.max_pixels)
    scenes = parallel(make, range(args.scenes), args.workers, "instruct")
    write("instruct", [row for rows in scenes for row in rows], "single-view questions")


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
