"""SensitivityTable: the loss that each (unit, variant) and each (channel group, width) causes, on calibration data.

The loss is the KL divergence from the dense network's outputs (design.md), with every unit but one dense fp32, or every
group but one whole. Weights that read a narrower group, or are rounded to int8, are refitted as those of a deployed network are.
What an allocation loses is predicted from them: their sum, or what stitched networks taught of it (`interactions`), which the
header holds where there was time for them.

Schema history:
  1  one row a (unit, variant) with its loss; header under the Parquet key `hwsearch`.
  2  rows of (group, width) beside them, and the order in which slots go.
  3  losses on calibration batches that no weight was refitted on; which losses of widths are estimated.
  4  losses of int8 are of refitted weights, as they are deployed, and of so many bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.loss.interactions import Agreement, Correction
from hwsearch.network.network import Network
from hwsearch.network.variants import INT8_BITS, Int8, Variant
from hwsearch.table.checking import Rows, first_wrong, is_variant, number, wrong_network
from hwsearch.table.parquet import read_parquet, write_parquet

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 4
KIND = "sensitivity_table"
UNIT, GROUP = "unit", "group"
WIDTH = "width"
"""What stands before the slots kept where a row is of a width."""
TODO = "take another copy, or move it away and run `hwsearch sensitivity` again"
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
        rank_correlation: Kendall tau between predicted and simulated loss of stitched networks (random whole allocations) that no
            prediction has seen; None for too few.
        created: date and time, ISO 8601.
        validation: (sum of losses, simulated) loss of these networks.
        width_loss: group -> slots kept -> mean loss a sample (0 for the whole width, which is always present).
        order: group -> its slots, the most important first; a width keeps as many from the front.
        estimated: the (group, width) whose loss was not measured, but follows the Fisher estimate from the group's narrowest
            measured width on.
        int8_bits: bits of int8 weights, as the backend deploys them.
        unsigned: whether int8 activations that were never negative are unsigned, as the backend deploys them.
        refused: unit -> variant -> why it has no loss and is not offered; group -> `width16`, of a width, likewise.
        made_of: everything that the losses depend on, by name, as numbers or digests; empty in files of versions without it.
        correction: how losses become that of an allocation, as learnt from the stitched networks; their sum in files of versions
            without it.
        corrected: loss of each of `validation`, predicted by what was learnt from the others; empty where nothing was.
        passes: forward passes that the stitched networks took.
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
    correction: Correction = field(default_factory=Correction, repr=False)
    corrected: tuple[float, ...] = field(default=(), repr=False)
    passes: int = 0

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
        """Predicted loss of an allocation.

        Args:
            variants: unit -> variant.
            widths: group -> slots kept; None for whole ones.

        Returns:
            Mean loss a sample.
        """
        return self._predicted(self.parts(variants, widths))

    def parts(self, variants: Mapping[str, Variant], widths: Mapping[str, int] | None = None) -> dict[tuple[str, str], float]:
        """The losses that the predicted loss of an allocation is made of.

        Args:
            variants: unit -> variant.
            widths: group -> slots kept; None for whole ones.

        Returns:
            (`unit` or `group`, its name) -> its loss, with all else dense fp32 and whole.
        """
        narrower = {g: w for g, w in (widths or {}).items() if w < self.network.channels[g]}
        units = {(UNIT, unit): self[unit, str(variant)] for unit, variant in variants.items()}
        return units | {(GROUP, g): self.of_width(g, w) for g, w in narrower.items()}

    def most(self) -> float:
        """Predicted loss of what loses most, whether or not it can be chosen.

        Returns:
            Mean loss a sample.
        """
        units = {(UNIT, unit): max(own.values(), default=0.0) for unit, own in self.loss.items()}
        return self._predicted(units | {(GROUP, g): max(own.values(), default=0.0) for g, own in self.width_loss.items()})

    def _predicted(self, parts: Mapping[tuple[str, str], float]) -> float:
        of = {UNIT: self.correction.of_unit, GROUP: self.correction.of_group}
        return self.correction.loss(math.fsum(of[kind](name, loss) for (kind, name), loss in parts.items()))

    def trust(self) -> dict[str, Any] | None:
        """How far predicted losses can be trusted, for reports.

        Returns:
            Of stitched networks, how well the `sum` of losses predicts theirs, how well they are predicted `corrected` by what was
            learnt from the others, and how many forward `passes` that took; None where there are too few.
        """
        before, after = self.agreement
        if before is None:
            return None
        return {"sum": asdict(before), "corrected": after and asdict(after), "passes": self.passes}

    @property
    def agreement(self) -> tuple[Agreement | None, Agreement | None]:
        """How well the loss of stitched networks is predicted: (by the sum of losses, with interactions learnt from the others)."""
        simulated = [loss for _, loss in self.validation]
        after = Agreement.of(self.corrected, simulated) if self.corrected else None
        return Agreement.of([total for total, _ in self.validation], simulated), after

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
                    f"the sensitivities are of other {what}: table={own}, current={other}; "
                    "score this one into a file of its own with `hwsearch sensitivity`"
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
            **({"correction": self.correction.to_json(), "corrected": list(self.corrected)} if self.corrected else {}),
            "passes": self.passes,
        }
        rows = self._rows()
        write_parquet(pa.Table.from_pylist(rows, schema=_columns()), header, path)

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
            loaded = _from_header(header)
            why = wrong_network(loaded.network) or first_wrong(_checks(loaded))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"{path} is damaged: header: {error!r}; {TODO}") from error
        if why:
            raise InvalidInput(f"{path} is damaged: header: {why}; {TODO}")
        _check_rows(Rows(table, path, TODO), loaded.network)
        loss, widths = loaded.loss, loaded.width_loss
        for line in table.to_pylist():
            if line["variant"].startswith(WIDTH):
                widths.setdefault(line["unit"], {})[int(line["variant"][len(WIDTH) :])] = line["loss"]
            else:
                loss.setdefault(line["unit"], {})[line["variant"]] = line["loss"]
        if lacking := [u.name for u in loaded.network.units if not loss.get(u.name)]:
            raise InvalidInput(f"{path} is damaged: it has no row of unit {lacking[0]}; {TODO}")
        return loaded


def _from_header(header: Mapping[str, Any]) -> SensitivityTable:
    """The table without its losses. Raises KeyError, TypeError, ValueError or AttributeError on what is no header."""
    return SensitivityTable(
        network=Network.from_json(header["network"]),
        loss={},
        samples=header["samples"],
        divergence=header["divergence"],
        quantize_outputs=header["quantize_outputs"],
        int8_bits=header.get("int8_bits", INT8_BITS),
        unsigned=header.get("unsigned", False),
        rank_correlation=header["rank_correlation"],
        created=header["created"],
        validation=tuple((float(a), float(b)) for a, b in header["validation"]),
        width_loss={},
        order={g: tuple(slots) for g, slots in header["order"].items()},
        estimated=frozenset((str(g), int(w)) for g, w in header["estimated"]),
        refused={u: dict(own) for u, own in header.get("refused", {}).items()},
        made_of={str(k): str(v) for k, v in header.get("made_of", {}).items()},
        correction=Correction(**header.get("correction", {})),
        corrected=tuple(map(float, header.get("corrected", ()))),
        passes=header.get("passes", 0),
    )


def _checks(table: SensitivityTable) -> list[tuple[str, Any, bool, str]]:
    """(field, value, whether it is right, what is expected) of a header."""
    channels, tau = table.network.channels, table.rank_correlation
    checks: list[tuple[str, Any, bool, str]] = [
        ("samples", table.samples, number(table.samples, 1, whole=True), "a whole number from 1 on"),
        ("divergence", table.divergence, table.divergence in ("auto", "kl", "mse"), "auto, kl or mse"),
        ("int8_bits", table.int8_bits, table.int8_bits in (7, 8), "7 or 8"),
        ("rank_correlation", tau, tau is None or (number(tau, -1.0) and tau <= 1.0), "-1 to 1, or none"),
        ("validation", table.validation, all(map(number, sum(table.validation, ()))), "finite losses from 0 on"),
        *(
            (what, value, isinstance(value, bool), "true or false")
            for what, value in (("quantize_outputs", table.quantize_outputs), ("unsigned", table.unsigned))
        ),
        ("passes", table.passes, number(table.passes, whole=True), "a whole number from 0 on"),
        *_checks_of_correction(table),
    ]
    for group, slots in table.order.items():
        right = sorted(slots) == list(range(channels.get(group, -1)))
        checks.append((f"order of {group}", slots, right, f"each of its {channels.get(group, 0)} slots once"))
    for group, width in sorted(table.estimated):
        right = 0 < width <= channels.get(group, 0)
        checks.append((f"estimated of {group}", width, right, f"1 to {channels.get(group, 0)} channels"))
    known = {*table.network.by_name, *channels}
    checks += [(f"refused of {of}", own, of in known, "a unit or group of the network") for of, own in table.refused.items()]
    return checks


def _checks_of_correction(table: SensitivityTable) -> list[tuple[str, Any, bool, str]]:
    """As `_checks`, of what was learnt from stitched networks."""
    own = table.correction
    checks: list[tuple[str, Any, bool, str]] = [
        (f"correction.{what}", value, number(value, above=True), "a finite number above 0")
        for what, value in (("factor", own.factor), ("exponent", own.exponent))
    ]
    of: tuple[tuple[str, Any, set[str]], ...] = (
        ("units", own.units, set(table.network.by_name)), ("groups", own.groups, set(table.network.channels)),
    )  # fmt: skip
    for what, coefficients, known in of:
        right = isinstance(coefficients, dict) and all(n in known and number(c, above=True) for n, c in coefficients.items())
        checks.append((f"correction.{what}", coefficients, right, f"a number above 0 for {what} of the network"))
    right = all(map(number, table.corrected)) and len(table.corrected) in (0, len(table.validation))
    return [*checks, ("corrected", table.corrected, right, "a finite loss from 0 on for each pair of validation")]


def _columns() -> Any:
    """Of the rows, the pyarrow schema."""
    import pyarrow as pa

    return pa.schema([("unit", pa.string()), ("variant", pa.string()), ("loss", pa.float64())])


def _check_rows(rows: Rows, network: Network) -> None:
    """Raises InvalidInput on the first row that no scoring leaves."""
    rows.typed(_columns())
    rows.numbers("loss", "a finite loss from 0 on", lambda v: np.isfinite(v) & (v >= 0))
    rows.words("unit", {*network.by_name, *network.channels}, "a unit or a channel group of the network")
    units, variants = (rows.rows[name].to_pylist() for name in ("unit", "variant"))
    for row, (name, text) in enumerate(zip(units, variants, strict=True)):
        width = text[len(WIDTH) :] if text.startswith(WIDTH) else None
        if width is None and not (name in network.by_name and is_variant(text)):
            rows.refuse(row, "variant", text, f"a variant of unit {name} such as dense.int8")
        if width is not None and not (width.isdecimal() and 0 < int(width) <= network.channels.get(name, 0)):
            rows.refuse(row, "variant", text, f"{WIDTH}1 to {WIDTH}{network.channels.get(name, 0)} of group {name}")
    rows.once("unit", "variant", whole=False)
