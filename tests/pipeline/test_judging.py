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


@pytest.fixture(scope="module")
def nih(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, pd.DataFrame]:
    """A table like NIH's of 600 images, scores of 500 of them and of 3 others, and both joined."""
    folder, random = tmp_path_factory.mktemp("nih"), np.random.default_rng(0)
    names = [f"{number // 3 + 1:08d}_{number % 3:03d}.png" for number in range(600)]
    found = random.integers(0, 4, 600)
    table = pd.DataFrame(
        {
            "Image Index": names,
            "Finding Labels": np.array(FINDINGS)[found],
            "Follow-up #": np.arange(600) % 3,
            "Patient ID": np.arange(600) // 3 + 1,
            "Patient Age": random.integers(20, 90, 600),
            "Patient Gender": random.choice(["M", "F"], 600),
            "View Position": random.choice(["AP", "PA"], 600),
        }
    )
    table.to_csv(folder / "table.csv", index=False)
    truth = np.column_stack([found == 0, found == 2])
    scores = pd.DataFrame(1 / (1 + np.exp(-random.normal(2 * truth - 1, 1))), columns=["p_Edema", "p_Consolidation"])
    scores.insert(0, "Image Index", names)
    kept = pd.concat([scores.sample(500, random_state=1), scores[:3].assign(**{"Image Index": ["x", "y", "z"]})])
    kept.to_csv(folder / "scores.csv", index=False)
    return folder / "table.csv", folder / "scores.csv", kept[:500].merge(table)


def test_a_table_alone_judges_scores(nih: tuple[Path, Path, pd.DataFrame], tmp_path: Path) -> None:
    table, scores, both = nih
    out = tmp_path / "judged"
    words = ("--columns", COLUMNS, "--threshold", "0.5", "--name", "theirs", "--out", out, "--png", out / "png")
    done = run_pipeline("judge", scores, table, *words)
    assert "scores.csv: 100 of 600 images have no row, such as " in done.stderr
    assert "scores.csv: 3 of its images are not in the data set, such as x" in done.stderr
    found = read_evaluation(out / "evaluation.json")
    assert (found.split, found.labels) == ("all", ["Edema", "Consolidation"])
    truth = both["Finding Labels"] == "Edema"
    row = found.get("auroc", "Edema")
    assert row.value == pytest.approx(roc_auc_score(truth, both["p_Edema"]))
    assert (row.positives, row.negatives) == (truth.sum(), (~truth).sum())
    for side in ("AP", "PA"):
        rows = both["View Position"] == side
        expected = roc_auc_score(truth[rows], both["p_Edema"][rows])
        assert found.get("auroc", "Edema", group=f"projection={side}").value == pytest.approx(expected)
    rate = found.get("sensitivity", "Edema", group="given").value
    assert rate == pytest.approx(recall_score(truth, both["p_Edema"] >= 0.5))
    assert "within AP" in next(found.select(metric="verdict", label="Edema")).note
    assert f"│ Edema                   │ {row.shown} │" in done.stdout
    assert [file.name for file in sorted(out.iterdir())] == ["card.md", "evaluation.json", "png", "report.html"]
    assert (out / "png" / "auroc-of-each-label.png").stat().st_size > 1000
    card = (out / "card.md").read_text()
    assert card.startswith("# Model card: theirs\n")
    assert f"| Edema | {row.shown} |" in card
    assert "100 of 600 images have no row" in (out / "report.html").read_text()


def test_cells_that_a_set_leaves_open_may_count_as_negative(nih: tuple[Path, Path, pd.DataFrame]) -> None:
    """NIH's infiltrates may be consolidations: figures of others count them as negative."""
    table, scores, both = nih
    columns = parse_columns(COLUMNS)
    plain, filled = (judge(scores, table, Judging(columns=columns, open=how)) for how in ("ignore", "zeros"))
    truth = both["Finding Labels"] == "Consolidation"
    known = both["Finding Labels"] != "Infiltration"
    for judged, rows in ((plain, known), (filled, np.ones(500, bool))):
        row = judged.evaluation.get("auroc", "Consolidation")
        assert row.value == pytest.approx(roc_auc_score(truth[rows], both["p_Consolidation"][rows]))
        assert (row.positives, row.negatives) == (truth.sum(), (rows & ~truth).sum())


