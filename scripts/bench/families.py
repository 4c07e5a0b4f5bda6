#!/usr/bin/env python
"""Networks of timm's families, one or more of each, with random weights: does every engine compute what it should?

Each network is traced; random channels of every group are removed in torch and compared with the masked network; engines in fp32,
in int8, in random variants, and of random widths in fp32 and in random variants are compared with their simulation. Each runs in a
process of its own. One line a network: units, channel groups, and of each engine its deviation and what rounding allows; WRONG and
FAILED lines say what is not as it should be. Images are of 96 pixels where a network takes any size. timm and torchvision are
downloaded from PyPI (15 MB) and imported; their weights are not.

    python scripts/bench/families.py
    python scripts/bench/families.py csatv2 test_vit --backend onnxruntime
"""

from __future__ import annotations

import argparse
import importlib
import random
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hwsearch as hs
from hwsearch import backends
from hwsearch.engine.setup import Setup, set_up
from hwsearch.errors import HwsearchError
from hwsearch.network.variants import Variant, legal
from hwsearch.zoo._cache import cache_dir

PACKAGES = ("timm==1.0.31", "torchvision==0.28.0")
SMALL, SAMPLES, LIMIT_S = 96, 4, 400.0
NAMES = (
    "botnet26t_256 test_byobnet coat_lite_mini convit_tiny convnext_atto_rms convnext_pico_ols cpubone_nano crossvit_tiny_240 "
    "csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deit_small_distilled_patch16_224 densenet121 dla46x_c dpn48b "
    "edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mobilenetv2_035 mobilenet_edgetpu_v2_xs efficientvim_m1 "
    "efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 vit_small_patch16_rope_mixed_224 fasternet_t0 fasternet_s fastvit_t8 "
    "fastvit_mci1 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 iformer_t "
    "inception_next_atto inception_v3 lcnetv2_small levit_128s levit_conv_256 lowformer_b0 test_mambaout maxvit_pico_rw_256 "
    "gmlp_ti16_224 lcnet_035 mobilenetv3_small_100 mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small test_nfnet pit_xs_224 "
    "pvt_v2_b0 regnetx_002 repghostnet_050 repvit_m1_0 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 "
    "legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 "
    "swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 twins_svt_small visformer_tiny test_vit vit_tiny_r_s16_p8_224 "
    "test_vit_relpos ese_vovnet19b_slim_dw legacy_xception xcit_nano_12_p8_224"
).split()
"""The smallest of each family, and of large ones another."""


def timm() -> Any:
    """The package, downloaded where it is not there. torchvision's compiled operators need CUDA, and none of them is called."""
    folder = cache_dir("timm")
    if not (folder / "timm").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *PACKAGES], check=True)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
            wheel.unlink()
        (folder / "torchvision" / "_meta_registrations.py").write_text("")
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.append(str(folder))
    found = importlib.import_module("timm")
    found.hwsearch_library = library
    return found


def network(name: str) -> tuple[nn.Module, list[Tensor]]:
    """(the network with statistics of BatchNorm of its own, smooth random images of the size that it takes)."""
    torch.manual_seed(0)
    model = timm().create_model(name, pretrained=False, num_classes=10)
    model.eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # a head of zeros puts out zeros, whatever is before it
            nn.init.trunc_normal_(parameter, std=0.02)
    last: Exception | None = None
    for shape in ((3, SMALL, SMALL), tuple(model.default_cfg["input_size"])):
        coarse = [torch.randn(1, 3, *(max(4, s // 4) for s in shape[1:])) for _ in range(SAMPLES)]
        images = [F.interpolate(c, size=shape[1:]) + 0.3 * torch.randn(1, *shape) for c in coarse]
        try:
            with torch.no_grad():
                _statistics(model, torch.cat(images))
                model(images[0])
            return model, images
        except (AssertionError, RuntimeError, ValueError) as error:
            last = error
    raise SystemExit(f"FAILED {name}: {type(last).__name__}: {last}")


def _statistics(model: nn.Module, images: Tensor) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    model(images)
    model.eval()


def trials(setup: Setup) -> Iterator[tuple[str, dict[str, Variant], dict[str, list[int]]]]:
    """(name, variants, slots that are kept of each group)."""
    rng, units = np.random.default_rng(0), setup.network.units

    def mixed() -> dict[str, Variant]:
        offered = {u.name: [v for v in setup.variants("fp32") if legal(u, [v])] or [Variant("fp32")] for u in units}
        return {name: own[int(rng.integers(len(own)))] for name, own in offered.items()}

    plain = {u.name: Variant("fp32") for u in units}
    yield "fp32", plain, {}
    yield "int8", {u.name: Variant("int8") if legal(u, [Variant("int8")]) else Variant("fp32") for u in units}, {}
    yield "mixed", mixed(), {}
    for what in ("narrow", "narrow mixed"):
        kept = {}
        for group in setup.network.groups:
            if rng.random() < 0.7:
                width = int(rng.integers(max(1, group.channels // 4), group.channels + 1))
                kept[group.name] = sorted(rng.choice(group.channels, width, replace=False).tolist())
        yield what, plain if what == "narrow" else mixed(), kept


def compared(name: str, backend: str) -> None:
    """Print what came of one network."""
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "tests" / own) for own in ("", "graph")]
    check = importlib.import_module("test_channels").check
    model, images = network(name)
    setup = set_up(hs.Task(model, images[0], images, lambda predict: 0.0, name), backends.get(backend))
    said = []
    try:
        check(setup.lowering.traced, images[0], random.Random(0))
    except AssertionError as error:
        said.append(f"WRONG masked: {error}")
    for what, variants, kept in trials(setup):
        try:
            own = setup.narrow(kept) if kept else setup
            engine, _ = own.build(variants, "fp32")
            off = own.expected.deviation(engine, variants, "fp32")
            said.append(f"{'WRONG ' * off.wrong}{what} {off.error:.2g} of {off.allowed:.2g}")
        except HwsearchError as error:
            said.append(f"FAILED {what}: {error}")
    print(f"{name}: {len(setup.network.units)} units, {len(setup.network.groups)} groups; {'; '.join(said)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--here", action="store_true", help="in this process, as each network is called")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.here:
        for name in args.names:
            compared(name, args.backend)
        return 0
    timm()
    bad = []
    for name in args.names:
        command = [sys.executable, __file__, name, "--backend", args.backend, "--here"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith(f"{name}: ")]
            line = lines[-1] if lines else f"{name}: FAILED {(done.stderr.strip().splitlines() or ['without a word'])[-1]}"
        except subprocess.TimeoutExpired:
            line = f"{name}: FAILED took more than {LIMIT_S:.0f} s"
        print(line, flush=True)
        if "WRONG" in line or "FAILED" in line:
            bad.append(name)
    right = len(args.names) - len(bad)
    print(f"{len(args.names)} networks in {args.backend}: {right} as they should be; not so: {', '.join(bad) or 'none'}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
