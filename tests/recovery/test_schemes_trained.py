"""Training of what a scheme allows: zeros stay zeros, channels that went stay away, and the network is better than before."""

from __future__ import annotations

from functools import cache

import pytest
import recovering
import torch

from hwsearch.errors import InvalidInput
from hwsearch.graph.canonical import tensor_attr
from hwsearch.lowering.lowering import Lowering
from hwsearch.recovery.coupling import coupling
from hwsearch.recovery.processes import Processes
from hwsearch.recovery.recovery import Options, Recovered, Recovery, SchemeRecovery
from hwsearch.recovery.student import CPU, Student
from hwsearch.schemes import (
    NM,
    Balanced,
    BlockPrune,
    Compose,
    Compressed,
    FilterPrune,
    Prune,
    Quantize,
    Scheme,
)

PATTERNS = {
    "prune": Prune(0.15),
    "prune int4": Compose(Prune(0.2), Quantize("int4")),
    "filters, prune, int8": Compose(FilterPrune(0.6, align=4), Prune(0.4), Quantize("int8")),
    "filters": FilterPrune(0.5, align=4),
    "blocks": BlockPrune(0.3, block=(2, 1)),
    "2:4": NM(2, 4),
    "balanced": Balanced(0.25, block=8),
    "int3": Quantize("int3"),
}


@cache
def made(name: str) -> Compressed:
    return PATTERNS[name](recovering.with_data())


def recovery(found: Compressed, method: str, **options: object) -> Recovery:
    """As `hs.bayes` makes one."""
    assert found.of is not None
    fields = {"epochs": 3, "rate": recovering.RATE, "method": method, "scored": False, **options}
    return SchemeRecovery(Lowering(found.of), found.trainable(), Options(**fields), processes=Processes(device=CPU))  # type: ignore[arg-type]


@cache
def trained(name: str, method: str = "mask") -> tuple[Compressed, Recovered]:
    done = recovery(made(name), method).run()
    return made(name).trained(done.lowering), done


