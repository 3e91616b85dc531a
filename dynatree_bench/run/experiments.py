"""What each experiment measures: its methods, its axes, and its sizes in the quick and in the full form.

Tables and nothing else; `measure.py` runs them. The full sizes are the published ones where there are any.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from dynatree_core.errors import InputError, nearest_match


@attrs.frozen
class Method:
    """A way to generate.

    A policy may be a template such as "fixed(depth={base_depth})": it is then measured at every point of the
    experiment's that has these axes, and any other method once.
    """

    name: str
    kind: str = "dynatree"  # or "hf", "rival"
    policy: str | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)  # of `generate`: ours, or for the kind "hf" transformers'
    reference: str = "autoregressive"  # the method that its tokens are compared with
    drafter: str | None = None  # by name, where several are asked for; None: the pair's
    is_bitwise: bool = False  # cached keys and values are compared too

    @property
    def is_drafting(self) -> bool:
        """Whether it is ours and drafts."""
        return self.kind == "dynatree" and self.policy != "autoregressive"

    @property
    def axes(self) -> set[str]:
        """The axes that the policy's template names."""
        return {field for _, field, _, _ in string.Formatter().parse(self.policy or "") if field is not None}


@attrs.frozen
class Cell:
    """One output to be made of a prompt: a method at a point of the axes."""

    method: Method
    axes: Mapping[str, Any]

    @property
    def policy(self) -> str:
        """The stack's string at this point."""
        return (self.method.policy or "").format(**self.axes)

    @property
    def max_new_tokens(self) -> int:
        return int(self.axes["max_new_tokens"])


@attrs.frozen
class Form:
    """The sizes of an experiment."""

    workloads: tuple[str, ...]
    num_prompts: int | None  # of each workload; None: all
    max_new_tokens: tuple[int, ...]
    points: tuple[Mapping[str, Any], ...] = ({},)
    prompt_tokens: tuple[int | None, ...] = (None,)  # lengths to which prompts are cut; None: as they are


@attrs.frozen
class Claim:
    """What a run is to show: stacks with one of these policies reach a speedup on every category of prompts."""

    policies: frozenset[str]
    least: float


@attrs.frozen
class Experiment:
    """A question, and how it is measured."""

    name: str
    question: str
    methods: tuple[Method, ...]
    quick: Form
    full: Form
    drafters: tuple[str, ...] = ()  # unless others are asked for; none: the target's usual one
    dtype: str = "auto"
    claim: Claim | None = None


REFERENCE_AXES = ("dataset", "prompt_tokens", "max_new_tokens")  # what a greedy text depends on, beside its prompt
REFERENCE = Method("autoregressive", policy="autoregressive")
LINEAR = Method("linear", policy="linear(depth=6)")
FIXED = Method("fixed", policy="fixed")
PHASES = tuple(Method(name, policy=name) for name in ("phase1", "phase2", "phase3"))

EAGER = Method("autoregressive eager", policy="autoregressive", options={"runner": "eager"})
# with sinks the text is another one once it is longer than sinks and window
SINKS = tuple(
    Method(f"{policy} sinks", policy=policy, options={"cache": "sinks=4,window=1024"}, reference="autoregressive sinks")
    for policy in ("autoregressive", "phase3")
)

FIXED_WIDTH = tuple(
    Method(f"{policy}{name}", policy=policy, options=options, reference=f"autoregressive{name}", is_bitwise=True)
    for name, options in (("", {}), (" fixed width", {"exact": "fixed_width"}))
    for policy in ("autoregressive", "phase3")
)

WEIGHING = tuple(Method(name, policy=name) for name in ("phase3+governor", "cost_aware"))  # these weigh costs

COMPILED = "hf static compiled"  # only where it is asked for: compiling takes minutes on a CPU
# transformers' own; the names of the options are those of its generation config
HF = (
    Method("hf generate", "hf"),
    Method("hf static", "hf", options={"cache_implementation": "static", "disable_compile": True}),
    Method(COMPILED, "hf", options={"cache_implementation": "static"}),
    *(
        Method(f"hf assisted {name}", "hf", options={"assistant": settings})
        for name, settings in {
            "heuristic": {
                "num_assistant_tokens": 5,
                "num_assistant_tokens_schedule": "heuristic",
                "assistant_confidence_threshold": 0.0,
            },
            "constant": {
                "num_assistant_tokens": 5,
                "num_assistant_tokens_schedule": "constant",
                "assistant_confidence_threshold": 0.0,
            },
            "dynamic": {},  # its defaults: up to 20 tokens, fewer where the drafter is unsure
        }.items()
    ),
    Method("hf prompt lookup", "hf", options={"prompt_lookup_num_tokens": 10}),
)
USELESS = ("noise", "random")  # names of drafters that are never right, see dynatree_bench.run.useless
RIVALS = tuple(Method(name, "rival") for name in ("flashspec", "economize", "dejavuu"))

