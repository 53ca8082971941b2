"""The report's figures of routing draw what metrics.jsonl holds: of one layer, of many, of none."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from sigma_train import report
from sigma_train.report import png, write_report
from sigma_train.routing_view import MAPS, deviations, loads, looks, maps
from test_train_sparsity import SMALL  # noqa: F401 - of make_trainer

SETTINGS = ("train.steps=2", "train.save_every=100", "train.eval_every=100", "guard.stats_every=1")


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


def made(layers: int = 2, steps: tuple[int, ...] = (2, 4, 6)) -> list[dict]:
    """Rows of a run with a look every two steps whose k changes after the fourth; the last bound bounds nothing."""
    chance, rows = np.random.default_rng(layers), [{"step": 5, "top_k": [1] * layers}]
    for step in steps:
        of = {name: chance.random(layers).tolist() for name in (*MAPS, "load_most_floor")}
        of |= {"load_least": [-0.5] * layers, "load_most_bound": chance.random(layers).tolist()}
        rows.append({"step": step, "layers": {"steps": 2, **of}})
    rows[1]["layers"]["routing_changes"] = [None] * layers
    rows[-1]["layers"]["load_most_bound"][-1] = -0.2
    return sorted(rows, key=lambda row: row["step"])


def test_maps_show_each_look_in_its_interval():
    """Defends: layers upside down, steps off by an interval, a first look drawn as no change."""
    rows = made()
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


def test_loads_are_relative_to_an_even_share():
    """Defends: one layer's experts in another's map; a step that the guard left out moves all that follow."""
    rows = [
        {"step": 3, "load": [[4, 0], [2, 2]]},
        {"step": 4, "guard": "left out"},
        {"step": 5, "load": [[1, 3], [4, 0]]},
        {"step": 5, "sample": ""},
    ]
    of = {axes.get_title(): axes.images[0] for axes in loads(rows).axes if axes.images}
    assert list(of) == ["layer 0", "layer 1"]
    assert of["layer 0"].get_array().tolist() == [[2, None, 0.5], [0, None, 1.5]]
    assert of["layer 1"].get_array().tolist() == [[1, None, 2], [1, None, 0]]
    assert of["layer 1"].get_extent() == [2, 5, -0.5, 1.5]


def test_deviations_have_their_limits():
    """Defends: one layer's limits in another's plot; a bound that bounds nothing; a switch that is not marked."""
    rows = made()
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


@pytest.mark.parametrize("layers", [1, 5, 18])
def test_any_number_of_layers_is_drawn(layers):
    """Defends: fractions of a layer on the axis, an empty plot beside the last, a figure of many screens."""
    rows = made(layers)
    plots, figure, shares = deviations(rows), maps(rows), loads([{"step": 1, "load": [[1, 3]] * layers}])
    assert len(plots.axes) == len(shares.axes) - 1 == layers  # and a scale
    assert max(each.get_size_inches()[1] for each in (plots, figure, shares)) < 12
    assert layers > 10 or png(plots).startswith(b"\x89PNG")
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert all(label.removeprefix("\N{MINUS SIGN}").isdigit() for label in labels if label), labels


def test_one_look_and_a_collapse_are_drawn():
    rows = made(2, (2,))
    rows[0]["layers"]["load_most"][0] = 95.0
    for figure in (maps(rows), deviations(rows)):
        assert png(figure).startswith(b"\x89PNG")


def test_the_report_has_both_figures_where_there_is_a_router(make_trainer, monkeypatch):
    monkeypatch.setattr(report, "png", lambda figure: b"a picture")  # which are drawn above
    for name, experts, has_any in (("sparse", 8, True), ("dense", 1, False)):
        trainer = make_trainer(name, *SETTINGS, f"model.num_experts={experts}")
        trainer.run()
        page = write_report(trainer.out, "sample").read_text()
        files = {path.name for path in trainer.out.glob("*.png")}
        assert ({"routing.png", "deviation-from-an-even-load.png"} <= files) == has_any
        assert ("<h2>Routing</h2>" in page) == has_any
        assert "layers.png" in files
