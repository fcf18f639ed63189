import re
from dataclasses import asdict, replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.runs.config import Config
from model.runs.report import draw_training, render_model_card, render_report
from pipeline.base.pages import Table, pictures, show_setting
from pipeline.look import judged
from pipeline.measure import evaluate
from pipeline.measure.belief import add_belief
from pipeline.measure.evaluate import Scored, assess, calibrate
from pipeline.measure.evaluation import MEANS, Evaluation
from tests.conftest import REPOSITORY, Capture

NAMES = ["Edema", "Pleural Effusion", "Fracture", "Rare"]
CONFIG = asdict(Config(arch="resnet18", manifest="ab12", uncertain="best", blank="zeros", labels=tuple(NAMES)))
LINE = ("epoch", "train_loss", "dev_loss", "macro_auroc", "macro10_auroc", "mean5_auroc")
HISTORY = [
    dict(zip(LINE, values, strict=True))
    for values in ((0.5, 0.7, 0.8, 0.6, None, None), (1, 0.5, 0.6, 0.7, 0.72, None))
]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def draw_images(seed: int) -> Scored:
    """300 images with signal; no Fracture, and 5 rare positives."""
    random = np.random.default_rng(seed)
    target = (random.random((300, 4)) < 0.3).astype(np.float32)
    target[:, 2], target[:, 3] = 0, np.arange(300) % 60 == 0
    logits = random.normal(-1, 1, target.shape) + 1.5 * target
    return Scored(
        (1 / (1 + np.exp(-3 * logits))).astype(np.float32),
        target,
        np.ones(target.shape, bool),
        np.char.mod("patient%05d", np.arange(300) // 2),
        np.where(np.arange(300) % 20 < 2, 0, np.arange(300) % 3),
        random.choice(["Female", "Male"], 300),
        random.integers(10, 95, 300),
        random.choice(["AP", "PA", "LL"], 300),
    )


@pytest.fixture(scope="module")
def images() -> Scored:
    return draw_images(0)


@pytest.fixture(scope="module")
def evaluation(images: Scored) -> Evaluation:
    result = assess(NAMES, images, calibrate(NAMES, draw_images(1)), split="valid")
    add_belief(result, images, {"Male": (images.sex == "Male") * 1.0}, {"sex": images.sex})
    evaluate.add_other(result, images, "runs/other", images.scores[::-1])
    members = {"runs/a": images.scores**2 * 0.5, "runs/b": images.scores[::-1]}
    evaluate.add_comparisons(result, "image", images, members, evaluate.MEMBERS)
    evaluate.add_comparisons(result, "image", images, {f"{evaluate.ALTERED}center covered": images.scores**2})
    studies = evaluate.study_level(images)
    calls = np.where(np.arange(4) == 0, studies.target, np.nan)
    evaluate.add_readers(result, studies, {"<bc4>": calls, "always": np.where(calls >= 0, 1.0, np.nan)})
    result.head |= {"against": ["runs/other"], "members": list(members), "altered": ["center covered"]}
    result.head["readers"] = ["<bc4>", "always"]
    return result


@pytest.fixture(scope="module")
def page(images: Scored, evaluation: Evaluation) -> str:
    return render_report("runs/first", CONFIG, HISTORY, [evaluation], {"valid": images})


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and the rows of its tables by their class."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.feed(html)
        for kind, body in re.findall(r'<table class="(\w+)">(.*?)</table>', html, re.DOTALL):
            cells = (re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in body.split("<tr>")[1:])
            rows = [[unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in cells]
            self.tables.setdefault(kind, []).append(rows)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


TABLE = Table(
    "A|b", ("label", ("one <", "x"), ("one <", "y")), [["<Edema>", "0.5 [0.1, 0.9]", "–"], ["macro", "1", "2"]],
    ["<note>"], means=1, kind="k",
)  # fmt: skip


def test_a_table_has_three_renderers(capsys: Capture) -> None:
    TABLE.print()
    printed = capsys.readouterr().out
    assert "│ <Edema> │ 0.5 [0.1, 0.9] │     – │" in printed
    assert "├─────────┼────────────────┼───────┤\n│ macro   │              1 │     2 │" in printed
    assert "<note>" in printed
    assert f"{TABLE.html()}\n" == (REPOSITORY / "tests" / "tables" / "rendered.html").read_text()
    assert TABLE.markdown() == (REPOSITORY / "tests" / "tables" / "rendered.md").read_text()
    folded = replace(TABLE, folded=True, rows=TABLE.rows[:1], means=0, notes=()).html("t")
    assert folded.startswith("<details><summary>t</summary>\n<div")
    assert folded.endswith("</div>\n</details>")
    empty = Table("t", ("label", "x"), [["a", "–"], ["b", "3 positives (few)"]])
    assert (empty.html(), Table("t", ("label",), []).markdown()) == ("", "")


def test_tables_hold_the_rows(evaluation: Evaluation, page: str) -> None:
    """Each table of the page is one of `judged`, whose cells are the rows' figures."""
    get, tables = evaluation.get, Page(page).tables
    for level, shown in zip(("image", "study"), tables["metrics"], strict=True):
        expected = judged.tabulate_metrics(evaluation, level, "")
        assert shown == [list(expected.columns), *expected.rows]
        auroc = get("auroc", "Edema", level)
        assert shown[1][:2] == ["Edema", f"{auroc.value:.3f} [{auroc.low:.3f}, {auroc.high:.3f}]"]
        assert shown[1][3:5] == [f"{auroc.positives:,}", f"{auroc.negatives:,}"]
        assert [row[0] for row in shown[3:]] == ["Fracture (few)", "Rare (few)", *MEANS.values()]
        assert shown[3][1:3] == ["–", "–"]
    youden = [get(rate, "Edema", group="youden").shown for rate in judged.RATES]
    limit = get("threshold", "Edema", group="youden").value
    assert tables["rates"][1][1] == ["Edema", f"{limit:.3f}", *youden]
    assert len(tables["rates"]) == 1 + 2 * 3
    sex, rare = tables["groups"][0], get("auroc", "Rare", group="sex=Female")
    assert sex[0][1] == f"Female (n = {get('images', group='sex=Female').value:.0f})"
    assert sex[2][1] == get("auroc", "Edema", group="sex=Female").shown
    assert sex[2][-1] == get("tpr_gap", "Edema", group="sex").shown
    assert sex[5][1] == f"{rare.positives} positives, {rare.negatives} negatives (few)"
    assert sex[-1][0] == "macro over 2 labels"
    less = get("auroc_difference", "Edema", scorer="runs/other")
    assert tables["against"][0][1][3:5] == [less.change, "yes" if less.excludes_zero else "no"]
    assert tables["gain"][0][1][-1] == get("auroc_difference", "Edema", scorer="mean of the members").change
    altered = get("auroc", "Edema", scorer="altered: center covered")
    assert tables["sanity"][0][2][2:] == [altered.shown, "recognized" if (altered.low or 0) > 0.6 else ""]
    edema = tables["readers"][0][2]
    assert edema[:3] == ["Edema", "0 of 2", f"{get('below', 'Edema', 'study', scorer='always').positives}"]
    assert edema[4].startswith("1.000 [")
    assert tables["belief"][0][1][2] in [get("auroc_within", "Edema", group=name).shown for name in ("sex", "Male")]


def test_the_first_screen_answers_a_clinician(
    images: Scored, evaluation: Evaluation, page: str, capsys: Capture
) -> None:
    text = " ".join(Page(page).text.split())
    first = text[text.index("runs/first") : text.index(" Settings ")]
    parts = (
        "For research. Not for clinical use.",
        f"valid: 300 images in {evaluation.get('studies', level='study').value} studies of 150 patients.",
        f"{evaluation.get('auroc', 'macro10').shown} AUROC, macro, ≥ 10 patients",
        "AUROC per image",
        "At the threshold of Youden's J on dev, per image",
        "Too few patients of a class to tell: Fracture, Rare.",
    )
    places = [first.index(part) for part in parts]
    assert places == sorted(places)
    summary = [line for _, line in judged.summarize(evaluation)]
    assert all(line in first for line in summary)
    clear = [str(row.label) for row in evaluation.select(metric="verdict") if row.group == "none"]
    assert (f"No shortcut found for: {', '.join(clear)}." in summary) == bool(clear)
    dev = Evaluation(evaluation.head | {"split": "dev"}, evaluation.rows)
    assert judged.summarize(dev)[0][1].startswith("Optimistic: used to select")
    both = Page(render_report("r", CONFIG, HISTORY, [dev, evaluation], dict.fromkeys(("dev", "valid"), images)))
    links = [attrs["href"] for tag, attrs in both.tags if tag == "a"]
    assert links == ["#split-1", "#split-2", "#methods", "#settings", "#training"]  # training comes last
    judged.print_evaluation(evaluation)
    printed = capsys.readouterr().out
    assert all(row.note in printed for row in evaluation.select(metric="verdict"))
    few = [line.split()[1] for line in printed.splitlines() if "│ few" in " ".join(line.split())]
    assert few == ["Fracture", "Rare"]


def test_gaps_that_remain_after_correction_are_named() -> None:
    wide = Evaluation({"split": "valid", "unit": "image", "labels": ["Edema", "Fracture"]})
    for label, low in (("Edema", 0.1), ("Fracture", -0.1)):
        wide.add("image", label, "tpr_gap", 0.3, "sex", low=low, high=0.5)
    assert judged.list_open_gaps(wide) == ["Edema: sensitivity differs by 0.300 [0.100, 0.500] between groups of sex."]


def test_what_is_left_out_is_named(evaluation: Evaluation, page: str) -> None:
    gaps = judged.describe_gaps(evaluation)
    assert all(gap in " ".join(Page(page).text.split()) for gap in gaps)
    assert gaps[:3] == [
        "Fracture, images: no positives, so no AUROC, no AUPRC, and in no mean.",
        "Rare, images: fewer than 10 patients of a class, too few to tell; marked few.",
        "mean of competition's 5, images: undefined, for lack of labels.",
    ]
    assert "Fracture, images of dev: one class: no thresholds, scores as they are." in gaps
    more = evaluation.head | {"many_groups": {"zip_code": 1200}, "left_out": ["b.csv: 3 images have no row"]}
    named = judged.describe_gaps(Evaluation(more, evaluation.rows))
    assert named == [more["left_out"][0], *gaps, "zip_code: 1,200 values, too many to compare as groups."]


def test_settings_and_training_are_a_runs_own(
    images: Scored, evaluation: Evaluation, page: str, tmp_path: Path
) -> None:
    settings = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page[page.index('id="settings"') :]))
    assert settings == {name: escape(show_setting(value)) for name, value in CONFIG.items()}
    shown, folded = page[page.index('id="settings"') :].split("<details>")
    assert re.findall("<dt>(.*?)</dt>", shown) == ["arch", "uncertain", "blank", "manifest", "labels"]
    assert f"<summary>{len(CONFIG) - 5} more, at their defaults</summary>" in folded
    with pictures(tmp_path):  # which leave the page as it is
        assert render_report("runs/first", CONFIG, HISTORY, [evaluation], {"valid": images}) == page
    names = {path.stem for path in tmp_path.iterdir()}
    assert {"auroc-of-each-label", "loss-of-train-and-dev-by-epoch", "auroc-on-dev-by-epoch"} < names
    colors = Image.open(tmp_path / "loss-of-train-and-dev-by-epoch.png").convert("RGB").getcolors(2**24) or []
    assert {(0, 114, 178), (213, 94, 0), (255, 255, 255)} < {color for _, color in colors}  # the style sheet's
    assert 'id="training"' not in render_report("r", CONFIG, [], [evaluation], {"valid": images})
    loss, auroc = draw_training(HISTORY).split("<figcaption>")[:2]
    assert ">macro, ≥ 10 patients<" in auroc
    assert "competition" not in auroc
    assert [f">{split}<" in loss for split in ("train", "dev", "valid")] == [True, True, False]
    for svg in (loss, auroc):
        texts = re.findall(r"<text[^>]*>(.*?)</text>", svg)
        assert texts[: texts.index("epoch")] == ["1"]


