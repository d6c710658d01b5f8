"""What a stage prints must not cost what it computes.

Who reads the output may go away (`python evaluate.py | head -1`), its disk may be full, and its
encoding may lack letters of a question. Without this file each of these would end a stage in the
middle of its work. And Ctrl-C would be answered by every process of a pool.
"""

import contextlib
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
