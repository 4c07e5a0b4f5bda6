"""Allocation -> the task as the allocation wants it, narrow and refitted -> ONNX file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

import torch

from hwsearch import backends
from hwsearch.allocate.allocation import Allocation
from hwsearch.backends.base import Backend
from hwsearch.backends.exactness import int8_bits, takes_unsigned
from hwsearch.compress.bank import WeightBank
from hwsearch.compress.widths import Kept
from hwsearch.device import fingerprint as devices
from hwsearch.engine.setup import Setup, set_up
from hwsearch.errors import IncompatibleTables
from hwsearch.files import write_bytes
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import as_module, refitted, weight_bank
from hwsearch.network.choices import RESIDUAL
from hwsearch.network.choices import STORAGE as STORED
from hwsearch.network.network import Network
from hwsearch.network.variants import INT8_BITS, STORAGE, Int8, Variant
from hwsearch.recovery.trained import Trained, put
from hwsearch.task import Task


@dataclass(frozen=True)
class Deployed:
    """An ONNX file that runs without hwsearch, and what it was made from."""

    path: Path
    size_bytes: int
    allocation: Allocation
    base: str
    setup: Setup = field(repr=False)

    @cached_property
    def module(self) -> torch.nn.Module:
        """The same network in torch, in fp32: really narrower, with parameters that can be fine-tuned."""
        return as_module(self.setup.lowering)


def check_allocation(allocation: Allocation, network: Network) -> None:
    """Raises IncompatibleTables where the allocation is of another network or of other weights."""
    for what, own, current in (
        ("network", allocation.network, network.fingerprint),
        ("weights", allocation.weights_digest, network.weights_digest),
    ):
        if own != current:
            raise IncompatibleTables(
                f"the allocation is of other {what}: allocation={own}, current={current}; search again for this task"
            )


def of_allocation(
    task: Task,
    allocation: Allocation,
    backend: str | Backend | None = None,
    threads: int | None = None,
    lock_clocks: bool = False,
) -> Setup:
    """The task under the allocation's own options, on its own backend or another.

    lock_clocks: at the clock of its table, where that was locked. Raises IncompatibleTables where its int8 weights have more bits
    than the runtime sums exactly here, or it is of another network.
    """
    options = allocation.options
    which = backend or allocation.backend
    runtime = backends.get(which)
    clocks = int(options.get("clocks", 0)) or devices.clocks_to_lock(runtime) if lock_clocks else 0
    base = str(options.get("base", "fp32"))
    setup = set_up(
        task, runtime, threads=threads or int(options.get("threads", 1)),
        base=base if base in runtime.bases() else None, batch=options.get("batch"),
        axes=axes_of(allocation), load=int(options.get("load", 0)), clocks=clocks,
        energy=any(b["column"] == "energy" for b in allocation.budgets),
        int8=Int8(int8_bits_of(allocation), bool(options.get("unsigned", False)) and takes_unsigned(runtime)),
    )  # fmt: skip
    check_allocation(allocation, setup.network)
    if "dense.int8" in allocation.variants.values():
        _check_bits(setup)
    return setup


def axes_of(allocation: Allocation) -> list[str]:
    """The axes, beyond width and precision, without which its network would be another."""
    stored = str(STORAGE) in allocation.variants.values()
    return [RESIDUAL] * bool(allocation.options.get(RESIDUAL)) + [STORED] * stored


def int8_bits_of(allocation: Allocation) -> int:
    """Bits of its int8 weights, as its table says."""
    return int(allocation.options.get("int8_bits", INT8_BITS))


def _check_bits(setup: Setup) -> None:
    own, exact = setup.lowering.int8_bits, int8_bits(setup.backend, setup.options)
    if own > exact:
        raise IncompatibleTables(
            f"the allocation has int8 weights of {own} bits, and {setup.backend.name} sums products of such inexactly on this "
            f"device (it takes {exact} bits): what it would compute here is not what was searched; profile and search here"
        )


def lowering_of(task: Task, allocation: Allocation, weights: str | Path | None = None) -> Lowering:
    """The task as an allocation wants it, narrow and refitted, whichever backend it was searched on.

    weights: as for `deploy`. Raises IncompatibleTables (another network).
    """
    options = allocation.options
    whole = Lowering(
        task,
        options.get("batch"),
        residual=bool(options.get("residual", False)),
        int8_bits=int8_bits_of(allocation),
    )
    check_allocation(allocation, whole.network)
    if is_trained(weights):
        return _trained(whole, allocation, weights)
    return _refitted(whole, allocation, _bank(whole, allocation, weights))


def is_trained(weights: str | Path | None) -> TypeGuard[str | Path]:
    """Whether weights are a file of trained ones, and no folder of refitted ones."""
    return weights is not None and (Path(weights).is_file() or Path(weights).suffix == ".safetensors")


def with_weights(setup: Setup, allocation: Allocation, weights: str | Path | None) -> Setup:
    """The setup as an allocation wants it, with trained weights from a file, or refitted ones. weights: as for `deploy`."""
    if is_trained(weights):
        return replace(setup, lowering=_trained(setup.lowering, allocation, weights))
    return as_deployed(setup, allocation, bank_of(setup, allocation, weights))


def _trained(lowering: Lowering, allocation: Allocation, path: str | Path) -> Lowering:
    return put(lowering, kept_of(allocation, lowering.network), parse_variants(allocation), Trained.load(path), path)


def kept_of(allocation: Allocation, network: Network) -> Kept:
    """The slots of each channel group that an allocation keeps; empty where all stay."""
    if not allocation.narrow:
        return {}
    _check_groups(allocation, network)
    return {g: tuple(sorted(slots[: allocation.widths[g]])) for g, slots in allocation.slots.items()}


def _check_groups(allocation: Allocation, network: Network) -> None:
    if {g: len(s) for g, s in allocation.slots.items()} != network.channels:
        raise IncompatibleTables(
            "the allocation is of other channel groups than the network has; search again"
        )


def as_deployed(setup: Setup, allocation: Allocation, bank: WeightBank | None = None) -> Setup:
    """The setup with the channels that an allocation keeps, its weights refitted (from `bank`, or anew) and rounded."""
    lowering = _refitted(setup.lowering, allocation, bank)
    return setup if lowering is setup.lowering else replace(setup, lowering=lowering)


def _refitted(lowering: Lowering, allocation: Allocation, bank: WeightBank | None) -> Lowering:
    if not allocation.narrow:
        return refitted(lowering, parse_variants(allocation), bank=bank)
    _check_groups(allocation, lowering.network)
    bank = bank or weight_bank(lowering, None, allocation.slots)
    return refitted(lowering, parse_variants(allocation), allocation.widths, bank)


def bank_of(setup: Setup, allocation: Allocation, folder: str | Path | None) -> WeightBank | None:
    """The weights that an allocation is put together from, and its own once they are refitted, kept in `folder`."""
    return _bank(setup.lowering, allocation, folder)


def _bank(lowering: Lowering, allocation: Allocation, folder: str | Path | None) -> WeightBank | None:
    needed = allocation.narrow or folder is not None
    return weight_bank(lowering, folder, allocation.slots) if needed else None


class Refits:
    """Deploys the answers of one search: their weights come from one bank.

    weights: Folder of refitted weights, or a bank that has those of the search's order of channels already. order: of the
    sensitivities.
    """

    def __init__(self, weights: str | Path | WeightBank | None, order: Mapping[str, Sequence[int]]) -> None:
        self._order = order
        self._bank: WeightBank | None = None
        if isinstance(weights, WeightBank):
            if {g: list(own) for g, own in weights.order.items()} == {g: list(own) for g, own in order.items()}:
                self._bank = weights
            weights = None if weights.folder is None else weights.folder.parent
        self._folder = weights

    def deployed(self, setup: Setup, allocation: Allocation) -> Setup:
        """See `as_deployed`."""
        if not allocation.narrow:
            return as_deployed(setup, allocation, bank_of(setup, allocation, self._folder))
        if self._bank is None:
            self._bank = weight_bank(setup.lowering, self._folder, self._order)
        return as_deployed(setup, allocation, self._bank)


def parse_variants(allocation: Allocation) -> dict[str, Variant]:
    return {unit: Variant.parse(v) for unit, v in allocation.variants.items()}


def deploy(
    task: Task,
    allocation: Allocation,
    out: str | Path,
    *,
    backend: str | Backend | None = None,
    weights: str | Path | None = None,
    setup: Setup | None = None,
) -> Deployed:
    """Write the ONNX file of an allocation, after the backend has compiled those very bytes.

    Args:
        task: the task that was searched for.
        allocation: the answer of a search.
        out: file to write.
        backend: None for the allocation's own.
        weights: folder of refitted weights, as `hwsearch sensitivity` leaves one; or a file of trained ones, of `recover` or the
            `state_dict` of `Deployed.module` as safetensors. None refits them anew.
        setup: the allocation's own setup, at its widths; None makes one.

    Returns:
        The file, its size in bytes, and the network as a torch module.

    Raises:
        IncompatibleTables: the allocation is of another network, of other weights, or of int8 that is inexact here; or the trained
            weights break it (another shape or pattern): the first that does is named.
        BackendUnavailable: the runtime is not installed or does not build the network.
    """
    if setup is None:
        setup = with_weights(of_allocation(task, allocation, backend), allocation, weights)
    base = str(allocation.options.get("base", setup.options.base))
    model = setup.onnx(parse_variants(allocation), metadata=metadata_of(allocation, base))
    data = model.SerializeToString()
    setup.backend.build(data, replace(setup.options, base=base if base in setup.backend.bases() else setup.options.base))
    path = Path(out)
    write_bytes(path, data)
    return Deployed(path, len(data), allocation, base, setup)


def metadata_of(allocation: Allocation, base: str) -> dict[str, str]:
    """What someone who finds the file needs to run it as it was measured."""
    return {
        "hwsearch.base_precision": base,
        "hwsearch.backend": allocation.backend,
        "hwsearch.options": json.dumps(allocation.options, sort_keys=True),
        "hwsearch.budgets": json.dumps([b["text"] for b in allocation.budgets]),
    }
