"""Figures from results that were made up: what is drawn, what is left out, and how it looks."""

from __future__ import annotations

import attrs
import matplotlib as mpl
import pytest
from matplotlib.text import Text

from dynatree_bench.report import figures
from dynatree_bench.report.figures import FIGURES, draw
from dynatree_bench.report.shapes import compared
from dynatree_bench.report.statistics import summaries
from dynatree_bench.run.experiments import EXPERIMENTS, chosen_methods
from dynatree_bench.run.records import MethodInfo, Results, read_results

pytestmark = pytest.mark.usefixtures("_small_figures")
PLOTS = {plot.name: plot for plot in FIGURES}


OWN = {  # the figure of each experiment
    "main": "phases", "ablation": "ablation", "sensitivity": "sensitivity", "scalability": "scalability",
    "tree-search": "tree-search", "prompt-length": "prompt-length", "datasets": "datasets", "smoke": "phases",
    "never-slower": "phases", "fixed-width": "phases",
}  # fmt: skip
COMMON = {"acceptance-over-length", "iteration-time", "calibration", "nodes", "accepted"}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_figure_of_a_busy_machine_says_so(runs, tmp_path, monkeypatch, when):
    results = read_results(runs / "main")
    notes = ("the machine was busy before the run: others used 60 % of a core",) if when == "before" else ()
    settings = {} if when == "before" else {"cores": 8}  # of which others used 2 % each
    busy = attrs.evolve(results, info=attrs.evolve(results.info, notes=notes, settings=settings))
    said = []
    monkeypatch.setattr(figures.Figure, "text", lambda figure, x, y, text, **style: said.append(text))
    assert draw(PLOTS["accepted"], busy, tmp_path / "busy.png")
    assert any("The machine was busy: times are not to be believed." in " ".join(text.split()) for text in said)
    said.clear()
    assert draw(PLOTS["accepted"], results, tmp_path / "idle.png")
    assert not any("busy" in text for text in said)


def test_the_figures_are_there_and_named_in_the_page(main_page):
    drawn = {path.stem for path in (main_page.parent / "figures").iterdir()}
    assert drawn == {"phases", "shapes", *COMMON}
    text = main_page.read_text(encoding="utf-8")
    for name in drawn:
        assert f"(figures/{name}.png)" in text
        assert PLOTS[name].caption in text


def test_the_methods_that_differ_are_marked_in_the_figure(runs):
    results = read_results(runs / "main")
    figure = PLOTS["phases"].draw(results)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "economize †" in labels
    assert "fixed" in labels


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_has_its_own_figure_and_no_other_s(runs, name, tmp_path):
    results = read_results(runs / name)
    for own in set(OWN.values()):
        assert draw(PLOTS[own], results, tmp_path / f"{own}.png") == (own == OWN[name])
    assert [path.stem for path in tmp_path.iterdir()] == [OWN[name]]


@pytest.mark.parametrize("name", ["shapes", *OWN])
def test_a_figure_is_left_out_where_another_axis_varies_too(runs, name, tmp_path):
    """Its lines would go back and forth, or the last value would stand for all."""
    results = read_results(runs / ("main" if name == "shapes" else name))
    other = [attrs.evolve(record, axes={**record.axes, "other": value}) for record in results.records for value in "ab"]
    varied = attrs.evolve(results, records=tuple(other))
    assert compared(varied) is None
    assert not draw(PLOTS[OWN.get(name, name)], varied, tmp_path / "none.png")
    one_value = attrs.evolve(results, records=tuple(other[::2]))
    assert draw(PLOTS[OWN.get(name, name)], one_value, tmp_path / "one.png")


def test_a_heat_map_is_of_one_method(runs, tmp_path):
    results = read_results(runs / "tree-search")
    again = [attrs.evolve(record, method="another") for record in results.records if record.method == "fixed"]
    assert not draw(PLOTS["tree-search"], attrs.evolve(results, records=(*results.records, *again)), tmp_path / "x.png")