def test_a_fifth_of_the_patients_of_a_table_alone_may_be_dev(nih: tuple[Path, Path, pd.DataFrame]) -> None:
    table, scores, both = nih
    notes: list[str] = []
    found = judge(scores, table, Judging(columns=parse_columns(COLUMNS), dev="dev"), notes.append).evaluation
    patients = both["Patient ID"].nunique()
    judged = found.get("patients").number
    assert 0.7 * patients < judged < 0.9 * patients
    assert notes[-1] == (
        f"table.csv: {patients - judged:.0f} of {patients} patients, by a hash of their names, are dev"
    )
    assert found.get("threshold", "Edema", group="youden").value is not None
    assert found.get("bias", "Edema").note == "" or found.get("bias", "Edema").value is None


def test_two_readers_and_a_network_stand_on_one_page(nih: tuple[Path, Path, pd.DataFrame], tmp_path: Path) -> None:
    table, scores, both = nih
    truth = both["Finding Labels"] == "Edema"
    calls = {"a": truth, "b": np.arange(500) % 2 == 0}
    for name, called in calls.items():
        frame = pd.DataFrame({"key": both["Image Index"], "Edema": called.astype(int)})
        frame[50:].to_csv(tmp_path / f"{name}.csv", index=False)
    other = pd.read_csv(scores).assign(p_Edema=0.5, p_Consolidation=lambda one: 1 - one["p_Consolidation"])
    other["p_Edema"] = np.random.default_rng(5).random(len(other))
    other.to_csv(tmp_path / "other.csv", index=False)
    words = f"--readers {tmp_path}/a.csv --readers {tmp_path}/b.csv --against {tmp_path}/other.csv".split()
    done = run_pipeline("judge", scores, table, "--columns", COLUMNS, *words, "--out", tmp_path / "out")
    found = read_evaluation(tmp_path / "out" / "evaluation.json")
    for name, called in calls.items():
        rate = found.get("sensitivity", "Edema", "study", scorer=name)
        assert rate.value == pytest.approx(recall_score(truth[50:], called[50:]))
    assert [found.get("below", "Edema", "study", scorer=name).value for name in calls] == [0, 1]
    less = found.get("auroc_difference", "Consolidation", scorer="other")
    assert less.value == pytest.approx(2 * found.get("auroc", "Consolidation").number - 1)
    assert "below the curve: 1 of 2, readers times labels" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'aria-label="readers beside the ROC curve of Edema"' in page


def test_what_cannot_be_judged_is_refused(nih: tuple[Path, Path, pd.DataFrame], tmp_path: Path) -> None:
    table, scores, _ = nih
    for words, message in {
        ("--columns", "Edema,path=x"): "Edema has no column; 'path' is none of key, patient, study, No Finding",
        ("--dev", "dev", "--threshold", "0.5"): "--threshold is for scores without --dev",
    }.items():
        code, said = refusal("judge", scores, table, *words)
        assert (code, message in said) == (2, True), said
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


def test_logits_facts_and_means_over_views_are_judged_as_asked(
    nih: tuple[Path, Path, pd.DataFrame], tmp_path: Path
) -> None:
    table, scores, both = nih
    logits = pd.read_csv(scores)
    for name in ("p_Edema", "p_Consolidation"):
        logits[name] = np.log(logits[name] / (1 - logits[name]))
    logits.to_csv(tmp_path / "logits.csv", index=False)
    site = np.where(both["Patient ID"] % 2 == 0, "even", "odd")
    facts = pd.DataFrame({"patient": both["Patient ID"], "site": site}).drop_duplicates()
    facts.to_csv(tmp_path / "facts.csv", index=False)
    pd.read_csv(table).assign(**{"Follow-up #": 0}).to_csv(tmp_path / "table.csv", index=False)
    words = ("--columns", COLUMNS, "--logits", "--facts", tmp_path / "facts.csv", "--study", "mean")
    run_pipeline("judge", tmp_path / "logits.csv", tmp_path / "table.csv", *words, "--out", tmp_path / "out")
    found = read_evaluation(tmp_path / "out" / "evaluation.json")
    both = both.assign(site=site, truth=both["Finding Labels"] == "Edema")
    for group, rows in (("even", site == "even"), ("odd", site == "odd")):
        expected = roc_auc_score(both["truth"][rows], both["p_Edema"][rows])
        assert found.get("auroc", "Edema", group=f"site={group}").value == pytest.approx(expected)
    studies = both.groupby("Patient ID").agg({"truth": "max", "p_Edema": "mean"})
    expected = roc_auc_score(studies["truth"], studies["p_Edema"])
    assert found.get("auroc", "Edema", "study").value == pytest.approx(expected)
