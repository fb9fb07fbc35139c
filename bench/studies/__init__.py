"""Studies: further measurements of one trained run, chosen under ``evaluate.studies`` of a suite.

A study is a module with ``COLUMNS``, the columns of its CSV file, and ``measure(context, *, options...) -> rows``; the
annotations of its options are the schema of its settings. Rows are plain mappings with a ``status``: "ok"; or "not
defined" and the reason, of a number that does not exist; or, of a study that failed as a whole, "not measured" and why.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.studies.names import STUDIES, study

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.config import RunConfig
    from bench.data import Dataset
    from models.base import Model


@dataclass(frozen=True)
class Context:
    """A trained run, ready to be measured: the averaged weights are in ``model``."""

    model: Model
    run: RunConfig
    data: Dataset
    device: torch.device

    def points(self, count: int | None = None) -> Tensor:
        """The first test images as model variables x, on the device: those of likelihood.json, in its order."""
        from bench.likelihood import test_points

        most = len(self.data.test) if self.run.evaluate.images is None else self.run.evaluate.images
        count = most if count is None else min(count, most)
        return test_points(self.data, count, self.run.seed).to(self.device)

    def raw_model(self) -> Model | None:
        """A copy of the model with the weights of the last step, not averaged; None where they were not kept."""
        from safetensors.torch import load_file

        from bench.checkpoint import RAW_WEIGHTS

        path = self.run.folder / "weights" / RAW_WEIGHTS
        if not path.is_file():
            return None
        model = copy.deepcopy(self.model)
        model.load_state_dict(load_file(path, device=str(self.device)))
        return model


def conduct(context: Context, folder: Path) -> None:
    """Measure every study of the run's configuration and write one CSV file each; a failed one says why in a row."""
    from models.base import NotDefined
    from models.flows import FlowInverseError
    from models.integrators import IntegrationError

    asked = context.run.evaluate.studies
    for name in STUDIES:
        if name not in asked:
            (folder / f"{name}.csv").unlink(missing_ok=True)  # of an earlier configuration
    for name, options in asked.items():
        module, path = study(name), folder / f"{name}.csv"
        try:
            write_rows(path, module.COLUMNS, module.measure(context, **options))
        except (FlowInverseError, IntegrationError, NotDefined, RowNotFinite) as error:
            write_rows(path, module.COLUMNS, [{"status": f"not measured: {' '.join(str(error).split())}"}])


class RowNotFinite(ValueError):
    """A row holds NaN or infinity where a status should stand."""


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV, atomically; a blank where a row has None.

    Raises RowNotFinite for NaN or infinity, ValueError for a column that is not one of ``columns``.
    """
    import pandas as pd

    from bench.files import write_text_atomic

    for row in rows:
        unknown = [key for key in row if key not in columns]
        if unknown:
            raise ValueError(f"{path.stem}: a row has the column {unknown[0]!r}; accepted: {', '.join(columns)}")
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RowNotFinite(f"{path.stem}: {key} = {value} in {dict(row)}; a status must stand for it")
    write_text_atomic(path, pd.DataFrame(list(rows), columns=list(columns), dtype=object).to_csv(index=False))
