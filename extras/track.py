"""Mirror metrics.jsonl to a tracker: `--track PROJECT` of sft.py and rl.py. It is trackio, which
keeps everything on this machine (`trackio show` draws it), or wandb where only that is installed;
both have the same calls. Neither is in requirements.txt, and without the flag neither is imported.
"""

import atexit
import importlib
import importlib.util

import tools


def find_library():
    """Return the name of the tracker that is installed. Raise InputError if none is."""
    for name in ("trackio", "wandb"):
        if importlib.util.find_spec(name):
            return name
    raise tools.InputError("--track needs trackio or wandb: pip install trackio")


class Tracker:
    """A run in the project --track, named like the folder --out. If training is resumed, so is the
    run. What is still waiting to be sent is sent when Python ends, also after a signal."""

    def __init__(self, args):
        self.library = importlib.import_module(find_library())
        flags = {name: str(value) for name, value in vars(args).items()}
        self.library.init(project=args.track, name=args.out.name, config=flags, resume="allow")
        atexit.register(self.library.finish)

    def log(self, metrics):
        """Log the numbers in a line of metrics.jsonl, a dict, at its step."""
        numbers = {name: value for name, value in metrics.items()
                   if isinstance(value, (int, float))}
        self.library.log(numbers, step=metrics["step"])