def outputs(model: torch.nn.Module) -> torch.Tensor:
    x, _ = recovering.images(64, seed=9)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(x)
    return found


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("method", ["mask", "lc"])
def test_training_starts_from_the_network_of_the_scheme(name: str, method: str) -> None:
    own = recovery(made(name), method)
    student = Student(own.start, own.variants, unfolded=True)
    student.put(coupling(method, student, projection=own.projection).answer(), folded=True)
    x, _ = recovering.images(64, seed=9)
    torch.testing.assert_close(student.predict(x), outputs(made(name).task.model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PATTERNS)
def test_trained_it_is_better_and_no_larger(name: str) -> None:
    after, done = trained(name)
    assert done.better
    assert done.course.least < 0.9 * done.course.start
    before = made(name).footprint
    assert after.footprint.widths == before.widths
    slack = 1.01 if name == "int3" else 1.0  # what is rounded to zero may leave it, and other weights come there
    assert after.footprint.nonzero <= slack * before.nonzero
    assert after.footprint.packed_bytes <= slack * before.packed_bytes
    assert after.footprint.left_out == before.left_out


@pytest.mark.parametrize("name", PATTERNS)
def test_the_module_that_is_left_is_what_was_judged(name: str) -> None:
    after, done = trained(name)
    x, _ = recovering.images(64, seed=9)
    torch.testing.assert_close(outputs(after.task.model), done.lowering.traced_for((x,), "").graph(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n, s in PATTERNS.items() if not isinstance(s, Quantize)])
def test_what_was_zero_stays_zero(name: str) -> None:
    after, done = trained(name)
    way = made(name).trainable()
    narrow = {unit.name: weight for unit, weight in way.narrow.layers()}
    supports = way.supports(narrow)
    assert supports or name == "filters"
    for unit, mask in supports.items():
        path = str(done.lowering.traced.paths[unit][0])
        assert not bool(tensor_attr(done.lowering.traced.graph, path)[~mask].any()), unit
    assert after.footprint.nonzero <= sum(int(m.sum()) for m in supports.values()) + sum(
        w.numel() for u, w in narrow.items() if u not in supports
    )


def test_weights_are_on_the_grid_of_the_scheme() -> None:
    after, done = trained("prune int4")
    for unit in made("prune int4").trainable().units:
        weight = tensor_attr(done.lowering.traced.graph, str(done.lowering.traced.paths[unit][0]))
        for row in weight.flatten(1):
            assert len(row.unique()) <= 15, unit
    assert after.footprint.packed_bytes < after.footprint.dense_bytes / 8


@pytest.mark.parametrize("name", ["prune int4", "filters, prune, int8"])
def test_lc_chooses_what_stays_anew_and_holds_the_density(name: str) -> None:
    after, done = trained(name, "lc")
    assert done.better
    assert done.course.least < 0.9 * done.course.start
    assert after.footprint.nonzero <= made(name).footprint.nonzero * 1.001
    narrow = {unit.name: weight for unit, weight in made(name).trainable().narrow.layers()}
    before = made(name).trainable().supports(narrow)
    moved = 0
    for unit, mask in before.items():
        path = str(done.lowering.traced.paths[unit][0])
        moved += int((tensor_attr(done.lowering.traced.graph, path)[~mask] != 0).sum())
    assert moved > 0


def test_a_training_with_lc_goes_on_where_it_was(tmp_path: object) -> None:
    own = recovery(made("prune int4"), "lc", passes=4)
    student = Student(own.start, own.variants, unfolded=True)
    first = coupling("lc", student, projection=own.projection, passes=4)
    for step in range(8):
        for tensor in student.tensors.values():
            tensor.grad = torch.full_like(tensor, 1e-2) if tensor.requires_grad else None
        first.gradients(64)
        with torch.no_grad():
            for tensor in student.tensors.values():
                if tensor.grad is not None:
                    tensor.sub_(0.1 * tensor.grad)
        first.stepped(step, 8, 0.1)
    other = coupling("lc", Student(own.start, own.variants, unfolded=True), projection=own.projection, passes=4)
    other.load(first.state())
    other.student.put({k: t.detach() for k, t in student.tensors.items()})
    one, two = first.answer(), other.answer()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_channels_that_go_after_weights_cannot_be_trained() -> None:
    scheme: Scheme = Compose(Prune(0.5), FilterPrune(0.5, align=4))
    with pytest.raises(InvalidInput, match="let the steps that take channels come first"):
        scheme(recovering.with_data()).trainable()


def test_a_scheme_is_trained_by_mask_or_lc() -> None:
    with pytest.raises(InvalidInput, match="expected one of mask, lc"):
        recovery(made("prune"), "ste")


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("lc:steps=20", {"method": "lc", "passes": 20}),
        ("lc", {"method": "lc"}),
        ("mask:epochs=2,lr=1e-3", {"epochs": 2, "rate": 1e-3}),
        ("mask:5m", {"time_limit_s": 300.0}),
        ("3", {"epochs": 3}),
        ("90s", {"time_limit_s": 90.0}),
        ("time=1h,lr=0.01", {"time_limit_s": 3600.0, "rate": 0.01}),
    ],
)
def test_words_of_how_to_train(text: str, fields: dict[str, object]) -> None:
    assert Options.parse(text, "mask") == Options(**{"method": "mask", "scored": False, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lcc:epochs=2", "unknown method 'lcc'"),
        ("soon", "--recover soon: soon is not understood"),
        ("lc:step=2", "nothing of a training is called 'step'"),
        ("lc:steps=two", "steps=two is not understood"),
        ("mask:steps=12", "mask has none"),
        ("mask:epochs=0", "epochs must be at least 1"),
    ],
)
def test_other_words_say_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Options.parse(text, "mask")
