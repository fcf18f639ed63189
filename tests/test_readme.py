import re
from pathlib import Path

from docs.redraw import PICTURES, SAMPLE, draw_recording
from docs.reference import write_reference
from model.runs.commands import main as train
from pipeline.cli import COMMANDS
from tests.conftest import REPOSITORY, start

README = REPOSITORY / "README.md"
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
PAGES = [README, *sorted((REPOSITORY / "docs").rglob("*.md"))]
DOCUMENTS = (*PAGES, CONTRIBUTING, *(REPOSITORY / "benchmarks").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_no_block_leaves_settings_behind_for_the_next() -> None:
    blocks = [block for page in PAGES for block in page.read_text().split("```")[1::2] if "\nexport " in block]
    assert len(blocks) >= 3
    for block in blocks:
        commands = re.sub(r"(pipeline|python) .*", ":", block)
        ran = start("bash", "-c", f'make() {{ :; }}\n{commands}\necho "[$OUT]"')
        assert ran.stdout == "[]\n"


def test_every_test_that_the_pages_name_exists() -> None:
    text = "".join(page.read_text() for page in PAGES)
    named = re.findall(r"(tests/[\w/]*test_\w+\.py)(?:::(\w+))?", text)
    assert len(named) > 40
    for file, test in named:
        assert not test or f"\ndef {test}(" in (REPOSITORY / file).read_text(), (file, test)


def test_every_name_that_contributing_points_to_exists() -> None:
    """A row of the table names one module, and what to change in it."""
    rows = [line.split(" | ") for line in CONTRIBUTING.read_text().splitlines() if re.match(r"\| an? ", line)]
    assert len(rows) == 5
    for _, module, change, _ in rows:
        source = (REPOSITORY / module.strip("`")).read_text()
        for name in set(re.findall(r"`([A-Za-z_][\w.]*)`", change)):
            assert re.search(rf"^ *(def |class |){name.split('.')[-1]}\b", source, re.MULTILINE), name


def test_every_target_that_the_documents_name_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:`|^|\n)make ([a-z][a-z0-9-]*)", document.read_text()))
        assert named <= targets, document


def test_the_readme_is_short_and_so_is_every_page() -> None:
    assert len(README.read_text().splitlines()) <= 150
    words = {page: len(page.read_text().split()) for page in [*PAGES, CONTRIBUTING]}
    assert {page.name for page, number in words.items() if number > 2000} <= {"model-card.md"}


def test_every_link_leads_somewhere() -> None:
    """Files that exist; and headings, by the names that GitHub gives them."""
    for page in DOCUMENTS:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in (target for target in LINK.findall(prose) if not target.startswith("http")):
            name, _, anchor = target.partition("#")
            file = (page.parent / name) if name else page
            assert file.exists(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{page.name}: {target}"


def test_every_picture_is_small_and_shown_on_a_page() -> None:
    targets = [(page.parent, target) for page in PAGES for target in LINK.findall(page.read_text())]
    pictured = (".png", ".jpg", ".svg")
    linked = {(at / target).resolve() for at, target in targets if target.endswith(pictured) and "://" not in target}
    pictures = {path.resolve() for path in PICTURES.iterdir()}
    assert linked == pictures
    assert {path.name for path in pictures if path.stat().st_size > 300_000} == set()


def test_the_sample_is_small_and_tells_nothing_of_the_machine_that_made_it() -> None:
    readme = SAMPLE / "README.md"
    files = {*SAMPLE.iterdir()} - {readme}
    assert sum(path.stat().st_size for path in files) < 600_000
    assert len(readme.read_text().splitlines()) <= 30
    assert set(re.findall(r"\]\(([\w.-]+)\)", readme.read_text())) == {path.name for path in files}
    folders = r"(?<![\w.])/(home|root|work|tmp|usr|opt|mnt|var|data|Users)/\w"
    for path in (*files, readme, PICTURES / "make-train.svg"):
        text = re.sub(r'"data:[^"]*"', "", path.read_text())
        assert re.findall(folders, text) == [], path.name


def test_a_recording_plays_its_lines_without_the_long_waits() -> None:
    lines = [(0.0, "$ make it\n"), (99.0, "\x1b[32mgreen\x1b[0m <1>\n"), (99.0, "\x1b[?25h\n")]
    svg = draw_recording([*lines, (99.1, "x" * 150 + "\n")])
    shown = ["$&#160;make&#160;it", "green", "&#160;&lt;1&gt;", "x" * 100, "x" * 50]
    assert re.findall(r"<text[^>]*>([^<\n]+)</text>", svg) == shown
    assert "animation: 10.6s" in svg  # of which 0.5 s are the pause, and 10 its end
    heights = [float(height) for height in re.findall(r"% { transform: translateY\((.*?)px\)", svg)]
    assert heights == [1098.0, 1073.6, 1024.8]  # of 46 lines, 45, 44 and 42 are below those shown
    assert "#lines { transform: translateY(1024.8px) }" in svg


def test_the_pages_of_options_and_modules_are_made_from_the_code(tmp_path: Path) -> None:
    write_reference(tmp_path)
    pages = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    for lines in pages.values():
        assert {len(re.split(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")} == {4}
    commands = [f"pipeline {name}" for name in COMMANDS]
    commands += [f"python -m train {name}" for name in train.commands]
    assert sorted(line[3:] for line in pages["options.md"] if line.startswith("## ")) == sorted(commands)
    escaped = "| `--blanks [blank\\|not-annotated]` | "
    assert any(line.startswith(escaped) for line in pages["options.md"])
    modules = [path for package in ("pipeline", "model") for path in (REPOSITORY / package).rglob("*.py")]
    named = {line.split("`")[1] for line in pages["modules.md"] if line.startswith("| `")}
    assert named == {path.name for path in modules} - {"__init__.py"}
