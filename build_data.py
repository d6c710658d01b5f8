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
2. A row keeps the layout of its scene ("objects", "wallpaper"); only the scripted teacher reads it.
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
    not too hard  python build_data.py --filter results/sft/train.rates.jsonl --pass_rate_range 0.1 0.9
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import tools
from tools import check

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220),
           "yellow": (205, 175, 0), "purple": (150, 50, 180), "cyan": (0, 165, 185)}
SHAPES = ["circle", "square", "triangle", "star"]
# side of the image in pixels, a multiple of 9; radius of an object relative to its place; numbers
LEVELS = {"easy": {"side": 504, "radius": 0.43, "lookalikes": 2, "others": 3},
          "medium": {"side": 630, "radius": 0.40, "lookalikes": 5, "others": 5},
          "hard": {"side": 756, "radius": 0.37, "lookalikes": 10, "others": 7}}
# a split's index enters its random seeds: they never overlap
SPLITS = ["train", "easy", "medium", "hard", "instruct", "val"]

# The small language of the scripted teacher, shared by the base model's data and the cold start: a
# word that has to be copied from one turn to the next must look the same in both.
POSITIONS = ["top-left", "top", "top-right", "left", "center", "right",
          "bottom-left", "bottom", "bottom-right"]
PHRASES = {
    "region": "I see {colour} in {places}.",         # a view of nine places: which hold this colour
    "no_region": "I see no {colour}.",
    "wallpaper": "I see {colour} walls in {places}.",  # the whole image: walls hint at what is there
    "no_wallpaper": "I see no {colour} walls.",
    "cell": "I see {colour} {shape} {digit}.",     # a view of one place
    "empty": "I see nothing.",
    "verdict": " Want {wanted}. {verdict}.",       # after a cell: is it what the question names?
    "answer": " Answer {answer}.",                 # what follows from a Yes
    "here": " In {source} {places}.",              # candidates still to be looked at, where seen
    "later": " Later {places}.",                   # parts of the image still to be looked at
    "go": " Go {place}.",
    "scan": " Scan.", "shuffle": " Shuffle.", "hint": " Hint.",      # the plan, said in turn one
    "guess": " Guess {answer}.",                   # an answer that nothing seen supports
    "again": " Not found. Scan again.",
    "back": " Wrong guess. Back.",
    "check": " Check.",
    "sorry": "That call was refused.",
}


# ---- A scene and its picture --------------------------------------------------------------------


def position_box(place):
    """Relative box of one of the nine places of a view, as the teacher writes it."""
    row, col = divmod(POSITIONS.index(place), 3)
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

    objects: [part, place, colour, shape, digit] of each, parts and places by index into POSITIONS, the
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
            "colour": colour, "target_attribute": wanted, "objects": objects, "wallpaper": walls}


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
    paper = np.array([tint.get(wall, [0, 0, 0]) for wall in scene["wallpaper"]], dtype=np.int16)
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


def positions_with(objects, part, colour):
    """Names of the places of a part that hold this colour, in reading order."""
    return [place for place, held in zip(POSITIONS, colours_of(objects, part)) if held == colour]


def describe(kind, colours, wanted):
    """Where in a view of nine a colour is, in the words for a kind: "part" or "wallpaper"."""
    places = [place for place, colour in zip(POSITIONS, colours) if colour == wanted]
    phrase = PHRASES[kind if places else f"no_{kind}"]
    return phrase.format(colour=wanted, places=" ".join(places))


def describe_part(objects, part, colour):
    """"I see red in top left." / "I see no red." """
    return describe("region", colours_of(objects, part), colour)


