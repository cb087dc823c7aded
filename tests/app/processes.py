"""Processes of `fastgeo` that can be killed, limited and looked at.

Importing torch takes seconds, so one process imports it and forks for every command: the child is
a process of its own in every other respect, and runs what the entry point `fastgeo` runs.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path


class Fastgeo:
    """A command of fastgeo, running in a process of its own."""

    def __init__(self, parent, pid, folder):
        self._parent, self.pid, self._folder = parent, pid, folder

    @property
    def stderr(self):
        return self._read("err").replace("\r", "\n")

    @property
    def stdout(self):
        return self._read("out")

    def _read(self, name):
        file = self._folder / f"{self.pid}.{name}"
        return file.read_text() if file.exists() else ""

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def wait(self):
        """Its exit code; negative, if a signal ended it."""
        return self._parent.ask(wait=self.pid)

    def has_ended(self):
        with open(f"/proc/{self.pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] == "Z"


class Parent:
    """Imports fastgeo once and forks."""

    def __init__(self, folder):
        self._folder = Path(folder)
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **what):
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *argv, cwd=None, **limits):
        """`limits`: largest_file in bytes; bound_by_modes, as a root without capabilities is."""
        argv = list(map(str, argv))
        place = {"cwd": str(cwd or os.getcwd()), "to": str(self._folder)}
        return Fastgeo(self, self.ask(argv=argv, **place, **limits), self._folder)

    def run(self, *argv, **options):
        """A command that has ended, and its exit code."""
        process = self.start(*argv, **options)
        return process, process.wait()

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def drop_capabilities():
    """Root may write anywhere; without its capabilities it is the owner of its files, no more.

    Another user would do as well, were the interpreter's own files readable to all.
    """
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, in two halves
    if ctypes.CDLL(None, use_errno=True).capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _child(argv, cwd, to, largest_file=None, bound_by_modes=False):
    from fastgeo.app.cli import main

    os.chdir(cwd)
    sys.path.insert(0, cwd)
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{to}/{os.getpid()}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if bound_by_modes:
        drop_capabilities()
    sys.argv[1:] = argv
    code = 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _serve():
    import matplotlib.pyplot  # noqa: F401 - imported by no child again
    import scipy.optimize  # noqa: F401
    import torch._dynamo  # noqa: F401 - torch.optim does

    import fastgeo.app.cli
    import fastgeo.app.stages  # noqa: F401 - as every command does late

    for line in sys.stdin:
        what = json.loads(line)
        if "wait" in what:
            answer = os.waitstatus_to_exitcode(os.waitpid(what["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _child(**what)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
