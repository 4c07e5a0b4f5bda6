"""Our all-int8 network beside the one of NNCF's post-training quantization, on OpenVINO, in one run.

    pip install nncf        # a dependency of this script only; hwsearch does not need it
    python scripts/bench/rivals.py                                   # all tasks of the zoo, every instruction set
    python scripts/bench/rivals.py zoo:fashion_resnet --isa AVX2 --nodes kinds

Both start from the same fp32 ONNX file and see the same calibration batches. Ours has every layer in int8 that may be, its weights
refitted as those of a deployed network are; NNCF's is `nncf.quantize` with its defaults and the preset MIXED (unsigned activations
where none is negative), `model_type=TRANSFORMER` for transformers. Both, and the fp32 network, are compiled alike and
timed in turns in one process; ratios are of paired blocks. --nodes prints where the time of each goes.

Instruction sets are lowered with ONEDNN_MAX_CPU_ISA, each in a process of its own; one that this CPU does not have is left out.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ISAS = ("AVX2", "ALL")
"""Values of ONEDNN_MAX_CPU_ISA; ALL leaves the CPU as it is."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[])
    parser.add_argument("--isa", nargs="+", default=ISAS, help="values of ONEDNN_MAX_CPU_ISA")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each network")
    parser.add_argument(
        "--nodes",
        choices=("none", "kinds", "each"),
        default="none",
        help="print the time by operator, or node by node",
    )
    parser.add_argument("--signed", action="store_true", help="also ours with signed activations everywhere")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.tasks:
        from hwsearch.zoo import NAMES

        given.tasks = [f"zoo:{name}" for name in NAMES]
    if given.here:
        with tempfile.TemporaryDirectory() as folder:
            for task in given.tasks:
                compare(task, Path(folder), given.seconds, given.nodes, signed=given.signed)
        return
    print(f"{_cpu()}; {os.cpu_count()} CPUs; one thread", flush=True)
    for isa in given.isa:
        if isa == "ALL" and "AVX2" in given.isa and not _beyond_avx2():
            print("ALL: this CPU has no more than AVX2")
            continue
        print(f"{isa}:", flush=True)
        for task in given.tasks:
            command = [sys.executable, __file__, task, "--here", "--seconds", str(given.seconds)]
            command += ["--nodes", given.nodes, *["--signed"] * given.signed]
            subprocess.run(command, env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa}, check=True)


