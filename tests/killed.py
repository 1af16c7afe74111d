"""What runs in a process of its own, to be killed or measured: importable, since such processes are not forked from
pytest, whose autograd may have threads by then."""

import resource
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
