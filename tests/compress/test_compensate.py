from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hwsearch.compress import gram as gram_module
from hwsearch.compress.gram import (
    RIDGE,
    RIDGES,
    Batch,
    Gptq,
    Gram,
    Grams,
    as_columns,
    feature_columns,
    from_columns,
    grid,
    kept_apart,
    reconstruction_error,
    refit,
    refittable,
    round_to,
    squares,
    with_one,
)
from hwsearch.compress.quantize import quantize_weight
from hwsearch.compress.sequential import Moments, refit_sequential
from hwsearch.compress.widths import narrow
from hwsearch.graph.trace import trace
from hwsearch.network.variants import Variant
from tests.networks import NETWORKS


def random_gram(features: int, rows: int, seed: int) -> tuple[Gram, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64) @ mix + 1.0
    gram = Gram.empty(features)
    for part in x.split(max(rows // 3, 1)):
        gram.add(squares(with_one(part)), len(part))
    return gram, x


sizes = st.tuples(st.integers(2, 12), st.integers(1, 6), st.integers(0, 1000))


@settings(max_examples=40, deadline=None)
@given(sizes, st.booleans(), st.data())
def test_refitting_equals_least_squares(size: tuple[int, int, int], bias: bool, data: st.DataObject) -> None:
    features, out, seed = size
    gram, x = random_gram(features, 20 * features, seed)
    weight = torch.randn(
        out, features, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, features - 1), min_size=1))))
    new, shift = refit(gram, weight, kept, bias=bias, ridge=0.0)
    inputs = x[:, kept].numpy()
    if bias:
        inputs = np.column_stack([inputs, np.ones(len(x))])
    want = np.linalg.lstsq(inputs, (x @ weight.T).numpy(), rcond=None)[0]
    have = new.T.numpy()
    if bias:
        have = np.vstack([have, shift.numpy()])
    np.testing.assert_allclose(inputs @ have, inputs @ want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


@settings(max_examples=40, deadline=None)
@given(sizes, st.booleans(), st.sampled_from([0.0, 1e-3, 0.1, 10.0]), st.data())
def test_refitting_is_never_worse_than_leaving_columns_out(
    size: tuple[int, int, int], bias: bool, ridge: float, data: st.DataObject
) -> None:
    features, out, seed = size
    gram, _ = random_gram(features, 2 * features, seed)  # few rows: regularised problems too
    weight = torch.randn(out, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, features - 1), min_size=1))))
    new, shift = refit(gram, weight, kept, bias=bias, ridge=ridge)
    sliced = reconstruction_error(gram, weight, weight[:, kept], kept)
    assert reconstruction_error(gram, weight, new, kept, shift) <= sliced * (1 + 1e-6) + 1e-9


def test_nothing_removed_changes_nothing() -> None:
    gram, _ = random_gram(8, 100, 0)
    weight = torch.randn(4, 8)
    new, shift = refit(gram, weight, np.arange(8), ridge=1e-3)
    torch.testing.assert_close(new, weight.double())
    assert float(shift.abs().max()) < 1e-9


@pytest.mark.parametrize("levels", [127, 7])
def test_rounding_with_feedback_beats_rounding_to_nearest(levels: int) -> None:
    ratios = []
    for seed in range(12):
        gram, _ = random_gram(24, 400, seed)
        weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        kept = np.arange(24)
        scales = grid(weight, gram.moments(True)[0], levels)
        new, shift = refit(gram, weight, kept, ridge=1e-3, quantizer=Gptq(levels, scales))
        steps = new / scales[:, None]
        assert float((steps - steps.round()).abs().max()) < 1e-6
        assert float(steps.abs().max()) <= levels + 1e-6
        nearest = round_to(weight, scales[:, None], levels)
        mean = gram.moments(True)[1]
        errors = [
            reconstruction_error(gram, weight, q, kept, s)
            for q, s in ((new, shift), (nearest, (weight - nearest) @ mean))
        ]
        ratios.append(errors[0] / errors[1])
    assert np.median(ratios) < 0.7
    assert max(ratios) < 1.2


def batches(name: str, count: int = 2) -> list[Batch]:
    model, inputs = NETWORKS[name]()
    traced = trace(model.eval(), inputs)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    made: list[Batch] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        made.append(
            (
                traced,
                tuple(
                    torch.randn(a.shape, generator=generator) if a.is_floating_point() else a for a in args
                ),
                {},
            )
        )
    return made


@pytest.mark.parametrize(
    "name",
    ["mlp", "one_dimensional", "residual", "densenet", "transformer_encoder", "three_dimensional", "unet"],
)
def test_grams_see_what_units_compute(name: str) -> None:
    """The mean square of W x, from the Gram matrix, is that of the unit's real output."""
    own = batches(name, 1)
    traced, args, _ = own[0]
    grams = Grams(own, [u.name for u in traced.network.units], rows=10**9)
    values: dict[str, torch.Tensor] = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Record(traced.graph).run(*args, enable_io_processing=False)
    checked = 0
    for unit in traced.network.units:
        weight, bias = traced.weight(unit.name), traced.bias(unit.name)
        assert (unit.name in grams) == (refittable(unit) and weight is not None)
        if weight is None or unit.name not in grams or "transpose" in unit.op or unit.calls > 1:
            continue
        matrix = as_columns(unit, weight).double()
        torch.testing.assert_close(from_columns(unit, matrix), weight.double())
        if bias is not None:
            matrix = torch.cat([matrix, bias.double()[:, None]], 1)
            moment = grams[unit.name].matrix
        else:
            moment = grams[unit.name].matrix[:-1, :-1]
        have = torch.einsum("of,fg,og->o", matrix, moment, matrix)
        y = values[traced.sites[unit.name][0].node].double()
        y = y.movedim(y.dim() - len(unit.weight_shape) + 1, -1) if unit.op.startswith("conv") else y
        torch.testing.assert_close(have, y.flatten(0, -2).square().mean(0), rtol=1e-4, atol=1e-6)
        checked += 1
    assert checked


