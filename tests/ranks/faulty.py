"""`fastgeo`, in which a signal comes when a rank calls a function for the nth time.

    torchrun ... faulty.py RANK:MODULE:FUNCTION:N:SIGNAL:WHO COMMAND ...

WHO gets it is that "rank", "torchrun", the "others" among the ranks, or "all" of these.
"""

import functools
import importlib
import os
import signal
import sys
import time

from fastgeo.app.cli import main
from fastgeo.ranks import states


def happen(name: str, who: str) -> None:
    own, torchrun, number = os.getpid(), os.getppid(), signal.Signals[name]
    with open(f"/proc/{torchrun}/task/{torchrun}/children") as children:
        ranks = [int(rank) for rank in children.read().split()]
    others = [rank for rank in ranks if rank != own]
    groups = {"rank": [own], "torchrun": [torchrun], "others": others, "all": [*ranks, torchrun]}
    for process in groups[who]:
        os.kill(process, number)
    if who == "others":
        time.sleep(2)  # until they have told


def install(module: str, function: str, call: int, name: str, who: str) -> None:
    *owners, last = function.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, last), 0

    @functools.wraps(original)
    def faulty(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            happen(name, who)
        return original(*args, **kwargs)

    setattr(owner, last, faulty)


if __name__ == "__main__":
    states.SHARE = 0  # as many states are saved as are asked for
    fault, *argv = sys.argv[1:]
    if fault != "none":
        rank, module, function, n, name, who = fault.split(":")
        if rank == os.environ["RANK"]:
            install(module, function, int(n), name, who)
    main(argv)
