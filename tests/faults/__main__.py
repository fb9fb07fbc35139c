"""``python tests/faults [--faults 300] [--write]``: run the battery, keep its figures, write reports/reliability.md.

``--write`` only writes the report again from the figures that are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from fault_ledger import CI_POINTS, FAULTS, FOLDER, write_report

parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
parser.add_argument("--faults", type=int, default=300, help="points of kills; other faults in proportion")
parser.add_argument("--write", action="store_true", help="only write the report from the figures that are there")
parser.add_argument("--processes", type=int, default=1, help="tests at a time")
given = parser.parse_args()
code = 0
if not given.write:
    workers = ["-n", str(given.processes), "--dist", "loadfile"] if given.processes > 1 else []
    options = ["--faults", str(given.faults), "--faults-file", str(FOLDER / FAULTS), *workers]
    code = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(Path("tests/faults")), *options], check=False
    ).returncode
if (FOLDER / FAULTS).is_file():
    print(write_report(FOLDER, CI_POINTS))
sys.exit(code)
