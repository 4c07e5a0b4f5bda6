"""A part of a marked network as an ONNX network of its own: some units, and the real operations between them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import onnx
from onnx import TensorProto, helper

from hwsearch.backends.nodenames import unit_of
from hwsearch.errors import InvalidInput
from hwsearch.lowering.marked import MARK, tag_of


def cut(marked: onnx.ModelProto, units: Collection[str], filling: Collection[str]) -> onnx.ModelProto:
    """The named units with all their calls, markers kept.

    filling: those of them whose neighbours are all among `units`; every operation between them and their neighbours, or
    between them and the network's own inputs and outputs, is there. What else the units read are inputs of the part, under
    the names that the tensors have in the network, cut where a float32 tensor of known shape is nearest.
    Raises InvalidInput where there is no such tensor.
    """
    return _Cut(marked, set(units), set(filling)).model()


class _Cut:
    def __init__(self, marked: onnx.ModelProto, units: set[str], filling: set[str]) -> None:
        self.marked, self.units = marked, units
        self.nodes = list(marked.graph.node)
        self.maker = {output: i for i, n in enumerate(self.nodes) for output in n.output if output}
        self.readers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in node.input:
                self.readers.setdefault(name, []).append(i)
        self.given = {v.name: v for v in marked.graph.input}
        self.stored = {t.name: t for t in marked.graph.initializer}
        graph = marked.graph
        self.known = {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}
        self.owner = [_owner(n) for n in self.nodes]
        """The unit whose work a node is, its markers included; empty between units."""
        self.constant = self._spread(set(self.stored), every=True)
        ends = {o for n in self.nodes if n.op_type == MARK and _ends(n, units) for o in n.output}
        live = self._spread(ends)
        self.kept = {i for i, own in enumerate(self.owner) if own in units}
        self._after({i for i, n in enumerate(self.nodes) if n.op_type == MARK and _ends(n, filling)})
        work = {i for i, own in enumerate(self.owner) if own in filling}
        behind = self._spread({o for n in self.nodes if n.op_type == MARK for o in n.output})
        self._before(work, lambda i: i in live or i not in behind)
        self._before(set(self.kept), lambda i: i in live)

    def _spread(self, tensors: set[str], *, every: bool = False) -> set[int]:
        """Nodes between units that are made of some tensors: of these alone, or of any of them."""
        found, reached = set(), set(tensors)
        for i, node in enumerate(self.nodes):
            inputs = [name in reached for name in node.input if name]
            if not self.owner[i] and (all(inputs) if every else any(inputs)):
                found.add(i)
                reached.update(node.output)
        return found

    def _after(self, ends: set[int]) -> None:
        """Keep what stands between markers of outputs and the next units or the network's outputs."""
        todo = list(ends)
        while todo:
            for name in self.nodes[todo.pop()].output:
                for i in self.readers.get(name, ()):
                    if not self.owner[i] and i not in self.kept:
                        self.kept.add(i)
                        todo.append(i)

    def _before(self, start: set[int], wanted: Callable[[int], bool]) -> None:
        """Keep what stands between units, or the network's inputs, and some nodes."""
        todo = list(start)
        while todo:
            for name in self.nodes[todo.pop()].input:
                i = self.maker.get(name, -1)
                if i >= 0 and not self.owner[i] and i not in self.kept and wanted(i):
                    self.kept.add(i)
                    todo.append(i)

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        """Where the part is cut; what cannot be an input is kept."""
        found: dict[str, onnx.ValueInfoProto] = {}
        todo = sorted(self.kept)
        while todo:
            for name in self.nodes[todo.pop()].input:
                i = self.maker.get(name, -1)
                if not name or name in self.stored or i in self.kept:
                    continue
                if name in self.given:
                    found[name] = self.given[name]
                elif i not in self.constant and name in self.known and _plain(self.known[name]):
                    found[name] = self.known[name]
                elif i >= 0 and not self.owner[i]:
                    self.kept.add(i)
                    todo.append(i)
                else:
                    raise InvalidInput(
                        f"layers {', '.join(sorted(self.units))} cannot be cut out of the network: tensor {name} between "
                        "them and the rest has no static float32 shape; profile with --mode context"
                    )
        return _in_order(found, self.given)

    def model(self) -> onnx.ModelProto:
        inputs = self._inputs()
        nodes = [self.nodes[i] for i in sorted(self.kept)]
        if any(
            a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
            for n in nodes
            for a in n.attribute
        ):
            raise InvalidInput(
                f"layers {', '.join(sorted(self.units))} cannot be cut out of the network: an operation between them has a "
                "branch or a loop; profile with --mode context"
            )
        read = {name for n in nodes for name in n.input}
        whole = {v.name for v in self.marked.graph.output}
        outputs = [
            name
            for n in nodes
            for name in (
                [o for o in n.output if o in whole] or ([] if read & set(n.output) else [n.output[0]])
            )
        ]
        unknown = [name for name in outputs if name not in self.known]
        if unknown:
            raise InvalidInput(
                f"the network does not say the shape of {unknown[0]}; profile with --mode context"
            )
        graph = helper.make_graph(
            nodes,
            "part",
            inputs,
            [self.known[name] for name in outputs],
            [t for name, t in self.stored.items() if name in read],
        )
        model = helper.make_model(graph, opset_imports=list(self.marked.opset_import))
        model.ir_version = self.marked.ir_version
        return model


def _owner(node: onnx.NodeProto) -> str:
    if node.op_type == MARK:
        role, unit, _, _ = tag_of(node)
        return "" if role == "stored" else unit
    unit, own = unit_of(node.name)
    return unit if own else ""


def _ends(node: onnx.NodeProto, units: Collection[str]) -> bool:
    role, unit, _, _ = tag_of(node)
    return role == "out" and unit in units


def _plain(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    static = kind.HasField("shape") and all(
        d.HasField("dim_value") and d.dim_value > 0 for d in kind.shape.dim
    )
    return bool(kind.elem_type == TensorProto.FLOAT and static)


def _in_order(values: dict[str, onnx.ValueInfoProto], given: Iterable[str]) -> list[onnx.ValueInfoProto]:
    """The network's own inputs first, in its order."""
    own = [name for name in given if name in values]
    return [values[name] for name in (*own, *sorted(set(values) - set(own)))]
