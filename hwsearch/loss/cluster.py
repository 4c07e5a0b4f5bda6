"""Refits and scores on the workers of a Ray cluster: the numbers of one process, sooner.

What travels is JSON, and tensors as safetensors. A worker loads the task by its name, once, and refuses where that is another
task on its machine. What a worker was at when it died is given to another one, by Ray.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save

from hwsearch import __version__
from hwsearch.compress.bank import Entry, Key, Regression, WeightBank
from hwsearch.compress.gram import Gram
from hwsearch.compress.quantize import Range
from hwsearch.compress.simulate import Simulator
from hwsearch.engine.workers import enter, joined, place_of_work
from hwsearch.errors import HwsearchError, IncompatibleTables
from hwsearch.files import changed
from hwsearch.loading import load
from hwsearch.loss.measure import Choice, Scorer, batches_of, ingredients
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant
from hwsearch.progress import Progress
from hwsearch.task import Task

RETRIES = 3
"""Times that work is done again whose worker died."""
PARTS = 4
"""For each CPU so many parts of a batch's choices, so that none waits long for another."""
AHEAD = 2
"""For each CPU so many calls are under way or wait for it."""

T = TypeVar("T")


@contextmanager
def connected(address: str | None, task: Task) -> Iterator[Cluster | None]:
    """The workers of a cluster while the block runs; None where there is no address.

    Torch computes with one thread meanwhile, as the workers do: the results are those of a process with one thread.

    Args:
        address: `auto` (the cluster that this machine is in, or that the process is connected to), `local` (one of this machine's
            cores, for the block alone) or `HOST:PORT`.
        task: What workers load by its name.

    Raises:
        As `joined`.
    """
    if address is None:
        yield None
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with joined(address, task) as ray:
            yield Cluster(ray)
    finally:
        torch.set_num_threads(threads)