def describe_walls(walls, colour):
    """"I see red walls in top left." / "I see no red walls." """
    return describe("wallpaper", walls, colour)


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
    if kind == "wallpaper":
        where, everything, noun, mapped = "Which walls are", "what", " walls", asked[0]
    yield question, describe(kind, colours, asked[0])
    for colour in asked[1:]:
        yield f"{where} {colour}?", describe(kind, colours, colour)
    every = [describe(kind, colours, colour) for colour in COLOURS if colour in colours]
    yield f"{where} {everything}?", " ".join(every) or PHRASES["empty"]

    def place_by_place(shown):  # nine lessons in one reply on where a place is
        names = [colour + noun if colour in shown else "nothing" for colour in colours]
        return " ".join(f"{place} {name}." for place, name in zip(POSITIONS, names))

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
    later = rng.permutation(POSITIONS)[:rng.integers(0, 10)].tolist()
    here = [POSITIONS[i] for i in sorted(rng.permutation(9)[:rng.integers(0, 4)])]
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
        call = {"bbox_2d": position_box(POSITIONS[place]), "source": "original_image"}
        return tools.zoom([view], call)

    if not crowded:
        add_nine(image, "all", "wallpaper", scene["wallpaper"], 3)
    for part in rng.permutation(9)[:6 if crowded else 3].tolist():
        add_nine(closer(image, part), f"p{part}", "region", colours_of(objects, part), 2)
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
    fixed = [*tools.PROMPTS.values(), *PHRASES.values(), *(f" {place}" for place in POSITIONS),
             "What digit is on the red square?", "Which shape is the red object with digit 7?",
             " Yes. No.", "user\nassistant\n"]
    said = [text for row in data
            for text in (row["question"], row["answer"], *(turn["text"] for turn in row["turns"]))]
    # words alone, as in <answer>square</answer>: no space before it
    words = [word for text in said for word in text.strip(".?").split()]
    return fixed * 50 + said + words


# ---- The command --------------------------------------------------------------------------------


def parallel(function, jobs, workers, title, initial=0):
    """Map over processes, with a progress bar; yields results in order, whatever the number of
    workers. initial: jobs that were done before. Raises InputError if a worker is killed."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
            yield from tools.progress_bar(pool.map(function, jobs, chunksize=16), desc=title,
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
    add("--import", dest="data_set", metavar="NAME", help="which one")
    add("--source", type=Path, help="its folder; with --filter: questions (data/train.jsonl)")
    add = parser.add_argument_group("filter questions instead").add_argument
    add("--filter", type=Path, nargs="+", metavar="RATES", help="pass rates, from evaluate.py")
    add("--pass_rate_range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="rates to keep (0.1 0.9)")
    add = parser.add_argument_group("common").add_argument
    add("--seed", type=int, default=0, help="another seed draws another world, shuffles anew")
    add("--out", type=Path, help="folder to write to (data, or data/NAME with --import)")
    args = parser.parse_args()
    given = {flag for flag in vars(args) if getattr(args, flag) != parser.get_default(flag)}
    tools.check_number_flags(args, ["seed"])
    check(args.min_pixels <= args.max_pixels, "--max_pixels must be at least --min_pixels")
    mode, fitting = "without --import or --filter", given - {"source", "keep"}
    if args.data_set:
        mode, fitting = "with --import", {"data_set", "source", "seed", "out"}
    elif args.filter:
        mode, fitting = "with --filter", {"filter", "source", "keep"}
    wrong = " and ".join(f"--{flag}" for flag in sorted(given - fitting))
    check(not wrong, f"{wrong} cannot be used {mode}")
    if args.data_set:
        check(args.source, "--import needs --source, the folder that the data set was downloaded to")
        check(args.source.exists(), f"--source {args.source} does not exist")
    args.source, args.pass_rate_range = args.source or Path("data/train.jsonl"), args.pass_rate_range or [0.1, 0.9]
    check(0 <= args.pass_rate_range[0] <= args.pass_rate_range[1] <= 1,
         "--pass_rate_range must be two pass rates, 0 <= LOW <= HIGH <= 1")
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
        from extras.import_data import import_data
        import_data(args.data_set, args.source, args.out, args.seed)
    elif args.filter:
        from extras.import_data import filter_questions
        filter_questions(args.filter, args.source, *args.pass_rate_range)
    else:
        draw_world(args)


if __name__ == "__main__":
    tools.run(main)
