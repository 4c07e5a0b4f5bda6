"""Real engines by NVIDIA's builder, without a GPU: every variant on five targets, allocations, and what is said of each."""

from __future__ import annotations

import json
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
from deployment.test_deploy import allocation
from typer.testing import CliRunner

import hwsearch as hs
from hwsearch import cli
from hwsearch.allocate.allocation import Allocation
from hwsearch.backends.tensorrt.legality import BASES, target
from hwsearch.backends.typed import strongly_typed
from hwsearch.deployment.targets import (
    build,
    check,
    objections,
    otherwise,
    request_of,
    runtime,
    serialise,
    units_offered,
    verdicts,
)
from hwsearch.errors import BackendUnavailable, IncompatibleTables, InvalidInput
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant
from hwsearch.testing.contract import small_network
from hwsearch.zoo import load

pytest.importorskip("tensorrt_rtx")
FIVE = ["sm75", "sm80", "sm86", "sm89", "sm120"]
SPEC = f"{Path(__file__).parents[1] / 'tiny.py'}:cnn"


@cache
def network(name: str) -> Lowering:
    return Lowering(load(name), method="minmax") if name == "fashion_resnet" else small_network(name)


@pytest.mark.parametrize(
    ("name", "base"),
    [("residual", "fp32"), ("attention", "fp16"), ("two_inputs", "bf16"),
     *(pytest.param("fashion_resnet", base, marks=pytest.mark.slow) for base in ("fp16", "bf16", "fp32"))],
)  # fmt: skip
def test_every_variant_is_built_or_refused_as_documented(name: str, base: str) -> None:
    low = network(name)
    found = list(verdicts(runtime("tensorrt-rtx"), low, FIVE, base))
    assert all(v.explained for v in found), [
        (v.target, v.variant, v.documented, v.reason) for v in found if not v.explained
    ]
    assert {(v.target, v.variant) for v in found} == {
        (t, str(v)) for t in FIVE for v in units_offered(low.network, base)
    }
    for v in found:
        assert v.legal == (not v.reason)
        assert bool(v.layers) == v.legal
        if v.legal:
            assert set(v.executed) == set(v.units)
    plain = [v for v in found if v.variant == f"dense.{base}" and v.legal]
    assert plain
    assert not any(v.not_as_asked for v in plain)
    int8 = [v for v in found if v.variant == "dense.int8" and v.target in ("sm86", "sm89", "sm120")]
    assert not any(v.not_as_asked for v in int8)


@pytest.mark.parametrize("name", ["attention", "fashion_resnet"])
def test_mixed_allocations_are_built_or_refused_as_documented(name: str) -> None:
    low = network(name)
    rng = random.Random(0)
    for base in ("fp16", "bf16", "fp32"):
        choices = units_offered(low.network, base)
        variants = {
            u.name: rng.choice([v for v, own in choices.items() if u in own]) for u in low.network.units
        }
        onnx = strongly_typed(low.onnx(variants), base).SerializeToString()
        for sm in FIVE:
            reasons = objections(low.network, variants, base, sm)
            request = request_of(onnx, base, sm, variants)
            if reasons:
                with pytest.raises(BackendUnavailable, match=rf"for {sm}: "):
                    serialise(runtime("tensorrt-rtx"), request)
            else:
                assert serialise(runtime("tensorrt-rtx"), request).plan


# ---------------------------------------------------------------- allocations


@pytest.mark.parametrize(("share", "precision"), [(1.0, "int8"), (0.5, "int8"), (1.0, "fp16")])
def test_an_allocation_becomes_an_engine(share: float, precision: str, tmp_path: Path) -> None:
    """Whole or narrow, searched on ONNX Runtime."""
    made = build(tiny.task("cnn"), allocation("cnn", share, precision), tmp_path / "e.plan", target="sm86")
    assert made.path.stat().st_size == made.size_bytes > 1000
    units = list(tiny.lowering("cnn").network.by_name)
    assert set(made.executed) == set(units)
    assert made.layers
    assert made.base == "fp32"
    assert json.dumps(made.to_json())


def test_narrow_engines_are_smaller(tmp_path: Path) -> None:
    sizes = [
        build(tiny.task("cnn"), allocation("cnn", share), tmp_path / "e.plan", target="sm86").size_bytes
        for share in (1.0, 0.5)
    ]
    assert sizes[1] < sizes[0]