class Cluster:
    """Workers that refit and score for this process. refits_s: seconds that they have spent on refitting."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        call = ray.remote(num_cpus=1, max_retries=RETRIES)
        self._refit, self._score = call(_refit), call(_score)
        self._stored: dict[Any, Any] = {}
        self.refits_s = 0.0

    @property
    def cpus(self) -> int:
        """Of all machines."""
        return max(int(self._ray.cluster_resources().get("CPU", 1)), 1)

    def refit(self, lowering: Lowering, bank: WeightBank, todo: Sequence[Regression]) -> Iterator[tuple[Regression, Entry]]:
        """Entries of a bank; see `bank.Elsewhere`."""
        described = self._described(lowering, bank)

        def calls() -> Iterator[tuple[Regression, Any]]:
            gram, ref = None, None
            for one in todo:
                if one.gram is not gram:  # stored while its unit is refitted: those of a large network take gigabytes
                    gram, ref = one.gram, self._ray.put(_bytes({"gram": one.gram.matrix}))
                yield one, self._refit.remote(described, ref, json.dumps([one.unit, one.name, one.widths, one.int8, one.ridge]))

        for one, (made, seconds) in self._each(calls()):
            self.refits_s += seconds
            yield one, tensors_of(made)

    def losses(self, lowering: Lowering, scorer: Scorer, index: int, choices: Sequence[Choice]) -> tuple[list[float], int]:
        """As `Scorer.losses`, of the batch of this number."""
        bank, keys = scorer.bank, list[list[Key]]()
        if bank is not None:
            jobs = [[(u, widths, precision) for u, precision in bank.concerned(widths, units)] for units, widths in choices]
            bank.fill((job for own in jobs for job in own), partial(self.refit, lowering, bank))
            keys = [[bank.entry(*job)[0] for job in own] for own in jobs]
        described = self._described(lowering, bank)
        size = max(-(-len(choices) // (PARTS * self.cpus)), 1)

        def calls() -> Iterator[tuple[int, Any]]:
            for at in range(0, len(choices), size):
                own = dict.fromkeys(key for of in keys[at : at + size] for key in of)
                asked = {
                    "index": index, "kind": scorer.kind, "quantize_outputs": scorer.quantize_outputs, "entries": list(own),
                    "choices": [({u: str(v) for u, v in units.items()}, widths) for units, widths in choices[at : at + size]],
                }  # fmt: skip
                held = [self._once((bank.key, *key), partial(_bytes, bank.held(key))) for key in own] if bank is not None else []
                yield at, self._score.remote(described, json.dumps(asked), *held)

        found, count = dict[int, list[float]](), 1
        for at, (losses, samples) in self._each(calls()):
            found[at], count = losses, samples
            scorer.progress.advance(len(losses))
        return [loss for at in sorted(found) for loss in found[at]], count

    def _described(self, lowering: Lowering, bank: WeightBank | None) -> Any:
        """What workers make the same lowering and bank of, in the object store."""
        text = json.dumps({
            "spec": lowering.task.spec, "place": place_of_work(),
            "batch": lowering.batch, "method": lowering.method, "residual": lowering.residual,
            "int8_bits": lowering.int8_bits, "unsigned": lowering.unsigned,
            "ranges": [[*key, own.limit, own.top, own.unsigned] for key, own in lowering.ranges.items()],
            "order": None if bank is None else {g: np.asarray(own).tolist() for g, own in bank.order.items()},
            "made_of": _made_of(lowering),
        })  # fmt: skip
        return self._once(text, lambda: text)

    def _once(self, key: Any, value: Any) -> Any:
        """Where the object store has what `value()` gives, which is put there once."""
        if key not in self._stored:
            self._stored[key] = self._ray.put(value())
        return self._stored[key]

    def _each(self, calls: Iterable[tuple[T, Any]]) -> Iterator[tuple[T, Any]]:
        """What calls return, as they end. As few wait as keep all CPUs busy, for what they are given takes memory."""
        waiting, most = dict[Any, T](), AHEAD * self.cpus
        try:
            for key, ref in calls:
                waiting[ref] = key
                if len(waiting) >= most:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            for ref in waiting:
                self._ray.cancel(ref)

    def _next(self, waiting: dict[Any, T]) -> tuple[T, Any]:
        (ref,), _ = self._ray.wait(list(waiting), num_returns=1)
        key = waiting.pop(ref)
        try:
            return key, self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, HwsearchError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            raise HwsearchError(
                f"workers of the Ray cluster died at the same work {RETRIES + 1} times ({str(error).splitlines()[0]}); see whether "
                "their machines have memory enough. The same command goes on from what was finished"
            ) from error


def _bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return bytes(save({name: t.detach().contiguous() for name, t in tensors.items()}))


def _made_of(lowering: Lowering) -> dict[str, str]:
    """All that has to be the same on every machine, by name."""
    versions = {"version of hwsearch": __version__, "version of torch": torch.__version__}
    return {**ingredients(lowering, kind=lowering.task.divergence, quantize_outputs=False), **versions}


# ---- in a worker


@dataclass(frozen=True)
class _Worker:
    lowering: Lowering
    bank: WeightBank | None
    batches: Sequence[Any]


@lru_cache(maxsize=1)
def _worker(text: str) -> _Worker:
    """The lowering and the bank that were described: the same as those of the process that asks, or an error."""
    torch.set_num_threads(1)
    told = json.loads(text)
    enter(json.loads(told["place"]))
    options = {name: told[name] for name in ("batch", "method", "residual", "int8_bits", "unsigned")}
    lowering = Lowering(load(told["spec"]), **options)
    lowering.ranges = {(unit, call, port): Range(*own) for unit, call, port, *own in told["ranges"]}
    if why := changed(told["made_of"], _made_of(lowering)):
        raise IncompatibleTables(
            f"{told['spec']} is of other {why}; machines of a cluster need the same files and packages, and a task that is the "
            "same each time that it is loaded (give random numbers a seed)"
        )
    bank = None
    if told["order"] is not None:
        order = {g: np.asarray(own, np.int64) for g, own in told["order"].items()}
        bank = WeightBank(None, lowering.traced, lowering.fitting, order, int8_bits=lowering.int8_bits)
    return _Worker(lowering, bank, batches_of(lowering))


@lru_cache(maxsize=1)
def _simulator(text: str, index: int, quantize_outputs: bool) -> Simulator:
    worker = _worker(text)
    traced, args, kwargs = worker.batches[index]
    return worker.lowering.simulator(traced, args, kwargs, quantize_outputs=quantize_outputs)


@contextmanager
def _named() -> Iterator[None]:
    """Errors say on which machine."""
    try:
        yield
    except HwsearchError as error:
        raise type(error)(f"on {socket.gethostname()}: {error}") from error


def _refit(text: str, gram: bytes, asked: str) -> tuple[bytes, float]:
    """(an entry of the bank, seconds)."""
    with _named():
        bank = _worker(text).bank
        assert bank is not None
        begun = time.perf_counter()
        unit, name, widths, int8, ridge = json.loads(asked)
        matrix = tensors_of(gram)["gram"].clone()  # where it lies in memory, sums may come out otherwise
        made = bank.regressed(Regression(unit, name, widths, int8, Gram(matrix), ridge))
        return _bytes(made), time.perf_counter() - begun


def _score(text: str, asked: str, *entries: bytes) -> tuple[list[float], int]:
    """As `Cluster.losses`, of a part of the choices. entries: of the bank, all that these need."""
    with _named():
        worker, told = _worker(text), json.loads(asked)
        if worker.bank is not None:
            own = [(unit, name) for unit, name in told["entries"]]
            worker.bank.hold({key: tensors_of(entry) for key, entry in zip(own, entries, strict=True)})
        choices = [({u: Variant.parse(v) for u, v in units.items()}, widths) for units, widths in told["choices"]]
        scorer = Scorer(told["kind"], told["quantize_outputs"], worker.bank, Progress.silent())
        return scorer.losses(worker.lowering, _simulator(text, told["index"], told["quantize_outputs"]), choices)
