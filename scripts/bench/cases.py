"""Every case in a folder of small networks out of bug reports, through the public command line and a plain ONNX Runtime.

    python scripts/bench/cases.py ../shared/cases
    python scripts/bench/cases.py ../shared/cases --only 13 15 --time-limit 20s

A case is a `file.py:function` task with a budget. `hwsearch run` is called on it as a user would, in a process of its own; the
model.onnx that it leaves runs in ONNX Runtime without hwsearch: each output is compared with the module's on calibration data in
the deployed batch, and the task is scored with it. One line a case says what was expected and what happened; the exit code is 1
where one of them is not as expected. What is expected stands in `CASES` below, out of the README beside the cases.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 900
"""A case that takes longer has failed."""


@dataclass(frozen=True)
class Case:
    """What is to happen with one task.

    number, function: of the task's file and its function. budget: words for the command line. exit: its exit code. says: patterns
    that its output (standard error included) must match, never: patterns that it must not. loss: how much lower than the module's
    the score may be, in the deployed runtime and in a plain ONNX Runtime. error: the relative root mean square error from the
    module's outputs that no output of the file may exceed. groups: units whose channels must be groups. float_only: units that the
    report must name as staying float. axes: of outputs whose batch is not dimension 0, by their place.
    """

    number: str
    function: str = "make_task"
    budget: Sequence[str] = ("--budget", "size=50%")
    exit: int = 0
    says: Sequence[str] = ()
    never: Sequence[str] = (r"unexpected", r"tlparse", r"Traceback", r"While executing")
    loss: float = 0.03
    error: float = 0.5
    groups: Sequence[str] = ()
    float_only: Sequence[str] = ()
    axes: dict[int, int] = field(default_factory=dict)
    backend: str = "openvino"


CASES = (
    Case("01", budget=("--budget", "latency=75%", "--time-limit", "180s")),
    Case("02", groups=("a.3", "wide", "deep.4")),
    Case("06"),
    Case("06", budget=("--budget", "size=50%", "--batch", "4")),
    # dB: 23.06 dense
    Case("08", budget=("--budget", "size=40%"), loss=1.0),
    Case("08", budget=("--budget", "size=40%"), loss=1.0, backend="onnxruntime"),
    Case("09", exit=1, says=(r"keeps state: its outputs depend on cache\b", r"an input and an output")),
    Case("10", budget=("--budget", "size=40%"), loss=0.05),
    Case("10", budget=("--budget", "size=40%"), loss=0.05, backend="onnxruntime"),
    Case("11", budget=("--budget", "size=95%"), axes={1: 1, 2: 1}, groups=("cnn.0",)),
    Case("12"),
    Case("13"),
    Case("13", "make_inf", float_only=("matmul",)),
    Case(
        "13", "make_inf", budget=("--budget", "size=70%"), float_only=("matmul", "a.2"), backend="onnxruntime"
    ),
    Case("15"),
    Case("15", backend="onnxruntime"),
    Case("17"),
    Case("21"),
    Case("23", "make_compiled", groups=("body.0", "body.3")),
    Case("23", "make_self_compiled", groups=("body.0", "body.3")),
    Case("23", "make_parallel", groups=("body.0", "body.3")),
    Case("23", "make_ema", groups=("body.0", "body.3")),
    Case("23", "make_script", exit=2, says=(r"torch\.jit", r"give the nn\.Module")),
    Case("25"),
    Case("25", budget=("--budget", "size=40%")),
    Case("25", budget=("--budget", "size=40%"), backend="onnxruntime"),
    Case("28", exit=1, says=(r"draws random numbers", r"drawn by randn_like")),
    # dB; half of what 16 bits give is lost where products saturate
    Case("29", budget=("--budget", "size=40%", "--axes", "precision"), loss=30.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NUMBER", help="cases of these numbers")
    parser.add_argument("--time-limit", default="100s", help="of a run")
    parser.add_argument(
        "--out", type=Path, help="folder that keeps what the runs leave; by default none is kept"
    )
    parser.add_argument("--score", nargs=3, metavar=("TASK", "MODEL", "AXES"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.score:
        print(json.dumps(measured(*given.score)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        wrong = 0
        for index, case in enumerate(CASES):
            if given.only and case.number not in given.only:
                continue
            file = next(iter(sorted(given.folder.glob(f"{case.number}_*.py"))), None)
            if file is None:
                sys.exit(f"{given.folder} has no case {case.number}")
            out = (given.out or Path(temporary)) / f"{index:02d}-{case.number}-{case.function}"
            begun = time.monotonic()
            expected, happened, problems = attempt(case, f"{file}:{case.function}", out, given.time_limit)
            wrong += bool(problems)
            what = f"{case.number} {case.function} {case.backend} {' '.join(case.budget[1:])}"
            print(
                f"{'WRONG' if problems else 'ok   '} {what}: expected {expected}; got {happened} ({time.monotonic() - begun:.0f} s)"
                + "".join(f"\n      {problem}" for problem in problems),
                flush=True,
            )
    sys.exit(bool(wrong))


def attempt(case: Case, task: str, out: Path, time_limit: str) -> tuple[str, str, list[str]]:
    """(what is expected, what happened, what of it is wrong)."""
    command = ["hwsearch", "run", task, *case.budget, "--backend", case.backend, "--time-limit", time_limit]
    try:
        done = subprocess.run(
            [*command, "--out", str(out)], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"exit {case.exit}", f"nothing within {LIMIT_S} s", ["too slow"]
    said = f"{done.stdout}\n{done.stderr}"
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    problems = [f"it does not say {p!r}" for p in case.says if not re.search(p, said)]
    problems += [f"it says {p!r}" for p in case.never if re.search(p, said)]
    if done.returncode != case.exit:
        problems.append(f"exit {done.returncode}: {last}")
    if case.exit:
        return f"exit {case.exit}: {', '.join(case.says)}", f"exit {done.returncode}: {last[:160]}", problems
    expected = f"exit 0, score at most {case.loss} lower, outputs within {case.error}"
    if not (out / "model.onnx").exists():
        return expected, f"exit {done.returncode}: {last[:160]}", problems or ["no model.onnx"]
    report = json.loads((out / "report.json").read_text())
    problems += [
        f"{unit} is not named as float" for unit in case.float_only if unit not in report["float_only"]
    ]
    problems += [
        f"no channel group {g}" for g in case.groups if not any(g in name for name in report["widths"])
    ]
    own = subprocess.run(
        [sys.executable, __file__, ".", "--score", task, str(out / "model.onnx"), json.dumps(case.axes)],
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    if own.returncode:
        return expected, "a file that does not run", [*problems, own.stderr.strip().splitlines()[-1]]
    found = json.loads(own.stdout.splitlines()[-1])
    dense, scores = report["score"]["dense"], (report["score"]["deployed"], found["score"])
    problems += [f"the score falls from {dense:.4g} to {s:.4g}" for s in scores if not s >= dense - case.loss]
    problems += [f"output {i} is {e:.3g} off" for i, e in enumerate(found["errors"]) if not e <= case.error]
    errors = ", ".join(f"{e:.2g}" for e in found["errors"])
    happened = (
        f"score {dense:.4g} dense, {scores[0]:.4g} deployed, {scores[1]:.4g} in plain ONNX Runtime, outputs off by {errors}, "
        f"loss {report['loss']['measured']:.2g} measured, {report['loss']['predicted']:.2g} predicted"
    )
    return expected, happened, problems


def measured(task_spec: str, model: str, axes: str) -> dict[str, Any]:
    """The score of a file in plain ONNX Runtime, and the error of each floating-point output from the module's."""
    import torch
    from torch.utils import _pytree as pytree

    import hwsearch as hs

    torch.set_num_threads(1)
    task = hs.load(task_spec)
    module = task.model.eval()
    run, batch = _session(model)
    where = {int(k): v for k, v in json.loads(axes).items()}
    leaves, spec = pytree.tree_flatten(_called(module, task.example_inputs))

    def predict(*args: Any, **kwargs: Any) -> Any:
        given = _tensors((args, kwargs))
        total = len(given[0])
        pieces = []
        for start in range(0, total, batch):
            part = [t[start : start + batch] for t in given]
            short = batch - len(part[0])
            padded = [torch.cat([t, t[-1:].expand(short, *t.shape[1:])]) if short else t for t in part]
            outputs = run(padded)
            axis = [where.get(i, 0) for i in range(len(outputs))]
            pieces.append(
                [y.narrow(a, 0, y.shape[a] * (batch - short) // batch) if y.dim() else y
                 for a, y in zip(axis, outputs, strict=True)]
            )  # fmt: skip
        columns = [
            torch.cat(c, where.get(i, 0)) if c[0].dim() else torch.stack(c).float().mean()
            for i, c in enumerate(zip(*pieces, strict=True))
        ]
        left = iter(columns)
        return pytree.tree_unflatten([next(left) if isinstance(x, torch.Tensor) else x for x in leaves], spec)

    with torch.no_grad():
        errors = _errors(module, task.calibration[-4:], run, batch)
        return {"errors": errors, "score": float(task.evaluate(predict))}


def _errors(
    module: Any, batches: Sequence[Any], run: Callable[[Sequence[Any]], list[Any]], batch: int
) -> list[float]:
    """Relative root mean square errors over calibration batches, cut into the file's batch."""
    import torch
    from torch.utils import _pytree as pytree

    sums: list[list[float]] = []
    for inputs in batches:
        for start in range(0, len(_tensors(inputs)[0]) - batch + 1, batch):
            part = pytree.tree_map(
                lambda x, start=start: x[start : start + batch] if isinstance(x, torch.Tensor) else x, inputs
            )
            want, have = _tensors(_called(module, part)), run(_tensors(part))
            sums = sums or [[0.0, 0.0] for _ in want]
            for own, y, y0 in zip(sums, have, want, strict=True):
                if y.shape != y0.shape:
                    raise SystemExit(
                        f"an output is of shape {tuple(y.shape)}, the module's of {tuple(y0.shape)}"
                    )
                own[0] += float((y.double() - y0.double()).square().sum())
                own[1] += float(y0.double().square().sum())
    return [(off / (size or 1.0)) ** 0.5 for off, size in sums]


def _session(model: str) -> tuple[Callable[[Sequence[Any]], list[Any]], int]:
    """(runs the file on tensors, its batch)."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(tensors: Sequence[Any]) -> list[Any]:
        given = {n: t.contiguous().numpy() for n, t in zip(names, tensors, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, given)]

    return run, int(session.get_inputs()[0].shape[0])


def _called(module: Any, inputs: Any) -> Any:
    import torch

    if isinstance(inputs, dict):
        return module(**inputs)
    return module(inputs) if isinstance(inputs, torch.Tensor) else module(*inputs)


def _tensors(value: Any) -> list[Any]:
    import torch
    from torch.utils import _pytree as pytree

    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
