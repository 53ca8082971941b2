"""The report's figures of routing draw what metrics.jsonl holds: of one layer, of many, of none."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from sigma_train.metrics import read_metrics
from sigma_train.report import png, write_report
from sigma_train.routing_view import MAPS, deviations, looks, maps
from test_train_sparsity import make_trainer  # noqa: F401 - a fixture

SETTINGS = ("train.steps=6", "train.save_every=100", "train.eval_every=100", "guard.stats_every=2")
SWITCH = "sparsity.phases=[[0, [4, 2]], [4, [1, 1]]]"


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


@pytest.fixture
def rows(make_trainer):  # noqa: F811
    trainer = make_trainer("run", *SETTINGS, SWITCH)
    trainer.run()
    return list(read_metrics(trainer.out / "metrics.jsonl"))


def of_layers(rows: list[dict], layers: int) -> list[dict]:
    """The same rows of a model with another number of layers."""
    cut = []
    for row in rows:
        of = row.get("layers", {})
        lists = {name: (values * layers)[:layers] for name, values in of.items() if isinstance(values, list)}
        cut.append(row | ({"layers": of | lists} if of else {}))
    return cut


def test_maps_show_each_look_in_its_interval(rows):
    """Defends: layers upside down, steps off by an interval, a first look drawn as no change."""
    figure = maps(rows)
    by_title = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(by_title) == list(MAPS.values())
    for name, title in MAPS.items():
        (mesh,) = by_title[title].collections
        want = np.array([row["layers"][name] for row in looks(rows)], dtype=float).T
        np.testing.assert_array_equal(mesh.get_array().filled(np.nan), want)
        assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 2, 4, 6]
        assert [line.get_xdata()[0] for line in by_title[title].lines] == [4], "k changes after step 4"
    changes = by_title[MAPS["routing_changes"]].collections[0].get_array()
    assert changes.mask[:, 0].all()
    assert not changes.mask[:, 1:].any()
    low, high = by_title[MAPS["load_most"]].get_ylim()
    assert low > high, "layer 0 is at the top"


def test_deviations_have_their_limits(rows):
    """Defends: one layer's limits in another's plot; a bound that bounds nothing; a switch that is not marked."""
    figure = deviations(rows)
    seen = looks(rows)
    for layer, axes in enumerate(figure.axes):
        assert axes.get_title() == f"layer {layer}"
        of = {line.get_label(): line for line in axes.lines}
        for name, label in (
            ("load_most", "busiest expert"),
            ("load_least", "idlest expert"),
            ("load_most_floor", "busiest by chance"),
        ):
            assert of[label].get_xdata().tolist() == [2, 4, 6]
            assert of[label].get_ydata().tolist() == [row["layers"][name][layer] for row in seen]
        (bound,) = (line.get_ydata() for label, line in of.items() if label.startswith("commonest"))
        want = [row["layers"]["load_most_bound"][layer] for row in seen]
        assert all(np.isnan(x) if y <= 0 else x == y for x, y in zip(bound, want, strict=True))
        assert of["$k$ changes"].get_xdata()[0] == 4


@pytest.mark.parametrize("layers", [1, 2, 3, 9, 56])
def test_any_number_of_layers_is_drawn(rows, layers):
    """Defends: fractions of a layer on the axis, an empty plot beside the last."""
    rows = of_layers(rows, layers)
    for figure in (maps(rows), deviations(rows)):
        assert png(figure).startswith(b"\x89PNG")
    shown = [axes for axes in deviations(rows).axes if axes.get_visible()]
    assert len(shown) == layers
    figure = maps(rows)
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert all(label == "" or label.lstrip("−-").isdigit() for label in labels), labels


def test_one_look_is_drawn(rows):
    """And a collapse in which the busiest expert has everything."""
    rows = [row for row in rows if row["step"] <= 2]
    rows[-1]["layers"]["load_most"][0] = 95.0
    for figure in (maps(rows), deviations(rows)):
        assert png(figure).startswith(b"\x89PNG")


def test_the_report_has_both_figures_where_there_is_a_router(make_trainer):  # noqa: F811
    for name, experts, has_any in (("sparse", 8, True), ("dense", 1, False)):
        trainer = make_trainer(name, *SETTINGS, f"model.num_experts={experts}")
        trainer.run()
        page = write_report(trainer.out, "sample").read_text()
        files = {path.name for path in trainer.out.glob("*.png")}
        assert ({"routing.png", "deviation-from-an-even-load.png"} <= files) == has_any
        assert ("<h2>Routing</h2>" in page) == has_any
        assert "layers.png" in files
