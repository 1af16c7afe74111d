"""How the threads of a command wait for each other."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

POLICY = "OMP_WAIT_POLICY"
SETTINGS = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # what decides it: OpenMP's, of GNU's and of LLVM's


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Let threads that wait for others sleep instead of spinning, unless the user has decided.

    A network's evaluation has hundreds of parallel regions, and at the end of each GNU's OpenMP, torch's on Linux,
    spins: beside other programs, on the core that the awaited thread needs. It reads the environment when torch is
    loaded.
    """
    if "torch" not in sys.modules and not any(name in environment for name in SETTINGS):
        environment[POLICY] = "PASSIVE"
