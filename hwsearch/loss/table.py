"""SensitivityTable: the loss that each (unit, variant) and each (channel group, width) causes, on calibration data.

The loss is the KL divergence from the dense network's outputs (design.md), with every unit but one dense fp32, or every
group but one whole. Weights that read a narrower group, or are rounded to int8, are refitted as those of a deployed network are.

Schema history:
  1  one row a (unit, variant) with its loss; header under the Parquet key `hwsearch`.
  2  rows of (group, width) beside them, and the order in which slots go.
  3  losses on calibration batches that no weight was refitted on; which losses of widths are estimated.
  4  losses of int8 are of refitted weights, as they are deployed, and of so many bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.network.network import Network
from hwsearch.network.variants import INT8_BITS, Int8, Variant
from hwsearch.table.parquet import read_parquet, write_parquet

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 4
KIND = "sensitivity_table"
NOT_FINITE = "its simulation returns NaN or infinity on calibration data"


@dataclass(frozen=True)
class SensitivityTable:
    """Losses of every (unit, variant) and every (channel group, width).

    Args:
        network: the traced network.
        loss: unit -> variant it can become -> mean loss a sample (>= 0; dense.fp32 is 0 and always present).
        samples: how many samples of calibration data they are of.
        divergence: `kl`, `mse` or `auto`, see `hwsearch.loss.divergence`.
        quantize_outputs: whether int8 and fp8 were simulated with quantized outputs, as the backend deploys them.
        rank_correlation: Kendall tau between predicted (summed) and simulated loss of random whole allocations; None for too few.
        created: date and time, ISO 8601.
        validation: (predicted, simulated) loss of these allocations.
        width_loss: group -> slots kept -> mean loss a sample (0 for the whole width, which is always present).
        order: group -> its slots, the most important first; a width keeps as many from the front.
        estimated: the (group, width) whose loss was not measured, but follows the Fisher estimate from the group's narrowest
            measured width on.
        int8_bits: bits of int8 weights, as the backend deploys them.
        unsigned: whether int8 activations that were never negative are unsigned, as the backend deploys them.
        refused: unit -> variant -> why it has no loss and is not offered; group -> `width16`, of a width, likewise.
        made_of: everything that the losses depend on, by name, as numbers or digests; empty in files of versions without it.
    """

    network: Network
    loss: dict[str, dict[str, float]]
    samples: int
    divergence: str
    quantize_outputs: bool
    rank_correlation: float | None = None
    created: str = ""
    validation: tuple[tuple[float, float], ...] = field(default=(), repr=False)
    width_loss: dict[str, dict[int, float]] = field(default_factory=dict)
    order: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    estimated: frozenset[tuple[str, int]] = frozenset()
    int8_bits: int = INT8_BITS
    unsigned: bool = False
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    made_of: dict[str, str] = field(default_factory=dict, repr=False)

    def __getitem__(self, key: tuple[str, str]) -> float:
        unit, variant = key
        try:
            return self.loss[unit][variant]
        except KeyError as error:
            raise InvalidInput(
                f"the sensitivity table has no loss of {variant} for unit {unit}; run `hwsearch sensitivity` again"
            ) from error

    def of_width(self, group: str, width: int) -> float:
        """Loss of one group at one width.

        Args:
            group: name of the channel group.
            width: slots kept.

        Returns:
            Mean loss a sample.

        Raises:
            InvalidInput: it was not measured.
        """
        try:
            return self.width_loss[group][width]
        except KeyError as error:
            raise InvalidInput(
                f"the sensitivity table has no loss of {group} at {width} channels; run `hwsearch sensitivity --table` "
                "with the latency table"
            ) from error

    def total(self, variants: Mapping[str, Variant], widths: Mapping[str, int] | None = None) -> float:
        """Predicted loss of an allocation: the sum over units and groups.

        Args:
            variants: unit -> variant.
            widths: group -> slots kept; None for whole ones.

        Returns:
            Mean loss a sample.
        """
        narrower = {g: w for g, w in (widths or {}).items() if w < self.network.channels[g]}
        units = sum(self[unit, str(variant)] for unit, variant in variants.items())
        return units + sum(self.of_width(g, w) for g, w in narrower.items())

    def offers(self, variants: Mapping[str, Variant], widths: Mapping[str, int]) -> bool:
        """Whether nothing in an allocation is refused.

        Args:
            variants: unit -> variant.
            widths: group -> slots kept.

        Returns:
            False where a variant or a width has no loss, for the reason in `refused`.
        """
        chosen = [*((u, str(v)) for u, v in variants.items()), *((g, f"width{w}") for g, w in widths.items())]
        return not any(what in self.refused.get(of, ()) for of, what in chosen)

    def require(self, network: Network, int8: Int8 | None = None, *, weights: bool = True) -> None:
        """Refuse the table for another network, other weights or another kind of int8.

        Args:
            network: the traced network that it is to be of.
            int8: how int8 is deployed; None for any.
            weights: whether its weights must be the same.

        Raises:
            IncompatibleTables: it is of something else, which is named.
        """
        int8 = int8 or Int8(self.int8_bits, self.unsigned)
        for what, own, other in (
            ("network", self.network.fingerprint, network.fingerprint),
            ("weights", self.network.weights_digest, network.weights_digest if weights else self.network.weights_digest),
            ("bits of int8 weights", self.int8_bits, int8.bits),
            ("int8 activations (unsigned)", self.unsigned, int8.unsigned),
        ):
            if own != other:
                raise IncompatibleTables(
                    f"the sensitivities are of other {what}: table={own}, current={other}; run `hwsearch sensitivity` again"
                )

    def to_frame(self) -> pd.DataFrame:
        """The losses as rows.

        Returns:
            Columns `unit` (or the group), `variant` (or `width` and the slots kept) and `loss`.
        """
        import pandas as pd

        return pd.DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        units = [{"unit": u, "variant": v, "loss": x} for u, row in self.loss.items() for v, x in row.items()]
        groups = [
            {"unit": g, "variant": f"width{w}", "loss": x}
            for g, row in self.width_loss.items()
            for w, x in row.items()
        ]
        return units + groups

    def save(self, path: str | Path) -> None:
        """Write a Parquet file, in place in one step.

        Args:
            path: where to.
        """
        import pyarrow as pa

        header = {
            "schema": SCHEMA,
            "kind": KIND,
            "network": self.network.to_json(),
            "samples": self.samples,
            "divergence": self.divergence,
            "quantize_outputs": self.quantize_outputs,
            "int8_bits": self.int8_bits,
            "unsigned": self.unsigned,
            "rank_correlation": self.rank_correlation,
            "created": self.created,
            "validation": [list(pair) for pair in self.validation],
            "order": {g: list(slots) for g, slots in self.order.items()},
            "estimated": sorted(map(list, self.estimated)),
            **({"refused": self.refused} if self.refused else {}),
            "made_of": self.made_of,
        }
        rows = self._rows()
        schema = pa.schema([("unit", pa.string()), ("variant", pa.string()), ("loss", pa.float64())])
        write_parquet(pa.Table.from_pylist(rows, schema=schema), header, path)

    @staticmethod
    def load(path: str | Path) -> SensitivityTable:
        """Read a file that `save` wrote.

        Args:
            path: the file.

        Returns:
            The table.

        Raises:
            InvalidInput: the file is absent, truncated, damaged, or of another kind.
            IncompatibleTables: it has a schema that this version does not read.
        """
        table, header = read_parquet(path, KIND, SCHEMA)
        try:
            loss: dict[str, dict[str, float]] = {}
            widths: dict[str, dict[int, float]] = {}
            for line in table.to_pylist():
                if line["variant"].startswith("width"):
                    widths.setdefault(line["unit"], {})[int(line["variant"][5:])] = float(line["loss"])
                else:
                    loss.setdefault(line["unit"], {})[line["variant"]] = float(line["loss"])
            loaded = SensitivityTable(
                network=Network.from_json(header["network"]),
                loss=loss,
                samples=int(header["samples"]),
                divergence=header["divergence"],
                quantize_outputs=bool(header["quantize_outputs"]),
                int8_bits=int(header.get("int8_bits", INT8_BITS)),
                unsigned=bool(header.get("unsigned", False)),
                rank_correlation=header["rank_correlation"],
                created=header["created"],
                validation=tuple((float(a), float(b)) for a, b in header["validation"]),
                width_loss=widths,
                order={g: tuple(int(i) for i in slots) for g, slots in header["order"].items()},
                estimated=frozenset((str(g), int(w)) for g, w in header["estimated"]),
                refused={u: dict(own) for u, own in header.get("refused", {}).items()},
            )
            channels = loaded.network.channels
            if any(sorted(slots) != list(range(channels[g])) for g, slots in loaded.order.items()):
                raise ValueError("the order of slots is not one of the network's channels")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"{path} is damaged: {error!r}; make it again") from error
        losses = [x for row in loss.values() for x in row.values()]
        if not np.isfinite([*losses, *(x for own in widths.values() for x in own.values())]).all():
            raise InvalidInput(f"{path} is damaged: a loss is not finite; make it again")
        return loaded
