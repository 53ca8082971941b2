"""Debian's installation guide, one book in 19 languages: fetched through the package manager, checked, written as text.

Most of it is parallel, chapter by chapter.  What no one has translated stands there in English, word for word, in
Vietnamese a third of all letters: `untranslated` measures it and `translated` leaves it out.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from sigma_train.errors import Failure, WrongInput
from sigma_train.files import atomic_folder, must_be_writable, write_text

PACKAGE, VERSION = "installation-guide-amd64", "20230508+deb12u1"  # of all architectures, despite its name
LICENCE = (
    "The Installation Guide is copyright of the Debian Installer team and other contributors (1996-2023) and "
    "licensed under the GNU General Public License, version 2, which is an appendix of the guide itself and "
    "/usr/share/common-licenses/GPL-2 on Debian."
)
NOT_UTF8 = {"ru": "koi8-r"}  # in this version of the package
SHA256 = {  # of each install.LANG.txt as it comes out of the package
    "ca": "66a2234892e206f46e902fb014446509f0234d0c79b76742bde98a59c51f5267",
    "cs": "b27bc5479b1e84afa8aa7fa4aa3c18e3b9aab5f2155dc32a04e32125c49020a6",
    "da": "b09207ccd569018b07bfe0d012abaec28f317daa6795c4edda7cba473f7dccf2",
    "de": "51745bcd04956217d45987eff4e7c8946b5d6f8031b1205cee1dc80af32d1aff",
    "el": "1ca7595de4b0150d6a278864aeeec49c21880fe2381ff0232437eb74294ed0f4",
    "en": "71ab9cc293a3380baa7bfa24c48cbaf7346706e1458c64b7b259f0c9af863ef8",
    "es": "81c3360cb1e40b79a0de5ea116dbc906e43ff5f1218af8f41653503d7e12bae6",
    "fr": "fdca7ec4a6ea5009b15d09a7a7b2b603741a175fe100eca0293a0be88113e2a0",
    "id": "06367f4613220bac1007128904ea999ec175ea8c6b2cecfa2cce8ac70f78aa2a",
    "it": "3d334680bdddbae93023a62d1722e984e77384699025c5b6638603466c067b1e",
    "ja": "04719ce020463237e112e13ba0d35d835ea081fc617461ece559559c90e5aefc",
    "ko": "dc133dec5d128f5f47c3962c7340c667a8664b22bae61126727e98c1cc7d4f2a",
    "nl": "d24de2948d6f09912e6a123ffc2cd89c95fe4149d4e4bf428abb639b075dfadf",
    "pt": "02208de32c12faddaaaee23dcdfa90421fb72e85a9dc4968dbfc8506b7de5847",
    "ro": "3cacab7bd4e57f6c56736a24f8fd4220089e4667436f5ab0104c80f072c82afa",
    "ru": "1cc2301877dcbc646f9f6b2800724a9f0b305143718ebaa2af5b65e7b0e14426",
    "sv": "67192beff2f93ad452a58d9aef92bb6e5724690acfe806422979be845675474a",
    "vi": "e56b497198c953c06eb51717bb96b2dd77273839184a2a44d9d0fcb5d0fc5954",
    "zh_CN": "50ba9fcd5823f6cc84a8bc75ede1b9fd23aeadbfd69a2eb74219db42300678dc",
}
PIVOT = "en"
LEAST_LETTERS = 30  # of a paragraph whose language can be told; shorter ones are names, commands and numbers


class CorpusWarning(UserWarning):
    """A text that is not the one whose figures were published."""


def prepare_guide(out: Path, any_version: bool = False, without_english: bool = False) -> dict[str, float]:
    """Write LANG.txt of each language and a README.md into the new or empty folder `out`, all of it or nothing.

    Returns: of each language the share of letters in paragraphs that are still the English ones.
    Raises: WrongInput if `out` holds something or can't be written, or the text is of another version and
    `any_version` is False; Failure if the package can't be fetched.
    """
    with must_be_writable("--out", out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise WrongInput(f"--out must be a new or an empty folder, found {out}")
        out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        version, found = fetch(Path(scratch))
    check(version, found, any_version)
    texts = {language: decoded(language, content) for language, content in found.items()}
    shares = untranslated(texts)
    if without_english:
        texts = translated(texts)
    with must_be_writable("--out", out):
        _write(out, texts | {"README": readme(version, shares, without_english)})
    return shares


def fetch(scratch: Path) -> tuple[str, dict[str, bytes]]:
    """The package's version and its texts by language.  Raises: Failure that says what apt said."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise Failure(
                f"{program} is not there: the installation guide is fetched as a package of Debian or Ubuntu"
            )
    _run(["apt-get", "download", PACKAGE], scratch)
    (package,) = scratch.glob(f"{PACKAGE}_*.deb")
    version = _run(["dpkg-deb", "--field", package.name, "Version"], scratch).strip()
    _run(["dpkg-deb", "--extract", package.name, "content"], scratch)
    texts = {}
    for path in sorted((scratch / "content/usr/share/doc" / PACKAGE).glob("*/install.*.txt.gz")):
        texts[path.parent.name] = gzip.decompress(path.read_bytes())
    if not texts:
        raise Failure(f"{PACKAGE} {version} holds no install.LANG.txt.gz any more")
    return version, texts


