#!/usr/bin/env python
"""Does a test notice when a call of the TensorRT backend is broken? Breaks one after another, in a copy, and runs its tests.

scripts/mutate_tensorrt.py          # prints the list with the test that noticed each; exit 1 if one went unnoticed

None of it needs a GPU: the tests run on tests/backends/fake_tensorrt.py and on the bindings of tensorrt_rtx and tensorrt_lean.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [f"tests/backends/test_tensorrt{part}.py" for part in ("", "_cuda", "_inspecting", "_conformance")]


@dataclass(frozen=True)
class Mutation:
    """One broken call: `old` stands once in a file of hwsearch/backends/tensorrt, `new` takes its place."""

    what: str
    file: str
    old: str
    new: str


MUTATIONS = (
    Mutation(
        "no address is set for inputs and outputs", "engine.py",
        "if not context.set_tensor_address(name, buffer.address):", "if not name:",
    ),
    Mutation(
        "False from execute_async_v3 is ignored", "engine.py",
        "if not context.execute_async_v3(self._cuda.stream):", "if context.execute_async_v3(self._cuda.stream) is None:",
    ),
    Mutation(
        "inferences are put on the default stream", "engine.py",
        "context.execute_async_v3(self._cuda.stream)", "context.execute_async_v3(0)",
    ),
    Mutation(
        "run does not wait for the GPU", "engine.py",
        "            self._enqueue(self._context)\n        self._cuda.synchronize()\n\n    def nodes",
        "            self._enqueue(self._context)\n\n    def nodes",
    ),
    Mutation(
        "inputs are in the order of the engine, not of the ONNX graph", "engine.py",
        "[self._spec(name) for name in inputs]", "[self._spec(name) for name in names if name in inputs]",
    ),
    Mutation(
        "a captured graph is not checked", "engine.py", "if not self._same_outputs(graph):", "if graph is None:",
    ),
    Mutation(
        "report_to_profiler is never called", "engine.py",
        "if not context.report_to_profiler():", "if not profiler:",
    ),
    Mutation(
        "layer times are emitted while inferences are enqueued", "engine.py",
        "context.enqueue_emits_profile = False", "context.enqueue_emits_profile = True",
    ),
    Mutation(
        "layers are timed in the context that is timed as a whole", "engine.py",
        "context = self._new_context()\n        context.profiler", "context = self._context\n        context.profiler",
    ),
    Mutation(
        "None from deserialize_cuda_engine and others is ignored", "engine.py", "if made is None:", "if made is False:",
    ),
    Mutation(
        "a runtime around nothing is used", "log.py", "if made is not None and not reasons(log.lines):", "if made is not None:",
    ),
    Mutation(
        "a graph is launched on whatever stream is current", "../cuda.py",
        'with _cuda_errors("the CUDA graph cannot be launched"), self._cuda._torch.cuda.stream(self._cuda._stream):',
        'with _cuda_errors("the CUDA graph cannot be launched"):',
    ),
    Mutation(
        "None from build_serialized_network is ignored", "building.py", "if plan is None:", "if plan is False:",
    ),
    Mutation(
        "errors of the ONNX parser are ignored", "building.py", "if not parser.parse(onnx):", "if parser.parse(onnx) is None:",
    ),
    Mutation(
        "a timing cache of another GPU is taken", "building.py",
        "if not config.set_timing_cache(cache, False):  #", "if not config.set_timing_cache(cache, True):  #",
    ),
    Mutation(
        "layers are built without detailed verbosity", "building.py",
        "config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED",
        "config.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY",
    ),
)  # fmt: skip


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="hwsearch-mutations-") as folder:
        copy = Path(folder)
        for name in ("hwsearch", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        code, output = run(copy)
        if code != 0:
            print(f"the tests fail on what is not broken:\n{output[-3000:]}")
            return 1
        survived = 0
        for number, mutation in enumerate(MUTATIONS, 1):
            noticed = broken(copy, mutation)
            survived += not noticed
            print(f"{number:2}. {mutation.file}: {mutation.what}\n    {noticed or 'NOT NOTICED'}", flush=True)
        print(f"{len(MUTATIONS) - survived} of {len(MUTATIONS)} mutations noticed")
        return 1 if survived else 0


def broken(copy: Path, mutation: Mutation) -> str:
    """The first test that fails on a mutation; empty if none does."""
    path = copy / "hwsearch/backends/tensorrt" / mutation.file
    whole = path.read_text()
    if whole.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.file} has {whole.count(mutation.old)} of {mutation.old!r}, not one: adapt the mutation"
        )
    path.write_text(whole.replace(mutation.old, mutation.new))
    try:
        code, output = run(copy)
    finally:
        path.write_text(whole)
    found = re.search(r"^FAILED (\S+)", output, re.M)
    return found[1] if code == 1 and found else ""


def run(copy: Path) -> tuple[int, str]:
    """(pytest's exit code, what it printed) on the tests in a copy, up to the first failure."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *TESTS],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
