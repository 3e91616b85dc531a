"""Are the tests worth their name? Deliberate bugs, each of which a test has to notice.

    python tests/mutants.py [--list] [--only NAME]...

A mutant is one change of one file. It is made in a copy of packages and tests in a temporary folder, and the tests that
ought to notice it run there. Exit code 1: a mutant survived, or the tests fail without one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parents[1]
PACKAGES = ("dynatree_core", "dynatree_policies")
COPIED = (*PACKAGES, "tests", "pyproject.toml")
OPERATORS = ROOT / "dynatree_core" / "ops" / "native"
TIME_LIMIT = 300  # seconds for the tests of one mutant, which need a few


@attrs.frozen
class Mutant:
    """One deliberate bug."""

    name: str
    old: str  # stands once in all files, wherever that is
    new: str
    tests: tuple[str, ...]  # what ought to notice it

    def file(self, root: Path = ROOT) -> Path:
        """The file that has the old text, relative to the folder.

        Raises:
            ValueError: no file has it, or it stands there more than once.
        """
        found = {path: text.count(self.old) for path, text in _sources(root) if self.old in text}
        if sum(found.values()) != 1:
            raise ValueError(
                f"mutant '{self.name}': its old text must stand once in the packages, got it in "
                f"{', '.join(f'{path} ({count})' for path, count in found.items()) or 'no file'}; adapt the table"
            )
        return next(iter(found))

    def source(self, root: Path = ROOT) -> str:
        """The file with the bug in it."""
        return (root / self.file(root)).read_text(encoding="utf-8").replace(self.old, self.new)


@functools.cache
def _sources(root: Path) -> list[tuple[Path, str]]:
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.[pch]*"))]
    files = [path for path in files if path.suffix in (".py", ".c", ".h")]
    return [(path.relative_to(root), path.read_text(encoding="utf-8")) for path in files]


TREE = "tests/test_tree.py::test_growth_keeps_the_invariants"
FLATTEN = "tests/test_flatten.py::test_flatten"
LEVEL = "tests/test_flatten.py::test_flatten_level"
CACHE = "tests/test_cache.py::test_commit_moves_only_the_path"
WALK = "tests/test_verify.py::test_equals_a_walk"
LOSSLESS = "tests/test_lossless.py::test_every_length_and_every_stop"
STOPPING = "tests/test_settings.py::test_stopping_anywhere_in_a_path"
PROCESSORS = "tests/test_settings.py::test_processors_see_each_node_with_its_own_path"
PADDING = "tests/test_settings.py::test_padded_prompts"
CHAT = "tests/test_prefix_cache.py::test_turns_of_a_conversation"
ANOTHER_WAY = "tests/test_prefix_cache.py::test_a_prompt_that_goes_another_way"
SINKS = "tests/test_sink_cache.py::test_every_family_follows_the_definition[llama]"
SINK_TREES = "tests/test_sink_cache.py::test_a_text_beyond_the_models_context"
DRAFTS = "tests/test_drafters.py::test_model_proposals_are_those_of_a_plain_pass_over_the_path"
RECORDED_STEPS = "tests/test_recorded.py::test_replayed_steps_do_what_steps_do_that_are_launched"
RECORDED = "tests/test_captured.py::test_any_passes_are_the_plain_ones"

OPERATOR = "tests/test_triton.py::test_interpreted_kernels[operator]"
# noticed where Triton is installed; elsewhere the tests are skipped
TRITON_MUTANTS = (
    Mutant(
        "a kernel's blocks of inputs are others for one row",
        "        blocks = _blocks(matrix)\n",
        "        blocks = _blocks(matrix)\n        if num_rows == 1:\n            blocks['BLOCK_K'] = 16\n",
        (OPERATOR,),
    ),
    Mutant(
        "a kernel visits a row's own slots from the last to the first",
        "tl.load(own + first_own + place - num_run, mask",
        "tl.load(own + first_own + num_seen - 1 - place, mask",
        (OPERATOR,),
    ),
    Mutant(
        "a kernel turns keys as if the other number of a pair were not normed",
        "            y = _weighed(y, mean, inverse, head, other,",
        "            y += 0 * _weighed(y, mean, inverse, head, other,",
        (OPERATOR,),
    ),
    Mutant(
        "a kernel writes behind the end of the cache",
        "& (dim < head_dim)[None, :] & is_slot",
        "& (dim < head_dim)[None, :]",
        (OPERATOR,),
    ),
)
if importlib.util.find_spec("triton") is None:
    TRITON_MUTANTS = ()

MUTANTS = (
    # mask
    Mutant(
        "a node does not see itself",
        "torch.eye(num_nodes, dtype=torch.bool, device=device)",
        "torch.zeros(num_nodes, num_nodes, dtype=torch.bool, device=device)",
        (TREE,),
    ),
    Mutant(
        "a tree that grows twice grows over itself",
        "self.num_used == tree.num_nodes\n            and ",
        "",
        ("tests/test_tree.py::test_a_tree_may_grow_in_two_ways",),
    ),
    Mutant(
        "rows that stand in their new place are overwritten first",
        "rows if num_rows <= source - target else rows.clone()",
        "rows.flip(2)",
        ("tests/test_cache.py::test_neighbours_that_move_together_keep_their_order",),
    ),
    Mutant(
        "siblings see each other",
        "torch.index_select(room.mask[:, :old], 0, parent, out=room.mask[level, :old])",
        "torch.index_select(room.mask[:, :old], 0, parent, out=room.mask[level, :old])\n"
        "        room.mask[level, level] = parent[:, None] == parent",
        (TREE,),
    ),
    Mutant(
        "padding of a padded tree may be accepted",
        "        return self._packed[5]",
        "        return self._packed[4]",
        ("tests/test_padded.py::test_padding_is_not_accepted",),
    ),
    Mutant(
        "padded levels forget the budget",
        "is_chosen &= space.places[: is_chosen.numel()] < nodes_left(wanted.tree, wanted.max_nodes)",
        "nodes_left(wanted.tree, wanted.max_nodes)",
        ("tests/test_padded.py::test_a_stack_drafts_the_trees_that_it_drafts_without_padding",),
    ),
    Mutant(
        "a kernel that writes other levels than torch is believed",
        "    if is_same:\n        return write\n",
        "    if is_same or why:\n        return write\n",
        ("tests/test_padded.py::test_a_kernel_that_writes_other_levels_than_torch_is_told_and_not_used",),
    ),
    Mutant(
        "policies whose answers depend on padding are believed",
        "    difference = rehearsal.difference(keep)\n",
        "    difference = None\n",
        ("tests/test_padded.py::test_policies_whose_answers_depend_on_padding_are_told_and_go_without",),
    ),
    Mutant(
        "padding rows are seen",
        "visible[lane, nodes:, prefix_len + nodes : prefix_len + rows].diagonal().fill_(True)",
        "visible[lane, :, prefix_len + nodes : prefix_len + rows] = True",
        (FLATTEN,),
    ),
    Mutant(
        "a drafted node sees its whole level",
        "_behind_prefix(tree.ancestor_mask[first:, 1:], prefix_len)[None]",
        "_behind_prefix(\n"
        "            tree.ancestor_mask[first:, 1:] | (tree.depth[1:] == tree.max_depth), prefix_len\n"
        "        )[None]",
        (LEVEL, DRAFTS),
    ),
    Mutant(
        "the window counts slots",
        "distance = flat.position_ids[:, :, None] - flat.slot_positions[:, None, :]\n            visible",
        "slots = torch.arange(visible.shape[-1], device=visible.device)\n"
        "            distance = (slots[-visible.shape[1] :, None] - slots)[None]\n            visible",
        ("tests/test_architectures.py::test_one_tree_pass_equals_a_pass_per_path[mistral-None]",),
    ),
    # positions
    Mutant(
        "positions count slots",
        "position_ids[lane, :nodes] = tree.depth + prefix_len",
        "position_ids[lane, :nodes] = torch.arange(nodes, device=device) + prefix_len",
        (FLATTEN,),
    ),
    Mutant(
        "the drafter's positions are one too high",
        "torch.full((rows,), tree.max_depth + prefix_len - 1, device=tree.device)",
        "torch.full((rows,), tree.max_depth + prefix_len, device=tree.device)",
        (LEVEL, DRAFTS),
    ),
    Mutant(
        "padding is text",
        "return self.given_ids[self.num_padding :]",
        "return self.given_ids",
        (PADDING,),
    ),
    # commit
    Mutant(
        "a commit takes the row before",
        "rows = block[:, :, source : source + num_rows]",
        "rows = block[:, :, source - 1 : source - 1 + num_rows]",
        (CACHE,),
    ),
    Mutant(
        "a commit gathers keys only",
        "for shelf in self._shelves:\n",
        "for shelf in (shelf[::2] for shelf in self._shelves):\n",
        ("tests/test_cache.py::TestCacheMachine",),
    ),
    Mutant(
        "a commit leaves the lengths",
        "self.lengths = [length + len(path) for length, path in zip(self.lengths, paths, strict=True)]",
        "pass",
        (CACHE,),
    ),
    Mutant(
        "a rollback keeps the block",
        "self._block_lens = [0] * len(self._block_lens)",
        "pass",
        (CACHE,),
    ),
    Mutant(
        "a commit forgets the last accepted node",
        "[[0, *verdict.path[:num_cached]]]",
        "[[0, *verdict.path[: num_cached - 1]]]",
        (LOSSLESS,),
    ),
    Mutant(
        "the drafter keeps what was rejected",
        "[node - 1 for node in draft_path if node <= self.cache.block_len]",
        "list(range(self.cache.block_len))",
        (DRAFTS,),
    ),
    Mutant(
        "a pruned tree forgets where it was drafted",
        "self.draft_index[index] if self.is_cut else index)",
        "torch.arange(index.numel(), device=self.device))",
        ("tests/test_tree.py::test_pruning_keeps_the_invariants",),
    ),
    Mutant(
        "a step is recorded after the cache",
        "    lane.sequence.record(report)\n    lane.cache.commit([[0, *verdict.path[:num_cached]]])\n",
        "    lane.cache.commit([[0, *verdict.path[:num_cached]]])\n    lane.sequence.record(report)\n",
        ("tests/test_faults.py::test_interrupt[commit, after]",),
    ),
    Mutant(
        "a layer is added key by key",
        "self._places, self.keys, self.values = [*self._places, places], [*self.keys, keys], [*self.values, values]",
        "self.keys.append(keys)\n        self.values.append(values)",
        ("tests/test_cache.py::test_an_allocation_that_fails_adds_no_layer",),
    ),
    Mutant(
        "a lane is cut that others decode in",
        "        elif self.block_len > 0:\n            raise CacheError(",
        "        elif self.block_len > self.capacity:\n            raise CacheError(",
        ("tests/test_cache.py::TestCacheMachine",),
    ),
    Mutant(
        "rows are loaded into the first lane",
        "buffer[lane, :, :length] = rows[0, :, :length]",
        "buffer[0, :, :length] = rows[0, :, :length]",
        ("tests/test_cache.py::test_rows_are_loaded_into_the_lane_that_was_named",),
    ),
    # prefix cache
    Mutant(
        "rows beyond the common prefix are taken",
        "cache.load(best.keys, best.values, num_common)",
        "num_common = min(text.numel(), best.token_ids.numel())\n"
        "        cache.load(best.keys, best.values, num_common)",
        (ANOTHER_WAY,),
    ),
    Mutant(
        "common tokens behind a difference count",
        "(some[:num] == others[:num]).cumprod(0).sum()",
        "(some[:num] == others[:num]).sum()",
        (CHAT,),
    ),
    Mutant(
        "the text is kept by the session's own buffer",
        'token_ids[: cache.length].to("cpu", copy=True)',
        "token_ids[: cache.length].cpu()",
        ("tests/test_prefix_cache.py::test_a_text_is_kept_once", CHAT),
    ),
    Mutant(
        "rows are kept where they are",
        "return tuple(states.clone(memory_format=torch.contiguous_format) for states in rows)",
        "return tuple(rows)",
        ("tests/test_prefix_cache.py::test_no_two_sessions_share_buffers",),
    ),
    Mutant(
        "any model's rows will do",  # what a model is now differs from that of any other, so both have to go
        "if entry.model() is model and entry.made_as == way",
        "if entry.model() is not None",
        ("tests/test_prefix_cache.py::test_models_are_told_apart",),
    ),
    Mutant(
        "rows of another precision will do",
        "if entry.model() is model and entry.made_as == way",
        "if entry.model() is model",
        ("tests/test_prefix_cache.py::test_a_model_that_was_changed_in_place",),
    ),
    Mutant(
        "rows at other positions will do",
        "return self.positions is None and not self.is_fixed_width",
        "return not self.is_fixed_width",
        ("tests/test_prefix_cache.py::test_rows_that_a_plain_prefill_would_not_make",),
    ),
    Mutant(
        "the bound is exceeded by what comes last",
        "sum(entry.num_bytes for entry in entries) + num_bytes > most",
        "sum(entry.num_bytes for entry in entries) > most",
        (CHAT, "tests/test_prefix_cache.py::test_the_least_recently_used_text_goes"),
    ),
    Mutant(
        "use does not count as use",
        "self._entries = [*(entry for entry in self._entries if entry is not best), best]",
        "pass",
        ("tests/test_prefix_cache.py::test_the_least_recently_used_text_goes",),
    ),
    # sinks and window
    Mutant(
        "sinks stand one place too near",
        "turns = places + (self.next_place - self.option.num_tokens + 1)",
        "turns = places + (self.next_place - self.option.num_tokens + 2)",
        (SINKS,),
    ),
    Mutant(
        "a row sees the sinks of the rows above it too",
        "(flat.position_ids - self.next_place)[:, :, None] == owners",
        "(flat.position_ids - self.next_place)[:, :, None] >= owners",
        (SINKS,),
    ),
    Mutant(
        "a window of one token more",
        "window = (flat.visible & (distance < self.option.window))[:, :, first:]",
        "window = (flat.visible & (distance <= self.option.window))[:, :, first:]",
        (SINKS,),
    ),
    Mutant(
        "the window moves without its keys being turned",
        "keys[:, :, target] = _turned(keys[:, :, source], cos[0], -sin[0])",
        "keys[:, :, target] = keys[:, :, source].clone()",
        (SINKS,),
    ),
    Mutant(
        "a turn scales the keys once more",
        "return cos[0, :, None] / scaling, sin[0, :, None] / scaling",
        "return cos[0, :, None], sin[0, :, None]",
        ("tests/test_sink_cache.py::test_every_rotary_scaling[yarn]",),
    ),
    Mutant(
        "a tree crosses the point where the window is turned back",
        "min(self.sequence.limits.max_depth, self.sequence.num_tokens_left - 1, self.cache.max_places - 1)",
        "min(self.sequence.limits.max_depth, self.sequence.num_tokens_left - 1)",
        (f"{SINK_TREES}[llama-option1]",),
    ),
    Mutant(
        "a cache that was being turned back is taken as it is",
        "self._sinks, self._num_turned_back, self._rows.lengths = [], 0, [self._front]\n        end",
        "self._sinks, self._num_turned_back, self._rows.lengths = then\n        end",
        ("tests/test_sink_cache.py::test_a_turn_that_is_broken_off_is_done_again",),
    ),
    Mutant(
        "a drafter of a bounded cache follows tokens that it has skipped",
        "            self.cache.truncate(0)\n            self.num_skipped",
        "            self.num_skipped",
        (f"{SINK_TREES}[gpt_neox-option0]",),
    ),
    # verification
    Mutant(
        "the bonus token is the root's",
        "chosen.append(choose(child, chosen))",
        "chosen.append(choose(0, chosen))",
        (WALK,),
    ),
    Mutant(
        "a node is accepted whose parent is another one",
        "        child = children.get((child, chosen[-1]))\n",
        "        below = [one for (_, token), one in children.items() if token == chosen[-1] and one > child]\n"
        "        child = min(below, default=None)\n",
        (WALK,),
    ),
    Mutant(
        "float64 logits are not rounded",
        "        logits = logits.float()\n    if type(logits)",
        "        pass\n    if type(logits)",
        ("tests/test_verify.py::test_ties_are_broken_as_generate_does",),
    ),
    Mutant(
        "processors do not see the last token",
        "text = lane.sequence.text_with(before)",
        "text = lane.sequence.text_with(before[:-1])",
        (PROCESSORS,),
    ),
    Mutant(
        "processors act on the root only",
        "scores = lane.request.logits_processors(text, own_logits)",
        "scores = own_logits if before else lane.request.logits_processors(text, own_logits)",
        (PROCESSORS,),
    ),
    Mutant(
        "a token of a broken step is chosen anew",
        "        if len(before) == len(choices):\n",
        "        del choices[len(before) :]\n        if len(before) == len(choices):\n",
        ("tests/test_faults.py::test_a_callers_own_processor_or_criterion[criterion]",),
    ),
    Mutant(
        "what a broken step chose beyond the next one's tree is lost",
        "self.pending.behind(len(report.token_ids)),",
        "Pending(),",
        ("tests/test_sampling.py::test_a_session_that_goes_on_with_shallower_trees_draws_the_same",),
    ),
    Mutant(
        "padding is penalised",
        "RepetitionPenaltyLogitsProcessor(config.repetition_penalty, num_padding or None)",
        "RepetitionPenaltyLogitsProcessor(config.repetition_penalty)",
        ("tests/test_settings.py::test_padding_is_not_penalised",),
    ),
    # stopping
    Mutant(
        "a token too many after a stop",
        "return Verdict(verdict.path[:end], verdict.draft_path[:end], verdict.token_ids[:end], reason)",
        "return Verdict(verdict.path[:end], verdict.draft_path[:end], verdict.token_ids[: end + 1], reason)",
        (LOSSLESS,),
    ),
    Mutant(
        "an end token within a path is passed over",
        "if reason is not None:\n            return Verdict(verdict.path[:end]",
        "if reason and end == len(verdict.token_ids):\n            return Verdict(verdict.path[:end]",
        (LOSSLESS,),
    ),
    Mutant(
        "a token more than max_new_tokens",
        "if len(token_ids) >= self.num_tokens_left:",
        "if len(token_ids) > self.num_tokens_left:",
        (LOSSLESS, STOPPING),
    ),
    Mutant(
        "trees deeper than what is left",
        "min(self.sequence.limits.max_depth, self.sequence.num_tokens_left - 1, self.cache.max_places - 1)",
        "min(self.sequence.limits.max_depth, self.cache.max_places - 1)",
        ("tests/test_lossless.py::test_the_end_of_the_context",),
    ),
    Mutant(
        "criteria are asked once a step",
        "        if self.request.stopping_criteria:\n",
        "        if self.request.stopping_criteria and len(token_ids) == 1:\n",
        (STOPPING,),
    ),
    # trees that pay
    Mutant(
        "the governor goes on losing",
        "return is_known and self.account >= self._expected_loss()",
        "return is_known",
        ("tests/test_governor.py::test_a_useless_drafter_loses_no_more_than_the_bound",),
    ),
    Mutant(
        "the governor is asked last",
        "@hookimpl(tryfirst=True)",
        "@hookimpl",
        ("tests/test_governor.py::test_it_is_asked_before_a_policy_that_looks_at_the_drafter",),
    ),
    Mutant(
        "best first expands too little",
        "rivals.topk(min(self.nodes, rivals.numel()))",
        "rivals.topk(min(self.nodes // 2 + 1, rivals.numel()))",
        ("tests/test_tree_policies.py::test_best_first_verifies_the_best_of_all_paths",),
    ),
    Mutant(
        "every rank is planned as the first",
        "for p in reversed(self.acceptance):",
        "for p in [self.acceptance[0]] * len(self.acceptance):",
        ("tests/test_tree_policies.py::test_sequoia_reproduces_published_trees",),
    ),
    Mutant(
        "rejected nodes judge their children",
        "judged = is_accepted[tree.parent[1:]]",
        "judged = torch.ones_like(is_accepted[1:])",
        ("tests/test_acceptance.py::test_only_children_of_accepted_nodes_are_judged",),
    ),
    Mutant(
        "seconds are worth nothing",
        "(gained * per_node[:, None] - np.float32(rate) * seconds).max(axis=0)",
        "(gained * per_node[:, None] - 0 * seconds).max(axis=0)",
        ("tests/test_cost_aware.py::test_a_child_is_worth_its_row",),
    ),
    Mutant(
        "levels of a free drafter are free",
        "return (0.0 if is_free else costs.drafter_level_seconds(width)) + of_host",
        "return 0.0 if is_free else costs.drafter_level_seconds(width)",
        ("tests/test_cost_aware.py::test_a_level_is_not_free_where_the_drafter_is",),
    ),
    Mutant(
        "what a model loses keeps copied text from being drafted",
        "if not pays and may_pay and self.free_account >= 0:",
        "if not pays and may_pay and min(self.account, self.free_account) >= 0:",
        ("tests/test_free_looks.py::test_a_model_that_has_lost_its_account_does_not_stop_free_looks",),
    ),
    Mutant(
        "noise is drafted whatever it has lost",
        "frontier.depth >= min(self.max_depth, self.depth_limit) or max(self.account, self.free_account) < 0",
        "frontier.depth >= min(self.max_depth, self.depth_limit)",
        ("tests/test_cost_aware.py::test_what_drafting_may_lose_is_bounded",),
    ),
    Mutant(
        "changes of weights that nobody counts are overlooked",
        "return place, version, _sample(tensor) if is_read else None",
        "return place, version, None",
        ("tests/test_packed.py::test_changed_weights_are_noticed",),
    ),
    Mutant(
        "loading a student draws random numbers",
        'with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):',
        "if True:",
        ("tests/test_student.py::test_loading_draws_no_random_numbers",),
    ),
    Mutant(
        "reports hold their session",
        "verdict,\n        measure=lane.measure_costs,",
        "verdict,\n        measure=lambda: lane.measure_costs(),",
        ("tests/test_session.py::test_a_session_goes_without_the_garbage_collector",),
    ),
    Mutant(
        "an observer is told the last reason",
        "sorted(Outcome, reverse=True)",
        "sorted(Outcome)",
        ("tests/test_observer.py::test_what_is_told_is_what_happened",),
    ),
    Mutant(
        "an observer's error is the policy's fault",
        'if self.request.on_error == "raise" or self.is_observers(error):',
        'if self.request.on_error == "raise":',
        ("tests/test_observer.py::test_an_observers_own_error_of_our_classes_is_nobody_elses_fault",),
    ),
    Mutant(
        "an observer's time counts",
        "        with self._clock.leave_out():\n            for observer",
        "        if True:\n            for observer",
        ("tests/test_observer.py::test_times",),
    ),
    Mutant(
        "old costs are believed",
        "return not before / STALE_FACTOR <= seconds <= before * STALE_FACTOR",
        "return False",
        ("tests/test_costs.py::test_measurements_are_kept",),
    ),
    Mutant(
        "measuring costs is part of an iteration",
        "self._left_out += self._now() - begin",
        "pass",
        ("tests/test_costs.py::test_the_time_of_a_measurement_counts_nowhere",),
    ),
    Mutant(
        "changed weights stay packed, and graphs recorded, as they were",
        "if name not in kept or kept[name][0] != state:",
        "if name not in kept:",
        (
            "tests/test_packed.py::test_changed_weights_are_noticed",
            "tests/test_captured.py::test_a_generation_that_gets_a_cache_replays_its_graphs",
        ),
    ),
    Mutant(
        "packed layers know no autocast",
        'if rows.dtype != self.product.packed.dtype or torch.is_autocast_enabled("cpu"):',
        "if rows.dtype != self.product.packed.dtype:",
        ("tests/test_packed.py::test_autocast_is_obeyed",),
    ),
    Mutant(
        "attention is renamed for families that branch on its name",
        'if twin.config._attn_implementation == "sdpa" and twin._supports_attention_backend:',
        'if twin.config._attn_implementation == "sdpa":',
        ("tests/test_packed.py::test_a_packed_pass_is_the_plain_pass_up_to_rounding",),
    ),
    Mutant(
        "GPT-2's matrices are packed as they lie",
        "layer.weight.t() if type(layer) is Conv1D else layer.weight for",
        "layer.weight for",
        ("tests/test_packed.py::test_a_packed_pass_is_the_plain_pass_up_to_rounding",),
    ),
    Mutant(
        "a product is taken for that of any rows",
        "if last is None or last[0] is not rows:",
        "if last is None:",
        ("tests/test_packed.py::test_each_layer_of_a_product_gets_its_own_rows",),
    ),
    Mutant(
        "threads may see each other's product",
        "return last[1][layer]",
        "return (self._last or last)[1][layer]",
        ("tests/test_packed.py::test_threads_share_a_product",),
    ),
    Mutant(
        "layers that are not alike are one product",
        "all(map(_is_packable, layers)) and len(set(map(_kind, layers))) == 1",
        "all(map(_is_packable, layers))",
        ("tests/test_packed.py::test_only_layers_alike_are_one_product",),
    ),
    Mutant(
        "packing changes the model itself",
        "return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # its memo is shared",
        "return model",
        ("tests/test_packed.py::test_the_model_is_shared_and_not_changed",),
    ),
    Mutant(
        "models with hooks are packed",
        "if any(not is_fine(hook) for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())):",
        "if False:",
        ("tests/test_packed.py::test_what_auto_chooses",),
    ),
    Mutant(
        "rows that see each other's numbers are not found",
        "moved = max(_off(tree, other) for other in others)",
        "moved = 0.0",
        ("tests/test_row_probe.py::test_rows_that_depend_on_others_are_refused",),
    ),
    Mutant(
        "rows that depend on their place are not found",
        "if not (deviation := _off(stepwise, logits)) <= bound:",
        "if not (deviation := _off(stepwise, logits)) <= 1e9:",
        ("tests/test_row_probe.py::test_rows_that_depend_on_others_are_refused",),
    ),
    Mutant(
        "a model that was probed is never probed again",
        "if state in known:\n            return known[state]",
        "if known:\n            return next(iter(known.values()))",
        ("tests/test_row_probe.py::test_a_model_is_asked_once_for_each_state",),
    ),
    Mutant(
        "what has come to stand at an address counts as what was there",
        "self._held: object = weakref.ref(thing)",
        "self._held: object = (weakref.ref(thing), id(thing))[1]",
        ("tests/test_model_state.py::test_what_comes_to_stand_at_an_address_is_another_thing",),
    ),
    Mutant(
        "replaced functions of classes are not looked at",
        "if isinstance(function, _FUNCTIONS) and is_others(function):",
        "if False:",
        ("tests/test_row_probe.py::test_functions_that_were_replaced_are_found",),
    ),
    Mutant(
        "kept rows cross adapters",
        "return device, model.dtype, dtype, state_of(model, reads_weights=False, reads_code=not is_drafter)",
        "return device, model.dtype, dtype, model.config._attn_implementation",
        ("tests/test_model_state.py::test_kept_rows_do_not_cross_a_change",),
    ),
    Mutant(
        "rows of two adapters are kept as those of one",
        "if _way_of(model, is_drafter) == self._ways[cache]:",
        "if True:",
        ("tests/test_model_state.py::test_rows_of_a_generation_that_saw_two_adapters_are_not_kept",),
    ),
    Mutant(
        "a generation method of one's own is bypassed",
        "method = None if is_trusted else _own_method(model_inside(plain) or plain, _GENERATION_METHODS)",
        "method = None",
        ("tests/test_wrappers.py::test_a_method_of_a_class_of_ones_own_is_refused",),
    ),
    Mutant(
        "a decoder that was told to look ahead is taken",
        'if not getattr(config, "is_causal", True):',
        "if False:",
        ("tests/test_architectures.py::test_a_model_that_was_told_to_look_ahead_is_refused",),
    ),
    Mutant(
        "a part with a configuration of its own is taken",
        'if role == "target" and not reason:',
        'if role == "drafter" and not reason:',
        ("tests/test_architectures.py::test_a_part_with_a_configuration_that_says_something_else_is_refused",),
    ),
    Mutant(
        "files are read with parameters that the model does not have",
        "    _check_parameters(found, config, family)\n",
        "",
        ("tests/test_stored.py::test_files_with_other_parameters_than_the_model_has_are_left_to_transformers",),
    ),
    Mutant(
        "angles are those of the configuration, whatever the model computes with",
        'name if _begins_anew(module, kind) else f"{prefix}inv_freq"',
        "name",
        ("tests/test_native.py::test_angles_are_those_that_the_model_computes_with",),
    ),
    Mutant(
        "tokens are drafted that the target cannot read",
        "DraftPlan(\n                self.num_known_ids,",
        "DraftPlan(\n                self.vocab_size,",
        ("tests/test_drafters.py::test_no_token_is_drafted_that_the_target_cannot_read",),
    ),
    Mutant(
        "a caller's cache gets the rows that it holds again",
        "cache.update(*(_padded(rows, num_padding)[:, :, num_held:] for rows in (layer_keys, layer_values)), index)",
        "cache.update(*(_padded(rows, num_padding) for rows in (layer_keys, layer_values)), index)",
        ("tests/test_transformers_cache.py::test_a_text_goes_on_from_a_cache",),
    ),
    Mutant(
        "every row of a batch draws the first row's numbers",
        "generator=self._generator)[self._row]",
        "generator=self._generator)[0]",
        ("tests/test_hf_rows.py::test_several_answers_to_one_prompt",),
    ),
    Mutant(
        "what a processor has written into the text is lost",
        "if end > self._num_shown:",
        "self._num_shown = min(self._num_shown, self.num_committed)\n        if end > self._num_shown:",
        ("tests/test_hf.py::test_a_processor_that_writes_into_the_text",),
    ),
    Mutant(
        "a streamer that generate() keeps to itself gets nothing",
        "if frame.f_code is _GENERATE and",
        "if False and",
        ("tests/test_hf.py::test_a_streamer_given_to_generate_itself",),
    ),
    Mutant(
        "buffers of a cache belong to inference mode",
        "with torch.inference_mode(False):  # so that passes in and outside of that mode may write into it\n"
        "            buffer = ",
        "if True:\n            buffer = ",
        ("tests/test_model_state.py::test_weights_that_inference_mode_cannot_use",),
    ),
    Mutant(
        "nodes of a level that was skipped are never forwarded",
        "self._asked(flatten_level(tree, self.cache.length, self.cache.block_len))",
        "self._asked(flatten_level(tree, self.cache.length))",
        ("tests/test_drafters.py::test_a_model_may_be_asked_about_some_levels_only",),
    ),
    Mutant(
        "a model catches up at the root only",
        "is_behind = self.cache.length < followed.numel()",
        "is_behind = tree.max_depth == 0",
        ("tests/test_drafters.py::test_a_model_that_was_left_out_says_what_a_new_one_says",),
    ),
    Mutant(
        "what a model catches up on is not committed",
        "            self.cache.commit([range(self.cache.block_len)])\n",
        "",
        ("tests/test_drafters.py::test_a_model_that_was_left_out_says_what_a_new_one_says",),
    ),
    Mutant(
        "recorded passes write where they were recorded",
        "torch.clamp(self._order + start, max=start + rows - 1, out=self._written)",
        "self._written = torch.clamp(self._order + start, max=start + rows - 1)",
        (RECORDED,),
    ),
    Mutant(
        "padding rows of recorded passes write behind the block",
        "torch.clamp(self._order + start, max=start + rows - 1, out=self._written)",
        "torch.add(self._order, start, out=self._written)",
        ("tests/test_captured.py::test_the_last_slot_can_be_filled",),
    ),
    Mutant(
        "what an earlier pass saw stays in a recorded mask",
        "own.visible[:, :, slots:] = False",
        "pass",
        ("tests/test_captured.py::test_a_cache_that_was_cut_shows_no_more_than_it_has",),
    ),
    Mutant(
        "a recorded pass returns the buffer of all replays",
        "PassOutput(logits.clone(), None if output.hidden is None",
        "PassOutput(logits, None if output.hidden is None",
        ("tests/test_captured.py::test_logits_stay_when_the_next_pass_comes",),
    ),
    Mutant(
        "a recorded pass keeps the positions of a prompt",
        "if own.model_positions is not None and flat.model_positions is not None:",
        "if False:",
        ("tests/test_captured.py::test_positions_of_a_prompt_are_an_input_of_the_graph",),
    ),
    Mutant(
        "a replay is believed whatever it says",
        "if not off <= TOLERANCE[cache.keys[0].dtype]:",
        "if False:",
        ("tests/test_captured.py::test_rows_that_do_not_arrive_are_noticed",),
    ),
    Mutant(
        "a recorded pass is shown what an earlier text has left",
        "                self._is_zeroed = self._is_always_zeroed\n",
        "                pass\n",
        ("tests/test_captured.py::test_what_a_text_has_left_is_not_shown_to_the_next_one",),
    ),
    Mutant(
        "each generation's drafter has a cache of its own",
        "self.cache = plan.new_cache(runner, self.num_slots, self)",
        "self.cache = runner.new_cache(self.num_slots)",
        ("tests/test_captured.py::test_a_generation_records_few_passes_and_the_next_one_none",),
    ),
    Mutant(
        "a replayed tree stays in the memory of its graph",
        "packed=self._packed.clone(),",
        "packed=self._packed,",
        (RECORDED_STEPS,),
    ),
    Mutant(
        "a parameter that moves stays in a graph as it was",
        "number.fill_(parameters[policy][name])",
        "number.fill_(0.5)",
        (f"{RECORDED_STEPS}[phase3]",),
    ),
    Mutant(
        "a recorded step is believed whatever it says",
        "if not off <= TOLERANCE[lane.cache.keys[0].dtype]:",
        "if False:",
        ("tests/test_recorded.py::test_a_target_pass_that_comes_out_otherwise_is_not_replayed",),
    ),
    Mutant(
        "a recorded step is deeper than the text is long",
        "recorded is None or lane.depth_limit < recorded.rows.max_depth:",
        "recorded is None:",
        (RECORDED_STEPS,),
    ),
    Mutant(
        "a drafter forgets that a replay has followed the text",
        "        self.num_settled = self.cache.length - 1  # as in `proposing`\n        self.cache.append(num_rows)",
        "        self.num_settled = self.cache.length - 1  # as in `proposing`",
        ("tests/test_recorded.py::test_a_parameter_that_moves_needs_no_new_graph",),
    ),
    Mutant(
        "folded heads stand in the order of rows",
        "folded_rows = query.reshape(lanes, key.shape[1], group * rows, head_dim)",
        "folded_rows = query.transpose(1, 2).reshape(lanes, key.shape[1], group * rows, head_dim)",
        ("tests/test_folded.py::test_grouped_heads_are_rows",),
    ),
    Mutant(
        "folded attention is used whatever it says",
        "if not off <= TOLERANCE[own._dtype]:",
        "if False:",
        ("tests/test_folded.py::test_an_attention_that_says_something_else_is_noticed_and_not_used",),
    ),
    Mutant(
        "the bias of folded attention has rows that torch has to copy",
        "-(-slots // BIAS_ALIGNMENT) * BIAS_ALIGNMENT",
        "slots",
        ("tests/test_folded.py::test_a_bias_is_as_the_kernel_wants_it",),
    ),
    Mutant(
        "a ragged pass gives every sequence the first one's rows",
        "return list(torch.split_with_sizes(rows, self.num_rows, dim=1))",
        "return [rows[:, :num_rows] for num_rows in self.num_rows]",
        ("tests/test_together.py::test_rows_of_several_sequences_say_what_they_say_alone[llama]",),
    ),
    Mutant(
        "padding rows are stored",
        "cache.update(key_states[lane : lane + 1, :, :rows], value_states[lane : lane + 1, :, :rows], layer_idx)",
        "cache.update(key_states[lane : lane + 1], value_states[lane : lane + 1], layer_idx)",
        ("tests/test_together.py::test_rows_of_several_sequences_say_what_they_say_alone[llama]",),
    ),
    Mutant(
        "in a ragged pass a shorter sequence's rows see what they may not",
        "own_mask = mask[..., : lane.keys.shape[2]]",
        "own_mask = mask[..., : lane.keys.shape[2]] | True",
        ("tests/test_together.py::test_rows_of_several_sequences_say_what_they_say_alone[llama]",),
    ),
    Mutant(
        "rows of a shared pass that failed stay",
        "            one.cache.cut_block(rows)\n",
        "            pass\n",
        ("tests/test_together.py::test_a_pass_that_fails_is_computed_for_each_by_itself",),
    ),
    Mutant(
        "passes of one shape are shared",
        "can_be_shared=not lane.request.is_fixed_width",
        "can_be_shared=True",
        ("tests/test_batches.py::test_passes_of_one_shape_are_not_shared",),
    ),
    Mutant(
        "a fault of one sequence is everybody's",
        "            self.errors[lane] = error\n",
        "            raise\n",
        ("tests/test_batches.py::test_what_fails_ends_its_own_sequence_only",),
    ),
    Mutant(
        "numbers of several sequences are handed out in the wrong order",
        "left = iter(torch.cat([*there.values()]).tolist())",
        "left = iter(torch.cat([*there.values()][::-1]).tolist())",
        ("tests/test_batches.py::test_a_batch_gives_what_each_prompt_gives_alone",),
    ),
    Mutant(
        "policies that promise nothing are shown trees of the host beside a GPU",
        "or not request.stack.can_draft_on_host:",
        ":",
        ("tests/test_device_work.py::test_trees_grow_where_they_are_read",),
    ),
    Mutant(
        "the text that trees of the host grow behind stays as it was",
        "            self._tree_ids[self.num_committed :][: len(token_ids)] = torch.tensor(token_ids)\n",
        "            pass\n",
        ("tests/test_device_work.py::test_a_policy_that_reads_grows_the_trees_of_a_cpu",),
    ),
    Mutant(
        "a cancelled sequence keeps its lane",
        "        running = [running for running in self._running if running.handle in cancelled]\n",
        "        running: list[_Running] = []\n",
        ("tests/test_batches.py::test_a_cancelled_sequence_is_gone_and_the_others_do_not_notice",),
    ),
    Mutant(
        "the memory of a sequence that is done is not given back",
        "        self.engine.take_back(self.cache)\n",
        "",
        ("tests/test_batches.py::test_a_cancelled_sequence_is_gone_and_the_others_do_not_notice",),
    ),
    Mutant(
        "the waiting line has no end",
        "if len(requests) > num_free:",
        "if False:",
        ("tests/test_batches.py::test_requests_wait_in_their_order_and_the_line_has_an_end",),
    ),
    Mutant(
        "the last in the line is the first",
        "handle = self._waiting[0]",
        "handle = self._waiting[-1]",
        ("tests/test_batches.py::test_requests_wait_in_their_order_and_the_line_has_an_end",),
    ),
    Mutant(
        "a long prompt is filled in at once",
        "while one.chunks is not None and num_left > 0:",
        "while one.chunks is not None:",
        ("tests/test_batches.py::test_a_long_prompt_does_not_stop_the_others",),
    ),
    Mutant(
        "sequences share processors that remember their calls",
        "found[name] = copy.deepcopy(found[name])",
        "found[name] = list(found[name])",
        ("tests/test_batches.py::test_processors_for_all_prompts_are_copied_for_each",),
    ),
    Mutant(
        "every sequence draws from torch's generator",
        "if not request.do_sample or request.seed is not None:",
        "if True:",
        ("tests/test_batches.py::test_sampling_without_a_seed_is_as_if_each_had_its_own",),
    ),
    Mutant(
        "the last reports are lost where another thread ends a sequence",
        "            if is_done:\n                break",
        "            if self._done.is_set():\n                break",
        ("tests/test_threads.py::test_reports_are_all_there_when_another_thread_makes_the_last_steps",),
    ),
    Mutant(
        "who is cancelled when a step has looked for the last time goes on",
        "        finally:\n            self._drop_between_steps(engine)",
        "        finally:\n            pass",
        ("tests/test_threads.py::test_who_is_cancelled_at_any_moment_of_a_step_has_ended_when_it_is_over",),
    ),
    Mutant(
        "a client is counted until its request has ended in the server",
        'if message["type"] == "http.response.body" and not message.get("more_body", False):\n            end()',
        "if False:\n            end()",
        ("tests/test_serve_limits.py::test_a_client_may_ask_again_as_soon_as_it_has_its_answer",),
    ),
    Mutant(
        "after Ctrl-C sequences go on with what the step has left",
        "            for one in ready.values():\n                one.chunks = filled(one.lane)\n            raise",
        "            raise",
        ("tests/test_batches.py::test_ctrl_c_within_a_step_leaves_an_engine_that_goes_on",),
    ),
    Mutant(
        "a logit that is NaN is the greatest number",
        "tokens[np.isnan(rows[np.arange(len(rows)), tokens])] = NOT_A_NUMBER",
        "pass",
        ("tests/test_verify.py::test_nan_is_an_error",),
    ),
    Mutant(
        "a tree's time counts for its own sequence only",
        "shared + max(num_sequences * (of_rows[rows + own] - shared), of_rows[num_sequences * own] - alike)",
        "of_rows[rows + own]",
        ("tests/test_load.py::test_each_second_that_a_tree_adds_counts_for_every_sequence",),
    ),
    Mutant(
        "rows that others had last make rows cheap for all",
        "shared + max(num_sequences * (of_rows[rows + own] - shared), of_rows[num_sequences * own] - alike)",
        "shared + num_sequences * (of_rows[rows + own] - shared)",
        ("tests/test_load.py::test_all_together_draft_no_more_than_pays",),
    ),
    Mutant(
        "a sequence that is put back begins anew",
        "self._take_place(is_drafting=self._was_drafting)",
        "self.sequence = Sequence(self.request, self.device, self.device)\n        self._take_place()",
        ("tests/test_batches.py::test_who_is_put_back_when_memory_is_short_goes_on_later_as_if_nothing_had_been",),
    ),
    Mutant(
        "memory has no bound",
        "while (needed := self._num_bytes_needed(engine, events)) > engine.max_bytes and len(self._running) > 1:",
        "needed = 0\n        while False:",
        ("tests/test_batches.py::test_who_is_put_back_when_memory_is_short_goes_on_later_as_if_nothing_had_been",),
    ),
    Mutant(
        "a cache that grows loses its rows",
        "            larger[..., : self.length, :] = shelf[..., : self.length, :]\n",
        "            pass\n",
        ("tests/test_batches.py::test_who_is_put_back_when_memory_is_short_goes_on_later_as_if_nothing_had_been",),
    ),
    Mutant(
        "a sequence that does not ask is followed beside one that does",
        "for lane, tree in self._undecided.items() if lane.is_likely_to_ask}",
        "for lane, tree in self._undecided.items()}",
        ("tests/test_following.py::test_a_sequence_that_does_not_ask_has_no_rows_in_the_passes_of_those_that_do",),
    ),
    Mutant(
        "catching up with a text has no price",
        "return self.drafter_level_seconds(num_tokens + 1) - self.drafter_level_seconds(1)",
        "return 0.0",
        ("tests/test_following.py::test_the_price_of_a_look_has_that_of_catching_up_in_it",),
    ),
    Mutant(
        "following is priced as a level",
        "if self.drafter_follow_seconds is not None:",
        "if False:",
        ("tests/test_free_looks.py::test_following_is_priced_by_what_was_measured",),
    ),
    Mutant(
        "no look of a union is known to be free",
        "return self._heard[2] < LITTLE",
        "return False",
        ("tests/test_free_looks.py::test_what_is_said_before_the_look_is_what_the_look_says",),
    ),
    Mutant(
        "a model is tried ever again where rows are dear",
        "less = _less_won(frontier) if self.has_looked else 0.0",
        "less = 0.0",
        ("tests/test_load.py::test_a_model_is_tried_once_where_a_usual_chain_is_not_worth_its_rows",),
    ),
    Mutant(
        "what free looks win is believed of the model",
        "won = mass * (self.look_value - less)",
        "won = mass * (self.free_look_value - less)",
        ("tests/test_free_looks.py::test_what_free_looks_win_says_nothing_about_the_model",),
    ),
    Mutant(
        "a tree that may grow by free looks only has a prompt read",
        "return self._may_look(frontier)",
        "return frontier.depth > 0 or self._may_look(frontier)",
        ("tests/test_free_looks.py::test_a_governor_lets_a_tree_grow_where_looks_are_free_and_no_further",),
    ),
    Mutant(
        "a tree that fails takes what was followed along",
        "self.num_settled = self.cache.length - 1  # whatever",
        "self.num_settled = self.cache.length  # whatever",
        ("tests/test_drafters.py::test_a_model_that_was_left_out_says_what_a_new_one_says",),
    ),
    Mutant(
        "a governor has any prompt read",
        "<= LOAN * step * frontier.num_tokens_left",
        "<= 1e9 * step * frontier.num_tokens_left",
        ("tests/test_following.py::test_a_governor_does_not_have_a_prompt_read_for_a_short_text",),
    ),
    Mutant(
        "a governor waits for ever beside sequences that always draft",
        "return self.num_since_plain >= PATIENCE + (self.refresh if is_known else 0)",
        "return False",
        ("tests/test_following.py::test_a_governor_beside_sequences_that_always_draft_is_not_starved",),
    ),
    Mutant(
        "old slots of a cache that grows do not count",
        "return sum(one.num_bytes for one in self._running) + moving",
        "return sum(one.num_bytes for one in self._running)",
        ("tests/test_budget.py::test_old_slots_stand_beside_new_ones_for_a_moment",),
    ),
    Mutant(
        "caches of drafters do not count",
        "sizes.append((self.draft_state.num_bytes(), self.draft_state.num_bytes(self.committed_ids.numel())))",
        "sizes.append((0, 0))",
        ("tests/test_budget.py::test_no_more_is_taken_up_at_any_moment",),
    ),
    Mutant(
        "kept prefixes do not make room",
        "            engine.prefix_cache.shrink(num_bytes)",
        "            engine.prefix_cache.shrink(2**60)",
        ("tests/test_budget.py::test_kept_prefixes_make_room_before_anybody_has_to_wait",),
    ),
    Mutant(
        "rows beyond what two texts have in common are copied",
        "return _num_common(self.token_ids[: self.cache.length], token_ids)",
        "return min(self.cache.length, token_ids.numel())",
        ("tests/test_prefix_cache.py::test_a_sequence_that_starts_copies_rows_of_one_that_runs",),
    ),
    Mutant(
        "rows of a batch draw from one generator",
        "                session.sampler.apart(began)\n",
        "                session.sampler.apart(began) if row == 0 else None\n",
        ("tests/test_hf_rows.py::test_several_answers_to_one_prompt",),
    ),
    Mutant(
        "only who asks first gets proposals",
        "for lane, tree in self._undecided.items() if lane.is_likely_to_ask}",
        "for lane, tree in [*self._undecided.items()][:1]}",
        ("tests/test_batches.py::test_a_level_of_all_trees_is_one_pass",),
    ),
    Mutant(
        "several rows take their inputs from the last to the first",
        "      EACH_BLOCK w[b] = plain_weights(form, block[b], i);\n      ADD_INPUT(i)\n",
        "      const int64_t place = num_rows > 1 ? inputs - 1 - i : i;\n"
        "      EACH_BLOCK w[b] = plain_weights(form, block[b], place);\n      ADD_INPUT(place)\n",
        ("tests/test_ops_native.py::test_a_product_is_right_and_no_row_knows_its_neighbours",),
    ),
    Mutant(
        "several rows in 8 bits add what stands beside the codes first",
        "      sum = add16(sum, mul16(floats_of(whole[r]), mul16(scales.scale, all16(row->scale))));\n"
        "      if (form == NIBBLES) sum = add16(sum, mul16(scales.least, all16(row->sum)));\n",
        "      const f16x first = mul16(floats_of(whole[r]), mul16(scales.scale, all16(row->scale)));\n"
        "      const f16x second = mul16(scales.least, all16(row->sum));\n"
        "      sum = add16(add16(sum, num_rows > 1 ? second : first), num_rows > 1 ? first : second);\n",
        ("tests/test_ops_native.py::test_rows_in_8_bits_have_the_references_bits_whatever_stands_beside_them",),
    ),
    Mutant(
        "a row in 8 bits loses its NaN",
        "  if (sizes[0] >= 0x7f800000) sizes[0] = 0x7fc00000;\n",
        "  if (sizes[0] >= 0x7f800000) sizes[0] = 0;\n",
        ("tests/test_ops_native.py::test_what_is_not_finite_makes_no_number_of_its_row_and_of_no_other",),
    ),
    Mutant(
        "blocks of a tile have the scales of the first",
        "w[b] = next_weights(form, &scales[b], ",
        "w[b] = next_weights(form, &scales[0], ",
        ("tests/test_ops_native.py::test_weights_are_decoded_to_the_last_bit",),
    ),
    Mutant(
        "a row visits its own slots from the last to the first",
        "s->own[place - s->run]",
        "s->own[s->num - 1 - place]",
        ("tests/test_ops_native.py::test_attention_depends_on_a_rows_text_alone",),
    ),
    Mutant(
        "what a part of a row adds up to is not made smaller where another has a greater number",
        "add_exp16(sum, sub16(load16(most + i), all), load16(sums + i))",
        "add_exp16(sum, all16(0.0f), load16(sums + i))",
        ("tests/test_ops_native.py::test_totals",),
    ),
    Mutant(
        "experts of several rows are added from the last to the first",
        "  for (int64_t e = 0; e < outputs && !failed; e++) {\n",
        "  for (int64_t n = 0; n < outputs && !failed; n++) {\n    const int64_t e = rows > 1 ? outputs - 1 - n : n;\n",
        ("tests/test_ops_native.py::test_a_mixture_is_right_and_no_row_knows_its_neighbours",),
    ),
    Mutant(
        "of equal shares the higher number is taken",
        "shares[e] > shares[best]",
        "shares[e] >= shares[best]",
        ("tests/test_ops_native.py::test_of_equal_shares_the_lower_number_is_taken",),
    ),
    Mutant(
        "weights of experts add up in every family",
        "adds_up=family.adds_up is None or bool(getattr(config, family.adds_up)),",
        "adds_up=True,",
        ("tests/test_native.py::test_a_mixtures_settings_are_followed",),
    ),
    Mutant(
        "lanes that are no longer there are still written to",
        "        self.table[lanes:] = 0\n",
        "",
        ("tests/test_ops_native.py::test_lanes_of_several_caches_count_on",),
    ),
    Mutant(
        "spans have texts that nobody asked for",
        "        if self.has_texts:\n",
        "        if True:\n",
        ("tests/test_serve_spans.py::test_no_text_stands_in_a_span",),
    ),
    Mutant(
        "a client's trace is not gone on with",
        "            propagate.extract(Headers(scope=scope), getter=_HeaderGetter()),\n",
        "            None,\n",
        ("tests/test_serve_spans.py::test_a_request_has_one_span_with_times_and_figures",),
    ),
    Mutant(
        "processes that share a model are not compared",
        "    if any(not torch.equal(own, other) for other in found):\n",
        "    if False:\n",
        ("tests/test_placement.py::test_processes_that_share_a_model_have_the_tokens_of_generate",),
    ),
    Mutant(
        "an offloaded model is where its first weight is",
        "    return next(iter(_hooked_devices(model)), device) if device == META else device\n",
        "    return device\n",
        ("tests/test_placement.py::test_an_offloaded_target_has_the_tokens_of_generate",),
    ),
    Mutant(
        "weights that nothing brings are taken",
        "    if lost:\n",
        "    if False:\n",
        ("tests/test_placement.py::test_weights_without_values_are_refused",),
    ),
    Mutant(
        "a connection on which nothing comes stays",
        "        elif self._waiting is None:\n",
        "        elif False:\n",
        ("tests/test_serve_bounds.py::test_a_connection_on_which_no_request_comes_is_closed",),
    ),
    Mutant(
        "the rest of an answered request keeps its connection",
        "        is_answering = self.cycle is not None and not self.cycle.response_complete\n",
        "        is_answering = self.cycle is not None\n",
        ("tests/test_serve_bounds.py::test_the_rest_of_a_body_that_nobody_reads_keeps_no_connection",),
    ),
    Mutant(
        "a stranger's name is the server's own",
        "        if not self._keys and not is_own_host(host, self._hosts):\n",
        "        if False:\n",
        ("tests/test_serve_bounds.py::test_a_page_of_somebody_else_cannot_ask_through_a_name_of_theirs",),
    ),
    Mutant(
        "a client that does not read keeps its connection",
        "        if self.transport.get_write_buffer_size() <= num_before - LEAST_BYTES:\n",
        "        if True:\n",
        ("tests/test_serve_bounds.py::test_who_does_not_read_is_closed",),
    ),
    Mutant(
        "a client that reads slowly is closed",
        "        if self.transport.get_write_buffer_size() <= num_before - LEAST_BYTES:\n",
        "        if False:\n",
        ("tests/test_serve_bounds.py::test_who_reads_slowly_is_not",),
    ),
    Mutant(
        "a little that nobody reads keeps its connection",
        "            transport.set_write_buffer_limits(high=1)\n",
        "            pass\n",
        ("tests/test_serve_bounds.py::test_the_last_bytes_that_nobody_reads_keep_no_connection",),
    ),
    Mutant(
        "a body is taken for JSON whatever it says",
        """        raise ApiError(415, message, code="not_json")\n""",
        "        del message\n",
        ("tests/test_serve_bounds.py::test_a_body_must_say_that_it_is_json",),
    ),
    Mutant(
        "a stream may have any number of log-probabilities",
        "        if body.num_logprobs is not None:\n            refuse_large",
        "        if body.num_logprobs is not None and not body.stream:\n            refuse_large",
        ("tests/test_serve_bounds.py::test_an_answer_has_so_many_log_probabilities",),
    ),
    Mutant(
        "an empty list watches",
        '"observer": watching or None}',
        '"observer": watching}',
        ("tests/test_serve_bounds.py::test_an_answer_that_nobody_watches_has_no_observer",),
    ),
    Mutant(
        "trees wait without bound",
        "deque(maxlen=MOST_WAITING)",
        "deque(maxlen=10**9)",
        ("tests/test_serve_trees.py::test_who_is_late_gets_the_latest_and_is_told_how_many_were_dropped",),
    ),
    Mutant(
        "a collector is waited for",
        "        sending.join(SHUTDOWN_SECONDS)\n",
        "        sending.join(90)\n",
        ("tests/test_serve_spans.py::test_a_collector_that_does_not_answer_is_not_waited_for",),
    ),
    *TRITON_MUTANTS,
)


@contextlib.contextmanager
def copy_of_the_project() -> Iterator[Path]:
    """A temporary folder with packages and tests."""
    with tempfile.TemporaryDirectory(prefix="dynatree-mutants-") as folder:
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder)
        yield Path(folder)


def run_there(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy, with the copy's packages."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may be as long as the code, and made in the same second
        "DYNATREE_HYPOTHESIS_PROFILE": "mutants",
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )


def check_the_copy_is_what_is_imported(folder: Path) -> None:
    for package in ("dynatree_core", "dynatree_policies"):
        found = run_there(folder, "-c", f"import {package}; print({package}.__file__)").stdout.strip()
        if not Path(found).resolve().is_relative_to(folder.resolve()):
            raise SystemExit(f"{package} must be imported from {folder}, got {found!r}")


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit code, and the first test that failed or pytest's last words."""
    done = run_there(folder, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *tests)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if failed is None:
        return done.returncode, (done.stdout + done.stderr).strip()[-300:]
    # tensors that a mutant shares may make torch abort when the process ends, after the report of what has failed
    return 1 if done.returncode < 0 else done.returncode, failed[1]


