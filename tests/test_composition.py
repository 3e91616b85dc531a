"""Stack strings: parsing, printing, and every way to get a name wrong."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynatree_core import PluginSpec, build_drafter, build_stack, format_stack, hookimpl, parse_stack
from dynatree_core.errors import (
    ParameterError,
    PluginConflictError,
    PluginLoadError,
    PolicyError,
    StackSyntaxError,
    UnknownPluginError,
)
from dynatree_core.plugins import registry as registry
from dynatree_core.plugins.presets import expand_preset
from dynatree_core.plugins.registry import load_plugin, plugin_parameters
from dynatree_core.testing import strategies as ours

names = st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,8}", fullmatch=True)
quoted = st.text("\\'\"+()a", max_size=6)  # what may end a string too early
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | quoted
keywords = names.filter(
    lambda name: name not in ("None", "True", "False") and not __import__("keyword").iskeyword(name)
)
specs = st.builds(
    PluginSpec, names, st.none() | names, st.dictionaries(keywords.filter(lambda n: n != "_"), values, max_size=3)
)


@given(st.lists(specs, min_size=1, max_size=4))
def test_what_is_printed_parses_to_the_same(stack):
    text = format_stack(stack)
    assert parse_stack(text) == stack
    assert format_stack(parse_stack(text)) == text


@given(ours.stacks())
def test_a_built_stack_prints_the_string_it_came_from(text):
    assert str(build_stack(text)) == text


def test_spaces_do_not_matter():
    text = " confidence ( high = 0.9 , low=0.4 ) + dynamic_depth : plan+history "
    assert format_stack(parse_stack(text)) == "confidence(high=0.9,low=0.4)+dynamic_depth:plan+history"


@pytest.mark.parametrize(
    "text",
    ["", "+", "fixed+", "+fixed", "fixed++linear", "fixed(", "fixed)", "fixed(depth)", "fixed(4)", "fixed(depth=)",
     "fixed(depth=x)", "fixed(depth=[1])", "fixed(depth=1+1j)", "fixed(depth=1,depth=2)", "fixed(**{})", "3fixed",
     "fixed:", "fixed:a:b", "fixed(depth=4)linear", "fixed(depth=4)(branch=3)",
     "fixed(depth=4).x(branch=3)", "fixed('a'='b')", "fixed linear"],
)  # fmt: skip
def test_malformed_strings(text):
    with pytest.raises(StackSyntaxError):
        parse_stack(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("confidense", "did you mean 'confidence'"),
        ("phase4", "did you mean 'phase3'|did you mean 'phase"),
        ("nonsense", "known are: autoregressive, best_first, confidence"),
        ("fixed:plan", "'fixed' has no variant 'plan'"),
        ("confidence:plane", "did you mean 'plan'"),
        ("phase3:plane", "did you mean 'plan'"),
    ],
)
def test_unknown_names(text, message):
    with pytest.raises(UnknownPluginError, match=message):
        build_stack(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fixed(dept=4)", r"no parameter 'dept' \(did you mean 'depth'\?\); known are: depth, branch, tau, max_nodes"),
        ("autoregressive(x=1)", "known are: none"),
        ("history(recent=3)", "no parameter 'recent'"),
        ("phase3(high=0.9)", r"write out its policies: confidence\+dynamic_depth\+history"),
    ],
)
def test_unknown_parameters(text, message):
    with pytest.raises(ParameterError, match=message):
        build_stack(text)


def test_a_value_that_is_none_is_named_as_it_is_written():
    with pytest.raises(StackSyntaxError, match=r"\(two is not a number, string, True, False or None\)"):
        build_stack("fixed(depth=two)")


def test_a_policy_stands_in_a_stack_once():
    with pytest.raises(StackSyntaxError, match="got 'fixed' twice"):
        build_stack("fixed+confidence+fixed")
    with pytest.raises(StackSyntaxError, match="got 'confidence' twice"):
        build_stack("phase2+confidence")


def test_drafters_by_name():
    assert build_drafter("prompt_lookup(max_ngram=2)").max_ngram == 2
    with pytest.raises(UnknownPluginError, match="did you mean 'prompt_lookup'"):
        build_drafter("prompt_lokup")
    with pytest.raises(ParameterError, match="at least 1, got 0"):
        build_drafter("prompt_lookup(max_matches=0)")
    assert str(build_drafter("prompt_lookup(max_ngram=2)+prompt_lookup")) == "prompt_lookup(max_ngram=2)+prompt_lookup"
    with pytest.raises(ParameterError, match="at least two drafters"):
        build_drafter("union(of='prompt_lookup')")
    with pytest.raises(ParameterError, match=r"'model' needs a value for model, as in 'model\(model=\.\.\.\)'"):
        build_drafter("model")


def test_variants_and_their_overrides():
    policy = build_stack("confidence:plan(high=0.85)").find("confidence")
    assert (policy.high, policy.low, policy.max_branch) == (0.85, 0.3, 4)
    specs = expand_preset(PluginSpec("phase1", "plan"))
    assert format_stack(specs) == "fixed(depth=5)+confidence:plan"


def test_parameters_are_read_from_the_constructor():
    assert plugin_parameters(load_plugin(registry.POLICIES, "fixed")) == {
        "depth": 5, "branch": 2, "tau": 0.05, "max_nodes": 128,
    }  # fmt: skip


class Chatty:
    """A policy object with a name of its own."""

    name = "chatty_one"

    def __init__(self) -> None:
        self.heard = []

    @hookimpl
    def on_iteration_end(self, report) -> None:
        self.heard.append(report)


def test_objects_and_lists():
    mine = Chatty()
    stack = build_stack(["phase2", mine])
    assert list(stack.policies) == ["confidence", "dynamic_depth", "chatty_one"]
    assert str(stack) == "phase2+chatty_one"
    assert stack.find("chatty_one") is not mine  # a copy: sessions share no state
    policy = load_plugin(registry.POLICIES, "fixed")(depth=3)
    assert str(build_stack(policy)) == "fixed(depth=3,branch=2,tau=0.05,max_nodes=128)"
    with pytest.raises(StackSyntaxError, match="empty list"):
        build_stack([])
    with pytest.raises(PolicyError, match="at least one of"):
        build_stack(None)


@pytest.fixture
def installed(monkeypatch):
    """Called with names and objects: they are all that is installed, policies unless a group is named."""

    def install(*plugins: tuple[str, str] | tuple[str, str, str]) -> None:
        entries = [EntryPoint(name, value, *(group or [registry.POLICIES])) for name, value, *group in plugins]
        monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in entries if e.group == group])
        registry.plugin_table.cache_clear()

    yield install
    registry.plugin_table.cache_clear()


def test_two_plugins_of_one_name(installed):
    installed(("fixed", "a.b:C"), ("fixed", "d.e:F"))
    with pytest.raises(PluginConflictError, match=r"'fixed' comes from .*a\.b:C.* and .*d\.e:F"):
        build_stack("fixed")


def test_a_plugin_that_cannot_be_imported(installed):
    installed(("broken", "no_such_module:C"))
    with pytest.raises(PluginLoadError, match=r"'broken' .* cannot be imported \(no_such_module"):
        build_stack("broken")


def test_a_plugin_whose_module_fails(installed, tmp_path, monkeypatch):
    (tmp_path / "divides.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    installed(("broken", "divides:C"))
    with pytest.raises(PluginLoadError, match=r"ZeroDivisionError: division by zero\); repair"):
        build_stack("broken")


class Parts:
    """What entry points of other packages may name by mistake, and what they may well name."""

    not_a_class = 3
    nested = "short+linear"
    short = "fixed"
    mirror = "glass"
    glass = "linear+mirror"
    misspelt = "fixed(depth=)"
    listed = ("fixed", "linear")

    class Raises:
        def __init__(self):
            raise RuntimeError("no luck")

    class Open:
        def __init__(self, width=2, **options):
            self.width = width

        @hookimpl
        def branch_factor(self, frontier):
            return self.width

    @attrs.define
    class Varied:
        variants: dict = {"wide": {}}  # noqa: RUF008  # the mistake

        @hookimpl
        def branch_factor(self, frontier):
            return 1


FIXED, LINEAR = ("fixed", "dynatree_policies.fixed:Fixed"), ("linear", "dynatree_policies.linear:Linear")


def part(name: str, group: str = registry.POLICIES) -> tuple[str, str, str]:
    return name.lower(), f"{__name__}:Parts.{name}", group


@pytest.mark.parametrize(
    ("plugins", "text", "message"),
    [
        ([part("not_a_class")], "not_a_class", r"'not_a_class' of dynatree\.policies must be a class, got int"),
        ([part("missing")], "missing", "'missing' is installed but cannot be imported"),
        ([part("Raises")], "raises", "'raises' cannot be made, its constructor raised RuntimeError: no luck"),
        ([part("Varied")], "varied", r"Varied\.variants must map names .* annotate it as ClassVar or not at all"),
        ([part("listed", registry.PRESETS)], "listed", r"'listed' of dynatree\.presets must be a string, got tuple"),
        ([part("misspelt", registry.PRESETS), FIXED], "misspelt", "the preset 'misspelt' cannot be read: .*depth="),
        (
            [part("mirror", registry.PRESETS), part("glass", registry.PRESETS), LINEAR],
            "mirror",
            "a preset must not stand for itself, got mirror -> glass -> mirror",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_package_that_is_wrong_is_named(installed, plugins, text, message):
    installed(*plugins)
    with pytest.raises(PluginLoadError, match=message):
        build_stack(text)


def test_a_preset_may_name_another(installed):
    installed(part("nested", registry.PRESETS), part("short", registry.PRESETS), FIXED, LINEAR)
    assert list(build_stack("nested").policies) == ["fixed", "linear"]


def test_parameters_without_a_name_are_none(installed):
    installed(part("Open"))
    assert plugin_parameters(Parts.Open) == {"width": 2}
    assert build_stack("open(width=3)").find("open").width == 3


def test_an_entry_point_that_makes_no_drafter(installed):
    installed(("odd", f"{__name__}:Parts.Open", registry.DRAFTERS))
    with pytest.raises(PluginLoadError, match="'odd' must make drafters, got <"):
        build_drafter("odd")


def test_a_field_that_is_private_prints_as_it_is_given():
    @attrs.define
    class Private:
        _width: int = 3

        @hookimpl
        def branch_factor(self, frontier):
            return self._width

    assert str(build_stack(Private(4))) == "private(width=4)"
