"""What `hwsearch deploy --for` leaves: a network, an example, and a script that needs TensorRT alone; run on the imitation."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from deployment.test_deploy import allocation
from typer.testing import CliRunner

import hwsearch as hs
from hwsearch import cli
from hwsearch.backends.tensorrt import standalone
from hwsearch.deployment.targets import for_tensorrt
from hwsearch.errors import InvalidInput
from tests.backends.fake_tensorrt import FakeCuda, FakeTensorRT

SPEC = f"{Path(tiny.__file__)}:cnn"


def written(folder: Path, precision: str = "int8", target: str = "sm89") -> Path:
    chosen = allocation("cnn", 1.0, precision)
    for_tensorrt(hs.load(SPEC), chosen, folder, target=target)
    return folder


def script(folder: Path) -> ModuleType:
    """run_tensorrt.py as a module of its own."""
    spec = importlib.util.spec_from_file_location("run_tensorrt", folder / "run_tensorrt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ran(folder: Path, *argv: str, cuda: FakeCuda | None = None) -> int:
    cuda = cuda or FakeCuda((8, 9))
    code: int = script(folder).main(["--duration", "0.01", *argv], FakeTensorRT(cuda), cuda, folder)
    return code


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_folder_builds_checks_and_times_itself(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "there", precision)
    assert sorted(p.name for p in folder.iterdir()) == ["example.npz", "model.onnx", "run_tensorrt.py"]
    assert ran(folder, "--save-engine", str(tmp_path / "model.plan")) == 0
    told = capsys.readouterr().out
    assert "[I] Engine built: " in told
    assert "relative error" in told
    assert "[I] GPU Compute Time: min = " in told
    assert "percentile(99%) = " in told
    assert told.endswith("&&&& PASSED hwsearch.run_tensorrt\n")
    assert (tmp_path / "model.plan").stat().st_size > 100


def test_the_script_needs_nothing_of_hwsearch(tmp_path: Path) -> None:
    tree = ast.parse((written(tmp_path) / "run_tensorrt.py").read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not [name for name in imported if name.startswith(("hwsearch", "torch", "onnx"))]


def test_settings_are_of_the_allocation(tmp_path: Path) -> None:
    settings: dict[str, Any] = script(written(tmp_path)).SETTINGS
    model = onnx.load(tmp_path / "model.onnx")
    assert (settings["base"], settings["sparse"], settings["target"]) == ("fp32", False, "sm89")
    assert set(settings["tolerance"]) == {v.name for v in model.graph.output}
    assert all(0 < t < 1 for t in settings["tolerance"].values())
    with np.load(tmp_path / "example.npz") as arrays:
        assert set(arrays) == {f"input:{v.name}" for v in model.graph.input} | {
            f"output:{v.name}" for v in model.graph.output
        }


def test_wrong_outputs_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path)
    with np.load(folder / "example.npz") as arrays:
        changed = {n: -a if n.startswith("output:") else a for n, a in arrays.items()}
    np.savez(folder / "example.npz", **changed)
    assert ran(folder) == 1
    told = capsys.readouterr()
    assert "is rounding\n&&&& FAILED" in told.err
    assert "GPU Compute Time" not in told.out, "a wrong network is not timed"


def test_what_tensorrt_refuses_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, cuda = written(tmp_path), FakeCuda((8, 9))
    trt = FakeTensorRT(cuda)
    trt.faults["build_serialized_network"] = None
    assert script(folder).main([], trt, cuda, folder) == 1
    assert "does not build the network" in capsys.readouterr().err


def test_without_tensorrt_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    assert script(written(tmp_path)).main([]) == 1
    assert "tensorrt" in capsys.readouterr().err


def test_what_the_gpu_has_not_is_refused(tmp_path: Path) -> None:
    chosen = allocation("cnn", 1.0, "int8")
    first = next(u for u, v in chosen.variants.items() if v == "dense.int8")
    chosen.variants[first] = "dense.fp8"
    with pytest.raises(
        InvalidInput, match=rf"{first} in dense\.fp8: fp8 needs compute capability 8\.9 .*search for that GPU"
    ):
        for_tensorrt(hs.load(SPEC), chosen, tmp_path / "no", target="sm86")
    assert not (tmp_path / "no").exists()
    with pytest.raises(InvalidInput, match="unknown target 'sm1'"):
        for_tensorrt(hs.load(SPEC), chosen, tmp_path / "no", target="sm1")


def test_on_the_command_line(tmp_path: Path) -> None:
    """No TensorRT and no GPU is needed for it."""
    allocation("cnn", 1.0, "int8").save(tmp_path / "alloc.json")
    words = ["deploy", SPEC, str(tmp_path / "alloc.json"), "--for", "sm89", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 2
    assert "--backend tensorrt" in done.stderr
    done = CliRunner().invoke(cli.app, [*words, "--backend", "tensorrt"])
    assert done.exit_code == 0, done.output
    assert "python run_tensorrt.py" in done.stdout
    done = CliRunner().invoke(cli.app, [*words, "--backend", "tensorrt", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["path"].endswith("model.onnx")


def test_percentiles_are_in_trtexec_s_words() -> None:
    told = standalone.report([float(n) for n in range(1, 101)])
    assert told.startswith(
        "[I] GPU Compute Time: min = 1 ms, max = 100 ms, mean = 50.5 ms, median = 50.5 ms, "
    )
    assert told.endswith("percentile(90%) = 90.1 ms, percentile(95%) = 95.05 ms, percentile(99%) = 99.01 ms")
