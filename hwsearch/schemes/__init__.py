"""Schemes: how to compress a network, composed of steps in a few lines, with a few numbers left free.

scheme.py: what every scheme is, free parameters and `Compose`. patterns.py: single weights, blocks, N:M, balanced. channels.py:
filters and neurons, by channel groups. precision.py: what weights are rounded to. allocate.py: the exact search behind one
number. subject.py: the network that steps work on. trainable.py: the same for training. footprint.py: the bytes that are left.
"""

from hwsearch.schemes.allocate import Allocate
from hwsearch.schemes.channels import FilterPrune, NeuronPrune, StructurePrune
from hwsearch.schemes.footprint import Footprint
from hwsearch.schemes.patterns import NM, Balanced, BlockPrune, Prune
from hwsearch.schemes.precision import Quantize
from hwsearch.schemes.scheme import Compose, Compressed, Free, Scheme

__all__ = [
    "NM", "Allocate", "Balanced", "BlockPrune", "Compose", "Compressed", "FilterPrune", "Footprint", "Free", "NeuronPrune", "Prune",
    "Quantize", "Scheme", "StructurePrune",
]  # fmt: skip
