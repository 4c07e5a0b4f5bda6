"""The sensitivities of a setup: those of a file where they fit, else measured anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hwsearch.compress.bank import WeightBank
from hwsearch.device.timelimit import TimeLimit
from hwsearch.engine.setup import Setup
from hwsearch.errors import IncompatibleTables
from hwsearch.files import changed
from hwsearch.loss.cluster import Cluster
from hwsearch.loss.measure import ingredients, measure_sensitivity
from hwsearch.loss.table import SensitivityTable
from hwsearch.lowering.refitted import weight_bank
from hwsearch.network.variants import STORAGE, legal
from hwsearch.progress import Progress


def sensitivity_for(
    setup: Setup,
    path: str | Path | None,
    *,
    seed: int = 0,
    grid: Mapping[str, Sequence[int]] | None = None,
    weights: str | Path | None = None,
    bank: WeightBank | None = None,
    limit: TimeLimit | None = None,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> SensitivityTable:
    """The sensitivities at `path` where all that made them is the same now, else measured anew; what has changed is said.

    A file that does not tell what made it, of an earlier version, is measured anew as well. Those that a time limit cut short
    are gone on with.

    Args:
        grid: Widths of the channel groups to score.
        weights: Folder of refitted weights to use and to leave.
        bank: The refitted weights, where they are known already: `bank_for`.
        limit: See `measure_sensitivity`.
        cluster: See `measure_sensitivity`.

    Raises:
        IncompatibleTables: The file is of another network, kind of int8, backend or base precision.
    """
    progress = progress or Progress.silent()
    narrower = {g: steps for g, steps in (grid or {}).items() if len(steps) > 1}
    made_of = _ingredients(setup, seed)
    if path is not None and Path(path).exists():
        kept = SensitivityTable.load(path)
        missing = _missing(kept, setup, narrower, path)
        if why := changed(kept.made_of, made_of):
            progress.say(f"{path} is of other {why}: measured anew, and replaced")
        elif not missing:
            if not Path(f"{path}.partial").exists():
                return kept
            if narrower:
                bank = bank or weight_bank(setup.lowering, weights, kept.order, progress.say)
    return measure_sensitivity(
        setup.lowering, path, variants=setup.variants(), quantize_outputs=setup.backend.quantize_outputs,
        seed=seed, grid=narrower, bank=bank or bank_for(setup, weights, narrower, progress), limit=limit, cluster=cluster,
        progress=progress,
    )  # fmt: skip


def holds_now(setup: Setup, path: Path, seed: int) -> bool:
    """Whether the sensitivities at `path` are there, and of all that would make them now."""
    return path.exists() and not changed(SensitivityTable.load(path).made_of, _ingredients(setup, seed))


def _ingredients(setup: Setup, seed: int) -> dict[str, str]:
    kind, quantize_outputs = setup.lowering.task.divergence, setup.backend.quantize_outputs
    return ingredients(setup.lowering, kind=kind, quantize_outputs=quantize_outputs, seed=seed)


def _missing(
    kept: SensitivityTable, setup: Setup, grid: Mapping[str, Sequence[int]], path: str | Path
) -> bool:
    """Whether a file lacks a loss, and a reason for none, of anything wanted. Raises IncompatibleTables."""
    kept.require(setup.network, setup.lowering.int8, weights=False)
    wanted = {u.name: set(map(str, legal(u, setup.variants()))) for u in setup.network.units}
    missing = {v for u, vs in wanted.items() for v in vs - {*kept.loss[u], *kept.refused.get(u, {})}}
    if missing - {str(STORAGE)} or kept.quantize_outputs != setup.backend.quantize_outputs:
        have = sorted({v for row in kept.loss.values() for v in row})
        raise IncompatibleTables(
            f"{path} was made for another backend or base precision (it holds {', '.join(have)}); give another file"
        )
    return bool(missing) or not all(
        {f"width{w}" for w in steps} <= {*(f"width{w}" for w in kept.width_loss.get(g, ())), *kept.refused.get(g, {})}
        for g, steps in grid.items()
    )


def bank_for(
    setup: Setup, weights: str | Path | None, grid: Mapping[str, Sequence[int]], progress: Progress
) -> WeightBank | None:
    """Refitted weights; None where nothing is narrower or quantized."""
    if any(len(steps) > 1 for steps in grid.values()):
        progress.start(None, "finding which channels matter")
        bank = weight_bank(setup.lowering, weights, say=progress.say)
        progress.stop()
        return bank
    if any(v.precision == "int8" for v in setup.variants()):
        order = {g: range(n) for g, n in setup.network.channels.items()}
        return weight_bank(setup.lowering, weights, order, progress.say)
    return None
