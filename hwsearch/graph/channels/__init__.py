"""Which channels of a traced network must stay or go together.

Every index along a prunable axis (a channel, a feature, an attention head's column) is an atom. Running the graph
once on labels instead of values, each operator says which atoms are the same (a residual add), which it moves (a
reshape, a concatenation, a channel shuffle: the operator itself, applied to the labels), and which may not go at
all (the network's outputs). What is left connected is a slot; slots that run through the same tensors form a group.
The idea is that of dependency graphs (Fang et al., DepGraph, 2023), with the reshapes of attention and shuffles
followed index by index.

atoms.py: union-find. labels.py: the labels of a graph's tensors. weights.py: what units do to them; rules.py: the rule of
every other operator, in moving.py, selecting.py and mixing.py; reasons.py: why some have none. grouping.py: the run, and groups
from what is left connected. groups.py: the result.
"""

from hwsearch.graph.channels.atoms import ALWAYS, same
from hwsearch.graph.channels.grouping import find
from hwsearch.graph.channels.groups import Axis, Channels, describe
from hwsearch.graph.channels.rules import FILLED

__all__ = ["ALWAYS", "FILLED", "Axis", "Channels", "describe", "find", "same"]
