"""The documentation runs: its Python, its links, its settings, its commands."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from sigma_cli import app
from sigma_train.config import Config, _toml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for name in re.findall(r"`((?:tests|bench|docs|csrc|sigma_kernels)/[\w/.-]*)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_run(page):
    blocks = [code for is_left_out, code in BLOCK.findall(page.read_text()) if not is_left_out]
    namespace: dict[str, object] = {}
    for code in blocks:
        exec(compile(code, str(page), "exec"), namespace)


def test_train_config_lists_every_setting_and_default():
    page = (ROOT / "docs" / "train-config.md").read_text()
    listed, section = {}, ""
    for line in page.splitlines():
        if line.startswith("## ["):
            section = line[4:-1]
        elif match := re.match(r"\| `(\w+)` \| `([^`]*)` \|", line):
            listed[f"{section}.{match[1]}"] = match[2]
    assert listed == {
        f"{section}.{key}": "none" if value is None else _toml(value)
        for section, settings in Config()
        for key, value in settings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_sigma_commands_exist_with_their_options(page):
    group = typer.main.get_command(app)
    for line in re.findall(
        r"^(?: {4}|`)?(?:[A-Z_]+=\S+ )*(sigma [a-z][^`\n]*?)(?: {2,}.*)?$", page.read_text(), re.M
    ):
        words = shlex.split(line.split("`")[0], comments=True)
        if len(words) < 2 or words[1] not in ("train", "compare", "generate", "export", "doctor", "bench"):
            continue
        command = group.commands[words[1]]
        options = {name for parameter in command.params for name in parameter.opts}
        for word in words[2:]:
            assert not word.startswith("--") or word in options, f"{line}: {word}"
