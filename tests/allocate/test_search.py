"""Widths and precisions together, against brute force, exact costs and the law of a simulated device."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulation import scores, simulated_table
from three_groups import ADDITIVE, LAW, NETWORK, SCORES, chosen, everything, memory, model, narrow, table
from typer.testing import CliRunner

from hwsearch.allocate import search as module
from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import Budget
from hwsearch.allocate.polytope import Polytope
from hwsearch.allocate.search import front, search, search_diverse
from hwsearch.allocate.space import make_space
from hwsearch.cli import app
from hwsearch.errors import Infeasible, InvalidInput
from hwsearch.latency.model import fit
from hwsearch.loss.interactions import Correction
from hwsearch.network.choices import Candidate, candidate_widths
from hwsearch.network.variants import Variant, network_bytes, uniform
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, sizes_of


def law_ns(of: Candidate, law: LatencyLaw) -> float:
    return law.time_ns({u: v.precision for u, v in of.variants.items()}, sizes_of(NETWORK, of.widths))


def between(share: float, times: list[float]) -> float:
    """A limit so far from the least time (0) to the longest (1)."""
    return min(times) + share * (max(times) - min(times))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4, 0.6, 0.8])
def test_the_answer_is_that_of_brute_force(share: float) -> None:
    """Over all (variants, widths): predicted by the model itself, exact in size and MACs."""
    at = model()
    limit = between(share, [at.predict(c.variants, c.widths).time_ns for c in everything()])
    found = search(
        table(), SCORES, [f"latency={limit / 1e6:.6f}ms", "size=90%", "macs=90%"], kappa=0.0, model=at
    )
    best = min(
        SCORES.total(c.variants, c.widths)
        for c in everything()
        if at.predict(c.variants, c.widths).time_ns <= limit and narrow(c).macs <= 0.9 * NETWORK.macs
    )
    assert found.predicted["loss"] == pytest.approx(best, rel=1e-9)
    assert found.solver["status"] == "optimal"
    assert found.predicted["loss"] == pytest.approx(SCORES.total(chosen(found).variants, found.widths))


LEARNT = replace(SCORES, correction=Correction({"conv0": 3.0, "conv3": 0.4}, {"conv1": 2.0}, 1.7, 1.3))


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_what_was_learnt_of_losses_is_searched_with_and_shown(share: float) -> None:
    """The least predicted loss, and the least size under a bound on it, as by brute force; the front is of predicted losses."""
    at, every = model(), list(everything())
    loss = {id(c): LEARNT.total(c.variants, c.widths) for c in every}
    limit = between(share, [at.predict(c.variants, c.widths).time_ns for c in every])
    least = min(loss[id(c)] for c in every if at.predict(c.variants, c.widths).time_ns <= limit)
    found = search(table(), LEARNT, [f"latency={limit / 1e6:.6f}ms"], kappa=0.0, model=at)
    assert found.predicted["loss"] == pytest.approx(least, rel=1e-9)
    assert found.predicted["loss"] == pytest.approx(LEARNT.total(chosen(found).variants, found.widths))
    assert (found.solver["status"], found.solver["gap"]) == ("optimal", 0.0)
    assert found.solver["bound"] == pytest.approx(found.predicted["loss"])
    most = float(f"{between(share, list(loss.values())):.6f}")
    small = search(table(), LEARNT, [f"loss={most}"], minimize="size", model=at)
    assert small.predicted["loss"] <= most
    best = min(network_bytes(narrow(c), c.variants) for c in every if loss[id(c)] <= most)
    assert network_bytes(narrow(chosen(small)), chosen(small).variants) == best
    for point in front(table(), LEARNT, points=4, model=at).best():
        variants = {u: Variant.parse(v) for u, v in zip(NETWORK.by_name, point.variants, strict=True)}
        assert point.loss == pytest.approx(LEARNT.total(variants, dict(zip(NETWORK.channels, point.widths, strict=True))))
    with pytest.raises(Infeasible, match=r"the least loss within latency=") as caught:
        search(table(), LEARNT, [f"latency={limit / 1e6:.6f}ms", f"loss={least / 2:.6f}"], kappa=0.0, model=at)
    assert caught.value.least["loss"] == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("quantize_outputs", [False, True])
def test_a_budget_on_memory_is_met_at_the_least_loss(share: float, quantize_outputs: bool) -> None:
    """Over all (variants, widths), the peak counted tensor by tensor; front points say it as well."""
    losses = replace(SCORES, quantize_outputs=quantize_outputs)
    peaks = {i: memory(c, quantize_outputs) for i, c in enumerate(everything())}
    limit = int(between(share, list(map(float, peaks.values()))))
    found = search(table(), losses, [f"memory={limit}B", "macs=70%"], kappa=0.0, model=model())
    best = min(
        SCORES.total(c.variants, c.widths)
        for i, c in enumerate(everything())
        if peaks[i] <= limit and narrow(c).macs <= 0.7 * NETWORK.macs
    )
    assert found.predicted["loss"] == pytest.approx(best, rel=1e-9)
    assert found.predicted["memory_bytes"] == memory(chosen(found), quantize_outputs) <= limit
    assert found.solver["status"] == "optimal"


def test_too_little_memory_names_the_least() -> None:
    least = min(memory(c) for c in everything())
    with pytest.raises(Infeasible, match="the least memory is") as caught:
        search(table(), SCORES, [f"memory={least - 1}B"], model=model())
    assert caught.value.least == {"memory": least}
    assert search(table(), SCORES, [f"memory={least}B"], model=model()).predicted["memory_bytes"] == least


@pytest.mark.parametrize("impossible", ["latency=1%", "latency=90x", "size=0.1%", "memory=800x"])
def test_an_impossible_share_is_answered_by_one_that_can_be_met(impossible: str) -> None:
    """What the error tells to write is met, and two hundredths less is not."""
    with pytest.raises(Infeasible, match="the least as shares: ") as caught:
        search(table(), SCORES, [impossible], kappa=0.0, model=model())
    told = Budget.parse(str(caught.value).partition("the least as shares: ")[2].partition(")")[0])
    assert told.kind == Budget.parse(impossible).kind
    assert search(table(), SCORES, [told], kappa=0.0, model=model()).predicted["loss"] > 0
    tighter = told.value / 1.02 if told.kind == "fraction" else told.value * 1.02
    with pytest.raises(Infeasible):
        search(table(), SCORES, [Budget(told.column, told.kind, tighter)], kappa=0.0, model=model())


def test_the_share_told_is_of_the_dense_network_as_measured_now() -> None:
    """The closed loop's own limit: the dense network took 10 % longer than in the table."""
    at = model()
    budget = Budget.parse("latency=1%")
    limit = round(budget.resolve(at.table.dense_ns) * 1.1)
    with pytest.raises(Infeasible, match="the least as shares: ") as caught:
        search(table(), SCORES, [budget], kappa=0.0, model=at, tighten={"latency": limit})
    told = Budget.parse(str(caught.value).partition("the least as shares: ")[2].partition(")")[0])
    least = caught.value.least["latency"]
    assert 1.01 * least <= told.resolve(1.1 * at.table.dense_ns) * 1.001
    assert told.value == pytest.approx(1.01 * least / (1.1 * at.table.dense_ns), rel=0.011)