def compile_operators(folder: Path, changed: Path) -> None:
    """Compile the copy's operators where one of their sources was changed."""
    if changed.suffix in (".c", ".h"):
        done = run_there(folder, "-m", "dynatree_core.ops.native")
        if done.returncode:
            raise SystemExit(f"the changed operators must compile, but the compiler said: {done.stderr[-500:]}")


def outcome(folder: Path, mutant: Mutant) -> tuple[bool, str]:
    """Whether a test noticed the mutant, and which one."""
    path = folder / mutant.file(folder)
    before = path.read_text(encoding="utf-8")
    path.write_text(mutant.source(folder), encoding="utf-8")
    try:
        compile_operators(folder, path)
        code, said = run_tests(folder, mutant.tests)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {TIME_LIMIT} s"
    finally:
        path.write_text(before, encoding="utf-8")
        for library in OPERATORS.glob("*.so"):
            shutil.copy(library, folder / library.relative_to(ROOT))
    return code == 1, said if code == 1 else f"pytest ended with {code}: {said}"  # 1: tests ran, and some failed


@click.command()
@click.option("--list", "only_list", is_flag=True, help="Show the mutants and run nothing.")
@click.option("--only", multiple=True, metavar="NAME", help="Run this mutant; may be repeated.")
def main(only_list: bool, only: tuple[str, ...]) -> None:
    """Run the tests against deliberate bugs."""
    unknown = set(only) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise click.UsageError(f"there is no mutant {', '.join(map(repr, sorted(unknown)))}; --list shows them")
    mutants = [mutant for mutant in MUTANTS if not only or mutant.name in only]
    for mutant in mutants:
        mutant.source()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if only_list:
        table = Table("mutant", "file", "tests")
        for mutant in mutants:
            table.add_row(mutant.name, str(mutant.file()), escape("\n".join(mutant.tests)))
        console.print(table)
        return

    table, num_survivors, start = Table("mutant", "caught", "by", "seconds"), 0, time.monotonic()
    with copy_of_the_project() as folder:
        check_the_copy_is_what_is_imported(folder)
        code, said = run_tests(folder, tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests)))
        if code != 0:
            raise SystemExit(f"the tests must pass without a mutant, but pytest ended with {code}: {said}")
        for mutant in mutants:
            begin = time.monotonic()
            is_caught, said = outcome(folder, mutant)
            num_survivors += not is_caught
            table.add_row(mutant.name, "yes" if is_caught else "NO", escape(said), f"{time.monotonic() - begin:.0f}")
            console.print(f"{mutant.name}: {'caught' if is_caught else 'NOT CAUGHT'}", highlight=False)
    console.print(table)
    console.print(f"{len(mutants) - num_survivors} of {len(mutants)} caught in {time.monotonic() - start:.0f} s")
    sys.exit(num_survivors > 0)


if __name__ == "__main__":
    main()
