"""The command `judge`, and the function behind it: scores that anybody made, against the truth of any source."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import recall_score, roc_auc_score

from pipeline import DataError, Judging, judge
from pipeline.measure.evaluation import read_evaluation
from pipeline.sources.table import parse_columns
from tests.conftest import refusal, run_pipeline

FINDINGS = ("Edema", "Infiltration", "Consolidation", "No Finding")
COLUMNS = 'key="Image Index",Edema=p_Edema,Consolidation=p_Consolidation'
Nih = tuple[Path, Path, pd.DataFrame]


@pytest.fixture(scope="module")
def nih(tmp_path_factory: pytest.TempPathFactory) -> Nih:
    """A table like NIH's of 600 images, scores of 500 of them and of 3 others, and both joined."""
    folder, random = tmp_path_factory.mktemp("nih"), np.random.default_rng(0)
    number, finding = np.arange(600), random.integers(0, 4, 600)
    names = [f"{place // 3 + 1:08d}_{place % 3:03d}.png" for place in range(600)]
    table = pd.DataFrame({"Image Index": names, "Finding Labels": np.array(FINDINGS)[finding]})
    table = table.assign(**{"Follow-up #": number % 3, "Patient ID": number // 3 + 1})
    table["Patient Age"], table["Patient Gender"] = random.integers(20, 90, 600), random.choice(["M", "F"], 600)
    table["View Position"] = random.choice(["AP", "PA"], 600)
    table.to_csv(folder / "table.csv", index=False)
    truth = np.column_stack([finding == 0, finding == 2])
    scores = pd.DataFrame(1 / (1 + np.exp(-random.normal(2 * truth - 1, 1))), columns=["p_Edema", "p_Consolidation"])
    scores.insert(0, "Image Index", names)
    kept = pd.concat([scores.sample(500, random_state=1), scores[:3].assign(**{"Image Index": ["x", "y", "z"]})])
    kept.to_csv(folder / "scores.csv", index=False)
    return folder / "table.csv", folder / "scores.csv", kept[:500].merge(table)


def test_a_table_alone_judges_scores(nih: Nih, tmp_path: Path) -> None:
    table, scores, both = nih
    out = tmp_path / "judged"
    words = ("--columns", COLUMNS, "--threshold", "0.5", "--name", "theirs", "--out", out, "--png", out / "png")
    done = run_pipeline("judge", scores, table, *words)
    assert "scores.csv: 100 of 600 images have no row, such as " in done.stderr
    assert "scores.csv: 3 of its images are not in the data set, such as x" in done.stderr
    evaluation = read_evaluation(out / "evaluation.json")
    assert (evaluation.split, evaluation.labels) == ("all", ["Edema", "Consolidation"])
    truth, row = both["Finding Labels"] == "Edema", evaluation.get("auroc", "Edema")
    assert row.value == pytest.approx(roc_auc_score(truth, both["p_Edema"]))
    assert (row.positives, row.negatives) == (truth.sum(), (~truth).sum())
    for side, rows in both.groupby("View Position"):
        expected = roc_auc_score(rows["Finding Labels"] == "Edema", rows["p_Edema"])
        assert evaluation.get("auroc", "Edema", group=f"projection={side}").value == pytest.approx(expected)
    rate = evaluation.get("sensitivity", "Edema", group="given").value
    assert rate == pytest.approx(recall_score(truth, both["p_Edema"] >= 0.5))
    assert "within AP" in next(evaluation.select(metric="verdict", label="Edema")).note
    assert f"│ Edema                   │ {row.shown} │" in done.stdout
    assert [file.name for file in sorted(out.iterdir())] == ["card.md", "evaluation.json", "png", "report.html"]
    assert (out / "png" / "auroc-of-each-label.png").stat().st_size > 1000
    card = (out / "card.md").read_text()
    assert card.startswith("# Model card: theirs\n")
    assert f"| Edema | {row.shown} |" in card
    assert "100 of 600 images have no row" in (out / "report.html").read_text()


def test_cells_that_a_set_leaves_open_may_count_as_negative(nih: Nih) -> None:
    """NIH's infiltrates may be consolidations: figures of others count them as negative."""
    table, scores, both = nih
    columns = parse_columns(COLUMNS)
    plain, filled = (judge(scores, table, Judging(columns=columns, open=how)) for how in ("ignore", "zeros"))
    truth = both["Finding Labels"] == "Consolidation"
    for judged, rows in ((plain, both["Finding Labels"] != "Infiltration"), (filled, np.ones(500, bool))):
        row = judged.evaluation.get("auroc", "Consolidation")
        assert row.value == pytest.approx(roc_auc_score(truth[rows], both["p_Consolidation"][rows]))
        assert (row.positives, row.negatives) == (truth.sum(), (rows & ~truth).sum())


def test_a_fifth_of_the_patients_of_a_table_alone_may_be_dev(nih: Nih) -> None:
    table, scores, both = nih
    notes: list[str] = []
    judging = Judging(columns=parse_columns(COLUMNS), dev="dev")
    evaluation = judge(scores, table, judging, notes.append).evaluation
    patients, judged = both["Patient ID"].nunique(), evaluation.get("patients").number
    assert 0.7 * patients < judged < 0.9 * patients
    dev = f"{patients - judged:.0f} of {patients} patients"
    assert notes[-1] == f"table.csv: {dev}, by a hash of their names, are dev"
    assert evaluation.get("threshold", "Edema", group="youden").value is not None


def test_two_readers_and_a_network_stand_on_one_page(nih: Nih, tmp_path: Path) -> None:
    table, scores, both = nih
    truth = both["Finding Labels"] == "Edema"
    calls = {"a": truth, "b": np.arange(500) % 2 == 0}
    for name, called in calls.items():
        frame = pd.DataFrame({"key": both["Image Index"], "Edema": called.astype(int)})
        frame[50:].to_csv(tmp_path / f"{name}.csv", index=False)
    other = pd.read_csv(scores).assign(p_Edema=np.random.default_rng(5).random(503))
    other["p_Consolidation"] = 1 - other["p_Consolidation"]
    other.to_csv(tmp_path / "other.csv", index=False)
    words = f"--readers {tmp_path}/a.csv --readers {tmp_path}/b.csv --against {tmp_path}/other.csv".split()
    done = run_pipeline("judge", scores, table, "--columns", COLUMNS, *words, "--out", tmp_path / "out")
    evaluation = read_evaluation(tmp_path / "out" / "evaluation.json")
    for name, called in calls.items():
        rate = evaluation.get("sensitivity", "Edema", "study", scorer=name)
        assert rate.value == pytest.approx(recall_score(truth[50:], called[50:]))
    assert [evaluation.get("below", "Edema", "study", scorer=name).value for name in calls] == [0, 1]
    less = evaluation.get("auroc_difference", "Consolidation", scorer="other")
    assert less.value == pytest.approx(2 * evaluation.get("auroc", "Consolidation").number - 1)
    assert "below the curve: 1 of 2, readers times labels" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'aria-label="readers beside the ROC curve of Edema"' in page


def test_what_cannot_be_judged_is_refused(nih: Nih, tmp_path: Path) -> None:
    table, scores, _ = nih
    for words, message in {
        ("--columns", "Edema,path=x"): "Edema has no column; 'path' is none of key, patient, study, No Finding",
        ("--dev", "dev", "--threshold", "0.5"): "--threshold is for scores without --dev",
    }.items():
        code, line = refusal("judge", scores, table, *words)
        assert (code, message in line) == (2, True), line
    few = tmp_path / "few.csv"
    pd.read_csv(scores)[:400].to_csv(few, index=False)
    for options, message in (
        ({"dev": "train"}, r"one CSV without splits, in which `dev` is 20% of the patients; "),
        ({"against": (few,)}, r"few.csv: no scores of \d+ of these 500 images, such as 0"),
        ({"against": (few, few)}, r"two files of one name, by which they are shown; rename one$"),
    ):
        with pytest.raises(DataError, match=message):
            judge(scores, table, Judging(columns=parse_columns(COLUMNS), **options))
    with pytest.raises(DataError, match=r"^`dev` dev is to be judged, too; name another, or another `split` to judge$"):
        judge(scores, tmp_path, Judging(dev="dev"))


def test_scores_of_studies_are_judged_by_study(chexpert: Path, tmp_path: Path) -> None:
    paths = pd.read_csv(chexpert / "train.csv")["Path"].str.split("/").str[2:4].str.join("/").unique()
    pd.DataFrame({"study": paths, "Edema": np.linspace(0, 1, len(paths))}).to_csv(tmp_path / "scores.csv", index=False)
    evaluation, images = judge(tmp_path / "scores.csv", chexpert / "train.csv")
    assert (evaluation.unit, evaluation.get("studies").value, len(images.scores)) == ("study", len(paths), len(paths))


def test_logits_facts_and_means_over_views_are_judged_as_asked(nih: Nih, tmp_path: Path) -> None:
    table, scores, both = nih
    both = both.assign(sick=both["Finding Labels"] == "Edema")
    both["site"] = np.where(both["Patient ID"] % 2, "odd", "even")
    logits = pd.read_csv(scores)
    logits.iloc[:, 1:] = np.log(logits.iloc[:, 1:] / (1 - logits.iloc[:, 1:]))
    logits.to_csv(tmp_path / "logits.csv", index=False)
    facts = both.rename(columns={"Patient ID": "patient"})[["patient", "site"]].drop_duplicates()
    facts.to_csv(tmp_path / "facts.csv", index=False)
    pd.read_csv(table).assign(**{"Follow-up #": 0}).to_csv(tmp_path / "table.csv", index=False)
    words = ("--columns", COLUMNS, "--logits", "--facts", tmp_path / "facts.csv", "--study", "mean")
    run_pipeline("judge", tmp_path / "logits.csv", tmp_path / "table.csv", *words, "--out", tmp_path / "out")
    get = read_evaluation(tmp_path / "out" / "evaluation.json").get
    for site, rows in both.groupby("site"):
        expected = roc_auc_score(rows["sick"], rows["p_Edema"])
        assert get("auroc", "Edema", group=f"site={site}").value == pytest.approx(expected)
    studies = both.groupby("Patient ID").agg({"sick": "max", "p_Edema": "mean"})
    assert get("auroc", "Edema", "study").value == pytest.approx(roc_auc_score(studies["sick"], studies["p_Edema"]))
