"""The documentation runs: its Python, its links, its settings, its commands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from sigma_cli.commands import app
from sigma_train.config import Config, _toml, load_config
from sigma_train.config_words import fields_of, wanted_in

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]


def each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


every_page = each(PAGES)

PYTHON = re.compile(r"(<!-- not run: [^>]+ -->\n)?```python\n(.*?)```", re.DOTALL)
NOT_PROSE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
FOLDERS = "bench|csrc|docs|python|sigma_kernels|tests"


@every_page
def test_python_blocks_run(page):
    """Each page in one namespace of its own; what is left out says why in a comment above."""
    namespace: dict[str, object] = {}
    text = page.read_text()
    for block in PYTHON.finditer(text):
        is_left_out, code = block.groups()
        if not is_left_out:  # blank lines before it, so that a traceback has the page's own line numbers
            lines = text.count("\n", 0, block.start(2))
            exec(compile("\n" * lines + code, str(page), "exec"), namespace)


def anchors(page: Path) -> set[str]:
    """The names under which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each(PAGES + OTHERS)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", NOT_PROSE.sub("", text)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(rf"`((?:{FOLDERS})/[\w/.-]*)`", text):
        assert (ROOT / name).exists(), name
    for name, test in re.findall(r"`(test_\w+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / "tests" / name).read_text(), (name, test)


@pytest.mark.parametrize("name", [page.name for page in PAGES if page.parent == ROOT / "docs"])
def test_every_page_is_in_the_index(name):
    index = (ROOT / "docs" / "index.md").read_text()
    assert name == "index.md" or f"]({name})" in index


def test_train_config_lists_every_setting_with_kind_and_default():
    listed, section = [], ""
    for line in (ROOT / "docs" / "train-config.md").read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip("[]")
        elif section in Config.model_fields and line.startswith("| `"):
            key, default, wanted, meaning = (cell.strip(" `") for cell in line.strip("|").split("|"))
            assert meaning, key
            listed.append((section, key, default, wanted))
    assert listed == [
        (section, key, "none" if value is None else _toml(value), wanted_in(fields_of(section, Config)[key]))
        for section, settings in Config()
        for key, value in settings
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `sigma` command: in code spans, indented lines and bash blocks."""
    spans = re.findall(r"`(sigma(?: [^`\n]*)?)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [*re.findall(r"^ {4}(.+)$", text, re.M), *re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    for piece in [*spans, *(part for line in lines for part in re.split(r"&&|\n", line))]:
        # a variable or two before, a remark after at least two spaces
        match = re.match(r"\s*(?:[A-Z_]+=\S+ )*(?:\S*/)?sigma(?: (\S.*?))?(?: {2,}.*)?$", piece)
        if match:
            yield shlex.split(match[1] or "")


def check_command(words: list[str]) -> None:
    """Raises what the program itself would, short of running it; a bare command name is no command line."""
    group = typer.main.get_command(app)
    if not words or words == ["--help"]:
        return
    name, *args = words
    assert name in group.commands, f"no command {name}"
    if isinstance(group.commands[name], typer.core.TyperGroup):  # of commands, such as noise
        group, (name, *args) = group.commands[name], args or ["--help"]
        assert name == "--help" or name in group.commands, f"no command {words[0]} {name}"
    if not args or args == ["..."]:
        return
    context = group.commands[name].make_context(name, list(args))
    presets = [context.params.get("preset"), *context.params.get("presets", [])]
    for preset in presets:
        load_config(preset, None, context.params.get("overrides") or [])


@every_page
def test_sigma_commands_exist_with_their_options(page):
    for words in commands(page.read_text()):
        try:
            check_command(words)
        except Exception as error:
            raise AssertionError(f"sigma {shlex.join(words)}: {error}") from error


def check_commands(text: str) -> None:
    for words in commands(text):
        check_command(words)


@pytest.mark.parametrize(
    "text, message",
    [
        ("`sigma nois`", "no command nois"),
        ("`sigma noise rum --out x`", "no command noise rum"),
        ("`sigma noise run --out x --kernels spin`", "No such option: --kernels"),
        ("    sigma train --preset smok\n", "unknown preset 'smok'"),
        ("    X=1 sigma train --preset smoke --frob   trains\n", "No such option: --frob"),
        ("```bash\nmake && .venv/bin/sigma train --set optim.lrr=1\n```", "unknown key optim.lrr"),
        ("    sigma generate   a remark\n    sigma generate run extra\n", "extra"),
        ("    sigma bench --rounds 0\n", "1"),
    ],
)
def test_a_wrong_command_is_found(text, message):
    """Defends: a parser of pages that passes over what it was to check."""
    with pytest.raises(Exception, match=message):
        check_commands(text)
