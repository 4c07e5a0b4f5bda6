"""One latency table of all machines of a Ray cluster that are of one kind: each profiles by itself, and what they have measured is
merged as it comes.

Each machine designs its builds with a seed of its own, times them against a reference engine of its own, and keeps them in a file
of its own; see `table.merging` for what becomes of them. A machine that dies costs what it had not handed over: a few seconds.
"""

from __future__ import annotations

import json
import platform
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hwsearch import backends
from hwsearch.device.fingerprint import fingerprint_for
from hwsearch.device.lock import lock_path
from hwsearch.engine.workers import enter, joined, place_of_work
from hwsearch.errors import HwsearchError, IncompatibleTables, InvalidInput
from hwsearch.files import make_folder, write_bytes
from hwsearch.loading import load
from hwsearch.progress import Progress
from hwsearch.table.build import Role
from hwsearch.table.header import Mode
from hwsearch.table.merging import apart, merged
from hwsearch.table.table import LatencyTable
from hwsearch.task import Task

Measure = partial[LatencyTable]
"""`hwsearch.api.profile` with its options."""
POLL_S = 5.0
"""From one look at what the machines have measured to the next."""
ANSWER_S = 60.0
"""So long a machine may take to answer: one that does not at first, as other work of the cluster keeps it busy, is left out."""


def profile_on_machines(
    address: str, task: Task, out: str | Path | None, measure: Measure, *, mode: str = "context", trace: str | Path | None = None,
    seed: int = 0, prior: Sequence[LatencyTable | str | Path] = (), progress: Progress | None = None,
) -> LatencyTable:  # fmt: skip
    """The table at `out`, filled by all machines of a cluster that are of the kind of the first.

    That is the first one of the table, if there is one; else the machine of this process, if it is in the cluster. Times are its.
    What each machine has measured is kept in `OUT.machines` as well, from where the same command goes on.

    Args:
        address: As for `engine.workers.joined`.
        measure: `hwsearch.api.profile` with its options, which each machine calls.
        seed: Of the first machine's builds; the others' are the next ones.

    Raises:
        InvalidInput: The mode is not `context`, as others are not merged, a trace is asked for, or `out` has other options.
        IncompatibleTables: `out` is of something else.
        HwsearchError: No machine measured as much as a table needs, or as `joined`.
    """
    progress = progress or Progress.silent()
    if trace is not None:
        raise InvalidInput("a trace is of one machine, and several profile; `hwsearch table show` has the sums of all")
    if mode != Mode.CONTEXT:
        raise InvalidInput(f"tables of mode {mode} cannot be merged: with several machines, give mode context")
    with ExitStack() as stack:
        if out is not None:
            stack.enter_context(lock_path(Path(out), say=progress.say))
        folder = Path(f"{out}.machines" if out is not None else stack.enter_context(tempfile.TemporaryDirectory()))
        make_folder(folder)
        ray = stack.enter_context(joined(address, task))
        group = _Group(ray, progress, folder, None if out is None else Path(out))
        group.gather(measure)
        group.begin(task.spec, measure, seed, [_bytes_of(table) for table in prior])
        try:
            progress.start(None, f"profile on {len(group.machines)} machines")
            group.follow()
        finally:
            progress.stop()
            group.end()
        return group.table()


@dataclass
class _Member:
    """A machine at work. worker: its actor; file: of what it has measured; stamp: of the last state that was handed over."""

    name: str
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    worker: Any
    file: Path
    stamp: int = 0
    builds: int = 0


