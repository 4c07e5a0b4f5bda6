"""GPUs, of this machine or another: the engine of an allocation for one, and which variants are legal on which."""

from __future__ import annotations

from typing import Annotated

import typer

from hwsearch.cli import printing as show
from hwsearch.cli.arguments import (
    AllocationFile,
    AnyWeights,
    AsJson,
    Batch,
    EngineBackend,
    Output,
    Quiet,
    TaskSpec,
)


def build(
    task: TaskSpec,
    allocation: AllocationFile,
    output: Output,
    target: Annotated[
        str | None,
        typer.Option(metavar="SM", help="GPU architecture, for instance sm86; `tensorrt-rtx` needs one."),
    ] = None,
    backend: EngineBackend = "tensorrt-rtx",
    base: Annotated[
        str | None,
        typer.Option(metavar="PRECISION", help="Instead of the allocation's own: fp16, bf16, fp32 or tf32."),
    ] = None,
    weights: AnyWeights = None,
    as_json: AsJson = False,
) -> None:
    """Write the serialised engine of an allocation for a GPU. With `tensorrt-rtx` no GPU is needed here."""
    import hwsearch as hs
    from hwsearch.allocate.allocation import Allocation

    chosen = Allocation.load(allocation)
    made = hs.build(hs.load(task), chosen, output, target=target, backend=backend, base=base, weights=weights)
    show.engine_file(made, as_json)


def check(
    task: TaskSpec,
    target: Annotated[
        str,
        typer.Option(metavar="SM[,SM]", help="GPU architectures, for instance sm75,sm80,sm86,sm89,sm120."),
    ],
    base: Annotated[
        str,
        typer.Option(
            metavar="PRECISION", help="Precision of all that is not quantized: fp16, bf16, fp32, tf32."
        ),
    ] = "fp16",
    backend: EngineBackend = "tensorrt-rtx",
    batch: Batch = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also list the fused layers of every engine.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell which variants are legal on which GPU. NVIDIA's builder is asked, on any machine; nothing is timed."""
    names = [name.strip() for name in target.split(",") if name.strip()]
    import hwsearch as hs
    from hwsearch.progress import Progress

    with Progress(quiet=quiet) as progress:
        found = hs.check(
            hs.load(task), names, base=base, backend=backend, batch=batch, progress=progress
        )
    show.verdicts(found, as_json, layers=layers)