def _run(command: list[str], folder: Path) -> str:
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False
    )
    if result.returncode != 0:
        said = [line for line in result.stderr.splitlines() if not line.startswith("W:")]
        why = said[-1] if said else f"exit code {result.returncode}"
        raise Failure(f"{' '.join(command[:2])} of {PACKAGE} failed: {why}; `apt-get update` may help")
    return result.stdout


def check(version: str, texts: Mapping[str, bytes], any_version: bool) -> None:
    """Raises: WrongInput if the texts are not those that are known; with `any_version` warns instead."""
    found = {language: hashlib.sha256(content).hexdigest() for language, content in texts.items()}
    if found == SHA256:
        return
    other = sorted(
        language for language in found.keys() | SHA256 if found.get(language) != SHA256.get(language)
    )
    told = (
        f"the installation guide is version {version} here, figures of the documentation are of {VERSION}: "
        f"the text differs in {', '.join(other)}"
    )
    if not any_version:
        raise WrongInput(f"{told}; --any-version takes it")
    warnings.warn(told, CorpusWarning, stacklevel=2)


def decoded(language: str, content: bytes) -> str:
    """UTF-8, or what the text of this language was in.  Raises: Failure, of a version in which it is neither."""
    for encoding in ("utf-8", NOT_UTF8.get(language, "utf-8")):  # KOI8-R in Russian is never UTF-8 by chance
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise Failure(
        f"install.{language}.txt of the installation guide is not UTF-8; this version cannot be read"
    )


def untranslated(texts: Mapping[str, str]) -> dict[str, float]:
    """Of each language the share of letters in paragraphs that are, but for white space, those of the English text."""
    english = {_plain(paragraph) for paragraph in _paragraphs(texts.get(PIVOT, ""))}
    shares = {}
    for language, text in texts.items():
        letters = {True: 0, False: 0}
        for paragraph in _paragraphs(text):
            if (count := _letters(paragraph)) >= LEAST_LETTERS:
                letters[_plain(paragraph) in english] += count
        shares[language] = letters[True] / max(sum(letters.values()), 1)
    return shares


def translated(texts: Mapping[str, str]) -> dict[str, str]:
    """The same without what is English in the others; short paragraphs stay."""
    english = {_plain(p) for p in _paragraphs(texts.get(PIVOT, "")) if _letters(p) >= LEAST_LETTERS}
    return {
        language: text
        if language == PIVOT
        else "\n\n".join(p for p in _paragraphs(text) if _plain(p) not in english)
        for language, text in texts.items()
    }


def _paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


def _plain(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _letters(paragraph: str) -> int:
    return sum(map(str.isalpha, paragraph))


def readme(version: str, shares: Mapping[str, float], without_english: bool) -> str:
    rows = "".join(f"| {language} | {share:.1%} |\n" for language, share in shares.items())
    left_out = " It is left out here." if without_english else ""
    return (
        f"# Debian's installation guide in {len(shares)} languages\n\n"
        f"From the Debian package {PACKAGE} {version}, each text as the package has it, in UTF-8.\n\n{LICENCE}\n\n"
        f"Share of letters in paragraphs that nobody has translated from English:{left_out}\n\n"
        f"| language | English |\n|---|---|\n{rows}"
    )


def _write(out: Path, texts: Mapping[str, str]) -> None:
    """Under a temporary name, then renamed: a rename takes the place of an empty folder."""
    with atomic_folder(out, "--out") as temporary:
        for name, text in texts.items():
            write_text(temporary / (f"{name}.md" if name == "README" else f"{name}.txt"), text)
