"""How a script runs at the terminal: its flags and their help, progress, errors, and how Ctrl-C is
answered. Every script ends with terminal.run(main).

What a stage prints must not cost what it computes. Who reads the output may go away
(`python evaluate.py | head -1`), its disk may be full, and its encoding may lack letters of a
question. Each of these would otherwise end a stage in the middle of its work.
"""

import argparse
import contextlib
import errno
import gc
import io
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

import tools

# ---- Flags --------------------------------------------------------------------------------------


class HelpFormatter(argparse.HelpFormatter):
    """Adds its default to the help of a flag, unless the help says what happens without it."""

    def _get_help_string(self, action):
        """Return the help of a flag (argparse calls this), a value of a list without brackets."""
        default = action.default
        is_switch = action.nargs == 0 and default in (False, argparse.SUPPRESS)
        if not action.option_strings or is_switch or "default" in action.help:
            return action.help
        if isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{action.help} (default: {default})"


def make_parser(description):
    """Return a parser of a script's flags, whose --help shows their defaults."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)


def check_number_flags(args, may_be_zero=(), any_number=()):
    """Raise InputError unless every flag that is a number is finite and above 0. may_be_zero: names
    of flags that may also be 0; any_number: names of flags that are not checked."""
    for flag_name, value in vars(args).items():
        if type(value) not in (int, float) or flag_name in any_number:
            continue
        if flag_name in may_be_zero:
            tools.check(0 <= value < math.inf,
                        f"--{flag_name} {value} must be a number of at least 0")
        else:
            tools.check(0 < value < math.inf, f"--{flag_name} {value} must be a number above 0")


def check_unused(args, parser, names, when):
    """Raise InputError if a flag among `names`, which has no meaning in this case, was given. when:
    the case, such as "with --import"."""
    given = [f"--{name}" for name in sorted(names)
             if getattr(args, name) != parser.get_default(name)]
    tools.check(not given, f"{' and '.join(given)} cannot be used {when}")


# ---- Running a script ---------------------------------------------------------------------------


def run(main):
    """Run main() of a stage and print how long it took. What a user can cause ends in one line on
    stderr; any other error keeps its traceback. A stage that Ctrl-C interrupts may raise
    KeyboardInterrupt with a text: what is saved, and how to continue."""
    # 1. Whatever happens to the terminal, main() runs to its end.
    protect_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C; trainers have their own
    script_name = Path(sys.argv[0]).name
    rank = int(os.environ.get("RANK", "0"))
    start_time = time.time()
    # 2. Run it. Each kind of error has its line.
    try:
        main()
        reason = lost_output()
        tools.check(reason is None, f"what was printed is lost ({reason}); the files are written")
    except tools.InputError as error:
        sys.exit(f"{script_name}: error: {error}")
    except OSError as error:  # disk full, no permission; no file is half-written (write_atomic)
        sys.exit(f"{script_name}: error: {describe(error)}")
    except RuntimeError as error:  # of torch.distributed, if the process of another rank has ended
        if not re.search("by peer|Broken pipe|Timed out waiting|remote process", str(error)):
            raise
        reason = " ".join(str(error).split())[:400]
        sys.exit(f"{script_name}: rank {rank} stops because another process has ended ({reason})")
    except KeyboardInterrupt as interrupt:
        note = str(interrupt) or "nothing new was saved"
    else:
        if rank == 0:
            minutes, seconds = divmod(time.time() - start_time, 60)
            print(f"{script_name}: finished in {minutes:.0f} min {seconds:.0f} s", flush=True)
        return
    # 3. It was interrupted. Say what is saved, and end at once.
    gc.collect()  # frees the semaphores of a pool; left behind, they would be warned about
    if rank == 0:
        sys.stdout.flush()
        print(f"{script_name}: interrupted; {note}", file=sys.stderr, flush=True)
    os._exit(130)  # sys.exit would wait for threads that wait for a server


def describe(error):
    """Return one line about an OSError: what, where, and what to do."""
    advice = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "; earlier files are untouched: free the disk or change --out and run again"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        advice = "; a file is where a folder is needed: change --out"
    return f"{error.strerror or error} ({error.filename or 'while writing'}){advice}"


# ---- Progress -----------------------------------------------------------------------------------


def progress_bar(*args, **kwargs):
    """Return tqdm's bar. Where there is no terminal it prints a plain line every half minute."""
    if not sys.stderr.isatty():
        bar_format = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        kwargs.update(file=PlainLines(), mininterval=30, maxinterval=30, bar_format=bar_format)
    return tqdm(*args, **kwargs)


class PlainLines:
    """A file for tqdm that prints each state of a progress bar on a line of its own."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass


# ---- What is printed, and Ctrl-C ----------------------------------------------------------------


class SafeStream:
    """stdout or stderr. When printing fails, what follows is dropped, and the error is kept."""

    def __init__(self, stream):
        self.stream = stream
        self.error = None

    def __getattr__(self, name):    # isatty, encoding and so on
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *args):
        """Call a function of the stream. If it fails, send what is still in the stream's buffer,
        and all that is written later, nowhere."""
        try:
            function(*args)
        except OSError as error:
            self.error = error
            null_device = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_device, self.stream.fileno())
            os.close(null_device)


def protect_streams():
    """Let stdout and stderr fail without an exception. Letters that their encoding lacks are
    printed as \\u1234."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:          # it was closed before Python started
            stream = open(os.devnull, "w")
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, SafeStream(stream))


def lost_output():
    """Return why something printed to stdout was lost, or None. That its reader has gone is no
    reason: `| head -1` is meant to end so."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is None or isinstance(error, BrokenPipeError):
        return None
    return error.strerror


@contextlib.contextmanager
def only_parent_answers_ctrl_c():
    """Let the processes that are started here never see Ctrl-C, from their first moment on: they
    inherit what this thread blocks. If Ctrl-C or SIGTERM comes meanwhile, raise KeyboardInterrupt
    when all are started, since half a start ends in tracebacks of the processes."""
    interrupts = []
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, lambda *args: interrupts.append(args))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if interrupts:
        raise KeyboardInterrupt
