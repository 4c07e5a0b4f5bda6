"""Every attribute of TensorRT that our source names exists in NVIDIA's own Python bindings.

The list is made from our source: what is read on a name that holds the module or one of its objects (`HOLDS`). It is compared with
`tensorrt_rtx` and `tensorrt_lean`, whose native bindings import without a GPU; the full package can neither be installed
nor imported here, so that what only it has would have to be listed in `FULL_ONLY` with its documented name.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import hwsearch.backends.tensorrt
from hwsearch.backends.tensorrt.engine import _profiler
from hwsearch.backends.tensorrt.log import log_of, reasons

SOURCES = sorted(Path(hwsearch.backends.tensorrt.__file__).parent.glob("*.py"))

HOLDS = {
    "trt": "", "self._trt": "", "self.trt": "", "flags": "BuilderFlag|NetworkDefinitionCreationFlag", "modes": "TensorIOMode",
    "runtime": "Runtime", "engine": "ICudaEngine", "self._engine": "ICudaEngine", "context": "IExecutionContext",
    "self._context": "IExecutionContext", "inspector": "EngineInspector", "builder": "Builder", "network": "INetworkDefinition",
    "config": "IBuilderConfig", "parser": "OnnxParser", "error": "ParserError",
}  # fmt: skip
"""Names in our source, and the class of what they hold; the module itself is ''."""
OURS = {"encode", "strip", "name", "lines", "log", "partition"}
"""Attributes that are not TensorRT's: of its strings and enums, and of our own logger and profiler."""

LEAN_HAS_NOT = {
    "Builder": "tensorrt.Builder", "ComputeCapability": "tensorrt.ComputeCapability",
    "EngineInspector": "tensorrt.EngineInspector", "IBuilderConfig": "tensorrt.IBuilderConfig",
    "INetworkDefinition": "tensorrt.INetworkDefinition", "NetworkDefinitionCreationFlag": "tensorrt.NetworkDefinitionCreationFlag",
    "OnnxParser": "tensorrt.OnnxParser", "ParserError": "tensorrt.ParserError",
    "IExecutionContext.is_stream_capturable": "tensorrt_rtx.IExecutionContext.is_stream_capturable",
}  # fmt: skip
"""What the lean runtime lacks, with the documented name of what has it: it runs engines, and builds and inspects none."""
FULL_ONLY: dict[str, str] = {}
"""What only the full package has, with its documented name: nothing yet."""


@dataclass(frozen=True)
class Use:
    """One attribute of a class (or of the module), and how many positional arguments it is called with; None: not called."""

    path: str
    arguments: int | None
    where: str