class _Group:
    """The machines of a cluster that fill one table."""

    def __init__(self, ray: Any, progress: Progress, folder: Path, out: Path | None) -> None:
        self._ray, self._progress, self._folder, self._out = ray, progress, folder, out
        self.machines: list[_Member] = []
        self._running: dict[Any, _Member] = {}
        self._errors: list[HwsearchError] = []
        self._refused: dict[str, str] = {}

    def gather(self, measure: Measure) -> None:
        """Find the machines of one kind, the first one first. Raises HwsearchError where there is none."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = self._ray.get_runtime_context().get_node_id()
        nodes = [n for n in self._ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
        asked = []
        for node in sorted(nodes, key=lambda n: (n["NodeID"] != here, n["NodeManagerHostname"], n["NodeID"])):
            worker = self._ray.remote(_Machine).options(
                num_cpus=node["Resources"]["CPU"], max_concurrency=2,  # nothing else runs there meanwhile
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(place_of_work())  # fmt: skip
            asked.append((node["NodeManagerHostname"], worker, worker.look.remote(measure)))
        for host, worker, ref in asked:
            told = self._answer(host, ref, ANSWER_S)
            if told is None:
                continue
            if told["machine"] in [m.name for m in self.machines]:
                self._tell(f"two nodes of the cluster are of the machine {told['machine']}: one of them profiles")
                self._ray.kill(worker)
                continue
            file = self._folder / f"{told['machine'].replace('/', '_')}.parquet"
            self.machines.append(_Member(told["machine"], told["device"], told["versions"], worker, file))
        self._put_first()
        self._require_kind()

    def _put_first(self) -> None:
        """The first machine of the table that is there goes first."""
        if self._out is None or not self._out.exists():
            return
        sections = LatencyTable.sections(self._out)
        names = [name for table in sections for name in table.machines]
        self.machines.sort(key=lambda m: names.index(m.name) if m.name in names else len(names))
        for member in self.machines:  # a table that was made without a cluster
            if not member.file.exists():
                for table in sections:
                    if own := table.of_machine(member.name) if member.name in table.machines else []:
                        LatencyTable(table.header, tuple(own)).save(member.file)

    def _require_kind(self) -> None:
        if not self.machines:
            raise self._errors[0] if self._errors else HwsearchError("the cluster has no machine with a CPU that is free")
        first = self.machines[0]
        for member in self.machines[1:]:
            if (member.device["id"], member.versions) != (first.device["id"], first.versions):
                what = "another kind of device" if member.device["id"] != first.device["id"] else "other versions of the runtime"
                self._tell(f"{member.name} is left out: {what} than {first.name}; profile it by itself, into another file")
                self._ray.kill(member.worker)
                self.machines = [m for m in self.machines if m is not member]

    def begin(self, spec: str, measure: Measure, seed: int, prior: Sequence[bytes]) -> None:
        """Let every machine profile."""
        for number, member in enumerate(self.machines):
            before = member.file.read_bytes() if member.file.exists() else b""
            ref = member.worker.profile.remote(measure, spec, before, list(prior), seed + number)
            self._running[ref] = member

    def follow(self) -> None:
        """Take over what they measure until all have ended."""
        while self._running:
            ended, _ = self._ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
            changed = [self._take_over(member) for member in self._running.values()]
            for ref in ended:
                self._answer(self._running.pop(ref).name, ref)
            if any(changed):
                self._keep()
                self._progress.step(", ".join(f"{m.builds} builds on {m.name}" for m in self.machines))

    def end(self) -> None:
        """Stop the machines."""
        for member in self.machines:
            self._ray.kill(member.worker)

    def _take_over(self, member: _Member) -> bool:
        """Write what a machine has measured by now into its file; whether there is more than before."""
        try:
            stamp, data = self._ray.get(member.worker.measured.remote(member.stamp), timeout=ANSWER_S)
        except self._ray.exceptions.RayError:  # what it ended by is said once, by its profile
            return False
        if not data:
            return False
        new = member.file.with_suffix(".new")
        write_bytes(new, data)
        if len(LatencyTable.sections(new)) > 1:
            new.unlink()
            raise InvalidInput(
                f"{self._out} is of other options or input shapes; with several machines, give each table a file of its own"
            )
        new.replace(member.file)
        member.stamp = stamp
        return True

    def _answer(self, name: str, ref: Any, timeout_s: float | None = None) -> Any:
        """What a machine answers; None where it cannot, or does not in time, which is told."""
        try:
            return self._ray.get(ref, timeout=timeout_s)
        except self._ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, HwsearchError):
                raise
            self._errors.append(error.cause)
            self._tell(f"{name} stopped: {error.cause}")
        except self._ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
            self._errors.append(HwsearchError(f"the machine {name} is lost ({reason})"))
            self._tell(f"the machine {name} is lost ({reason}): what it had measured counts, and the same command goes on there")
        return None

    def _tell(self, what: str) -> None:
        self._progress.say(what)
        warnings.warn(what, stacklevel=2)

    def _merged(self) -> LatencyTable | None:
        """The tables of all machines that have enough and are of one kind, as one; None without one."""
        accepted: list[tuple[str, LatencyTable]] = []
        every: LatencyTable | None = None
        for member in self.machines:
            if not member.stamp and not member.file.exists():
                continue
            table = LatencyTable.load(member.file)
            member.builds = len(table.builds)
            if all(b.role != Role.DENSE for b in table.builds):
                continue
            try:
                every = merged([*accepted, (member.name, table)])
                accepted.append((member.name, table))
                self._refused.pop(member.name, None)
            except IncompatibleTables as error:
                self._refused[member.name] = f"{error}; its own table is {member.file}"
        return every

    def _keep(self) -> None:
        if (every := self._merged()) is not None and self._out is not None:
            every.save(self._out)

    def table(self) -> LatencyTable:
        """What all have measured. Raises HwsearchError where that is too little."""
        every = self._merged()
        for name, why in self._refused.items():
            self._tell(f"{name} is left out: {why}")
        if every is None:
            raise self._errors[0] if self._errors else HwsearchError(
                "no machine measured the dense network before the time limit; give a longer one"
            )
        if self._out is not None:
            every.save(self._out)
        for machine in apart(every):
            if said := machine.against(every.machines[0]):
                self._tell(said)
        return every


def _bytes_of(table: LatencyTable | str | Path) -> bytes:
    """A table's file."""
    if not isinstance(table, LatencyTable):
        LatencyTable.sections(table)  # a clear error here, not on each machine
        return Path(table).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        table.save(Path(folder) / "table.parquet")
        return (Path(folder) / "table.parquet").read_bytes()


class _Machine:
    """In a process of its own on each machine."""

    def __init__(self, place: str) -> None:
        enter(json.loads(place))
        self._folder = Path(tempfile.mkdtemp(prefix="hwsearch-"))
        self._file = self._folder / "table.parquet"

    def look(self, measure: Measure) -> dict[str, Any]:
        """What this machine is, by the backend that is to be measured with."""
        runtime = backends.get(measure.keywords["backend"])
        name = getattr(runtime, "machine", "") or platform.node()
        return {"machine": name, "device": fingerprint_for(runtime).to_json(), "versions": dict(runtime.versions())}

    def profile(
        self, measure: Measure, spec: str, before: bytes, prior: Sequence[bytes], seed: int
    ) -> None:
        """Measure; `measured` tells what there is. before: what this machine measured in an earlier command."""
        if before:
            write_bytes(self._file, before)
        files = []
        for number, data in enumerate(prior):
            files.append(self._folder / f"prior{number}.parquet")
            write_bytes(files[-1], data)
        measure(load(spec), out=self._file, prior=files, seed=seed)

    def measured(self, stamp: int) -> tuple[int, bytes]:
        """(the state of the table's file, its bytes); none where it is the state that was handed over."""
        try:
            now = self._file.stat().st_mtime_ns
            return (now, self._file.read_bytes()) if now != stamp else (now, b"")
        except FileNotFoundError:
            return 0, b""
