"""What ``tests/test_processes.py`` starts by ``torchrun``: runs of ``tiny_run``, whole, and one that stops midway."""

import os
import sys

import torch
from two_processes import ASKED, COMMAND, STOP, STOPPED, VARIANTS, ask_one_at, stop_at, tiny_run

from bench.train import Trainer, train


def main(folder: str) -> None:
    """Train each variant under ``folder``/whole, STOPPED up to STOP under stopped, COMMAND up to ASKED in asked."""
    torch.set_num_threads(1)
    use(folder, "whole")
    for variant in VARIANTS:
        train(tiny_run(variant), progress=False)
    use(folder, "stopped")
    trainer = Trainer(tiny_run(STOPPED), progress=False)
    stop_at(trainer, STOP)
    use(folder, "asked")
    ask_one_at(Trainer(tiny_run(COMMAND), progress=False), ASKED)
    torch.distributed.destroy_process_group()


def use(folder: str, name: str) -> None:
    """Send results and checkpoints to ``folder``/``name``."""
    os.environ["INDM_BENCH_RUNS"] = f"{folder}/{name}/runs"
    os.environ["INDM_BENCH_CHECKPOINTS"] = f"{folder}/{name}/checkpoints"


if __name__ == "__main__":
    main(sys.argv[1])