def uses(path: Path) -> list[Use]:
    tree = ast.parse(path.read_text())
    calls = {id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = []
    for node in ast.walk(tree):
        receiver, attribute = _read(node)
        if not attribute or attribute in OURS or attribute.startswith("__"):
            continue
        where = f"{path.name}:{node.lineno}"  # type: ignore[attr-defined]
        found += [
            Use(f"{k}.{attribute}".strip("."), calls.get(id(node)), where) for k in _kinds(receiver) or ()
        ]
    return found


def _read(node: ast.AST) -> tuple[str, str]:
    """(what an attribute is read on, its name) of `a.b` and of `getattr(a, "b")`; empty of anything else."""
    if isinstance(node, ast.Attribute):
        return ast.unparse(node.value), node.attr
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
        name = node.args[1]
        return ast.unparse(node.args[0]), str(name.value) if isinstance(name, ast.Constant) else ""
    return "", ""


def _kinds(receiver: str) -> list[str] | None:
    """Classes that a receiver may be of: of a name in HOLDS, or of a class of the module itself (`trt.BuilderFlag`)."""
    if receiver in HOLDS:
        return HOLDS[receiver].split("|")
    module, _, name = receiver.rpartition(".")
    return [name] if module and HOLDS.get(module) == "" else None


USES = [use for path in SOURCES for use in uses(path)]


def lookup(module: Any, path: str) -> Any:
    found = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def has(module: Any, path: str) -> bool:
    try:
        lookup(module, path)
    except AttributeError:
        return False
    return True


def module_of(name: str) -> Any:
    pytest.importorskip(name, reason=f"{name} is not installed")
    return importlib.import_module(name)


def test_the_list_is_made_from_our_source() -> None:
    found = {use.path for use in USES}
    assert found >= {
        "ILogger", "IProfiler", "Runtime", "Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context",
        "IExecutionContext.set_tensor_address", "IExecutionContext.execute_async_v3", "IExecutionContext.report_to_profiler",
        "IExecutionContext.enqueue_emits_profile", "EngineInspector.get_engine_information", "ProfilingVerbosity.NONE",
        "Builder.build_serialized_network", "IBuilderConfig.set_timing_cache",
    }  # fmt: skip
    assert len(found) > 40


def test_nothing_of_tensorrt_is_used_on_a_name_that_the_list_does_not_know() -> None:
    """Names that only TensorRT's classes have must be read on receivers in HOLDS."""
    rtx = module_of("tensorrt_rtx")
    members = {m for kind in _classes() for m in dir(getattr(rtx, kind)) if "_" in m.strip("_")}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in members and not node.attr.startswith("_"):
                receiver = ast.unparse(node.value)
                assert _kinds(receiver) is not None or receiver in ("self", "config.get_timing_cache()"), (
                    f"{path.name}:{node.lineno}: {receiver}.{node.attr}: add {receiver} to HOLDS"
                )


def _classes() -> set[str]:
    return {kind for value in HOLDS.values() for kind in value.split("|") if kind}


@pytest.mark.parametrize("path", sorted({use.path for use in USES}))
def test_it_exists_in_tensorrt_rtx(path: str) -> None:
    where = [use.where for use in USES if use.path == path]
    if path.startswith(("BuilderFlag.", "NetworkDefinitionCreationFlag.")):
        # one name of ours holds both enums
        member = path.partition(".")[2]
        known = [has(module_of("tensorrt_rtx"), f"{e}.{member}") for e in HOLDS["flags"].split("|")]
        assert any(known), f"{path} at {where}"
        return
    assert has(module_of("tensorrt_rtx"), path) or path in FULL_ONLY, f"{path} at {where}"


@pytest.mark.parametrize("path", sorted({use.path for use in USES}))
def test_it_exists_in_tensorrt_lean_or_is_known_to_be_elsewhere(path: str) -> None:
    lean = module_of("tensorrt_lean")
    if path.startswith("BuilderFlag.") and not has(lean, path):
        path = path.replace("BuilderFlag.", "NetworkDefinitionCreationFlag.")
    lacking = [known for known in LEAN_HAS_NOT if path == known or path.startswith(f"{known}.")]
    assert has(lean, path) or lacking, f"{path} is not in tensorrt_lean"


def test_what_lean_is_said_to_lack_it_lacks() -> None:
    lean = module_of("tensorrt_lean")
    assert [path for path in LEAN_HAS_NOT if has(lean, path)] == []


@cache
def _signatures(path: str) -> tuple[str, ...]:
    """What pybind11 says of a method: `name(self: ..., a: int) -> bool`, one line for each overload."""
    documented = lookup(module_of("tensorrt_rtx"), path).__doc__ or ""
    name = path.rpartition(".")[2]
    return tuple(re.findall(rf"^(?:\d+\. )?{name}(\(self.*\) -> .*)$", documented, re.M))


@pytest.mark.parametrize(
    "use", [u for u in USES if u.arguments is not None and "." in u.path], ids=lambda u: f"{u.path}@{u.where}"
)
def test_calls_have_as_many_arguments_as_the_bindings_take(use: Use) -> None:
    module_of("tensorrt_rtx")
    signatures = _signatures(use.path)
    assert signatures, f"{use.path} is no method"
    assert any(least <= use.arguments <= most for least, most in map(_arity, signatures)), (
        f"{use.where} calls {use.path} with {use.arguments} arguments; it takes {signatures}"
    )


def _arity(signature: str) -> tuple[int, int]:
    """(least, most) arguments beside self."""
    inside = signature[1 : signature.rindex(") ->")]
    depth, parts, current = 0, [], ""
    for char in inside:
        depth += (char in "[(<") - (char in "])>")
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    parts = [*parts, current][1:]
    return sum("=" not in part for part in parts), len(parts)


@pytest.mark.parametrize(
    "method",
    [
        "IExecutionContext.set_tensor_address", "IExecutionContext.execute_async_v3", "IExecutionContext.report_to_profiler",
        "IExecutionContext.is_stream_capturable", "OnnxParser.parse", "IBuilderConfig.set_timing_cache",
        "IBuilderConfig.set_compute_capability",
    ],
)  # fmt: skip
def test_what_we_take_for_true_or_false_is(method: str) -> None:
    module_of("tensorrt_rtx")
    assert all(signature.endswith("-> bool") for signature in _signatures(method))


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt_lean"])
def test_our_subclasses_are_taken_by_the_real_bindings(name: str) -> None:
    """The logger and the profiler are ours; the real classes must let us construct and call them."""
    trt = module_of(name)
    profiler = _profiler(trt)
    profiler.report_layer_time("a", 1.5)
    profiler.report_layer_time("a", 0.5)
    assert profiler.times_ms == {"a": 2.0}
    log = log_of(trt)
    log.lines = []  # it is the module's, and another test may have left some
    log.log(trt.ILogger.ERROR, "no GPU")
    assert reasons(log.lines) == "no GPU"


_WITHOUT_GPU = """
import importlib, sys
from hwsearch.backends.tensorrt.engine import TensorRTEngine
from hwsearch.errors import BackendUnavailable
try:
    TensorRTEngine(importlib.import_module(sys.argv[1]), None, b"no plan", ["x"], ["y"])
except BackendUnavailable as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt_lean"])
def test_without_a_gpu_the_real_libraries_give_a_reason_and_do_not_end_the_process(name: str) -> None:
    module_of(name)
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_GPU, name], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-300:]}"
    assert "CUDA" in done.stdout, done.stdout
