#!/usr/bin/env python
"""SIGKILL a command at random moments and go on with it: at most the build under way is lost, and every file is whole.

    python scripts/bench/kills.py zoo:fashion_resnet --kills 20
    python scripts/bench/kills.py tests/tiny.py:cnn --run --kills 50 --backend onnxruntime

With --run it is `hwsearch run` that is killed, at moments spread evenly over all of its stages; a run that ended before is not
counted. After each kill every file in the folder is read, builds that were on disk are there unchanged, and in the end the same
command meets its budget or says that it cannot.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import onnx
from safetensors.torch import load_file

import hwsearch as hs
from hwsearch.allocate.front import Front
from hwsearch.latency.model import fit
from hwsearch.table.table import LatencyTable

CLI = [sys.executable, "-c", "from hwsearch.cli import main; main()"]


def main() -> None:
    parser = common.parser(__doc__, tasks="zoo:fashion_resnet", backend=True)
    parser.add_argument("--run", action="store_true", help="kill `hwsearch run`")
    parser.add_argument("--budget", default="latency=70%%")
    parser.add_argument("--time-limit", default="60s", help="of the run that is killed")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--axes", default="width,precision")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    if args.run:
        return kill_runs(args, rng)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        command = [*CLI, "profile", args.task, "-o", str(path), "--backend", args.backend, "--axes", args.axes, "--time-limit"]
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


def kill_runs(args: argparse.Namespace, rng: np.random.Generator) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "run"
        command = [
            *CLI, "run", args.task, "-o", str(folder), "--backend", args.backend, "--budget", args.budget.replace("%%", "%"),
            "--axes", args.axes, "--time-limit", args.time_limit, "--quiet",
        ]  # fmt: skip
        begun = time.monotonic()
        code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
        whole_s = time.monotonic() - begun
        print(f"undisturbed: exit code {code} after {whole_s:.0f} s", flush=True)
        kept: list[object] = []
        number = since = 0
        while number < args.kills:
            if since % 5 == 0:  # as a run goes on where it was killed, later stages are only seen by runs that begin anew
                shutil.rmtree(folder, ignore_errors=True)
                kept = []
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(float(rng.uniform(2.0, whole_s)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            keys = whole(folder)
            if keys[: len(kept)] != kept:
                sys.exit(f"kill {number + 1}: builds that were on disk are gone or changed")
            kept = keys
            if process.returncode >= 0:  # it ended before, which is no kill
                since = 0
                continue
            number, since = number + 1, since + 1
            files = ", ".join(sorted(p.name for p in folder.glob("*"))) or "nothing"
            print(f"{number}: killed, {len(keys)} builds, {files}", flush=True)
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        whole(folder)
        print(f"the same command in the end: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        if done.returncode not in (0, 3):
            sys.exit("the run does not go on")


def whole(folder: Path) -> list[object]:
    """Reads every file of a run; the builds of its table."""
    readers = {
        "sens.parquet": hs.SensitivityTable.load, "alloc.json": hs.Allocation.load, "front.parquet": Front.load,
        "report.json": lambda p: json.loads(p.read_text()), "model.onnx": lambda p: onnx.checker.check_model(onnx.load(p)),
    }  # fmt: skip
    for name, read in readers.items():
        if (folder / name).exists():
            read(folder / name)
    for path in folder.rglob("*.safetensors"):
        if not path.name.startswith("."):
            load_file(path)
    table = folder / "table.parquet"
    return [(b.role, b.key, b.measured_at) for b in LatencyTable.load(table).builds] if table.exists() else []


if __name__ == "__main__":
    main()
