#!/usr/bin/env python
"""Five networks that nothing here was tuned on, with the weights that their packages on PyPI ship, as tasks.

`onet` (faces: a CNN with PReLU and three outputs; facenet-pytorch, MIT), `crepe` (pitch: long convolutions, BatchNorm after
ReLU; torchcrepe, MIT), `fcpe` (pitch: Conformer blocks; torchfcpe, MIT), `silero` (speech: convolutions, an LSTM cell, its
state in and out; silero-vad, MIT), `voice` (speakers: an LSTM of three layers; Resemblyzer, Apache-2.0). Packages are downloaded by
pip and unpacked, and their module files are run. Inputs are synthetic tones, and for `onet` crops of the photographs of
zoo:efficientnet_lite0; but for `crepe`, which is scored by its pitch, scores are agreement with the dense network.

    python scripts/bench/foreign.py
    python scripts/bench/latency_model.py scripts/bench/foreign.py:{onet,crepe,fcpe,silero,voice} --time-limit 180 --no-alone
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import hwsearch as hs
from hwsearch.zoo._cache import cache_dir

RATE = 16_000
PACKAGES = {
    "facenet_pytorch": "facenet-pytorch==2.6.0", "torchcrepe": "torchcrepe==0.0.24", "torchfcpe": "torchfcpe==0.0.4",
    "silero_vad": "silero-vad==6.2.3", "resemblyzer": "Resemblyzer==0.1.4",
}  # fmt: skip


def package(name: str) -> Path:
    """Folder of an unpacked package, downloaded where it is not there."""
    folder = cache_dir("foreign") / name
    if not (folder / name).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        own = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGES[name]]
        subprocess.run(own, check=True)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
            wheel.unlink()
    return folder / name


def run_file(path: Path, without: str = "", until: str = "") -> dict[str, Any]:
    """The names of a module's file. without: a line to leave out; until: where it is cut."""
    source = path.read_text().replace(without, "")
    names: dict[str, Any] = {"__file__": str(path), "__name__": path.stem}
    exec(compile(source.split(until)[0] if until else source, str(path), "exec"), names)
    return names


def weights(path: Path) -> Any:
    """Of a file of torch."""
    return torch.load(path, weights_only=True, map_location="cpu")


