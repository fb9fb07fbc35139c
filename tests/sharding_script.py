"""What ``tests/test_sharding.py`` starts by ``torchrun``: messages between two processes, then evaluations by both."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from toy_model import LEVELS, SETTINGS, Toy

from bench import cli, sharding, stopping
from bench.data import make_dataset
from bench.errors import InputError
from bench.likelihood import measure
from bench.pieces import Pieces
from bench.sharding import on_main, session, spread, team
from bench.stopping import Stopped
from models.base import NotDefined
from models.integrators import IntegrationError

COUNT = 5
FAILURES = (NotDefined, IntegrationError)


def piece(k):
    """What the tests spread: arrays of different sizes, of which one process has more."""
    return {
        "value": np.arange(k * 100, dtype=np.float32),
        "rank": np.array(team().rank),
        "name": np.array(f"piece {k}"),
    }


def described(found):
    """JSON of what ``spread`` gave, for comparison with :func:`piece`."""
    return [[len(part["value"]), float(part["value"].sum()), int(part["rank"]), str(part["name"])] for part in found]


def failing(*failures):
    """The message of what spread raises where the pieces named in ``failures`` do."""
    given = dict(failures)

    def work(k):
        if k in given:
            raise given[k]
        return piece(k)

    with session():
        try:
            spread(COUNT, work, FAILURES)
        except FAILURES as error:
            return [type(error).__name__, str(error)]


def broken(work):
    """The message of what a session ends with."""
    try:
        with session(), session():
            work()
            spread(COUNT, piece)  # where the other process is when this one fails
    except Exception as error:  # noqa: BLE001 - it is what is tested
        return [type(error).__name__, str(error)]


def raise_on(rank, error):
    if team().rank == rank:
        raise error


class Fragile(Toy):
    """A Gaussian whose ODE fails for image 7, and whose chain has no finite bound for image 9."""

    def nll_parts(self, x, generator=None, **options):
        """Fails where image 7 is."""
        if 7 in generator.index:
            raise IntegrationError(f"unfinished in the batch of image {int(generator.index[0])}")
        return super().nll_parts(x, generator=generator, **options)

    def chain_parts(self, x, generator=None):
        """NaN for image 9."""
        parts = super().chain_parts(x, generator)
        return parts | {"prior": torch.where(generator.index == 9, math.nan, parts["prior"])}


def fragile():
    """The record of a model that fails for some images."""
    pixels = torch.arange(24 * 4, dtype=torch.uint8).remainder(LEVELS).reshape(24, 1, 2, 2)
    record, _ = measure(Fragile(), make_dataset("small", LEVELS, pixels[:12], pixels[12:]), SETTINGS, seed=3)
    return record


def messages():
    """Results of every kind of message, as JSON."""
    with session():
        said = {"spread": described(spread(COUNT, piece)), "nothing": spread(0, piece)}
        said["main only"] = len(spread(COUNT, piece, main_only=True))
        said["on main"] = on_main(lambda: [team().rank, team().size, float("inf"), 0.1])
        sharding.CHUNK = 7  # messages of many parts, of which some processes have none
        said["chunks"] = described(spread(2, piece))
        sharding.CHUNK = 2**26
    # batch 2 is the first process's, batch 3 the second's
    said["first failure"] = failing((3, NotDefined("third")), (2, IntegrationError("second")))
    said["failure elsewhere"] = failing((3, NotDefined("third")), (4, IntegrationError("fourth")))
    said["fault"] = broken(lambda: raise_on(1, ValueError("a fault\nof the code")))
    said["bad input"] = broken(lambda: raise_on(1, InputError("train.steps: accepted: more")))
    said["fault of the first"] = broken(lambda: on_main(lambda: raise_on(0, OSError("disk full"))))
    said["stopped"] = broken(lambda: on_main(lambda: raise_on(0, Stopped("time is up"))))
    said["both"] = broken(lambda: raise_on(team().rank, ValueError(f"fault of {team().rank}")))
    with session():
        said["afterwards"] = described(spread(COUNT, piece))
        said["fragile"] = fragile()
    return said


def begin(folder, command):
    """Execute ``command`` until the second process is asked to stop; its files so far go to ``folder``/begun."""
    whole, saved = Pieces.save, []

    def save(self, *arguments):
        whole(self, *arguments)
        saved.append(arguments)
        if team().rank == 1 and len(saved) == 4:
            stopping.request("test")

    Pieces.save = save
    code = cli.execute(command)
    Pieces.save = whole
    assert code == stopping.EXIT_CODE, code
    with session():
        on_main(lambda: shutil.copytree(folder, folder / "begun", ignore=shutil.ignore_patterns("log")) and None)


def main(folder, *commands):
    """Messages to ``folder``/messages-RANK.json; then each of ``commands``, JSON lists of the command line's words.

    The first command is stopped once and then continued.
    """
    torch.set_num_threads(1)
    sharding.join()
    (Path(folder) / f"messages-{os.environ['RANK']}.json").write_text(json.dumps(messages()))
    begin(Path(folder), json.loads(commands[0]))
    for command in commands:
        code = cli.execute(json.loads(command))
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