_THRESHOLDS = tuple(
    {"high": high, "low": low, "min_branch": 1, "max_branch": 3} for high, low in ((0.7, 0.2), (0.8, 0.3))
)
_BRANCHES = tuple(
    {"high": 0.9, "low": 0.4, "min_branch": low, "max_branch": high} for low, high in ((1, 2), (1, 3), (1, 4), (2, 4))
)
_CONFIDENCE = "confidence(high={high},low={low},min_branch={min_branch},max_branch={max_branch})"


def _grid(**axes: Iterable[Any]) -> tuple[Mapping[str, Any], ...]:
    return tuple(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "main",
            "How fast is each method, against autoregressive decoding and against transformers?",
            (
                REFERENCE,
                *(method for method in HF if method.name != COMPILED),
                EAGER,
                LINEAR,
                FIXED,
                *PHASES,
                *SINKS,
                *WEIGHING,
            ),
            quick=Form(("built-in",), 3, (24,)),
            full=Form(("wikitext-2",), 20, (1000,)),
        ),
        Experiment(
            "ablation",
            "What does each phase add, at base depths 4, 5 and 6?",
            (
                REFERENCE,
                Method("fixed", policy="fixed(depth={base_depth})"),
                Method("phase1", policy="fixed(depth={base_depth})+confidence"),
                Method("phase2", policy="confidence+dynamic_depth(base_depth={base_depth})"),
                Method("phase3", policy="confidence+dynamic_depth(base_depth={base_depth})+history"),
            ),
            quick=Form(("built-in",), 3, (16,), _grid(base_depth=(4, 5, 6))),
            full=Form(("wikitext-2",), 20, (500,), _grid(base_depth=(4, 5, 6))),
        ),
        Experiment(
            "sensitivity",
            "How much do the confidence thresholds and the range of branches matter?",
            (REFERENCE, Method("phase3", policy=f"{_CONFIDENCE}+dynamic_depth+history")),
            quick=Form(("built-in",), 3, (24,), (*_THRESHOLDS, *_BRANCHES)),
            full=Form(("wikitext-2",), 20, (500,), (*_THRESHOLDS, *_BRANCHES)),
        ),
        Experiment(
            "scalability",
            "How do speed and acceptance change with the length of the output?",
            (REFERENCE, FIXED, PHASES[-1]),
            quick=Form(("built-in",), 3, (8, 16, 32)),
            full=Form(("wikitext-2",), 20, (100, 200, 300, 500, 750, 1000)),
        ),
        Experiment(
            "tree-search",
            "Which depth, branch factor and threshold suit the fixed tree?",
            (REFERENCE, Method("fixed", policy="fixed(depth={depth},branch={branch},tau={tau})")),
            quick=Form(("built-in",), 3, (16,), _grid(depth=(2, 4, 6), branch=(1, 2, 3), tau=(0.02, 0.1))),
            full=Form(
                ("wikitext-2",),
                10,
                (500,),
                _grid(depth=(3, 4, 5, 6, 7, 8), branch=(1, 2, 3, 4), tau=(0.01, 0.03, 0.05, 0.1)),
            ),
        ),
        Experiment(
            "prompt-length",
            "How does the length of the prompt change speed and acceptance?",
            (REFERENCE, FIXED, PHASES[-1]),
            quick=Form(("built-in:text",), 3, (16,), prompt_tokens=(32, 128, 384)),
            full=Form(("wikitext-2",), 20, (500,), prompt_tokens=(50, 100, 200, 400)),
        ),
        Experiment(
            "datasets",
            "Do the findings hold on another kind of text?",
            (REFERENCE, LINEAR, FIXED, *PHASES),
            quick=Form(("built-in:prose", "built-in:code", "built-in:copying"), 1, (24,)),
            full=Form(("wikitext-2", "pg19"), 20, (500,)),
        ),
        Experiment(
            "smoke",
            "What are trees worth that are drafted without a model, and where does an iteration's time go?",
            (REFERENCE, FIXED, PHASES[-1]),
            quick=Form(("built-in",), 3, (24,)),
            full=Form(("built-in",), None, (64,)),
            drafters=("prompt_lookup",),
        ),
        Experiment(
            "never-slower",
            "Is a policy ever slower than no drafting, with a useless drafter for instance?",
            (
                REFERENCE,
                PHASES[-1],
                *(Method(name, policy=name) for name in ("phase3+governor", "cost_aware", "cost_aware+governor")),
            ),
            quick=Form(("built-in",), 3, (32,)),
            full=Form(("built-in",), None, (128,)),
            drafters=("prompt_lookup", "random", "noise"),
            claim=Claim(frozenset({"governor", "cost_aware"}), 0.97),
        ),
        Experiment(
            "fixed-width",
            'Does exact="fixed_width" make coarse arithmetic equal to autoregressive decoding, and what does it cost?',
            FIXED_WIDTH,
            quick=Form(("built-in",), 3, (16,)),
            full=Form(("built-in",), None, (32,)),
            drafters=("prompt_lookup",),
            dtype="bfloat16",
        ),
    )
}