def compare(spec: str, folder: Path, seconds: float, nodes: str, *, signed: bool) -> None:
    """Print one line of ratios and scores, and where the time goes. folder: for NNCF's network."""
    import openvino

    import hwsearch as hs
    from hwsearch.backends.base import BuildOptions
    from hwsearch.backends.openvino import OpenVINOBackend, OpenVINOEngine
    from hwsearch.deployment.evaluate import predictor, score
    from hwsearch.device.timing import Protocol, paired
    from hwsearch.engine.setup import set_up
    from hwsearch.lowering.refitted import refitted
    from hwsearch.network.variants import Int8, Variant, legal

    task = hs.load(spec)
    backend = OpenVINOBackend()
    setup = set_up(task, backend)
    lowering, network = setup.lowering, setup.network
    fp32 = {u.name: Variant("fp32") for u in network.units}
    int8 = {u.name: (*legal(u, [Variant("int8")]), Variant("fp32"))[0] for u in network.units}
    dense = setup.onnx(fp32).SerializeToString()
    refit = refitted(lowering, int8)
    ours = type(setup)(refit, backend, setup.options).onnx(int8).SerializeToString()
    options = BuildOptions(1, "fp32")
    rest: dict[str, Any] = {}
    if signed:
        other = set_up(task, backend, int8=Int8(setup.lowering.int8_bits, unsigned=False))
        other = type(setup)(refitted(other.lowering, int8), backend, setup.options)
        rest["signed"] = other.onnx(int8).SerializeToString()
    theirs = _quantized(dense, lowering, folder / "nncf.xml")
    files: dict[str, Any] = {"fp32": dense, "ours": ours, "nncf": theirs, **rest}
    engines = {name: OpenVINOEngine(openvino.Core(), file, options) for name, file in files.items()}
    for engine in engines.values():
        engine.prepare(*lowering.arrays())
    runs = {name: engine.run for name, engine in engines.items()}
    protocol = Protocol(width=0.003, limit_s=seconds)
    against_nncf = paired(runs["nncf"], {"ours": runs["ours"]}, protocol)["ours"]
    against_fp32 = paired(runs["fp32"], {n: runs[n] for n in ("ours", "nncf", *rest)}, protocol)
    scores = {n: score(task, predictor(lowering, e), n) for n, e in engines.items()}
    floats = sum(v != Variant("int8") for v in int8.values())
    print(
        f"{task.name}: {len(int8)} units, {floats} of them float; ours / nncf {against_nncf.ratio:.3f} "
        f"[{against_nncf.low:.3f}, {against_nncf.high:.3f}]; of fp32 ({against_fp32['ours'].reference_median_ns / 1e6:.3f} ms): "
        f"ours {against_fp32['ours'].ratio:.3f}, nncf {against_fp32['nncf'].ratio:.3f}; "
        f"score fp32 {scores['fp32']:.4f}, ours {scores['ours']:.4f}, nncf {scores['nncf']:.4f}",
        flush=True,
    )
    for name in rest:
        print(f"  {name}: {against_fp32[name].ratio:.3f} of fp32, score {scores[name]:.4f}", flush=True)
    for name, engine in engines.items() if nodes != "none" else ():
        _print_nodes(name, engine, each=nodes == "each")


def _quantized(dense: bytes, lowering: Any, path: Path) -> str:
    """NNCF's int8 network as an OpenVINO file; returns its path."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    batches = [_arrays(lowering, args, kwargs) for _, args, kwargs in _deployed(lowering)]
    attention = any(u.op == "matmul" for u in lowering.network.units)
    quantized = nncf.quantize(
        openvino.Core().read_model(dense),
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER if attention else None,
    )
    openvino.save_model(quantized, path, compress_to_fp16=False)
    return str(path)


def _deployed(lowering: Any) -> list[tuple[Any, Any, Any]]:
    """The calibration batches that our weights are fitted on, in pieces of the deployed batch."""
    import torch
    from torch.utils import _pytree as pytree

    found = []
    for traced, args, kwargs in lowering.fitting:
        count = next(t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        for start in range(0, count - lowering.batch + 1, lowering.batch):
            stop = start + lowering.batch
            own = pytree.tree_map(lambda t, a=start, b=stop: t[a:b] if t.dim() else t, (args, kwargs))
            found.append((traced, *own))
    return found[:300]  # as many as NNCF takes by itself


def _arrays(lowering: Any, args: Any, kwargs: Any) -> list[Any]:
    from hwsearch.graph.calls import flat_inputs

    return [v.detach().numpy() for v in flat_inputs(lowering.traced.graph, args, kwargs)]


def _print_nodes(name: str, engine: Any, *, each: bool) -> None:
    nodes = engine.nodes(100)
    print(f"  {name}: {sum(n.time_ns for n in nodes) / 1e6:.3f} ms in nodes")
    if each:
        for n in nodes:
            print(
                f"    {n.op:20} {n.precision:6} {n.time_ns / 1e6:8.4f} ms  {n.name[:60]} <- {', '.join(n.sources)[:120]}"
            )
        return
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for node in nodes:
        times[node.op, node.precision].append(node.time_ns)
    for (op, precision), own in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"    {op:20} {precision:6} {len(own):4} nodes {sum(own) / 1e6:8.4f} ms")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")


def _beyond_avx2() -> bool:
    path = Path("/proc/cpuinfo")
    return not path.exists() or "avx512" in path.read_text() or "avx_vnni" in path.read_text()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
