"""What a scheme left of a network: weights that are not zero, and the bytes that they would take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Footprint:
    """The size of a compressed network. Computed: no file of this kind is written.

    Args:
        weights: weights of all layers of the dense network.
        nonzero: those of them that are left and not zero.
        dense_bytes: of the whole dense network in fp32, BatchNorm folded.
        nonzero_bytes: the values that are not zero at their bits, and all that is no weight of a layer (biases, norms, embeddings);
            neither positions nor scales. What papers on pruning call the size.
        packed_bytes: with the positions of the zeros, coded at their entropy in each layer, and with scales.
        densities: layer -> the share of its weights in the dense network that is left and not zero.
        widths: channel group -> channels left.
        left_out: layer or channel group -> why a step of the scheme left it as it was.
    """

    weights: int
    nonzero: int
    dense_bytes: int
    nonzero_bytes: int
    packed_bytes: int
    densities: Mapping[str, float] = field(default_factory=dict, repr=False)
    widths: Mapping[str, int] = field(default_factory=dict, repr=False)
    left_out: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def density(self) -> float:
        """The share of the weights that is left and not zero."""
        return self.nonzero / self.weights if self.weights else 1.0

    def __str__(self) -> str:
        lines = [
            f"{self.nonzero:,} of {self.weights:,} weights are not zero ({self.density:.2%})",
            f"{self.dense_bytes:,} bytes dense; {self.nonzero_bytes:,} of values that are not zero "
            f"({self.dense_bytes / self.nonzero_bytes:.1f}x fewer), {self.packed_bytes:,} with positions and scales "
            f"({self.dense_bytes / self.packed_bytes:.1f}x fewer)",
            *(f"left as it was: {name}: {why}" for name, why in self.left_out.items()),
        ]  # fmt: skip
        return "\n".join(lines)


def packed_bits(count: int, nonzero: int, bits: int) -> float:
    """Bits of a layer's values that are not zero, and of where they are among `count`, coded at the entropy of a random mask."""
    density = nonzero / count if count else 0.0
    if not 0 < density < 1:
        return float(nonzero * bits)
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    return nonzero * bits + count * entropy
