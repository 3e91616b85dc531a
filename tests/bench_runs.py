"""Runs of tiny models, for the tests of measuring."""

from __future__ import annotations

from dynatree_bench.run.experiments import EXPERIMENTS, chosen_methods
from dynatree_bench.run.measure import Options, run_experiment
from dynatree_bench.run.pairs import Pair
from dynatree_core import LoadedModel
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.testing.models import perturbed, tiny_model

SMALL = Options(quick=True, num_prompts=3, max_new_tokens=[6])
PLAIN = {"autoregressive", "autoregressive eager", "autoregressive sinks", "autoregressive fixed width"}
OURS = {
    method.name
    for experiment in EXPERIMENTS.values()
    for method in chosen_methods(experiment)
    if method.kind == "dynatree"
}
LONG = {"max_position_embeddings": 2048}  # room for sinks and a window


class IdleMeter:
    """A machine on which nothing else runs, whatever does."""

    def share(self):
        return 0.0


def tiny_pair():
    return Pair(LoadedModel(tiny_model("llama", **LONG), None, "tiny"), ModelDrafter(perturbed("llama")))


def run(name, pair, out, options=SMALL, **settings):
    usual = {"idle_check_seconds": 0, "with_bandwidth": False, "meter": IdleMeter}
    return run_experiment(name, pair, out, options, **usual | settings)


def by_method(results):
    return {method.name: [r for r in results.records if r.method == method.name] for method in results.info.methods}