def test_under_a_budget_on_size_alone_widths_that_were_not_measured_are_chosen() -> None:
    """And of what was not measured no latency is predicted; whatever a table without a build knows is enough."""
    every = {g: candidate_widths(n) for g, n in NETWORK.channels.items()}
    losses = scores(NETWORK, every)
    sizes = [network_bytes(narrow(c), c.variants) + 500 for c in everything(every)]
    limit = sorted(sizes)[len(sizes) // 50]
    best = min(losses.total(c.variants, c.widths) for c, size in zip(everything(every), sizes, strict=True) if size <= limit)
    found = search(table(), losses, [f"size={limit}B"])
    assert found.predicted["loss"] == pytest.approx(best, rel=1e-9)
    assert any(w not in table().grid()[g] for g, w in found.widths.items())
    assert not {"latency_ns", "sigma_ns"} & set(found.predicted)
    assert found.dense["latency_ns"] > 0
    assert found.costs.latency is None
    nothing = search(LatencyTable(table().header), losses, [f"size={limit}B"])
    assert (nothing.variants, nothing.widths) == (found.variants, found.widths)
    assert "latency_ns" not in nothing.dense
    measured = search(table(), SCORES, [f"size={limit}B"], model=model())
    if all(model().knows(u, Variant.parse(v), measured.widths) for u, v in measured.variants.items()):
        assert measured.predicted["latency_ns"] > 0


def test_what_is_never_faster_than_dense_is_said_to_be() -> None:
    """Only int8, and slower: then the least is above 100 %."""
    slow = LatencyLaw({u: {"fp32": 1e5, "int8": 2e5} for u in NETWORK.by_name}, rest_ns=1e4, whole=LAW.whole)
    flat = simulated_table(NETWORK, slow, design=8)
    at = fit(flat)
    with pytest.raises(Infeasible, match="Nothing offered here is faster than the dense network"):
        search(flat, SCORES, ["latency=90%"], model=at)


def test_a_budget_within_the_error_of_the_least_is_left_to_a_measurement() -> None:
    at = model()
    every = [at.predict(c.variants, c.widths) for c in everything()]
    least = min(every, key=lambda p: p.time_ns)
    budget = f"latency={round(least.time_ns - least.sigma_ns)}ns"
    with pytest.raises(Infeasible, match="a prediction cannot tell: `hwsearch run` measures"):
        search(table(), SCORES, [budget], model=at)
    nearest = search(table(), SCORES, [budget], model=at, doubtful=True)
    assert nearest.predicted["latency_ns"] == pytest.approx(least.time_ns, abs=100)
    with pytest.raises(Infeasible) as far:
        search(table(), SCORES, [f"latency={round(least.time_ns - 3 * least.sigma_ns)}ns"], model=at, doubtful=True)
    assert "cannot tell" not in str(far.value)


def test_a_share_of_memory_is_of_the_dense_network() -> None:
    dense = memory(Candidate(uniform(NETWORK, "fp32"), NETWORK.channels))
    found = search(table(), SCORES, ["memory=50%"], model=model())
    assert found.dense["memory_bytes"] == dense
    assert found.budgets[0]["limit"] == dense // 2 >= found.predicted["memory_bytes"]
    assert search(table(), SCORES, ["memory=2x"], model=model()).variants == found.variants


def test_memory_is_swept() -> None:
    found = front(table(), SCORES, over="memory", points=5, model=model())
    best = found.best()
    assert [p.memory_bytes for p in best] == sorted(p.memory_bytes for p in best)
    assert all(a.loss > b.loss for a, b in pairwise(best))
    assert best[0].memory_bytes == min(memory(c) for c in everything())
    for p in best:
        at = dict(zip(found.units, map(Variant.parse, p.variants), strict=True))
        widths = dict(zip(found.groups, p.widths, strict=True))
        assert p.memory_bytes == memory(Candidate(at, widths)) <= p.budget


def test_the_command_line_bounds_and_sweeps_memory(tmp_path: Path) -> None:
    """`search` and `front` say the estimate where costs stand, also as JSON."""
    table().save(tmp_path / "t.parquet")
    SCORES.save(tmp_path / "s.parquet")
    files = ["--table", str(tmp_path / "t.parquet"), "--sensitivity", str(tmp_path / "s.parquet")]
    out = ["-o", str(tmp_path / "out")]

    def invoke(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*words, *files, *out])
        return done.exit_code, done.output

    code, said = invoke("search", "--budget", "memory=50%")
    assert code == 0
    assert "memory (estimated)" in said
    chosen_ = Allocation.load(tmp_path / "out")
    assert (
        chosen_.predicted["memory_bytes"] <= chosen_.budgets[0]["limit"] == chosen_.dense["memory_bytes"] // 2
    )
    code, said = invoke(
        "front", "--over", "memory", "--points", "4", "--plot", str(tmp_path / "f.png"), "--json"
    )
    assert code == 0
    data = json.loads(said)
    assert data["over"] == "memory"
    assert all(p["memory_bytes"] <= p["budget"] for p in data["points"] if not p["infeasible"])
    assert (tmp_path / "f.png").stat().st_size > 0


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.7])
def test_the_optimum_of_a_fitted_table_is_the_optimum_of_the_law(share: float) -> None:
    """Where nothing but the fit stands between: its small error may only exclude what is just within the budget."""
    truth = [(SCORES.total(c.variants, c.widths), law_ns(c, ADDITIVE)) for c in everything()]
    limit = between(share, [time for _, time in truth])
    found = search(table(True), SCORES, [f"latency={limit / 1e6:.6f}ms"], kappa=0.0, model=model(True))
    assert law_ns(chosen(found), ADDITIVE) <= 1.005 * limit
    assert found.predicted["loss"] <= min(loss for loss, time in truth if time <= 0.995 * limit) + 1e-12
    assert found.predicted["loss"] >= min(loss for loss, time in truth if time <= 1.005 * limit) - 1e-12


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_boundaries_do_not_lead_it_far_from_the_optimum_of_the_law(share: float) -> None:
    truth = [(SCORES.total(c.variants, c.widths), law_ns(c, LAW)) for c in everything()]
    limit = between(share, [time for _, time in truth])
    found = search(table(), SCORES, [f"latency={limit / 1e6:.6f}ms"], kappa=0.0, model=model())
    assert law_ns(chosen(found), LAW) <= 1.05 * limit
    assert found.predicted["loss"] <= min(loss for loss, time in truth if time <= 0.95 * limit) + 1e-12


