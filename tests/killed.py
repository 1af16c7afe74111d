"""A benchmark in a process of its own that can be killed: importable, since such processes are not forked from pytest,
whose autograd may have threads by then."""

import sys

import torch

from restore.app import cli
from restore.bench.run import bench


def run(config, log):
    torch.set_num_threads(1)
    with open(log, "a") as file:
        bench(config, progress=lambda event: (file.write(event.get("batch", "") + "\n"), file.flush()))


def command(*arguments):
    """The command line; what it prints goes nowhere."""
    torch.set_num_threads(1)
    sys.argv = ["restore", *map(str, arguments)]
    sys.stdout = sys.stderr = open("/dev/null", "w")
    cli.main()
