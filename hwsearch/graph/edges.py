"""What stands between the units of a traced graph: the operators that runtimes fuse into them, and the edges from unit to unit."""

from __future__ import annotations

from torch import fx

from hwsearch.graph.canonical import op_name
from hwsearch.graph.units import Shapes, Site
from hwsearch.network.network import Edge

# Elementwise operators that runtimes fuse into the layer before them.
FUSIBLE = frozenset(
    "relu relu_ relu6 relu6_ gelu gelu_ silu silu_ sigmoid sigmoid_ tanh tanh_ hardtanh hardtanh_ hardswish hardswish_ "
    "hardsigmoid hardsigmoid_ leaky_relu leaky_relu_ elu elu_ prelu mish mish_ clamp clamp_ clamp_min clamp_min_ "
    "add add_ sub sub_ mul mul_ div div_ batch_norm dropout dropout_ alias clone contiguous detach_ "
    "softplus neg abs sqrt rsqrt exp pow erf to _to_copy".split()
)
_CLAMPS = frozenset("relu relu_ relu6 relu6_ hardtanh hardtanh_ clamp clamp_min".split())
# Operators that move or keep data without computing: they pass a tensor on.
_NOT_FUSED = frozenset("dropout dropout_ alias clone contiguous detach_ to _to_copy".split())


def find_edges(
    graph: fx.GraphModule, sites: dict[str, list[Site]], shapes: Shapes
) -> tuple[dict[str, list[str]], tuple[Edge, ...]]:
    """Operators owned by each unit, and the edges between units.

    A fusible elementwise operator belongs to the unit that ran last before it (a residual add is fused into the
    later convolution); what else it reads arrives over a fused edge. Any other operator passes on its sources.
    """
    unit_of = {site.node: name for name, calls in sites.items() for site in calls}
    site_of = {site.node: site for calls in sites.values() for site in calls}
    order = {name: i for i, name in enumerate(sites)}
    owned: dict[str, list[str]] = {name: [] for name in sites}
    # For each node: the units whose outputs it carries, each with the operators passed on the way.
    carried: dict[str, dict[str, tuple[str, ...]]] = {}
    edges: dict[tuple[str, str, bool], Edge] = {}

    def connect(source: fx.Node, dst: str, fused: bool) -> None:
        for src, via in carried.get(source.name, {}).items():
            if src != dst and (src, dst, fused) not in edges:
                edges[src, dst, fused] = Edge(src, dst, shapes.bytes.get(source.name, 0), via, fused)

    for node in graph.graph.nodes:
        if node.name in unit_of:
            for position in site_of[node.name].activations:
                connect(node.args[position], unit_of[node.name], fused=False)
            carried[node.name] = {unit_of[node.name]: ()}
            continue
        if node.op != "call_function":
            continue
        name = op_name(node)
        sources = [i for i in node.all_input_nodes if carried.get(i.name)]
        if not sources:
            continue
        if name in FUSIBLE:
            fresh = [(s, u) for s in sources for u, via in carried[s.name].items() if not via]
            if fresh:
                main, owner = max(fresh, key=lambda pair: order[pair[1]])
                for source in sources:
                    if source is not main:
                        connect(source, owner, fused=True)
                if name not in _NOT_FUSED:
                    owned[owner].append(name.rstrip("_"))
                carried[node.name] = {owner: ()}
                continue
        carried[node.name] = {
            u: via if name in _NOT_FUSED else (*via, name)[-8:]
            for s in sources
            for u, via in carried[s.name].items()
        }
    return owned, tuple(edges.values())


def output_node(node: fx.Node) -> fx.Node:
    """Where the range of a unit's output is observed: after the clamp that follows it alone, if one does.

    Its Q/DQ stands before the clamp, so that runtimes fuse it into the unit: what it cuts off, the clamp would.
    """
    users = list(node.users)
    return users[0] if len(users) == 1 and op_name(users[0]) in _CLAMPS else node