def tones(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tones of eight partials with vibrato and noise [count, length] at 16 kHz, and their pitch in Hz [count]."""
    random = torch.Generator().manual_seed(seed)
    pitch = 80 * 2 ** (4.0 * torch.rand(count, generator=random))
    time = torch.arange(length) / RATE
    vibrato = 1 + 0.003 * torch.sin(2 * math.pi * (5 * time[None] + torch.rand(count, 1, generator=random)))
    phase = 2 * math.pi * torch.cumsum(pitch[:, None] * vibrato, 1) / RATE
    sound = torch.zeros(count, length)
    for k in range(1, 9):
        level, start = torch.rand(2, count, 1, generator=random)
        sound += level / k * torch.sin(k * phase + 2 * math.pi * start) * (k * pitch[:, None] < RATE / 2)
    sound /= sound.std(1, keepdim=True)
    noise = 0.05 * 10 ** torch.rand(count, 1, generator=random)
    return sound + noise * torch.randn(count, length, generator=random), pitch


def mels(sound: Tensor, bands: int, window: int, hop: int) -> Tensor:
    """Mel spectrogram [n, frames, bands]."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    at = torch.linspace(0, RATE / 2, window // 2 + 1)
    bank = torch.minimum((at - low) / (middle - low), (high - at) / (high - middle)).clamp(min=0) * (2 / (high - low))
    spectrum = torch.stft(sound, window, hop, window=torch.hann_window(window), return_complex=True).abs()
    return (bank @ spectrum).transpose(1, 2)


def batched(call: Callable[..., Any], *inputs: Tensor, batch: int = 100) -> list[Tensor]:
    """The outputs of all batches of inputs."""
    with torch.no_grad():
        outs = [call(*x) for x in zip(*(i.split(batch) for i in inputs), strict=True)]
    outs = [o if isinstance(o, tuple | list) else (o,) for o in outs]
    return [torch.cat(own) for own in zip(*outs, strict=True)]


def crepe() -> hs.Task:
    """Convolutions 512 and 64 long over 64 ms of sound; scored by pitches within 50 cents."""
    path = package("torchcrepe")
    stands_in = types.ModuleType("torchcrepe")
    stands_in.PITCH_BINS = 360  # type: ignore[attr-defined]
    sys.modules["torchcrepe"] = stands_in
    net = run_file(path / "model.py")["Crepe"]("tiny")
    net.load_state_dict(weights(path / "assets" / "tiny.pth"))

    def frames(count: int, seed: int) -> tuple[Tensor, Tensor]:
        sound, pitch = tones(count, 1024, seed)
        sound = sound - sound.mean(1, keepdim=True)
        return sound / sound.std(1, keepdim=True), pitch

    own, (test, pitch) = frames(512, 1)[0], frames(1000, 2)
    true = 1200 * torch.log2(pitch / 10)

    def evaluate(predict: hs.task.Predict) -> float:
        cents = 20 * batched(predict, test)[0].argmax(1) + 1997.3794084376191
        return float(((cents - true).abs() < 50).float().mean())

    return hs.Task(net.eval(), own[:1], list(own.split(64)), evaluate, "crepe", scored=len(test))


def fcpe() -> hs.Task:
    """Six blocks of depthwise and pointwise convolutions with LayerNorm over 0.6 s of sound."""
    path = package("torchfcpe")
    for missing, names in (("local_attention", ["LocalAttention"]), ("einops", ["rearrange", "repeat"])):
        if importlib.util.find_spec(missing) is None:  # of the attention that this network is without
            sys.modules[missing] = types.ModuleType(missing)
            vars(sys.modules[missing]).update(dict.fromkeys(names))
    parent = types.ModuleType("torchfcpe")
    parent.__path__ = [str(path)]
    sys.modules["torchfcpe"] = parent
    saved = weights(path / "assets" / "fcpe_c_v001.pt")
    own = saved["config_dict"]["model"]
    names = ("out_dims", "hidden_dims", "n_layers", "n_heads", "f0_max", "f0_min", "use_fa_norm", "conv_only")
    net = importlib.import_module("torchfcpe.models").CFNaiveMelPE(128, *(own[n] for n in names))
    net.load_state_dict(saved["model"])

    def clips(count: int, seed: int) -> Tensor:
        return torch.log(mels(0.1 * tones(count, 160 * 63, seed)[0], 128, 1024, 160).clamp(min=1e-5))

    return agreeing(net, "fcpe", (clips(64, 1),), (clips(100, 2),))


class Voice(nn.Module):
    """resemblyzer.VoiceEncoder without its device and files: [n, 160, 40] -> [n, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear, self.relu = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256), nn.ReLU()

    def forward(self, spectrum: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(spectrum)
        raw = self.relu(self.linear(hidden[-1]))
        return raw / torch.norm(raw, dim=1, keepdim=True)


def voice() -> hs.Task:
    """An LSTM of three layers over 1.6 s of sound."""
    net = Voice()
    net.load_state_dict(weights(package("resemblyzer") / "pretrained.pt")["model_state"], strict=False)

    def clips(count: int, seed: int) -> Tensor:
        return mels(0.03 * tones(count, 160 * 159, seed)[0], 40, 400, 160)

    return agreeing(net, "voice", (clips(64, 1),), (clips(64, 2),))


class Silero(nn.Module):
    """The network of silero_vad/tinygrad_model.py, the state [n, 2, 128] with the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, 1, 1), nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, 2, 1), nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell, self.final_conv = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(self, sound: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stft_conv(F.pad(sound, (0, 64), "reflect").unsqueeze(1))
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        hidden, cell = self.lstm_cell(x.squeeze(-1), (state[:, 0], state[:, 1]))
        speech = self.final_conv(hidden.unsqueeze(-1).relu()).sigmoid().squeeze(1).mean(1, keepdim=True)
        return speech, torch.stack([hidden, cell], 1)


def silero() -> hs.Task:
    """Four convolutions and an LSTM cell over 36 ms of sound, with the state of three calls before."""
    net = Silero()
    net.load_state_dict(load_file(package("silero_vad") / "data" / "silero_vad_16k.safetensors"))

    def clips(count: int, seed: int) -> tuple[Tensor, Tensor]:
        sound = 0.2 * tones(count, 576, seed)[0] * torch.rand(count, 1, generator=torch.Generator().manual_seed(seed))
        state = torch.zeros(count, 2, 128)
        for _ in range(3):
            state = batched(net, sound.roll(100, 1), state)[1]
        return sound, state

    return agreeing(net, "silero", clips(256, 1), clips(500, 2))


def onet() -> hs.Task:
    """The third network of MTCNN: a CNN on 48 x 48 crops."""
    path = package("facenet_pytorch")
    unused = "from .utils.detect_face import detect_face, extract_face"
    net = run_file(path / "models" / "mtcnn.py", unused, "class MTCNN")["ONet"](pretrained=False)
    net.load_state_dict(weights(path / "data" / "onet.pt"))
    photographs = cache_dir("efficientnet_lite0") / "photographs.npz"
    if not photographs.is_file():
        raise SystemExit("run scripts/fetch_zoo efficientnet_lite0 first: crops of its photographs are the inputs")
    with np.load(photographs, allow_pickle=False) as data:
        images = torch.from_numpy(data["calibration_images"]).float()
    images = (images - images.amin()) / (images.amax() - images.amin()) * 2 - 1

    def crops(count: int, seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(count):
            one, size = (int(torch.randint(a, b, (1,), generator=random)) for a, b in ((0, len(images)), (48, 200)))
            y, x = torch.randint(224 - size, (2,), generator=random).tolist()
            found.append(F.interpolate(images[one, None, :, y : y + size, x : x + size], size=(48, 48), mode="area"))
        return torch.cat(found)

    return agreeing(net, "onet", (crops(256, 1),), (crops(500, 2),))


def agreeing(net: nn.Module, name: str, own: tuple[Tensor, ...], test: tuple[Tensor, ...]) -> hs.Task:
    """A task scored by 1 less the squared error of the outputs, relative to how they vary."""
    dense = batched(net.eval(), *test)

    def evaluate(predict: hs.task.Predict) -> float:
        outs = batched(predict, *test)
        errors = (((a - b) ** 2).sum() / ((b - b.mean(0)) ** 2).sum() for a, b in zip(outs, dense, strict=True))
        return 1 - float(sum(errors)) / len(dense)

    pieces = list(zip(*(x.split(32) for x in own), strict=True))
    calibration = [p[0] for p in pieces] if len(own) == 1 else pieces
    example: Any = tuple(x[:1] for x in own) if len(own) > 1 else own[0][:1]
    return hs.Task(net, example, calibration, evaluate, name)


def main() -> None:
    for make in (onet, crepe, fcpe, silero, voice):
        task = make()
        count = sum(p.numel() for p in task.model.parameters())
        print(f"{task.name}: {count:,} parameters, score {task.evaluate(task.model):.4f}")


if __name__ == "__main__":
    main()
