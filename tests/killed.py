"""What runs in a process of its own, to be killed or measured: importable, since most of these processes are not forked
from pytest, whose autograd may have threads by then."""

import multiprocessing
import os
import random
import resource
import signal
import sys

import torch

from restore.app import cli
from restore.bench.run import run_benchmark


def run(config, log):
    torch.set_num_threads(1)
    with open(log, "a") as file:
        run_benchmark(config, progress=lambda event: (file.write(event.get("batch", "") + "\n"), file.flush()))


def command(*arguments):
    """The command line; what it prints goes nowhere."""
    torch.set_num_threads(1)
    sys.argv = ["restore", *map(str, arguments)]
    sys.stdout = sys.stderr = open("/dev/null", "w")
    cli.main()


def one_step(photo, out, task, memory, pipe):
    """Restores `photo` in one step; sends its plan, then (error, peak of resident bytes, of those new)."""
    import restore
    from restore.app import files
    from restore.app.choice import MethodChoice
    from restore.app.run import RestoreJob
    from restore.memory import Planner
    from restore.task import load_task

    torch.set_num_threads(1)
    prior = restore.load("embedded", device="cpu")
    # Windows without overlap are a quarter as many; those of one call, and all else that needs memory, are as ever.
    prior.windows |= {"overlap": 0.0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    options = {"planner": Planner(prior, memory), "announce": pipe.send}
    job = RestoreJob(prior, load_task(task), MethodChoice(steps=1), **options)
    (outcome,) = job.run(files.find_photos([photo], out))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send((outcome.error, after, after - before))


def kill_until_done(run, config, *, kills, seconds, attempts, patience):
    """Call run(config) in forked processes, the first `kills` of them killed within `seconds` (shortest, longest),
    until one ends by itself within `patience` seconds; returns the number of kills and the last exit code."""
    context, killed, chance = multiprocessing.get_context("fork"), 0, random.Random(0)
    for _ in range(attempts):
        child = context.Process(target=run, args=(config,))
        child.start()
        child.join(chance.uniform(*seconds) if killed < kills else patience)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            killed += 1
        elif child.exitcode == 0:
            break
    return killed, child.exitcode
