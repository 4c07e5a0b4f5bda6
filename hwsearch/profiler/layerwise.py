"""Profiles made layer by layer: units between their neighbours (sandwiched), or each by itself (alone).

The first never compiles the whole network, and times everything against one sandwich. The second is the naive baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from hwsearch.backends.base import Engine, qdq_form
from hwsearch.backends.process import compiler
from hwsearch.device.spent import ASSEMBLING, COMPILING, TIMING
from hwsearch.device.timing import Protocol, paired
from hwsearch.engine.record import graph_bytes, record, refusals
from hwsearch.engine.setup import Setup
from hwsearch.errors import InvalidInput
from hwsearch.lowering.marked import isolate
from hwsearch.lowering.parts import cut
from hwsearch.network.sandwich import Sandwich, largest, plan
from hwsearch.network.variants import Variant, everywhere, legal, uniform
from hwsearch.progress import Progress
from hwsearch.table.build import Role
from hwsearch.table.table import LatencyTable

METADATA_BYTES = 1024
"""The most that the metadata of a deployed file takes."""
WIDTH = 0.02
"""Interval of the ratio at which the measurement of a layer stops, where no narrower one is asked for."""


@dataclass
class Layers:
    """A profile made layer by layer. table: what is known so far; save: puts it on disk, after every build."""

    setup: Setup
    table: LatencyTable
    save: Callable[[LatencyTable], None]
    protocol: Protocol
    progress: Progress
    seed: int = 0

    def sandwiched(self, time_limit_s: float) -> None:
        """Sandwiches that hold every (signature, variant), all of one variant wherever it can be, and the same in fp32.

        Outputs of parts are compared with nothing: what a runtime computes wrongly shows when an allocation is deployed.
        Raises InvalidInput where the time limit ends it: a table that lacks a layer predicts nothing.
        """
        base, network = self.setup.options.base, self.setup.network
        jobs = [
            (s, v, base)
            for v in self.setup.variants(base)
            for s in self.plan
            if any(legal(network[u], [v]) for u in s.filling)
        ]
        if base != "fp32":
            jobs += [(s, Variant("fp32"), "fp32") for s in self.plan]
        self.progress.start(
            len(jobs), f"profile {network.name} in {len(self.plan)} sandwiches on {self.setup.backend.name}"
        )
        try:
            self._file_bytes()
            for sandwich, variant, own in self._timed(jobs, time_limit_s):
                self._sandwich(sandwich, variant, own)
            self._keep(self.table.with_header(ended=True))
        finally:
            self.progress.stop()

    def alone(self, time_limit_s: float, reference: Engine) -> None:
        """Each distinct (unit, variant) compiled and timed by itself, beside the whole network."""
        jobs: dict[tuple[str, Variant], str] = {}
        for unit in (u for u in self.setup.network.units if not u.stored):
            for variant in legal(unit, self.setup.variants()):
                jobs.setdefault((unit.signature, variant), unit.name)
        self.progress.expect(len(jobs))
        for name, variant in self._timed([(n, v) for (_, v), n in jobs.items()], time_limit_s):
            model = isolate(self.setup.lowering.marked, self.setup.network[name])
            self._measure(Role.ALONE, model, {name: variant}, self.setup.options.base, reference)

    @cached_property
    def plan(self) -> tuple[Sandwich, ...]:
        return plan(self.setup.network)

    @cached_property
    def reference(self) -> Engine:
        return sandwich_engine(self.setup)

    def _timed(self, jobs: Any, time_limit_s: float) -> Any:
        """The jobs while there is time."""
        start = self.setup.clock()
        for number, job in enumerate(jobs):
            if self.setup.clock() - start > time_limit_s * 1e9:
                raise InvalidInput(
                    f"the time limit of {time_limit_s:.0f} s ended the profile layer by layer after {number} of {len(jobs)} "
                    "builds; with the same output file and a longer --time-limit it goes on from there"
                )
            yield job

    def _file_bytes(self) -> None:
        """Sizes of the deployed file, from the ONNX of whole networks, which are not compiled."""
        dense = int(self.setup.onnx(uniform(self.setup.network, "fp32")).ByteSize())
        always, own = graph_bytes(self.setup, self.setup.options.base)
        self._keep(
            self.table.with_header(
                graph_bytes=always + METADATA_BYTES, unit_bytes=own, dense_file_bytes=dense
            )
        )

    def _sandwich(self, sandwich: Sandwich, variant: Variant, base: str) -> None:
        """One sandwich in one variant; again where a unit of it refused that, with this unit in the base precision."""
        model = cut(self.setup.lowering.marked, sandwich.units, sandwich.filling)
        while True:
            refused = self.table.header.unsupported
            whole = everywhere(self.setup.network, variant, base, refused)
            variants = {u: whole[u] for u in sandwich.units}
            if all(variants[u] != variant for u in sandwich.filling):
                return self.progress.step(f"{variant}: refused by {', '.join(sandwich.filling)}")
            self._measure(Role.SANDWICH, model, variants, base, self.reference, sandwich.filling)
            if self.table.header.unsupported == refused:
                return None

    def _measure(
        self, role: Role, marked: Any, variants: Mapping[str, Variant], base: str, reference: Engine,
        known: tuple[str, ...] | None = None,
    ) -> None:  # fmt: skip
        """Build and time a part of the network, unless the table has it. known: units whose precision it tells."""
        asked = tuple(str(variants.get(u.name, "")) for u in self.setup.network.units)
        what = f"{', '.join(known or variants)} {next(iter(variants.values()))}"
        if any((b.role, b.base, b.variants) == (role, base, asked) for b in self.table.builds):
            return self.progress.step(f"{what}: on disk already")
        begun = self.setup.clock()
        engine, model = _engine(self.setup, marked, variants, base)
        build_s = (self.setup.clock() - begun) / 1e9
        protocol = replace(self.protocol, width=max(self.protocol.width, WIDTH))
        with self.setup.spent.on(TIMING):
            timing = paired(
                reference.run,
                {role: engine.run},
                protocol,
                clock=self.setup.clock,
                seed=self.seed,
                sample=self.setup.sample,
            )[role]
        build = record(self.setup, role, variants, base, timing, engine, model, build_s)
        if base == self.setup.options.base:
            self.table = self.table.with_header(unsupported=refusals(self.table, build, known))
        self._keep(self.table.with_build(build).rescaled())
        return self.progress.step(f"{what}: {build.ratio:.4f} of the reference")

    def _keep(self, table: LatencyTable) -> None:
        self.table = table
        self.save(table)


def sandwich_engine(setup: Setup) -> Engine:
    """What everything in a sandwiched table is timed against: the sandwich of the most work, in the base precision."""
    chosen = largest(setup.network, plan(setup.network))
    marked = cut(setup.lowering.marked, chosen.units, chosen.filling)
    return _engine(setup, marked, dict.fromkeys(chosen.units, Variant(setup.options.base)), setup.options.base)[0]


def _engine(setup: Setup, marked: Any, variants: Mapping[str, Variant], base: str) -> tuple[Engine, Any]:
    """A part of the network compiled: on the example inputs where it has the network's own, else on noise."""
    build_engine = compiler(setup.backend)
    with setup.spent.on(ASSEMBLING):
        model = setup.lowering.assemble(marked, variants, **qdq_form(setup.backend))
    with setup.spent.on(COMPILING):
        engine = build_engine(model.SerializeToString(), replace(setup.options, base=base))
    names = [v.name for v in setup.lowering.marked.graph.input]
    given = dict(zip(names, setup.lowering.arrays(), strict=True))
    rng = np.random.default_rng(0)
    engine.prepare(
        *(
            given[s.name] if s.name in given else rng.normal(size=s.shape).astype(s.dtype)
            for s in engine.inputs
        )
    )
    return engine, model