def chosen_methods(
    experiment: Experiment,
    *,
    policies: Iterable[str] = (),
    only: Iterable[str] = (),
    with_compile: bool = False,
    with_rivals: bool = False,
    drafters: Sequence[str] = (),
) -> tuple[Method, ...]:
    """The methods of an experiment that are to run.

    Args:
        experiment: the experiment.
        policies: stacks to measure in place of the experiment's own; may be templates over its axes.
        only: names of methods to which to keep, foreign ones among them that the experiment does not have;
            autoregressive decoding always runs, and so does what a method's tokens are compared with.
        with_compile: whether to run the compiled static cache too.
        with_rivals: whether to run the rivals too.
        drafters: of several, each drafts for every method that drafts, `only` among these too.

    Raises:
        InputError: a name in `only` that there is not.
    """
    methods = list(experiment.methods)
    if own := [Method(policy, policy=policy) for policy in dict.fromkeys(policies) if policy != REFERENCE.name]:
        methods = [REFERENCE, *(method for method in methods if method.kind != "dynatree"), *own]
    if chosen := list(only):
        methods = list({method.name: method for method in (*methods, *HF, *RIVALS)}.values())
        names = [method.name for method in methods]
        for name in chosen:
            if name not in names:
                raise InputError(
                    f"'{name}' is not among the methods of {experiment.name}{nearest_match(name, names)}; they are: "
                    f"{', '.join(names)}"
                )
        references = {method.reference for method in methods if method.name in chosen}
        kept = [method for method in methods if method.name in {REFERENCE.name, *chosen, *references}]
        return tuple(_with_each(kept, drafters))
    compiled = [method for method in HF if method.name == COMPILED]
    methods = [*methods, *(compiled if with_compile else ()), *(RIVALS if with_rivals else ())]
    return tuple(_with_each(methods, drafters))


def _with_each(methods: Iterable[Method], drafters: Sequence[str]) -> Iterator[Method]:
    """A method that drafts once with each of several drafters, which its name then tells."""
    for method in methods:
        if len(drafters) > 1 and (method.is_drafting or "assistant" in method.options):
            yield from (attrs.evolve(method, name=f"{method.name} with {name}", drafter=name) for name in drafters)
        else:
            yield method


def cells(methods: Iterable[Method], form: Form, base: Mapping[str, Any]) -> Iterator[Cell]:
    """What is to be made of one prompt: every method at every point that it depends on.

    Args:
        methods: the methods.
        form: the sizes, of which lengths and points are used.
        base: axes that all cells have, such as the data set.

    Raises:
        InputError: a policy's template names an axis that the experiment does not have.
    """
    methods = tuple(methods)
    for max_new_tokens in form.max_new_tokens:
        for method in methods:
            seen = set()
            for point in form.points:
                if missing := method.axes - set(point):
                    raise InputError(
                        f"policy '{method.policy}' must have axes of the experiment in its braces "
                        f"({', '.join(point) or 'this one has none'}), got {', '.join(sorted(missing))}"
                    )
                axes = {**base, **(point if method.axes else {}), "max_new_tokens": max_new_tokens}
                if tuple(axes.items()) not in seen:  # a method that depends on no point comes once
                    seen.add(tuple(axes.items()))
                    yield Cell(method, axes)
