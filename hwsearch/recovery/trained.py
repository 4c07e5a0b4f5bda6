"""The file of trained weights: what a training left, by the names of the deployed module's parameters.

safetensors, with a header that says the schema, what the weights were made of, and the ranges of activations that they were trained
with. A file without that header (the `state_dict` of `hs.deploy(...).module`, trained in a loop of one's own and saved by
`safetensors.torch.save_file`) is taken as well: its ranges are calibrated anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from hwsearch.compress.patterns import nm_mask
from hwsearch.compress.quantize import Key, Range
from hwsearch.compress.widths import Kept
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.files import changed, write_bytes
from hwsearch.graph.canonical import is_get_attr, tensor_attr
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant
from hwsearch.recovery.student import homes

SCHEMA = "hwsearch.trained/1"
NETWORK, WEIGHTS, ALLOCATION = "network", "weights", "allocation"


@dataclass(frozen=True)
class Trained:
    """Trained weights of one allocation.

    Attributes:
        tensors: Name of a parameter of the deployed module -> its values, as they are deployed.
        ranges: Of activations, as trained with; None to calibrate anew.
        made_of: What they were made of, by name; empty where the file does not say.
        report: How it went, for reports.
    """

    tensors: Mapping[str, torch.Tensor]
    ranges: Mapping[Key, Range] | None = None
    made_of: Mapping[str, str] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the file, in place in one step."""
        ranges = [[*key, asdict(of)] for key, of in (self.ranges or {}).items()]
        header = {
            "schema": SCHEMA,
            "made_of": json.dumps(dict(self.made_of)),
            "ranges": json.dumps(ranges if self.ranges is not None else None),
            "told": json.dumps(dict(self.report)),
        }
        write_bytes(path, save({name: t.detach().contiguous().clone() for name, t in self.tensors.items()}, header))

    @staticmethod
    def load(path: str | Path) -> Trained:
        """Read a file. Raises InvalidInput where it is none, or damaged."""
        if not Path(path).is_file():
            raise InvalidInput(f"{path} does not exist; expected weights from `hwsearch recover`, or a folder of refitted ones")
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
            tensors = load_file(path)
            schema = header.get("schema", "")
            if schema not in ("", SCHEMA):
                raise IncompatibleTables(f"{path} has schema {schema!r}; this version reads {SCHEMA!r}: train again")
            ranges = json.loads(header.get("ranges", "null"))
            found = None
            if ranges is not None:
                found = {(str(unit), int(call), str(port)): Range(**of) for unit, call, port, of in ranges}
            made_of, report = (dict(json.loads(header.get(name, "{}"))) for name in ("made_of", "told"))
            return Trained(tensors, found, made_of, report)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise InvalidInput(
                f"{path} is no file of trained weights, or damaged ({error}); expected safetensors from `hwsearch recover`, or "
                "the state_dict of a deployed module"
            ) from error


def made_of(lowering: Lowering, kept: Kept, variants: Mapping[str, Variant]) -> dict[str, str]:
    """What trained weights belong to: a network, its weights, and an allocation."""
    whole = lowering if lowering.whole is None else lowering.whole
    network = whole.network
    chosen = repr([sorted((u, str(v)) for u, v in variants.items()), sorted((g, tuple(k)) for g, k in kept.items())])
    return {
        NETWORK: network.fingerprint,
        WEIGHTS: network.weights_digest,
        ALLOCATION: hashlib.sha256(chosen.encode()).hexdigest()[:16],
    }


def put(whole: Lowering, kept: Kept, variants: Mapping[str, Variant], trained: Trained, path: str | Path) -> Lowering:
    """The network of an allocation with trained weights. path: of their file, for messages.

    Raises IncompatibleTables, naming the first tensor that does, where they are not of this allocation.
    """
    if trained.made_of and (differs := changed(trained.made_of, made_of(whole, kept, variants))):
        raise IncompatibleTables(
            f"the weights in {path} were trained for something else: other {differs}; recover this allocation, or deploy the one "
            "that they are of"
        )
    narrow = whole.narrow(kept, calibrate=True)
    spread = _spread(trained.tensors, narrow, path)
    for name, have in spread.items():
        wanted = tensor_attr(narrow.traced.graph, name)
        if have.shape != wanted.shape:
            raise IncompatibleTables(
                f"{name} in {path} has shape {tuple(have.shape)}, and the allocation leaves {tuple(wanted.shape)}: these weights "
                "are of another allocation"
            )
        if not bool(torch.isfinite(have).all()) and bool(torch.isfinite(wanted).all()):
            raise IncompatibleTables(f"{name} in {path} holds NaN or infinity; train again, at a lower rate")
    for unit, variant in variants.items():
        place = narrow.traced.paths[unit][0]
        if variant.kept is None or place is None:
            continue
        axis = narrow.traced.network[unit].in_axis
        if bool((spread[place] * ~nm_mask(spread[place], axis, *variant.kept)).any()):
            raise IncompatibleTables(
                f"{place} in {path} violates the pattern of its unit: {unit} is {variant}, and more than {variant.kept[0]} of "
                f"{variant.kept[1]} consecutive weights are not 0; apply the mask after each step of training"
            )
    ranges = trained.ranges
    if ranges is not None and not whole.unsigned and any(of.unsigned for of in ranges.values()):
        ranges = None  # trained for a runtime that takes unsigned activations, and this one does not
    return whole.narrow(kept, calibrate=True, tensors=spread, ranges=ranges)


def _spread(tensors: Mapping[str, torch.Tensor], narrow: Lowering, path: str | Path) -> dict[str, torch.Tensor]:
    """Every place of the graph that is given -> its tensor; a tied one may be in the file under any of its names."""
    home = homes(narrow)
    places = {str(n.target) for n in narrow.traced.graph.graph.nodes if is_get_attr(n)}
    floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
    if unknown := next((name for name in floats if name not in places), None):
        raise IncompatibleTables(
            f"{path} holds {unknown}, which the network has no tensor of: it is of another network. BatchNorm is folded into "
            "the layers here; train `hs.deploy(...).module`, whose names are expected"
        )
    found = {name: t for name, t in floats.items() if name not in home}  # constants, which a module has as parameters too
    for name, own in home.items():
        given = [tensors[alias] for alias, other in home.items() if other == own and alias in tensors]
        if not given:
            raise IncompatibleTables(f"{path} lacks {name}; expected all parameters of the deployed module")
        if any(not torch.equal(given[0], g) for g in given[1:]):
            raise IncompatibleTables(f"{name} in {path} is tied to another tensor, and the two differ; keep them one parameter")
        found[name] = given[0]
    return found
