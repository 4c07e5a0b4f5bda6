#!/usr/bin/env python
"""What the way in which a runtime is called costs: threads that are woken for every inference, and the time of it.

OpenVINO: `infer()`, in the calling thread, against `start_async()` and `wait()`, which hand over between threads. ONNX Runtime:
workers awake during a run (and asleep after it), against workers that sleep between nodes. Both of the same compiled network, in
the base precision, timed in turn; again and again, as what it costs to wake a thread on a virtual machine changes from minute to
minute, and beside a busy process too, which keeps a core from falling asleep.

    python scripts/bench/calls.py zoo:fashion_resnet --times 4 --pause 20
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

import hwsearch as hs
from hwsearch import backends
from hwsearch.backends.base import Engine, example_arrays
from hwsearch.device.load import background
from hwsearch.device.timing import paired
from hwsearch.engine.setup import set_up
from hwsearch.network.variants import uniform

COUNTED = 200
"""Inferences over which switches of threads are counted."""


def main() -> None:
    parser = common.parser(__doc__, tasks="zoo:fashion_resnet")
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--pause", type=float, default=20.0, help="seconds between")
    args = parser.parse_args()
    common.say_machine()
    pairs = {
        (name, threads): calls(args.task, name, threads)
        for name in ("openvino", "onnxruntime")
        for threads in (1, 2)
    }
    for number in range(args.times):
        time.sleep(args.pause if number else 0.0)
        for workers in (0, 1):
            with background(workers):
                for (name, threads), (ours, other, what) in pairs.items():
                    found = paired(ours, {"other": other})["other"]
                    own = found.reference_median_ns / 1e3
                    print(
                        f"{number} {'beside a busy process' if workers else 'alone':22s} {name} {threads}t: {own:.0f} us and "
                        f"{switches(ours):.1f} switches; {what} {own * (found.ratio - 1.0):+.0f} us "
                        f"({found.ratio:.3f}x) and {switches(other):.1f}",
                        flush=True,
                    )


def calls(task: str, name: str, threads: int) -> tuple[Callable[[], None], Callable[[], None], str]:
    """(an inference as hwsearch times it, the same otherwise called, what that is)."""
    setup = set_up(hs.load(task), backends.get(name), threads=threads)
    onnx = setup.onnx(uniform(setup.network, setup.options.base))
    engine = setup.backend.build(
        onnx.SerializeToString(), setup.options
    )  # here, where its threads can be looked at
    engine.prepare(*setup.lowering.arrays())
    if name == "onnxruntime":
        return engine.run, asleep(onnx.SerializeToString(), engine, threads), "workers asleep between nodes"
    request: Any = engine._request  # type: ignore[attr-defined]  # the very network that hwsearch times

    def asynchronously() -> None:
        request.start_async()
        request.wait()

    return engine.run, asynchronously, "start_async() and wait()"


def asleep(onnx: bytes, engine: Engine, threads: int) -> Callable[[], None]:
    """An inference of the network in ONNX Runtime, whose workers sleep wherever there is nothing to do."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for spec, array in zip(engine.inputs, example_arrays(engine.inputs), strict=True):
        binding.bind_cpu_input(spec.name, array)
    for spec in engine.outputs:
        binding.bind_output(spec.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def switches(run: Callable[[], None]) -> float:
    """How often, for one inference, a thread of this process waited to be woken."""
    run()
    before = voluntary()
    for _ in range(COUNTED):
        run()
    return (voluntary() - before) / COUNTED


def voluntary() -> int:
    """Voluntary context switches of all threads so far (proc(5))."""
    lines = [
        line
        for task in Path("/proc/self/task").iterdir()
        for line in (task / "status").read_text().splitlines()
    ]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary"))


if __name__ == "__main__":
    main()