def test_the_page_needs_nothing_else(page: str) -> None:
    assert "://" not in page
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) == {"#"}
    tags = Page(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    targets = {f"#{attrs['id']}" for _, attrs in tags if "id" in attrs}
    for name, value in (item for _, attrs in tags for item in attrs.items()):
        assert not name.startswith("on")
        assert name not in ("href", "xlink:href", "src") or value in targets


def test_figures_follow_the_page_and_none_is_of_a_skipped_label(page: str, evaluation: Evaluation) -> None:
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    names = [re.findall(r'aria-label="(.*?)"', svg)[0] for svg in svgs]
    curves = [f"{kind} curve of" for kind in ("ROC", "precision-recall", "reliability", "decision")]
    curves = [f"{curve} {name}" for curve in curves for name in ("Edema", "Pleural Effusion", "Rare")]
    curves.insert(3, "readers beside the ROC curve of Edema")
    assert names == ["AUROC of each label", *curves, "loss of train and dev by epoch", "AUROC on dev by epoch"]
    for svg in svgs:
        assert "var(--first)" in svg
        assert "currentColor" in svg
        assert not re.findall(r"(?:fill|stroke): #", svg)
    for name in ("Edema", "Pleural Effusion"):
        gains = [evaluation.get("net_benefit_gain", name, group=f"at {at}").shown for at in (0.1, 0.3)]
        assert f"at 0.1 {gains[0]}, at 0.3 {gains[1]}" in page


def test_hostile_names_are_text(images: Scored) -> None:
    names = [HOSTILE, "$\\frac{1}", "{{ config }}", "a|b\n# c"]
    evaluation = assess(names, images, calibrate(names, images), split=HOSTILE)
    evaluate.add_other(evaluation, images, HOSTILE, images.scores)
    evaluation.head |= {"against": [HOSTILE], "left_out": [HOSTILE]}
    page = Page(render_report(HOSTILE, {HOSTILE: HOSTILE}, [], [evaluation], {HOSTILE: images}))
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert page.text.count(HOSTILE) > 20
    assert "{{ config }}" in page.text
    data = {HOSTILE: dict.fromkeys(("samples", "studies", "patients"), 1)}
    card = render_model_card(HOSTILE, CONFIG | {"arch": HOSTILE}, data, [evaluation], {})
    assert not {tag for tag, _ in Page(card).tags}
    assert "\n# c" not in card
    assert "a|b" not in card


def test_the_model_card_states_data_metrics_and_limits(evaluation: Evaluation) -> None:
    data = {"train": {"samples": 1200, "studies": 1100, "patients": 700}}
    card = render_model_card("runs/first", CONFIG, data, [evaluation], {})
    lines = card.splitlines()
    assert lines[0] == "# Model card: runs/first"
    for part in (
        "**For research. Not for clinical use.**",
        "A network that scores 4 findings on chest radiographs, trained on CheXpert-style labels that a program "
        "extracted from reports.",
        "Shards with the manifest of sha256 `ab12`.",
        "The checkpoint is the one with the best AUROC on dev: macro, ≥ 10 patients.",
        "| train | 1,200 | 1,100 | 700 |",
        "| lr | 0.0001 |",
    ):
        assert part in lines
    rates = judged.tabulate_rates(evaluation, "study", "youden", brief=True)
    for table in (judged.tabulate_metrics(evaluation, "image", ""), rates, judged.list_groups(evaluation)[0]):
        assert all(f"| {' | '.join(row)} |" in lines for row in table.rows)
    assert all(f"- {gap}" in lines for gap in judged.describe_gaps(evaluation))
    assert all(f"- {row.note}" in lines for row in evaluation.select(metric="verdict"))
    assert "\n\n\n" not in card
