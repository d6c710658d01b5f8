"""What a user sees at the terminal: help, progress, errors, and how Ctrl-C is answered.

What a stage prints must not cost what it computes.

Who reads the output may go away (`python evaluate.py | head -1`), its disk may be full, and its
encoding may lack letters of a question. Without this file each of these would end a stage in the
middle of its work. And Ctrl-C would be answered by every process of a pool.
"""

import argparse
import contextlib
import errno
import io
import os
import signal
import sys


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


def describe(error):
    """Return one line about an OSError: what, where, and what to do."""
    advice = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "; earlier files are untouched: free the disk or change --out and run again"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        advice = "; a file is where a folder is needed: change --out"
    return f"{error.strerror or error} ({error.filename or 'while writing'}){advice}"


class HelpFormatter(argparse.HelpFormatter):
    """Adds its default to the help of a flag, unless the help says what happens without it."""

    def _get_help_string(self, action):
        default = action.default
        is_switch = action.nargs == 0 and default in (False, argparse.SUPPRESS)
        if not action.option_strings or is_switch or "default" in action.help:
            return action.help
        if isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{action.help} (default: {default})"


class PlainLines:
    """A file for tqdm that prints each state of a progress bar on a line of its own."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass
