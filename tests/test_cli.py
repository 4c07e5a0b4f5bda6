"""The command line: what it passes on, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from simulated_nvml import NOT_SUPPORTED, Nvml
from simulation import chain, grouped, probed, simulated_table
from typer.testing import CliRunner, Result

import hwsearch as hs
from hwsearch import cli
from hwsearch.allocate.front import Front, Point
from hwsearch.allocation import Allocation
from hwsearch.errors import BudgetMissed, DeviceBusy, HwsearchError, Infeasible, InvalidInput
from hwsearch.progress import Progress
from hwsearch.staircase import staircase
from hwsearch.testing import LatencyLaw

Install = Callable[..., None]


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts functions in the place of hwsearch's own, without importing what those need."""

    def install(**functions: Any) -> None:
        for name, function in functions.items():
            monkeypatch.setitem(vars(hs), name, function)

    install(load=lambda spec: f"task {spec}")
    monkeypatch.setattr(cli, "_usable", lambda backend, lock_clocks=False: None)
    return install


@pytest.fixture(autouse=True)
def overview(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwsearch.overview.as_json", lambda table: {"backend": "openvino"})
    monkeypatch.setattr("hwsearch.overview.summary", lambda table: "a table of 24 builds")


class Table:
    asked: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def load(path: Path, **wanted: Any) -> str:
        Table.asked = wanted
        return f"table {path}"


class Scores(str):
    """Sensitivities, or an allocation, of some network."""

    backend = "openvino"
    network = SimpleNamespace(fingerprint="f00")
    options: dict[str, Any] = {"threads": 1}  # noqa: RUF012

    @staticmethod
    def load(path: Path) -> Scores:
        return Scores(f"scores {path}")


class Report:
    def __init__(self, met: bool) -> None:
        self.met = met
        self.saved: Path | None = None

    def to_json(self) -> dict[str, bool]:
        return {"met": self.met}

    def __str__(self) -> str:
        return f"the report, met: {self.met}"

    def save(self, path: Path) -> None:
        self.saved = path


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


# ---------------------------------------------------------------- errors and exit codes


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (HwsearchError("went wrong"), 1, "error: went wrong"),
        (InvalidInput("no such task;\n  try zoo:x"), 2, "error: no such task; try zoo:x"),
        (DeviceBusy("busy, pid 12"), 1, "error: busy, pid 12"),
        (Infeasible("at least 5 ms", {"latency": 5e6}), 3, "error: at least 5 ms"),
        (BudgetMissed("nearest 6 ms"), 3, "error: nearest 6 ms"),
        (OSError(28, "Disk full", "t.parquet"), 1, "error: Disk full: t.parquet; run again with --debug"),
        (ValueError("odd"), 1, "error: unexpected ValueError: odd; run again with --debug"),
        (KeyboardInterrupt(), 130, "interrupted: what was finished is on disk, the same command goes on from there"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_an_exit_code(
    api: Install, error: BaseException, code: int, line: str
) -> None:
    api(profile=raising(error))
    result = invoke("profile", "zoo:x", "-o", "t.parquet")
    assert (result.exit_code, result.stderr, result.stdout) == (code, f"{line}\n", "")


@pytest.mark.parametrize(
    "words", [("--debug", "profile", "zoo:x", "-o", "t"), ("profile", "zoo:x", "-o", "t", "--debug")]
)
@pytest.mark.parametrize("error", [InvalidInput("bad"), ValueError("odd")])
def test_debug_shows_the_traceback_before_or_after_the_command(
    api: Install, words: tuple[str, ...], error: Exception
) -> None:
    api(profile=raising(error))
    result = invoke(*words)
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "--debug" not in result.stderr.splitlines()[-1]
    assert result.exit_code == (2 if isinstance(error, InvalidInput) else 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("profile",), "Missing argument 'TASK'"),
        (("profile", "zoo:x"), "--output"),
        (("profile", "zoo:x", "-o", "t", "--threads", "0"), "--threads"),
        (("profile", "zoo:x", "-o", "t", "--mode", "sideways"), "sandwiched"),
        (("profile", "zoo:x", "-o", "t", "--time-limit", "soon"), "'soon' is no duration"),
        (("search", "--table", "t", "--sensitivity", "s", "-o", "a"), "--budget"),
        (("front", "--table", "t", "--sensitivity", "s", "-o", "a", "--points", "1"), "--points"),
        (("frobnicate",), "frobnicate"),
        (("devices", "--nonsense"), "--nonsense"),
        (("table",), "command"),
    ],
)
def test_usage_errors_are_one_line_and_2(words: tuple[str, ...], said: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_output_that_is_a_folder(tmp_path: Path) -> None:
    result = invoke("profile", "zoo:x", "-o", str(tmp_path))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "directory" in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", 90),
        ("10m", 600),
        ("1h", 3600),
        ("1h30m", 5400),
        ("1.5m", 90),
        ("45", 45),
        ("2min 5s", 125),
        ("1 H", 3600),
    ],
)
def test_durations(text: str, expected: float) -> None:
    assert cli.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "-5m", "0s", "5d", "m", "1m1h", "nan", "inf"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidInput, match="expected for instance 90s"):
        cli.seconds(text)


def test_warnings_of_dependencies_are_for_debugging(api: Install) -> None:
    def profile(*args: Any, **kwargs: Any) -> Table:
        warnings.warn("some day this will change", FutureWarning, stacklevel=1)
        return Table()

    api(profile=profile)
    assert invoke("profile", "zoo:x", "-o", "t").stderr == ""
    with pytest.warns(FutureWarning, match="some day"):
        invoke("profile", "zoo:x", "-o", "t", "--debug")


# ---------------------------------------------------------------- help, quickly


def test_help_needs_no_heavy_module_and_no_patience() -> None:
    code = (
        "import sys; from hwsearch import cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'pandas', 'numpy', 'scipy', 'onnx', 'openvino', 'onnxruntime', 'matplotlib', 'pyarrow'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = os.times()
    assert "loaded: []" in done.stdout
    assert "profile" in done.stdout
    # Processor time, not the clock on the wall: it takes 0.25 s, and half a second is promised on an idle machine.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


@pytest.mark.parametrize(
    "command",
    [
        "devices",
        "doctor",
        "profile",
        "table",
        "table show",
        "table staircase",
        "sensitivity",
        "search",
        "front",
        "deploy",
        "verify",
        "run",
    ],
)
def test_every_command_has_help(command: str) -> None:
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage: hwsearch " + command in result.stdout


def test_without_words_it_shows_the_help() -> None:
    result = invoke()
    assert result.exit_code == 0
    assert "Usage: hwsearch" in result.stdout


def test_version() -> None:
    assert invoke("--version").stdout == f"hwsearch {hs.__version__}\n"


# ---------------------------------------------------------------- commands


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from hwsearch import backends

    found = [
        backends.Status("good", True, {"good": "1.2"}, ("bf16", "fp32")),
        backends.Status("bad", False, reason="install it with: pip install 'hwsearch[cpu]'"),
    ]
    monkeypatch.setattr(backends, "status", lambda: found)
    result = invoke("devices")
    assert result.exit_code == 0
    for text in ("good", "1.2", "bf16, fp32", "hwsearch[cpu]"):
        assert text in result.stdout
    data = json.loads(invoke("devices", "--json").stdout)
    assert [entry["name"] for entry in data["backends"]] == ["good", "bad"]
    assert len(data["device"]["id"]) == 12


def test_devices_lists_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwsearch.backends.status", list)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(2, fails={"nvmlDeviceGetEccMode": NOT_SUPPORTED}))
    shown = invoke("devices").stdout
    for text in ("NVIDIA Test 0, SM 8.6, 24.0 GiB, driver 570.12", "GPU-0aaa", "GPU-1aaa", "now 1980 MHz"):
        assert text in shown
    found = json.loads(invoke("devices", "--json").stdout)
    assert [gpu["uuid"] for gpu in found["gpus"]] == ["GPU-1aaa", "GPU-0aaa"]
    assert all("ecc" not in gpu for gpu in found["gpus"])
    assert found["no_gpu"] == ""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "no GPU: NVML cannot be asked" in invoke("devices").stdout
    assert json.loads(invoke("devices", "--json").stdout)["gpus"] == []


ABSENT = """
from hwsearch.errors import BackendUnavailable
class Backend:
    name = "absent"
    def versions(self): raise BackendUnavailable("its runtime is not installed; install it with: pip install absent")
"""


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment where backend `absent` is registered, and importing torch, onnx or pandas fails."""
    (tmp_path / "absent_backend.py").write_text(ABSENT)
    info = tmp_path / "absent_backend-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: absent-backend\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[hwsearch.backends]\nabsent = absent_backend:Backend\n")
    for heavy in ("torch", "onnx", "pandas"):
        (tmp_path / f"{heavy}.py").write_text(f"raise SystemExit('{heavy} was imported')")
    paths = [str(tmp_path), str(Path(hs.__file__).parent.parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.parametrize(
    "words",
    [
        "doctor --backend absent",
        "profile zoo:x -o t.parquet --backend absent",
        "sensitivity zoo:x -o s.parquet --backend absent",
        "run zoo:x --budget latency=1ms -o out --backend absent",
    ],
)
def test_a_backend_that_is_not_there_is_told_before_anything_heavy_is_loaded(
    without_torch: dict[str, str], tmp_path: Path, words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from hwsearch.cli import main; main()", *words.split()],
        capture_output=True, text=True, env=without_torch, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "pip install absent" in done.stderr


@pytest.mark.parametrize(
    "words", ["profile zoo:x -o t --lock-clocks", "verify zoo:x {} -o r.json --lock-clocks"]
)
def test_clocks_of_a_cpu_are_not_locked(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Allocation, "load", lambda path: SimpleNamespace(backend="openvino"))
    result = invoke(*words.format("a.json").split(), *(["--backend", "openvino"]))
    assert result.exit_code == 2
    assert "openvino runs on the CPU; go without --lock-clocks" in result.stderr


def test_devices_says_whether_energy_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from hwsearch import backends, energy

    monkeypatch.setattr(backends, "status", list)
    monkeypatch.setattr(energy, "find", lambda: energy.Found(reason="no RAPL package"))
    assert "energy not measured: no RAPL package" in invoke("devices").stdout
    data = json.loads(invoke("devices", "--json").stdout)
    assert data["energy"] == {"available": False, "source": "", "reason": "no RAPL package"}
    monkeypatch.setattr(energy, "find", lambda: energy.Found(lambda: 0.0, "RAPL, 1 package(s)"))
    assert "energy measured by RAPL, 1 package(s)" in invoke("devices").stdout
    assert json.loads(invoke("devices", "--json").stdout)["energy"]["available"]


def test_profile_passes_on_everything(api: Install) -> None:
    seen: dict[str, Any] = {}

    def profile(task: str, **options: Any) -> Table:
        seen.update(task=task, **options)
        options["progress"].start(2, "profiling")
        options["progress"].step("one")
        return Table()

    api(profile=profile, LatencyTable=Table)
    words = (
        "profile zoo:x -o t.parquet --backend onnxruntime --threads 2 --base fp32 --batch 8 --time-limit 1h"
    )
    words += " --mode sandwiched --axes precision --load 2 --seed 3 --prior a.parquet --prior b.parquet"
    words += " --shape 2x3x8x8 --shape ids=2x5 --lock-clocks"
    result = invoke(*words.split())
    assert (result.exit_code, result.stdout) == (0, "a table of 24 builds\n")
    assert "[1/2] profiling: one" in result.stderr
    assert isinstance(seen.pop("progress"), Progress)
    assert seen == {
        "task": "task zoo:x", "out": Path("t.parquet"), "backend": "onnxruntime", "threads": 2, "base": "fp32",
        "batch": 8, "time_limit_s": 3600.0, "mode": "sandwiched", "axes": ["precision"], "load": 2, "seed": 3,
        "prior": [Path("a.parquet"), Path("b.parquet")], "shape": ["2x3x8x8", "ids=2x5"], "lock_clocks": True,
    }  # fmt: skip
    assert json.loads(invoke(*words.split(), "--json").stdout) == {"backend": "openvino"}


def test_profile_defaults(api: Install) -> None:
    seen: dict[str, Any] = {}
    api(profile=lambda task, **options: seen.update(options) or Table())
    assert invoke("profile", "zoo:x", "-o", "t").exit_code == 0
    del seen["progress"]
    assert seen == {
        "out": Path("t"), "backend": "openvino", "threads": 1, "base": None, "batch": None, "time_limit_s": 600.0,
        "mode": "context", "axes": ["width", "precision"], "load": 0, "seed": 0, "prior": (),
        "shape": None, "lock_clocks": False,
    }  # fmt: skip


def test_table_show(api: Install) -> None:
    api(LatencyTable=SimpleNamespace(sections=lambda path: [Table()]))
    assert invoke("table", "show", "t.parquet").stdout == "a table of 24 builds\n"
    assert json.loads(invoke("table", "show", "t.parquet", "--json").stdout) == {"backend": "openvino"}


def test_table_staircase(tmp_path: Path) -> None:
    table = probed()
    table.save(tmp_path / "t.parquet")
    plot = tmp_path / "stairs.png"
    result = invoke("table", "staircase", str(tmp_path / "t.parquet"), "--plot", str(plot))
    assert result.exit_code == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()][-len(staircase(table)) :]
    assert rows[0][:2] == ["conv0", "24"]
    assert [row[-1] == "kept" for row in rows] == [step.kept for step in staircase(table)]
    steps = json.loads(invoke("table", "staircase", str(tmp_path / "t.parquet"), "--json").stdout)
    assert [(s["group"], s["width"], s["times_ns"], s["kept"]) for s in steps] == [
        (s.group, s.width, s.times_ns, s.kept) for s in staircase(table)
    ]


def test_table_staircase_without_widths(tmp_path: Path) -> None:
    network = grouped()
    simulated_table(network, LatencyLaw.random(network), design=1).save(tmp_path / "t.parquet")
    result = invoke("table", "staircase", str(tmp_path / "t.parquet"))
    assert result.exit_code == 0
    assert "holds no widths" in result.stdout
    assert invoke("table", "staircase", str(tmp_path / "t.parquet"), "--plot", "s.png").exit_code == 2


def test_sensitivity(api: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = SimpleNamespace(
        network=SimpleNamespace(name="net", channels={"stem": 32}), divergence="softmax", samples=512,
        rank_correlation=0.875, width_loss={"stem": {32: 0.0, 16: 0.25, 8: 0.5}}, estimated={("stem", 8)},
        loss={"calm": {"dense.fp32": 0.0, "dense.int8": 1e-4}, "touchy": {"dense.fp32": 0.0, "dense.int8": 0.5}},
    )  # fmt: skip
    seen: dict[str, Any] = {}
    api(sensitivity=lambda task, **options: seen.update(options) or scores)
    result = invoke("sensitivity", "zoo:x", "-o", "s.parquet", "--seed", "1")
    assert result.exit_code == 0
    assert result.stdout.index("touchy") < result.stdout.index("calm")
    assert "5.00e-01" in result.stdout
    assert "16: 2.5e-01, 8: 5.0e-01~" in result.stdout
    assert "~: 1 estimated" in result.stdout
    assert "0.88" in result.stdout
    del seen["progress"]
    assert seen == {
        "out": Path("s.parquet"), "backend": "openvino", "base": None, "batch": None, "axes": ["width", "precision"],
        "table": None, "weights": None, "seed": 1,
    }  # fmt: skip
    assert json.loads(invoke("sensitivity", "zoo:x", "-o", "s", "--json").stdout)["loss"] == scores.loss
    monkeypatch.setattr("hwsearch.api.table_of_task", lambda path, task, **wanted: f"table {path} {wanted}")
    words = "sensitivity zoo:x -o s --table t.parquet --weights w --axes width --threads 2 --batch 4"
    assert invoke(*words.split()).exit_code == 0
    assert (seen["weights"], seen["axes"], seen["batch"]) == (Path("w"), ["width"], 4)
    assert seen["table"] == f"table t.parquet { {'batch': 4, 'base': None, 'threads': 2} }"
    assert "with --table" in invoke(*"sensitivity zoo:x -o s --threads 2".split()).stderr


def test_search(api: Install, tmp_path: Path) -> None:
    chosen = Allocation(
        variants={"a": "dense.int8", "b": "dense.bf16", "c": "dense.int8"},
        predicted={"latency_ns": 4.1e6, "sigma_ns": 5e4, "size_bytes": 1_200_000, "macs": 9.0, "loss": 0.0123},
        dense={"latency_ns": 1e7, "size_bytes": 4_800_000},
        budgets=[
            {"text": "latency=42%", "column": "latency", "limit": 4_200_000},
            {"text": "size=2MB", "column": "size", "limit": 2_000_000},
        ],
        solver={"status": "optimal", "gap": 0.0, "bound": 0.0123},
        network="", weights_digest="", device={}, backend="openvino", options={},
    )  # fmt: skip
    path = tmp_path / "alloc.json"
    seen: list[Any] = []

    def find(*words: Any, **options: Any) -> Allocation:
        seen.append((*words, options))
        return chosen

    api(LatencyTable=Table, SensitivityTable=Scores, search=find)
    words = f"search --table t --sensitivity s --budget latency=42% --budget size=2MB -o {path}"
    result = invoke(*words.split())
    assert result.exit_code == 0
    for text in (
        "4.1 ± 0.05 ms",
        "10 ms",
        "1.20 MB",
        "0.0123",
        "2 dense.int8, 1 dense.bf16",
        "gap 0",
        "size=2MB",
    ):
        assert text in result.stdout
    assert Table.asked == {"network": "f00"}
    given = ("table t", "scores s", ["latency=42%", "size=2MB"])
    assert seen == [(*given, {"axes": ["width", "precision"], "keep": ()})]
    assert Allocation.load(path) == chosen
    assert json.loads(invoke(*words.split(), "--json").stdout) == chosen.to_json()
    invoke(*words.split(), *"--axes precision,width --keep stem* --keep head".split())
    assert seen[-1] == (*given, {"axes": ["precision", "width"], "keep": ["stem*", "head"]})
    invoke(
        *words.split(),
        *"--threads 2 --batch 8 --base bf16 --shape 8x3x4x4 --load 0 --no-residual --cpus 0".split(),
    )
    assert Table.asked == {
        "network": "f00", "threads": 2, "batch": 8, "base": "bf16", "shape": ["8x3x4x4"], "load": 0, "residual": False,
        "cpus": "0",
    }  # fmt: skip


def test_front(api: Install, tmp_path: Path) -> None:
    found = Front(
        (
            Point(budget=1e6, infeasible=True),
            Point(budget=4e6, latency_ns=3.9e6, sigma_ns=5e4, size_bytes=2e6, loss=0.5),
            Point(budget=5e6, latency_ns=4.5e6, sigma_ns=5e4, size_bytes=2e6, loss=0.5, dominated=True),
            Point(latency_ns=4e6, size_bytes=2e6, loss=0.6, measured=True, label="deployed"),
        ),
        "latency",
        ("a", "b"),
    )
    seen: dict[str, Any] = {}
    plotted: list[Any] = []

    def draw(front: Front, path: Path) -> None:
        plotted.append((front, path))

    sweep = lambda table, scores, **options: seen.update(options) or found  # noqa: E731
    api(LatencyTable=Table, SensitivityTable=Scores, plot_front=draw, front=sweep)
    files = ["--table", "t", "--sensitivity", "s", "-o", str(tmp_path / "f.parquet")]
    result = invoke("front", *files, *"--over latency --points 3 --budget size=2MB --plot f.png".split())
    assert result.exit_code == 0
    assert seen == {
        "over": "latency", "points": 3, "budgets": ["size=2MB"], "axes": ["width", "precision"], "keep": (),
    }  # fmt: skip
    assert plotted == [(found, Path("f.png"))]
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()][-4:]
    assert rows[0] == ["1", "ms", "-", "-", "-", "-", "infeasible"]
    assert rows[1] == ["4", "ms", "3.9", "±", "0.05", "ms", "2.00", "MB", "-", "0.5"]
    assert rows[2][-1] == "dominated"
    assert rows[3] == ["deployed", "4", "ms", "2.00", "MB", "-", "0.6"]
    assert len(Front.load(tmp_path / "f.parquet").points) == 4
    points = json.loads(invoke("front", *files, "--json").stdout)["points"]
    assert [p["latency_ns"] for p in points] == [None, 3.9e6, 4.5e6, 4e6]
    assert len(plotted) == 1
    assert seen["budgets"] == ()


def test_deploy(api: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Allocation, "load", lambda path: SimpleNamespace(backend="onnxruntime"))
    seen: list[Any] = []

    def deploy(task: str, chosen: Any, out: Path, *, backend: str | None, weights: Path | None) -> Any:
        seen.append((backend, weights))
        return SimpleNamespace(path=out, size_bytes=1_250_000)

    api(deploy=deploy)
    assert invoke("deploy", "zoo:x", "a.json", "-o", "m.onnx").stdout == "m.onnx: 1.25 MB\n"
    result = invoke(*"deploy zoo:x a.json -o m.onnx --backend openvino --weights w --json".split())
    assert json.loads(result.stdout) == {"path": "m.onnx", "size_bytes": 1_250_000}
    assert seen == [(None, None), ("openvino", Path("w"))]


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 3)])
def test_verify_ends_with_whether_the_budget_is_met(
    api: Install, monkeypatch: pytest.MonkeyPatch, met: bool, code: int
) -> None:
    monkeypatch.setattr(Allocation, "load", lambda path: Scores(f"allocation {path}"))
    report = Report(met)
    seen: dict[str, Any] = {}
    api(
        verify=lambda task, chosen, **options: seen.update(options, chosen=chosen) or report,
        LatencyTable=Table,
    )
    words = "verify zoo:x a.json -o r.json --threads 2 --table t.parquet --lock-clocks"
    result = invoke(*words.split())
    assert result.exit_code == code
    assert result.stdout == f"the report, met: {met}\n"
    assert ("missed" in result.stderr) is (not met)
    assert report.saved == Path("r.json")
    assert seen == {
        "chosen": "allocation a.json", "backend": None, "threads": 2, "table": "table t.parquet", "weights": None,
        "lock_clocks": True,
    }  # fmt: skip
    assert json.loads(invoke("verify", "zoo:x", "a.json", "-o", "r.json", "--json").stdout) == {"met": met}


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 3)])
def test_run(api: Install, tmp_path: Path, met: bool, code: int) -> None:
    seen: dict[str, Any] = {}

    def run(task: str, budgets: list[str], out: Path, **options: Any) -> Report:
        seen.update(options, task=task, budgets=budgets, out=out)
        (out / "front.png").write_bytes(b"")
        return Report(met)

    api(run=run)
    words = (
        "run",
        "zoo:x",
        "--budget",
        "latency=40%",
        "--budget",
        "size=2MB",
        "--out",
        str(tmp_path),
        "--time-limit",
        "90s",
    )
    result = invoke(*words)
    assert result.exit_code == code
    assert result.stdout.startswith(f"the report, met: {met}\n")
    assert result.stdout.endswith(f"plot: {tmp_path / 'front.png'}\n")
    assert "latency table" not in result.stdout, "only what is there"
    del seen["progress"]
    assert seen == {
        "task": "task zoo:x", "budgets": ["latency=40%", "size=2MB"], "out": tmp_path, "backend": "openvino",
        "threads": 1, "base": None, "batch": None, "seed": 0, "time_limit_s": 90.0, "axes": ["width", "precision"],
        "keep": (), "load": 0,
    }  # fmt: skip
    assert json.loads(invoke(*words, "--json").stdout) == {"met": met}
    invoke(*words, *"--axes width --keep classifier*".split())
    assert (seen["axes"], seen["keep"]) == (["width"], ["classifier*"])


def test_run_that_missed_shows_the_nearest(api: Install, tmp_path: Path) -> None:
    api(run=raising(BudgetMissed("nearest 6 ms", Report(False))))
    result = invoke("run", "zoo:x", "--budget", "latency=5ms", "--out", str(tmp_path))
    assert (result.exit_code, result.stdout, result.stderr) == (
        3,
        "the report, met: False\n",
        "error: nearest 6 ms\n",
    )


@pytest.mark.usefixtures("own_locks")
def test_every_step_on_a_real_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profile, score, search, deploy and verify a tiny network with widths, each from the files of those before."""
    monkeypatch.undo()  # the overview
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path / "cache"))
    spec = f"{Path(__file__).with_name('tiny.py')}:cnn"
    table, scores, alloc, model, report = (
        str(tmp_path / name) for name in ("t.parquet", "s.parquet", "a.json", "m.onnx", "r.json")
    )
    weights = str(tmp_path / "weights")

    def ok(*words: str) -> Any:
        result = invoke(*words, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    made = ok("profile", spec, "-o", table, "--backend", "onnxruntime", "--time-limit", "4s")
    assert set(made["grid"]) == {"stem", "conv1", "conv3"}
    steps = ok("table", "staircase", table)
    lost = ok(
        "sensitivity", spec, "-o", scores, "--backend", "onnxruntime", "--table", table, "--weights", weights
    )
    assert set(lost["width_loss"]) <= {s["group"] for s in steps}
    files = ("--table", table, "--sensitivity", scores)
    found = ok("search", *files, "--budget", "size=70%", "--keep", "stem", "-o", alloc)
    assert found["widths"]["stem"] == 24
    assert found["predicted"]["size_bytes"] <= found["budgets"][0]["limit"]
    swept = ok("front", *files, "--points", "4", "-o", str(tmp_path / "f.parquet"))
    assert swept["groups"] == ["stem", "conv1", "conv3"]
    deployed = ok("deploy", spec, alloc, "-o", model, "--weights", weights)
    assert deployed["size_bytes"] == Path(model).stat().st_size
    verified = ok("verify", spec, alloc, "-o", report, "--table", table, "--weights", weights)
    assert verified["met"]
    assert verified["widths"] == {
        g: [w, n] for (g, w), n in zip(found["widths"].items(), (24, 20, 16), strict=True)
    }


def checked(holds: bool) -> Any:
    found = [SimpleNamespace(role="design", then=0.5, now=0.55, change=0.1, error=0.02)]

    class Found:
        builds = found

        def __str__(self) -> str:
            return "1 build measured again"

        def to_json(self) -> dict[str, Any]:
            return {"holds": holds}

    Found.holds = holds  # type: ignore[attr-defined]
    return Found()


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (False, 1)])
def test_table_check(api: Install, monkeypatch: pytest.MonkeyPatch, holds: bool, code: int) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("hwsearch.api.table_of_task", lambda path, task: f"table {path} of {task}")
    api(
        LatencyTable=Table,
        check=lambda table, task, **options: seen.update(table=table, task=task, **options) or checked(holds),
    )
    result = invoke("table", "check", "t.parquet", "--task", "zoo:x", "--builds", "3")
    assert result.exit_code == code
    assert "+10.0%" in result.stdout
    assert result.stdout.endswith("1 build measured again\n")
    del seen["progress"]
    assert seen == {
        "table": "table t.parquet of task zoo:x", "task": "task zoo:x", "builds": 3, "lock_clocks": False,
    }  # fmt: skip
    result = invoke("table", "check", "t.parquet", "--json")
    assert (json.loads(result.stdout), result.exit_code) == ({"holds": holds}, code)
    assert seen["task"] is None


def test_table_diagnose(tmp_path: Path) -> None:
    network = chain(16)
    table = simulated_table(network, LatencyLaw.random(network, 1), heldout=5, noise=0.02, node_noise=0.05)
    table.save(tmp_path / "t.parquet")
    result = invoke("table", "diagnose", str(tmp_path / "t.parquet"), "--plot", str(tmp_path / "d.png"))
    assert result.exit_code == 0
    assert "inside one sigma" in result.stdout
    assert (tmp_path / "d.png").exists()
    assert {"quality", "correlations", "points"} <= set(
        json.loads(invoke("table", "diagnose", str(tmp_path / "t.parquet"), "--json").stdout)
    )