def test_the_base_of_an_allocation_may_be_replaced(tmp_path: Path) -> None:
    """One searched with OpenVINO in bf16 is illegal on Turing, and legal in fp16."""
    network = tiny.lowering("cnn").network
    chosen = allocation(
        "cnn", 1.0, variants=dict.fromkeys(network.by_name, "dense.bf16"), backend="openvino",
        options={"threads": 1, "base": "bf16", "batch": 1},
    )  # fmt: skip
    with pytest.raises(
        BackendUnavailable,
        match=r"HW-specific datatypes: b16.*\(NVIDIA's documentation: bf16 needs compute capability 8.0",
    ):
        build(tiny.task("cnn"), chosen, tmp_path / "e.plan", target="sm75")
    assert not (tmp_path / "e.plan").exists()
    assert set(build(tiny.task("cnn"), chosen, tmp_path / "e.plan", target="sm86").executed.values()) == {
        "bf16"
    }
    made = build(tiny.task("cnn"), chosen, tmp_path / "e.plan", target="sm75", base="fp16")
    assert set(made.executed.values()) == {"fp16"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "sm99"}, InvalidInput, "unknown target 'sm99'; expected one of sm75"),
        (
            {"target": "sm90"},
            InvalidInput,
            r"tensorrt-rtx does not build for sm90 \(Hopper, H100\); it builds for sm75",
        ),
        ({}, InvalidInput, "tensorrt-rtx needs a target; it builds for sm75"),
        (
            {"target": "sm86", "base": "int8"},
            InvalidInput,
            "unknown base precision 'int8'; expected one of fp16, bf16",
        ),
        (
            {"target": "sm86", "backend": "openvino"},
            InvalidInput,
            "no engine file comes from backend 'openvino'",
        ),
    ],
)
def test_usage(options: dict[str, str], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        build(tiny.task("cnn"), allocation("cnn", 1.0), tmp_path / "e.plan", **options)


def test_an_allocation_of_another_network(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleTables, match="of other network"):
        build(tiny.task("cnn"), allocation("transformer", 1.0), tmp_path / "e.plan", target="sm86")


def test_the_builder_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'hwsearch\[tensorrt-rtx\]'"):
        check(tiny.task("cnn"), ["sm86"])


def test_what_was_compiled_to_something_else() -> None:
    variants = {"a": Variant("int8"), "b": Variant("fp16"), "c": Variant("tf32"), "d": Variant("int8", "2:4")}
    ran = {"a": "fp16", "b": "fp16", "c": "fp32", "d": "int8"}
    assert otherwise(variants, ran, [], "sm75") == {
        "a": "asked dense.int8, compiled to fp16",
        "c": "asked dense.tf32, compiled to fp32: sm75 has no tf32",
        "d": "asked 2:4.int8, compiled to int8: 2:4 needs compute capability 8.0 (Ampere), sm75 has 7.5",
    }
    assert otherwise(variants, ran, [], "sm86") == {
        "a": "asked dense.int8, compiled to fp16",
        "d": "asked 2:4.int8, compiled to int8: the builder names no sparse kernel for it",
    }
    log = [
        "[INFO] (Sparsity) Found 1 layer(s) eligible to use sparse tactics: d|0|Conv",
        "[INFO] (Sparsity) Chose 1 layer(s) using sparse tactics: d|0|Conv",
    ]
    assert set(otherwise(variants, ran, log, None)) == {"a"}


def test_tf32_is_a_flag_that_turing_does_not_know() -> None:
    found = verdicts(runtime("tensorrt-rtx"), small_network("residual"), ["sm75", "sm80"], "tf32")
    assert all(v.explained for v in found)


def test_what_is_offered() -> None:
    low = small_network("attention")
    assert next(str(v) for v in units_offered(low.network, "fp16")) == "dense.fp16"
    for base in BASES:
        for variant, units in units_offered(low.network, base).items():
            assert units
            assert not objections(low.network, {u.name: variant for u in units}, base, target("sm120").name)


# ---------------------------------------------------------------- the command line


def invoke(*words: str) -> Any:
    return CliRunner().invoke(cli.app, list(words))


def test_build_and_check_on_the_command_line(tmp_path: Path) -> None:
    alloc, plan = str(tmp_path / "a.json"), str(tmp_path / "e.plan")
    allocation("cnn", 1.0, "int8").save(alloc)
    result = invoke("build", SPEC, alloc, "--target", "sm86", "-o", plan)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{plan}: ")
    assert "tensorrt-rtx for sm86, base fp32" in result.stdout
    told = json.loads(invoke("build", SPEC, alloc, "--target", "sm86", "-o", plan, "--json").stdout)
    assert told["size_bytes"] == Path(plan).stat().st_size
    result = invoke("build", SPEC, alloc, "--target", "sm75", "-o", str(tmp_path / "no.plan"))
    assert result.exit_code == 1
    assert "FP32 GEMM is not supported" in result.stderr
    assert not (tmp_path / "no.plan").exists()
    assert invoke("build", SPEC, alloc, "--target", "sm5", "-o", plan).exit_code == 2
    assert invoke("check", SPEC, "--target", ",").exit_code == 2

    result = invoke("check", SPEC, "--target", "sm75,sm86", "--base", "fp32", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {(v["target"], v["explained"]) for v in found} == {("sm75", True), ("sm86", True)}
    refused = [v for v in found if not v["legal"]]
    assert refused
    assert all(v["reason"] and v["documented"] for v in refused)
    fused = [layer for v in found if v["legal"] for layer in v["layers"]]
    assert any(len(layer["sources"]) > 1 for layer in fused)
    text = invoke("check", SPEC, "--target", "sm86", "--layers").stdout
    assert "dense.int8" in text
    assert "conv1|0|Conv" in text


def test_an_allocation_loaded_from_its_file_is_the_same(tmp_path: Path) -> None:
    chosen = allocation("cnn", 1.0, "int8")
    chosen.save(tmp_path / "a.json")
    sizes = {
        hs.build(tiny.task("cnn"), a, tmp_path / "e.plan", target="sm86").executed["conv1"]
        for a in (chosen, Allocation.load(tmp_path / "a.json"))
    }
    assert sizes == {"int8"}


def test_variants_are_what_units_may_be() -> None:
    assert set(units_offered(small_network("residual").network, "fp16")) >= {Variant("fp16"), Variant("int8")}
