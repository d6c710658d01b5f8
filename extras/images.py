"""Can the images of rows be opened? Every stage asks this when it has read its rows.

Otherwise a missing image would be met only when it is reached, after hours of work. check_images
reads the beginning and the end of every file and decodes none: 15,000 files take two seconds. A
file that is damaged in its middle is still met later, and so is a BMP, TIFF, AVIF or JPEG 2000 that
was cut off: their ends all look alike.

Command:
    python extras/images.py data/train.jsonl data/coldstart.jsonl
"""

import argparse
import itertools
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

if __name__ == "__main__":
    import root  # noqa: F401
import tools
from extras import terminal
from tools import InputError, check


class Size(NamedTuple):
    """An image of which only the size is known. tools.zoom cuts crops from it as from an image."""
    width: int
    height: int

    def crop(self, box):
        left, top, right, bottom = box
        return Size(right - left, bottom - top)


# How the files of a format end.
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}


def read_size(image):
    """Return the Size that tools.to_rgb will give to an image that was opened, but not decoded.
    Raise InputError as tools.check_header, and nearly anything if the file was cut off."""
    tools.check_header(image)
    # 1. A camera's photo is turned upright. (PIL has already turned the size of a TIFF. The method
    #    is not image.getexif, since that of a PNG decodes the image.)
    width, height = image.size
    orientation = tools.Image.Image.getexif(image).get(0x0112)
    if orientation in (5, 6, 7, 8) and image.format != "TIFF":
        width, height = height, width
    # 2. Where the end is not what it should be, decoding tells whether anything is missing.
    if image.format in ENDS:
        file_size = image.fp.seek(0, os.SEEK_END)
        image.fp.seek(max(0, file_size - 64))
        if ENDS[image.format] not in image.fp.read():
            tools.to_rgb(image)
    return Size(width, height)


def leaves_folder(folder, path):
    """Return whether a link leads from `path` out of the folder of the data. The folder itself may
    be a link, and so may a folder directly in it: data/images may be on another disk."""
    if "\0" in str(path):  # no file has such a name
        return False
    names = Path(os.path.relpath(path, folder)).parts
    allowed = [os.path.realpath(folder)]
    if len(names) > 1 and names[0] != "..":
        allowed.append(os.path.realpath(folder / names[0]))
    real_path = Path(os.path.realpath(path))
    return not any(real_path.is_relative_to(real_folder) for real_folder in allowed)


def images_that_leave(folder, names):
    """Return which of these images are outside the folder, by links. Only links are followed, and
    each of the images' folders once: following every path would take longer than all the rest."""
    folder_leaves = {}
    leaving_names = set()
    for name in names:
        image_folder = os.path.dirname(name)
        if image_folder not in folder_leaves:
            folder_leaves[image_folder] = leaves_folder(folder, folder / image_folder / "image")
        is_link = os.path.islink(os.path.join(folder, name))
        if folder_leaves[image_folder] or (is_link and leaves_folder(folder, folder / name)):
            leaving_names.add(name)
    return leaving_names


def inspect_image(folder, leaving_names, name):
    """Return an image's Size, or the InputError that says why it cannot be used."""
    path = folder / name
    try:
        check(not re.match(r"data:|\w+://", name) and len(name) < 1000, f"'{name[:80]}' is not the "
              "path of an image; store the image in a file, in the folder of the data")
        check(name not in leaving_names, f"{path}: a link leads out of the folder {folder}; copy "
              "the image into it (only a whole folder directly in it may be a link)")
        return tools.open_image(path, read_size)
    except InputError as error:
        return error


def row_problem(row, size, replays_zooms):
    """Return why a row cannot be used, None if it can. size: see inspect_image."""
    if isinstance(size, InputError):
        return str(size)
    if replays_zooms:
        try:
            tools.replay(row, size)
        except InputError as error:
            return f"{error} Remove this row"
    return None


def check_images(path, rows, folder=None, replays_zooms=False):
    """Raise InputError unless every image can be opened and, if the stage replays the zooms of
    trajectories, every zoom can be carried out. The message names the line of the first row that
    cannot be used, and counts the others.

    rows: all rows of the file `path`, or the first ones. folder: of the images; None: of `path`."""
    # 1. Every image once. Threads, since a network disk answers many requests at a time.
    folder = Path(path).parent if folder is None else folder
    names = list(dict.fromkeys(row["image"] for row in rows))
    inspect = partial(inspect_image, folder, images_that_leave(folder, names))
    with ThreadPoolExecutor(16) as pool:
        sizes = dict(zip(names, pool.map(inspect, names)))
    # 2. Every row.
    problems = {}  # index of the row -> why it cannot be used
    for row_index, row in enumerate(rows):
        problem = row_problem(row, sizes[row["image"]], replays_zooms)
        if problem is not None:
            problems[row_index] = problem
    # 3. The message.
    if problems:
        first_index = min(problems)
        hint = other_spelling(folder / rows[first_index]["image"])
        num_more = len(problems) - 1
        more = f" (and {num_more} more {'row' if num_more == 1 else 'rows'})" if num_more else ""
        raise InputError(f"{path}:{line_of_row(path, first_index)}: {problems[first_index]}{hint}"
                         f"{more}")


def line_of_row(path, row_index):
    """Return the number of the line that holds a row: blank lines hold none."""
    with open(path, "rb") as file:
        line_numbers = (number for number, line in enumerate(file, start=1) if line.strip())
        return next(itertools.islice(line_numbers, row_index, None))


def other_spelling(path):
    """Return a hint if there is no such file, but one whose name is spelled otherwise."""
    def plain(name):
        """Return a name without what differs between systems: case, accents stored apart, %20."""
        return unicodedata.normalize("NFC", unquote(name)).casefold().strip()

    # os.path, since pathlib raises for names that no file can have
    spelled = Path(str(path).replace("\\", "/"))
    if not os.path.lexists(path) and os.path.isdir(spelled.parent):
        for name in sorted(os.listdir(spelled.parent)):
            if plain(name) == plain(spelled.name):
                return f"; there is {spelled.parent / name}"
    return ""


def main():
    """Look at the images of the rows of files."""
    parser = argparse.ArgumentParser(description="Look whether the images of rows can be opened.")
    parser.add_argument("files", type=Path, nargs="+", help="questions or trajectories")
    for path in parser.parse_args().files:
        rows = tools.read_jsonl(path, tools.check_question)
        check_images(path, rows)
        print(f"{path}: the images of {len(rows)} rows can be opened")


if __name__ == "__main__":
    terminal.run(main)
