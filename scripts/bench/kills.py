#!/usr/bin/env python
"""SIGKILL a profile at random moments and go on with it: at most the build under way is lost, and the table is whole.

python scripts/bench/kills.py zoo:fashion_resnet --kills 20
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np

import hwsearch as hs
from hwsearch.latency.model import fit
from hwsearch.table.table import LatencyTable

CLI = [sys.executable, "-c", "from hwsearch.cli import main; main()"]


def main() -> None:
    parser = common.parser(__doc__, tasks="zoo:fashion_resnet")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--axes", default="width,precision")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        command = [*CLI, "profile", args.task, "-o", str(path), "--axes", args.axes, "--time-limit"]
        kept: list[object] = []
        lost = 0
        for number in range(args.kills):
            process = subprocess.Popen(
                [*command, "10m"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            assert process.stderr is not None
            line = process.stderr.readline()  # the first build is done: from here on it may die at any moment
            while line and not line.startswith("["):
                line = process.stderr.readline()
            time.sleep(float(rng.uniform(0.0, 6.0)))
            process.kill()
            said = sum("of the reference" in rest for rest in [line, *process.stderr])
            process.wait()
            table = LatencyTable.load(path)
            keys = [(b.role, b.key, b.measured_at) for b in table.builds]
            if keys[: len(kept)] != kept:
                sys.exit(f"kill {number + 1}: builds that were on disk are gone or changed")
            lost = max(lost, said - (len(keys) - len(kept)))
            print(
                f"kill {number + 1}: {len(keys)} builds on disk, {len(keys) - len(kept)} of them new",
                flush=True,
            )
            kept = list(keys)
        subprocess.run([*command, "3m"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        table = LatencyTable.load(path)
        keys = [(b.role, b.key, b.measured_at) for b in table.builds]
        if keys[: len(kept)] != kept:
            sys.exit("builds that were on disk are gone or changed")
        model = fit(table)
        offered = sum(map(len, table.offered().values()))
        print(f"resumed to the end: {len(keys)} builds, ended {table.header.ended}, {offered} (unit, variant) offered, "
              f"{len(model.terms())} terms fitted; builds announced but lost in a kill: at most {max(lost, 0)}")  # fmt: skip
        assert hs.LatencyTable.load(path).header.ended


if __name__ == "__main__":
    main()