def test_what_no_width_meets_is_infeasible_and_names_the_least() -> None:
    with pytest.raises(Infeasible) as caught:
        search(table(), SCORES, ["macs=1%"], model=model())
    assert caught.value.least["macs"] == NETWORK.narrow({"conv0": 8, "conv1": 8, "conv2": 8}).macs


@pytest.mark.parametrize("options", [{}, {"axes": ["precision"]}, {"keep": ["conv2"]}])
def test_a_front_holds_the_widths_of_each_point(options: dict[str, Any]) -> None:
    found = front(table(), SCORES, points=5, model=model(), **options)
    assert found.groups == tuple(NETWORK.channels)
    for point in found.best():
        widths = dict(zip(found.groups, point.widths, strict=True))
        variants = {u: Variant.parse(v) for u, v in zip(found.units, point.variants, strict=True)}
        assert point.loss == pytest.approx(SCORES.total(variants, widths))
        assert point.latency_ns == pytest.approx(model().predict(variants, widths).time_ns, abs=20)
        assert point.size_bytes == network_bytes(NETWORK.narrow(widths), variants) + 500
        if options:
            assert widths["conv2"] == 16


@pytest.mark.parametrize("minimize", ["latency", "size", "macs", "memory"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_cost_is_minimised_within_a_bound_on_the_loss(minimize: str, share: float, tmp_path: Path) -> None:
    """Over all (variants, widths): the least cost whose loss is within the bound, then the least loss; the file says so."""
    at = model()
    all_losses = [SCORES.total(c.variants, c.widths) for c in everything()]
    limit = between(share, all_losses)
    found = search(table(), SCORES, [f"loss={limit!r}", "size=95%"], minimize=minimize, kappa=0.0, model=at)
    cost: dict[str, Callable[[Candidate], float]] = {
        "latency": lambda c: at.predict(c.variants, c.widths).time_ns,
        "size": lambda c: network_bytes(narrow(c), c.variants) + 500,
        "macs": lambda c: narrow(c).macs,
        "memory": memory,
    }
    allowed = [
        (cost[minimize](c), loss)
        for c, loss in zip(everything(), all_losses, strict=True)
        if loss <= limit and cost["size"](c) <= int(0.95 * table().header.dense_file_bytes)
    ]
    assert found.predicted["loss"] <= limit
    assert cost[minimize](chosen(found)) == pytest.approx(min(allowed)[0], rel=1e-12 if minimize != "latency" else 1e-4)
    if minimize != "latency":  # whose nanoseconds are rounded unit by unit
        assert found.predicted["loss"] == pytest.approx(min(allowed)[1], rel=1e-9)
    assert (found.solver["minimized"], found.solver["status"]) == (minimize, "optimal")
    found.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json") == found
    data = {**found.to_json(), "budgets": [{"text": f"loss={limit!r}", "column": "loss", "limit": limit / 2}]}
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(InvalidInput, match="limit"):
        Allocation.load(tmp_path / "a.json")


def test_a_latency_bound_keeps_its_reserve_whatever_is_minimised() -> None:
    at = model()
    for minimize in ("size", "loss"):
        spread = []
        for kappa in (0.0, 2.0):
            found = search(table(), SCORES, ["latency=70%", "loss=3"], minimize=minimize, kappa=kappa, model=at)
            assert found.predicted["latency_ns"] + kappa * found.predicted["sigma_ns"] <= 0.7 * table().dense_ns + 1
            spread.append(found.predicted["size_bytes" if minimize == "size" else "loss"])
        assert spread[0] <= spread[1]


def test_a_conflict_is_told_without_a_word_on_what_was_not_in_the_way() -> None:
    """Nothing on the dense network, nor shares of what is met: each alone could be met."""
    with pytest.raises(Infeasible, match=r"latency=\S+ and loss=0.5 conflict \(the least latency within loss=0.5 is") as caught:
        search(table(), SCORES, ["latency=30%", "loss=0.5", "macs=100%"], kappa=0.0, model=model())
    said = str(caught.value)
    assert "than the dense network" not in said
    assert "the least loss is 0" in said
    assert "macs=100" not in said.partition("the least as shares")[2]
    found = search(table(), SCORES, ["latency=30%", f"loss={1.001 * caught.value.least['loss']}"], kappa=0.0, model=model())
    assert found.predicted["loss"] == pytest.approx(caught.value.least["loss"], rel=1e-9)


def test_what_cannot_be_minimised_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'power' cannot be minimised; expected one of latency"):
        search(table(), SCORES, ["size=50%"], minimize="power")


@pytest.mark.parametrize(("budget", "differ"), [("latency=60%", 1), ("latency=60%", 3), ("size=100%", 2)])
def test_near_optimal_answers_differ(budget: str, differ: int) -> None:
    """The first is the answer of `search`; each next one is the least loss of all that differ enough from those before."""
    at = model()
    best = search(table(), SCORES, [budget], kappa=0.0, model=at)
    answers = search_diverse(table(), SCORES, [budget], 4, differ=differ, kappa=0.0, model=at)
    assert (answers[0].variants, answers[0].widths) == (best.variants, best.widths)
    limit = best.budgets[0]["limit"]
    column = budget.partition("=")[0]

    def within(c: Candidate) -> bool:
        time_ns, size = at.predict(c.variants, c.widths).time_ns, network_bytes(narrow(c), c.variants) + 500
        return (time_ns if column == "latency" else size) <= limit

    def other(a: Candidate, b: Candidate) -> int:
        return sum(
            a.variants[u.name] != b.variants[u.name] or any(a.widths[g] != b.widths[g] for g in u.groups) for u in NETWORK.units
        )

    known = [chosen(best)]
    for answer in answers[1:]:
        of = chosen(answer)
        assert within(of)
        assert all(other(of, k) >= differ for k in known)
        least = min(
            SCORES.total(c.variants, c.widths) for c in everything() if within(c) and all(other(c, k) >= differ for k in known)
        )
        assert answer.predicted["loss"] == pytest.approx(least, rel=1e-9)
        known.append(of)
    with pytest.raises(InvalidInput, match="1 to 4 units"):
        search_diverse(table(), SCORES, [budget], 2, differ=5)


def test_answers_that_no_more_meet_the_budgets_are_left_out() -> None:
    least = min(narrow(c).macs for c in everything())
    tight = search_diverse(table(), SCORES, [f"macs={least}MAC"], 9, differ=4, model=model())
    assert 1 <= len(tight) < 9


def test_a_front_over_two_costs_is_the_search_under_each_pair() -> None:
    found = front(table(), SCORES, over=["latency", "size"], points=3, model=model())
    assert found.swept == ("latency", "size")
    assert len(found.points) == 9
    for p in found.best():
        limits = [f"latency={round(p.budget)}ns", f"size={round(p.budget_beside)}B"]
        assert search(table(), SCORES, limits, kappa=0.0, model=model()).predicted["loss"] == pytest.approx(p.loss, rel=1e-9)
    for over in ([], ["energy"], ["latency", "size", "memory"]):
        with pytest.raises(InvalidInput, match="one or two of latency, size, memory"):
            front(table(), SCORES, over=over, model=model())


def test_what_cannot_keep_the_whole_reserve_keeps_as_much_as_can_be() -> None:
    """Not the fastest of all, whose loss is far higher."""
    at, limit = model(), 0.7 * table().dense_ns
    fastest = search(table(), SCORES, ["latency=70%"], minimize="latency", kappa=0.0, model=at).predicted
    free = search(table(), SCORES, ["latency=70%"], kappa=0.0, model=at).predicted
    kappa = 1.2 * (limit - fastest["latency_ns"]) / fastest["sigma_ns"]  # more than even the fastest can keep
    found = search(table(), SCORES, ["latency=70%"], kappa=kappa, model=at).predicted
    assert found["latency_ns"] + kappa * found["sigma_ns"] > limit
    assert found["latency_ns"] + kappa / 4 * found["sigma_ns"] <= limit + 1
    assert fastest["latency_ns"] < found["latency_ns"] <= free["latency_ns"]
    assert free["loss"] <= found["loss"] < fastest["loss"]


def test_the_programs_of_a_search_share_the_time_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is given half of what is left, and never less than the least, so that large networks do not wait for many limits."""
    now, given, real = [0.0], list[float](), module.solve

    def solve(problem: Any, *, minimize: str, time_limit_s: float) -> Any:
        given.append(time_limit_s)
        now[0] += time_limit_s  # as where it takes all of it
        return real(problem, minimize=minimize)

    monkeypatch.setattr(module, "solve", solve)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    at = model()
    limit = between(0.3, [at.predict(c.variants, c.widths).time_ns for c in everything()])
    search(table(), SCORES, [f"latency={limit / 1e6:.6f}ms"], kappa=1e6, model=at)
    assert len(given) > 3
    assert given[:2] == [module.TIME_LIMIT_S / 2, module.LEAST_S]
    assert set(given[2:]) == {module.LEAST_S}


def test_what_is_rounded_of_a_linear_program_agrees_with_the_widths_of_its_groups() -> None:
    """Whatever the fractions are; so that a first answer is there before branch and bound has found one."""
    problem = make_space(table(), SCORES, model(), columns=["latency"]).problem
    polytope, random = Polytope(problem, ["latency"]), np.random.default_rng(0)
    apart = 0
    for _ in range(50):
        x = random.random(polytope.count)
        assert problem.consistent(polytope.rounded(x))
        apart += not problem.consistent(polytope.decode(x))
    assert apart > 25