def test_the_heat_map_frames_the_best_tree(runs):
    results = read_results(runs / "tree-search")
    found = [one for one in summaries(results.records) if one.method == "fixed"]
    best = max(one.speedup.median for one in found)
    figure = PLOTS["tree-search"].draw(results)
    framed = [text.get_text() for axes in figure.axes for text in axes.texts if text.get_weight() == "bold"]
    assert framed == [f"{best:.2f}"]


def test_what_a_run_does_not_have_is_not_drawn(runs, tmp_path):
    results = read_results(runs / "main")
    foreign = Results(results.folder, results.info, tuple(r for r in results.records if r.steps is None))
    for name in COMMON:
        assert not draw(PLOTS[name], foreign, tmp_path / "none.png")
    no_replay = tuple(attrs.evolve(record, replay=None) for record in results.records)
    figure = PLOTS["nodes"].draw(Results(results.folder, results.info, no_replay))
    assert "oracle tree" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_same_records_give_the_same_bytes(runs, tmp_path):
    results = read_results(runs / "ablation")
    for name in ("one.png", "two.png"):
        assert draw(PLOTS["accepted"], results, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


LONG = "confidence(high=0.85,low=0.35,min_branch=1,max_branch=4)+dynamic_depth(base_depth=6)"


ERROR = "RuntimeError: " + "the size of tensor a must match the size of tensor b " * 5


@pytest.fixture(scope="module")
def long_names(runs):
    """The main experiment with policies of long names, two of which only differ in their middle, and a long error."""
    results = read_results(runs / "main")
    new = {"phase1": LONG, "phase2": LONG.replace("max_branch=4", "max_branch=5"), "phase3": f"{LONG}+history"}
    records = tuple(
        attrs.evolve(record, method=new.get(record.method, record.method), error=record.error and ERROR)
        for record in results.records
    )
    methods = tuple(attrs.evolve(method, name=new.get(method.name, method.name)) for method in results.info.methods)
    return attrs.evolve(results, records=records, info=attrs.evolve(results.info, methods=methods))


def test_long_names_are_shortened_and_stay_apart(long_names):
    labels = figures._labels(long_names.records)
    assert len(set(labels.values())) == len(labels)
    assert labels[LONG] == "confidence(…ic_depth(base_depth=6) (1)"
    assert labels[f"{LONG}+history"] == "confidence(…(base_depth=6)+history"
    assert labels["economize"] == "economize †"


@pytest.mark.parametrize("name", ["phases", *sorted(COMMON)])
def test_nothing_is_cut_off_at_the_edge_of_a_figure(long_names, name, tmp_path):
    with mpl.rc_context(figures.STYLE):
        figure = PLOTS[name].draw(long_names)
        figure.savefig(tmp_path / "figure.png", dpi=figure.dpi)
    width, height = figure.get_size_inches() * figure.dpi
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes.xaxis.label]
        texts += axes.get_yticklabels() if name in ("phases", "iteration-time") else []  # those of methods
        assert axes.get_window_extent().width > width / 3  # there is room for what is shown
    for text in filter(Text.get_text, texts):
        box = text.get_window_extent()
        assert -1 <= box.x0 < box.x1 <= width + 1, text.get_text()
        assert -1 <= box.y0 < box.y1 <= height + 1, text.get_text()


def test_methods_of_one_run_have_colours_of_their_own(runs, long_names):
    for results in (read_results(runs / "main"), long_names):
        styles = figures._styles(results)
        assert len({tuple(style.values()) for style in styles.values()}) == len(styles)
    names = [method.name for method in chosen_methods(EXPERIMENTS["main"], with_compile=True, with_rivals=True)]
    one = read_results(runs / "main").records[0]
    info = attrs.evolve(
        results.info, methods=tuple(MethodInfo(name, "hf" if name.startswith("hf ") else "rival", None, None, {})
                                    for name in names)
    )  # fmt: skip
    every = Results(results.folder, info, tuple(attrs.evolve(one, method=name) for name in names))
    colours = [style["color"] for style in figures._styles(every).values()]
    assert len(set(colours)) == len(colours) == len(names)
