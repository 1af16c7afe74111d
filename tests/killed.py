"""A benchmark in a process of its own that can be killed: importable, since such processes are not forked from pytest,
whose autograd may have threads by then."""

import torch

from restore.bench.run import bench


def run(config, log):
    torch.set_num_threads(1)
    with open(log, "a") as file:
        bench(config, progress=lambda event: (file.write(event.get("batch", "") + "\n"), file.flush()))