class Small(nn.Module):
    """Depthwise, residual and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.wide, self.deep = nn.Conv2d(12, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.back, self.head = nn.Conv2d(24, 12, 1), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.back(self.deep(self.wide(x).relu()).relu())
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("samples", "least", "most"), [(10, 0.1, 10.0), (4000, 0.0, 0.01)])
def test_what_few_samples_determine_is_regularised_more(samples: int, least: float, most: float) -> None:
    """Where the features of a layer outnumber its samples, following these would be no help on others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    traced = trace(model, torch.randn(samples, 128))
    own: list[Batch] = [(traced, (torch.randn(samples, 128),), {}) for _ in range(8)]
    grams, others = Grams(own[:4]), Grams(own[4:])
    assert least <= grams.ridges["2"] <= most
    weight, kept = traced.weight("2"), np.arange(0, 256, 2)
    assert weight is not None

    def error(ridge: float) -> float:
        new, shift = refit(grams["2"], weight, kept, ridge=ridge)
        return reconstruction_error(others["2"], weight, new, kept, shift)

    assert error(grams.ridges["2"]) <= 1.1 * min(error(r) for r in RIDGES)


def test_a_single_batch_leaves_nothing_to_choose_on() -> None:
    assert set(Grams(small()[:1]).ridges.values()) == {RIDGE}
    assert [kept_apart(n) for n in (1, 2, 3, 4, 8, 100)] == [1, 1, 2, 3, 6, 75]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_regression_moments_are_those_of_all_rows(bias: bool, groups: int) -> None:
    """Parts add up, the solution is that of least squares, and the error is its own."""
    torch.manual_seed(0)
    z = torch.cat([torch.randn(groups, 50, 4), torch.ones(groups, 50, 1)], 2).double()
    y = torch.randn(groups, 2, 50).double()

    def moments(rows: slice) -> Moments:
        own, target = z[:, rows], y[:, :, rows]
        n = own.shape[1]
        return Moments(own.transpose(1, 2) @ own / n, target @ own / n, n)

    both, parts = moments(slice(None)), moments(slice(0, 20)) + moments(slice(20, None))
    torch.testing.assert_close(parts.second, both.second)
    torch.testing.assert_close(parts.cross, both.cross)
    weight, shift, _ = both.solve(torch.zeros(groups, 2, 4).double(), 1e-12, bias)
    read = z if bias else z[:, :, :-1]
    best = torch.linalg.lstsq(read, y.transpose(1, 2)).solution.transpose(1, 2)
    torch.testing.assert_close(weight, best[:, :, :4])
    if bias:
        torch.testing.assert_close(shift, best[:, :, 4])
    left = (y - weight @ z[:, :, :-1].transpose(1, 2) - shift[:, :, None]).square().sum((0, 1)).mean()
    assert both.error(weight, shift) + float(y.square().sum((0, 1)).mean()) == pytest.approx(float(left))


def test_columns_of_indices() -> None:
    unit = small()[0][0].network["stem"]
    weight = torch.arange(float(np.prod(unit.weight_shape))).reshape(unit.weight_shape)
    left = as_columns(unit, weight)[:, feature_columns(unit, np.array([0, 2]))]
    torch.testing.assert_close(from_columns(unit, left), weight[:, [0, 2]])


def small() -> list[Batch]:
    torch.manual_seed(0)
    model = Small().eval()
    xs = [torch.randn(32, 3, 8, 8) for _ in range(3)]
    traced = trace(model, xs[0])
    return [(traced, (x,), {}) for x in xs]


def distance(own: list[Batch], kept: dict[str, list[int]], weights: object) -> float:
    traced = own[0][0]
    slim = narrow(traced, kept, weights)  # type: ignore[arg-type]
    with torch.no_grad():
        return float(sum((slim.graph(*a) - traced.graph(*a)).square().sum() for _, a, _ in own))


def test_corrections_come_closer_to_the_dense_network() -> None:
    own = small()
    kept = {g: list(range(n - n // 3)) for g, n in own[0][0].network.channels.items()}
    assert len(kept) == 2
    plain = distance(own, kept, {})
    regressed = distance(own, kept, refit_sequential(own, kept, {}))
    assert regressed < plain


def test_a_whole_network_stays_as_it_is() -> None:
    own = small()
    assert distance(own, {}, refit_sequential(own, {}, {})) < 1e-5


def test_rounded_on_the_way() -> None:
    """int8 units come out on their grid, and later ones make up for it."""
    own = small()
    traced = own[0][0]
    kept = {g: list(range(n - n // 3)) for g, n in traced.network.channels.items()}
    names = [u.name for u in traced.network.units]
    weights = refit_sequential(own, kept, {}, dict.fromkeys(names, Variant("int8")))
    rounded = {
        unit: (torch.from_numpy(quantize_weight(w, traced.network[unit].out_axis).dequantized()), b)
        for unit, (w, b) in weights.items()
    }
    for unit in set(names) - {"deep"}:
        torch.testing.assert_close(rounded[unit][0], weights[unit][0], rtol=1e-4, atol=1e-6)
    plain = distance(own, kept, {})
    assert distance(own, kept, rounded) < 0.5 * plain


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 8))
def test_a_symmetric_product_in_blocks_of_columns_is_the_whole_one(features: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(features * rows)
    z = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_module, "COLUMNS", columns)
        assert torch.allclose(squares(z), z.T @ z, rtol=1e-12, atol=1e-12)
