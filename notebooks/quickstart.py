# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # hwsearch in a few minutes
#
# You have a trained network, a device and a budget. hwsearch finds, layer by layer, the width and the precision that meet
# the budget at the least loss of accuracy, on *measured* times of *compiled* code, and hands back an ONNX file that really is that
# fast. This notebook goes through every step on this machine's CPU, with OpenVINO on one thread.
#
# A `Task` is what you bring: the model, example inputs, calibration batches and an `evaluate` function. Here it is a
# small residual network on Fashion-MNIST, which ships with the package. (Three calibration batches keep this notebook short.)

# %%
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import hwsearch as hs
from hwsearch.deployment.report import measured_points

task = hs.load("zoo:fashion_resnet")
task = replace(task, calibration=task.calibration[:3])
folder = Path(tempfile.mkdtemp())
print(
    f"{task.name}: {sum(p.numel() for p in task.model.parameters()):,} parameters, accuracy {task.evaluate(task.model):.4f}"
)

# %% [markdown]
# ## 1. Profile the device, once
#
# hwsearch builds the *whole* network many times, each time with other precisions and other numbers of channels, and times
# every build against a reference in turn, because a layer costs something else beside its neighbours than alone. The
# result is a `LatencyTable`. We stop after a minute and a half; the default limit of ten minutes gives numbers that you can rely on.

# %%
table = hs.profile(task, out=folder / "table.parquet", backend="openvino", threads=1, time_limit_s=90)
table.to_frame().round(3)

# %% [markdown]
# Channels that are tied (by residual connections, for instance) form a *channel group*, which can be made narrower as one.
# What a group costs at each width is a staircase, and not a monotone one: only steps that pay are kept (filled circles).

# %%
hs.plot_staircase(table)

# %% [markdown]
# A latency model is fitted on the table. Does it predict builds that it has not seen? The orange diamonds say.

# %%
hs.plot_predictions(table)

# %% [markdown]
# ## 2. How much does each layer suffer?
#
# The loss of a layer in a precision is the divergence between the outputs of the network with and without it, on the
# calibration data. That of a channel group at a width is the same, after the weights that read it were refitted to make
# up for the channels that are gone.

# %%
sensitivity = hs.sensitivity(
    task, out=folder / "sens.parquet", backend="openvino", table=table, weights=folder / "weights"
)
for group, losses in sensitivity.width_loss.items():
    print(
        f"{group:20s}",
        "  ".join(f"{width}: {loss:.2g}" for width, loss in sorted(losses.items(), reverse=True)),
    )
sensitivity.to_frame().query("unit in @sensitivity.loss and not variant.str.startswith('width')").pivot(
    index="unit", columns="variant", values="loss"
).loc[list(sensitivity.loss)]

# %% [markdown]
# ## 3. What can be had: the Pareto front
#
# For each of a dozen latency budgets, the allocation of least loss. The search is exact: under the model, nothing that
# meets the budget has a smaller loss. It needs no further measurement.

# %%
front = hs.front(table, sensitivity, points=12)
hs.plot_front(front)

# %% [markdown]
# ## 4. Search under a budget
#
# A budget may be absolute (`latency=2ms` or `latency=750us`), relative to the dense fp32 network (`latency=18%`) or a speed-up
# (`latency=5x`); add `size=2MB` beside it if you like. As machines differ, we ask here for what a point in the faster half
# of the front takes, with its uncertainty in reserve.

# %%
wanted = front.best()[len(front.best()) // 3]
budget = f"latency={math.ceil((wanted.latency_ns + 2 * wanted.sigma_ns) / 1e3)}us"
allocation = hs.search(table, sensitivity, [budget])
print(budget, allocation.counts(), allocation.widths, allocation.solver, sep="\n")

# %% [markdown]
# Each bar is the predicted time of a layer in the precision chosen for it; outlines show the other choice. Arcs mark the
# boundaries, where int8 meets another precision and a conversion costs time.

# %%
hs.plot_allocation(allocation, table, sensitivity)

# %% [markdown]
# ## 5. Deploy, and see whether it is true
#
# `deploy` writes an ONNX file that runs without hwsearch. `verify` measures it beside the dense network: latency,
# score on the evaluation images, size. Only a measurement can say that a budget is met. (`hs.run` does all of this,
# and searches again with the new measurement where the budget was missed.)

# %%
deployed = hs.deploy(task, allocation, folder / "model.onnx", weights=folder / "weights")
report = hs.verify(task, allocation, table=table, weights=folder / "weights")
print(report)

# %% [markdown]
# The same network in torch, really narrower, is `deployed.module`: a plain `nn.Module` to fine-tune or to look at.

# %%
print(f"{sum(p.numel() for p in deployed.module.parameters()):,} parameters left")

# %% [markdown]
# The measured point, beside the front that was predicted:

# %%
hs.plot_front(front.with_measured(measured_points(report)))

# %% [markdown]
# From here: `hwsearch run zoo:fashion_resnet --budget latency=18% --out result` does the same from the command line;
# `hwsearch --help` lists the rest. To bring your own network, write a function that returns an `hs.Task`.
