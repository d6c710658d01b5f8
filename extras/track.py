"""Mirror metrics.jsonl to a tracker: `--track PROJECT` of sft.py and rl.py. It is trackio, which
keeps everything on this machine (`trackio show` draws it), or wandb where only that is installed;
both have the same calls. Neither is in requirements.txt, and without the flag neither is imported.
"""

import atexit
import importlib
import importlib.util

import tools


def check(project):
    """Raise InputError if --track names a project and no tracker is installed."""
    if project is not None:
        find_library()


def find_library():
    """Return the name of the tracker that is installed. Raise InputError if none is."""
    for name in ("trackio", "wandb"):
        spec = importlib.util.find_spec(name)
        # A folder of that name, such as the one that wandb writes its logs to, has no loader.
        if spec is not None and spec.loader is not None:
            return name
    raise tools.InputError("--track needs trackio or wandb: pip install trackio")


class Tracker:
    """A run in a project, named like the folder --out. What is still waiting is sent when Python
    ends, also after a signal. If training is resumed, trackio goes on in the same run, and has the
    steps twice that were done again; wandb begins another run of the same name.

    flags: of the run, as texts. is_resumed: whether there were steps before."""

    def __init__(self, project, out, flags, is_resumed):
        self.library = importlib.import_module(find_library())
        self.library.init(project=project, name=out.name, config=flags,
                          resume="allow" if is_resumed else "never")
        atexit.register(self.library.finish)

    def log(self, metrics):
        """Log the numbers in a line of metrics.jsonl, a dict, at its step."""
        numbers = {name: value for name, value in metrics.items()
                   if isinstance(value, (int, float)) and name != "step"}
        self.library.log(numbers, step=metrics["step"])
