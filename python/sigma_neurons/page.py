"""neurons/report.html: the language neurons of a run as one page, with its pictures beside it."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sigma_train.errors import WrongInput
from sigma_train.files import atomic_file, must_be_writable, sha256_file, write_json, write_text
from sigma_train.report import STYLE, png

from sigma_neurons import pictures
from sigma_neurons.taxonomy import KINDS, score_words

SCHEMA = 3


def write(path: Path, content: Mapping[str, Any]) -> None:
    """As `read` has it back."""
    sealed = {"schema_version": SCHEMA, **content}
    write_json(path, sealed | {"sha256": _seal(sealed)})


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(path: Path, command: str) -> dict[str, Any]:
    """Raises: WrongInput if it is not there or not what `sigma neurons` wrote."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise WrongInput(f"{path} is missing; `sigma neurons {command}` writes it") from None
    except ValueError as error:
        raise WrongInput(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA:
        raise WrongInput(f"{path} must be of schema_version {SCHEMA}, as `sigma neurons {command}` writes it")
    if content.pop("sha256", None) != _seal(content):
        raise WrongInput(f"{path} is damaged or was edited; run `sigma neurons {command}` again")
    return content


def write_page(folder: Path) -> Path:
    """Of neurons.json and, where it is there, ablation.json of these neurons.  Raises: WrongInput."""
    neurons = read(folder / "neurons.json", "identify")
    ablation = None
    if (folder / "ablation.json").exists():
        ablation = read(folder / "ablation.json", "ablate")
        if ablation["neurons_sha256"] != sha256_file(folder / "neurons.json"):
            raise WrongInput(
                f"{folder / 'ablation.json'} is of other neurons than neurons.json; run `sigma neurons ablate` again"
            )
    parts = [f"<!doctype html><meta charset=utf-8><title>Language neurons</title><style>{STYLE}</style>"]
    parts += ["<h1>Language neurons</h1>", *_of_neurons(neurons, folder)]
    if ablation is not None:
        parts += _of_ablation(ablation, folder)
    with must_be_writable("--out", folder):
        write_text(folder / "report.html", "\n".join(parts))
    return folder / "report.html"


def _of_neurons(neurons: dict[str, Any], folder: Path) -> list[str]:
    totals = neurons["totals"]
    out = [
        _p(f"{_whose(neurons)}: {neurons['neurons']:,} neurons, counted on "
           f"{min(neurons['tokens']):,} tokens of each of {len(neurons['languages'])} languages, "
           f"{neurons['split']} split."),
        _p(f"Of the {neurons['top_rate']:.2%} of lowest {score_words(neurons['lambda'])}, {totals['specific']:,} are "
           f"specific to one language and {totals['related']:,} related to "
           f"{'some or all' if neurons['score'] == 'lape' else 'some'}; {totals['general']:,} of all neurons "
           f"are general. A language has a neuron where its {neurons['probability']} probability is above "
           f"{neurons['tau']:.4f}."),
        _table(
            ["language", *KINDS],
            [[name, *(f"{own[kind]:,}" for kind in KINDS)] for name, own in neurons["of_language"].items()],
        ),
        _picture("Kinds by layer", "kinds", pictures.kinds_figure([neurons["layers"]["kinds"]]), folder),
        _picture("Languages by layer", "languages", pictures.languages_figure(neurons), folder),
    ]  # fmt: skip
    if neurons["experts"]:
        out.append(_picture("Routing by language", "routing", pictures.routing_figure(neurons), folder))
        out += _of_experts(neurons["experts"], neurons["sites"])
    return out


def _of_experts(experts: dict[str, Any], sites: list[dict[str, Any]]) -> list[str]:
    rows = []
    for name, own in experts["of_language"].items():
        named = ", ".join(
            f"{expert} of layer {sites[site]['layer']}" for site, expert in experts["named"][name]
        )
        rows.append([name, *(f"{own[kind]:,}" for kind in KINDS), named])
    return [
        _p(f"Experts by their share of a language's tokens alone, whatever their neurons do: the "
           f"{experts['top_rate']:.2%} of lowest {score_words(experts['lambda'])}, where the share is above "
           f"{experts['tau']:.4f}."),
        _table(["language", *KINDS, "specific and related"], rows),
    ]  # fmt: skip


def _whose(neurons: dict[str, Any]) -> str:
    step = "" if neurons["step"] is None else f", step {neurons['step']}"
    return f"{neurons['checkpoint']}{step}"


def _of_ablation(ablation: dict[str, Any], folder: Path) -> list[str]:
    out = ["<h2>Without these neurons</h2>"]
    rows = []
    for name, of_set in ablation["sets"].items():
        mean = sum(of_set["neurons"].values()) / len(of_set["neurons"])
        rows.append(
            [
                name,
                f"{mean:.1f}",
                *(f"{of_set[key]:+.4f}" for key in ("own", "own_of_all", "others", "own_random")),
            ]
        )
    out.append(
        _table(["taken out", "neurons a language", "own", "own, of all", "others", "own, random"], rows)
    )
    out.append(
        _p(
            f"Rise of bits per byte on {ablation['batches']} batches of {ablation['batch_size']} x "
            f"{ablation['seq_len']} tokens of each language's validation text; random: mean "
            f"of {ablation['controls']} masks of as many neurons in each {ablation['within']}. Means of the languages "
            "that have neurons; of all: with 0 for those that have none."
        )
    )
    for name, of_set in ablation["sets"].items():
        key = f"without-{name.replace(' ', '-')}"
        out.append(_picture(f"Without {name}", key, pictures.matrix_figure(name, of_set), folder))
    return out


def _p(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    cells += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(cells)}</table>"


def _picture(title: str, name: str, figure: Any, folder: Path) -> str:
    content = png(figure)
    with must_be_writable("--out", folder), atomic_file(folder / f"{name}.png") as file:
        file.write(content)
    data = base64.b64encode(content).decode()
    return f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
