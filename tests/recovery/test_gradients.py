"""Pruned gradients: the support of each rule by brute force, the mean of the random ones, exact gradients of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import recovering
import torch
from recovering import recover
from torch.nn import functional as F

from hwsearch.errors import InvalidInput
from hwsearch.lowering.refitted import refitted
from hwsearch.network.variants import Variant, legal
from hwsearch.recovery import gradients
from hwsearch.recovery.coupling import SparseRefined
from hwsearch.recovery.gradients import WORDS, Layer, Pruning, Rule, rule
from hwsearch.recovery.recovery import Options
from hwsearch.recovery.student import Student

DRAWS, ERRORS = 4000, 4.5
"""Draws, and standard errors that their mean may be off by."""
PRUNING = [w for w in WORDS if w != "dense"]


def of(word: str) -> Rule:
    found = rule(word)
    assert found is not None
    return found


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LAYERS: dict[str, tuple[Layer, tuple[int, ...], tuple[int, ...]]] = {
    "conv2d": (Layer(lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1)), (3, 6, 7, 6), (8, 6, 3, 3)),
    "groups": (Layer(lambda x, w, b: F.conv2d(x, w, b, groups=2), groups=2), (2, 8, 5, 5), (16, 4, 3, 3)),
    "conv1d": (Layer(lambda x, w, b: F.conv1d(x, w, b)), (2, 3, 9), (8, 3, 3)),
    "transposed": (Layer(lambda x, w, b: F.conv_transpose2d(x, w, b), out_axis=1), (2, 6, 4, 4), (6, 8, 3, 3)),
    "linear": (Layer(F.linear), (3, 5, 6), (16, 6)),
    "vectors": (Layer(F.linear), (7, 6), (8, 6)),
    "addmm": (Layer(lambda x, w, b: x @ w if b is None else torch.addmm(b, x, w), out_axis=1), (7, 6), (6, 8)),
}


def run(layer: Layer, shapes: tuple[tuple[int, ...], ...], pruning: Pruning | None, whole: Any = None) -> tuple[Any, ...]:
    """(y, dy, x, weight, bias) after a backward pass, the last three with gradients."""
    random = generator()
    x, weight = (torch.randn(s, generator=random).requires_grad_() for s in shapes)
    bias = torch.randn(weight.shape[layer.out_axis], generator=random).requires_grad_()
    y = layer.call(x, weight, bias) if pruning is None else pruning.product(layer, x, weight, bias, whole)
    dy = torch.randn(y.shape, generator=random)
    y.backward(dy)
    return y.detach(), dy, x, weight, bias


def blocks(shape: tuple[int, ...], axis: int, m: int) -> Iterator[list[tuple[int, ...]]]:
    """Where the entries of each M consecutive ones along an axis are."""
    axis %= len(shape)
    for index in np.ndindex(*shape):
        if index[axis] % m == 0:
            yield [(*index[:axis], index[axis] + i, *index[axis + 1 :]) for i in range(m)]


def brute(tensor: torch.Tensor, axis: int, n: int, m: int) -> torch.Tensor:
    """With the N largest of every M."""
    found = torch.zeros_like(tensor)
    for block in blocks(tuple(tensor.shape), axis, m):
        for index in sorted(block, key=lambda i: -abs(float(tensor[i])))[:n]:
            found[index] = tensor[index]
    return found


def data_gradient(layer: Layer, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    own = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(layer.call(own, weight.detach(), None), own, dy)
    return dx


@pytest.mark.parametrize("word", ["2:4", "1:4", "2:8"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_pattern_keeps_the_largest_along_output_channels_in_the_gradient_of_the_input_alone(name: str, word: str) -> None:
    layer, *shapes = LAYERS[name]
    pruning = Pruning(of(word))
    want, (y, dy, x, weight, bias) = run(layer, tuple(shapes), None), run(layer, tuple(shapes), pruning)
    assert torch.equal(y, want[0])
    assert torch.equal(weight.grad, want[3].grad)
    assert torch.equal(bias.grad, want[4].grad)
    axis = 1 if name in ("conv2d", "groups", "conv1d", "transposed") else -1
    n, m = pruning.rule.n, pruning.rule.m
    assert torch.allclose(x.grad, data_gradient(layer, x, weight, brute(dy, axis, n, m)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(x.grad, want[2].grad, rtol=0.1, atol=0.1)
    assert pruning.measured()["zeros"] == pytest.approx(1 - n / m)
    assert pruning.measured()["zeros_dense"] == 0


@pytest.mark.parametrize("name", LAYERS)
def test_bdwp_prunes_the_weight_of_the_backward_product_alone_along_output_channels(name: str) -> None:
    layer, *shapes = LAYERS[name]
    want = run(layer, tuple(shapes), None)
    whole = torch.randn(shapes[1], generator=generator(1))
    for given in (None, whole):  # of the weight itself, and of that without the pattern of the forward product
        y, dy, x, weight, bias = run(layer, tuple(shapes), Pruning(of("bdwp:2:8")), given)
        assert torch.equal(y, want[0])
        assert torch.equal(weight.grad, want[3].grad)
        assert torch.equal(bias.grad, want[4].grad)
        pruned = brute((weight if given is None else given).detach(), layer.out_axis, 2, 8)
        assert torch.allclose(x.grad, data_gradient(layer, x, pruned, dy), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("word", ["2:4:mvue", "1:4:mvue", "2:8:mvue", "2:4:random", "2:4:rescaled"])
@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_no_rule_keeps_more_than_n_of_m(axis: int, word: str) -> None:
    dy = torch.randn(3, 8, 8, 8, generator=generator(2))
    kept = of(word).gradient(dy, axis, generator(3)) != 0
    counts = {sum(bool(kept[i]) for i in block) for block in blocks((3, 8, 8, 8), axis, of(word).m)}
    assert counts == {of(word).n}


def test_rescaling_restores_the_magnitude_of_each_channel_of_each_sample() -> None:
    for shape, axis in (((3, 8, 4, 5), -3), ((3, 9, 8), -1)):
        dy = torch.randn(shape, generator=generator(4))
        found = of("2:4:rescaled").gradient(dy, axis, generator())
        positions = [d for d in range(1, len(shape)) if d != axis % len(shape)]
        sums = [t.abs().sum(positions) for t in (found, dy)]
        assert torch.allclose(sums[0], sums[1] * (sums[0] > 0), rtol=1e-5)
        assert int((sums[0] > 0).sum()) > 20
        plain = brute(dy, axis, 2, 4)
        assert torch.equal(found != 0, plain != 0)
        assert bool((found.abs() >= plain.abs()).all())
    vectors = torch.randn(5, 8, generator=generator(5))
    assert torch.equal(of("2:4:rescaled").gradient(vectors, -1, generator()), brute(vectors, -1, 2, 4))


SMALL = torch.tensor(
    [[8.0, 1, 1, -1], [1, -1, 1, 1], [0, 0, 3, 0], [4, -3, 2, 1], [-5, 0.5, -0.2, 0.1], [0, 0, 0, 0], [2, 0, -7, 1]]
)


def off(draws: torch.Tensor, want: torch.Tensor) -> float:
    """How many standard errors the mean of draws is off, at most."""
    error = draws.std(0) / len(draws) ** 0.5
    return float(((draws.mean(0) - want).abs() / (error + 1e-5)).max())


@pytest.mark.parametrize(
    ("word", "unbiased"),
    [("2:4:mvue", True), ("1:4:mvue", True), ("3:4:mvue", True), ("stochastic:0.9", True), ("stochastic:0.5", True),
     ("2:4", False), ("2:4:rescaled", False), ("2:4:random", False)],
)  # fmt: skip
def test_the_mean_of_many_draws_is_the_gradient_where_a_rule_is_unbiased(word: str, unbiased: bool) -> None:
    draws = of(word).gradient(SMALL.expand(DRAWS, *SMALL.shape), -1, generator(6))
    assert (off(draws, SMALL) < ERRORS) == unbiased


def test_least_variance_draws_by_the_probabilities_of_the_paper_and_no_others_have_less() -> None:
    draws = of("2:4:mvue").gradient(SMALL.expand(DRAWS, *SMALL.shape), -1, generator(7))
    rng = np.random.default_rng(0)
    for row, block in enumerate(SMALL):
        size = block.abs().double()
        total, top = float(size.sum()), int(size.argmax())
        if total == 0:
            assert not bool(draws[:, row].any())
            continue
        want = 2 * size / total
        if want[top] > 1:
            want = size / (total - float(size[top])) if total > size[top] else torch.zeros(4, dtype=torch.float64)
            want[top] = 1.0
        taken = draws[:, row] != 0
        error = (want * (1 - want) / DRAWS).sqrt()
        assert bool(((taken.double().mean(0) - want).abs() <= ERRORS * error + 1e-9).all())
        for i in range(4):
            values = draws[taken[:, i], row, i]
            assert torch.allclose(values, (block[i] / want[i].clamp(min=1e-9)).float().expand(len(values)), rtol=1e-5)
        others = torch.from_numpy(2 * rng.dirichlet(np.ones(4), 20000))
        others = others[(others <= 1).all(1)]
        least = float((size.square()[size > 0] / want[size > 0]).sum())
        assert len(others) > 1000
        assert bool(((size.square() / others.clamp(min=1e-12)).sum(1) >= least * (1 - 1e-9)).all())


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_share_of_zeros_of_the_stochastic_rule_is_that_of_its_formula(share: float) -> None:
    dy = 3e-4 * torch.randn(400, 500, generator=generator(8))
    found = of(f"stochastic:{share}").gradient(dy, -1, generator(9))
    reach = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + share) / 2)).item()
    want = share - (2 / np.pi) ** 0.5 / reach * (1 - np.exp(-(reach**2) / 2))
    assert float((found == 0).double().mean()) == pytest.approx(want, abs=0.01)
    threshold = float(found[found != dy].abs().max())
    assert threshold == pytest.approx(reach * 3e-4, rel=0.02)
    raised = (found != dy) & (found != 0)
    assert torch.allclose(found[raised], threshold * dy[raised].sign())
    assert torch.equal(found[dy.abs() > threshold], dy[dy.abs() > threshold])


def test_channels_that_are_no_multiple_of_m_stay_dense_and_nothing_is_saved() -> None:
    layer, x, _ = LAYERS["vectors"]
    for word in ("2:4", "2:4:mvue", "bdwp:2:4"):
        pruning = Pruning(of(word))
        want, have = run(layer, (x, (10, 6)), None), run(layer, (x, (10, 6)), pruning)
        assert torch.equal(have[2].grad, want[2].grad)
        assert pruning.measured()["estimated_saving"] == pruning.measured()["zeros"] == 0


@pytest.mark.parametrize(("word", "skipped"), [("2:4", 0.5), ("1:4:mvue", 0.75), ("bdwp:2:8", 0.75), ("stochastic:0.9", None)])
def test_what_hardware_would_save_is_the_share_of_the_backward_product_times_what_is_skipped(
    word: str, skipped: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def tick() -> float:  # each of the three products takes a second
        now[0] += 1
        return now[0]

    monkeypatch.setattr(gradients.time, "perf_counter", tick)
    layer, *shapes = LAYERS["conv2d"]
    pruning = Pruning(of(word))
    run(layer, tuple(shapes), pruning)
    told = pruning.measured()
    assert told["backward_share"] == pytest.approx(1 / 3)
    assert told["estimated_saving"] == pytest.approx((told["zeros"] if skipped is None else skipped) / 3)
    assert 0.3 < told["zeros"] <= 0.75


def test_where_no_gradient_of_the_input_is_asked_for_there_is_no_backward_product() -> None:
    pruning = Pruning(of("2:4"))
    weight = torch.randn(8, 6, requires_grad=True)
    pruning.product(Layer(F.linear), torch.randn(7, 6), weight, None).sum().backward()
    assert weight.grad is not None
    assert pruning.counts["entries"] == pruning.measured()["backward_share"] == 0


# ---- networks


def gradients_of(word: str, precision: str, seed: int = 0) -> tuple[Any, dict[str, torch.Tensor]]:
    """(outputs, gradients) of the stripes' network at whole widths."""
    first, _, variants = recovering.start(precision, 1.0)
    found = rule(word)
    student = Student(first, variants, pruning=None if found is None else Pruning(found))
    if student.pruning is not None:
        student.pruning.start(seed)
    traced, args, kwargs = first.calibration[0]
    outputs = student(traced, args, kwargs)
    outputs.square().sum().backward()
    return outputs.detach(), {path: t.grad for path, t in student.tensors.items() if t.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp16"])
@pytest.mark.parametrize("word", PRUNING)
def test_outputs_and_the_gradients_of_the_last_layer_are_those_of_dense_ones_bit_by_bit(word: str, precision: str) -> None:
    before = torch.get_rng_state()
    (want, dense), (have, pruned) = gradients_of("dense", precision), gradients_of(word, precision)
    assert torch.equal(torch.get_rng_state(), before)  # a task may draw its own
    assert torch.equal(have, want)
    assert dense.keys() == pruned.keys()
    same = {path: torch.equal(dense[path], pruned[path]) for path in dense}
    assert all(value == path.startswith("head") for path, value in same.items()), same


def cosine(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    a, b = (torch.cat([t.flatten() for t in own.values()]) for own in (one, two))
    return float(F.cosine_similarity(a, b, dim=0))


def test_the_largest_lead_nearer_to_the_dense_gradient_than_any_others() -> None:
    _, dense = gradients_of("dense", "int8")
    near = {word: cosine(dense, gradients_of(word, "int8")[1]) for word in ("2:4", "2:4:rescaled", "2:4:random")}
    assert min(near["2:4"], near["2:4:rescaled"]) > near["2:4:random"] + 0.05


def test_every_step_draws_anew_and_the_same_for_one_seed() -> None:
    one, same, other = (gradients_of("2:4:mvue", "int8", seed)[1] for seed in (1, 1, 2))
    assert all(torch.equal(one[path], same[path]) for path in one)
    assert not torch.equal(one["stem.weight"], other["stem.weight"])


def test_bdwp_prunes_dense_weights_as_rounded_under_an_nm_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recovering.lowering()
    wanted = Variant("int8", "2:4")
    variants = {u.name: wanted if legal(u, [wanted]) else Variant("fp32") for u in whole.network.units}
    student = Student(refitted(whole, variants), variants, pruning=Pruning(of("bdwp:2:4")))
    random = generator(1)
    with torch.no_grad():  # dense weights under the pattern, as `srste` has them
        for tensor in student.tensors.values():
            tensor.add_(0.1 * tensor.abs().mean() * torch.randn(tensor.shape, generator=random))
    SparseRefined(student)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    product = Pruning.product

    def look(self: Pruning, layer: Layer, x: Any, weight: torch.Tensor, bias: Any, whole: torch.Tensor | None = None) -> Any:
        if whole is not None:
            seen.append((weight.detach(), whole))
        return product(self, layer, x, weight, bias, whole)

    monkeypatch.setattr(Pruning, "product", look)
    traced, args, kwargs = whole.calibration[0]
    student(student.lowering.traced_for(args, ""), args, kwargs)
    assert traced is not None
    assert len(seen) == sum(v.kept is not None for v in variants.values()) >= 3
    for forward, dense in seen:
        assert int((forward != 0).sum()) <= forward.numel() // 2 < 0.6 * int((dense != 0).sum())
        assert torch.equal(dense[forward != 0], forward[forward != 0])


# ---- recovery


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_rule_that_prunes_nothing_trains_as_dense_gradients_do_bit_by_bit(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = recover(precision=precision, scored=False)
    monkeypatch.setattr(Rule, "gradient", lambda self, dy, axis, random: dy)
    same = recover(precision=precision, scored=False, gradients="1:2")
    assert all(torch.equal(dense.trained.tensors[k], same.trained.tensors[k]) for k in dense.trained.tensors)
    curves = [[(p.step, p.loss, p.held_out) for p in done.course.points] for done in (dense, same)]
    assert curves[0] == curves[1]
    assert dense.to_json()["gradients"] == {"rule": "dense"}
    assert "gradients" not in str(dense)


@pytest.mark.parametrize("word", ["1:2", "1:2:rescaled", "1:2:mvue", "stochastic:0.9", "bdwp:1:2"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_recovery_with_pruned_gradients_lowers_the_loss_and_says_what_was_measured(word: str, precision: str) -> None:
    done = recover(precision=precision, scored=False, gradients=word)
    assert done.course.least < 0.9 * done.course.start
    told = done.to_json()["gradients"]
    assert told["rule"] == word
    assert told["zeros"] > told["zeros_dense"] + 0.05
    assert 0 < told["estimated_saving"] < told["backward_share"] < 1
    text = str(done)
    assert f"gradients {word}: measured, {told['zeros']:.0%} zeros" in text
    assert f"estimated, hardware that skips zeros would save {told['estimated_saving']:.0%}" in text


@pytest.mark.parametrize(
    "word", ["", "4:2", "4:4", "0:4", "2:4:largest", "2:4:mvue:x", "stochastic", "stochastic:1.5", "stochastic:0.0", "bdwp",
             "bdwp:2:8:mvue", "Dense"],
)  # fmt: skip
def test_wrong_words_are_refused_with_the_right_ones(word: str) -> None:
    with pytest.raises(InvalidInput, match=f"unknown gradients '{word}'; expected one of dense, 2:4, .*bdwp:2:8"):
        Options(gradients=word)


@pytest.mark.parametrize("word", WORDS)
def test_right_words_are_taken(word: str) -> None:
    assert Options(gradients=word).gradients == word
