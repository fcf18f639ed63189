"""Cross-validation by patient over all of a set's labeled films, and two ways to train compared film by film.

    .venv/bin/python -m benchmarks.folds split nih-sample folds        folds/train0.csv, folds/valid0.csv, …
    .venv/bin/python -m benchmarks.folds compare --shards shards/fold --within Pneumonia runs/crop runs/robust

Every film is scored once, by the network that was not trained on its patient. Between the two, runs of each fold are
trained: runs/crop-0 on shards/fold-0, and so on. Each network has a scale of its own, so scores are replaced by their
ranks within their fold before they are pooled. `--within` takes the films with that label alone: where a sample's
positives are from other years or devices than its negatives, that leaves this out of the other labels' AUROCs.
"""

from pathlib import Path

import click
import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.model_selection import StratifiedGroupKFold

from pipeline import open_shards
from pipeline.labels import LABELS
from pipeline.measure.delong import Areas, combine_limits, measure_areas, weigh_labels
from pipeline.measure.metrics import Floats

FEWEST = 10  # of each class


@click.group()
def main() -> None:
    """Write folds, or compare runs that were trained on them."""


@main.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--folds", default=5, show_default=True)
@click.option("--label", default="Pneumonia", show_default=True, help="As frequent in each fold.")
def split(source: Path, out: Path, folds: int, label: str) -> None:
    """Divide the patients of train.csv and valid.csv below SOURCE into FOLDS, as CSVs in OUT."""
    tables = [pd.read_csv(next(source.rglob(f"{name}.csv"))) for name in ("train", "valid")]
    films = pd.concat(tables, ignore_index=True)
    patient = films["Path"].str.extract(r"(patient\d+)")[0]
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    out.mkdir(parents=True, exist_ok=True)
    for fold, (kept, left) in enumerate(parts.split(films, films[label] == 1, patient)):
        films.iloc[kept].to_csv(out / f"train{fold}.csv", index=False)
        films.iloc[left].to_csv(out / f"valid{fold}.csv", index=False)


def pool_folds(shards: str, prefix: str, folds: int) -> pd.DataFrame:
    """Truth and ranks of all films, by key, in a column `<label> score` each; ranks are shares of the fold."""
    parts = []
    for fold in range(folds):
        with pa.memory_map(f"{prefix}-{fold}/scores-valid.arrow") as file:
            scores = pa.ipc.open_file(file).read_all().to_pandas().set_index("key")[list(LABELS)]
        truth = open_shards(f"{shards}-{fold}")["valid"].table.to_pandas().set_index("key")
        parts.append(
            truth[["patient", *LABELS]].join(scores.rank(pct=True).add_suffix(" score"), how="inner")
        )
    return pd.concat(parts).sort_index()


def areas_of(films: pd.DataFrame) -> Areas:
    target = films[list(LABELS)].to_numpy(float)
    scores = films[[f"{label} score" for label in LABELS]].to_numpy(float)
    return measure_areas(scores, target, np.isin(target, (0, 1)), films["patient"].to_numpy())


def describe(title: str, first: Areas, second: Areas, weights: Floats) -> str:
    """Both means and the second less the first, with limits."""
    both, none = first.join(second), np.zeros(len(LABELS))
    shown = []
    for sides, style in (((weights, none), ".3f"), ((none, weights), ".3f"), ((-weights, weights), "+.3f")):
        weight = np.concatenate(sides)
        values = np.nansum(weight * both.auroc), *combine_limits(both, weight).values()
        shown.append("{} [{}, {}]".format(*(format(value, style) for value in values)))
    return f"{title:18} {shown[0]}   {shown[1]}   difference {shown[2]}"


@main.command()
@click.argument("first")
@click.argument("second")
@click.option("--shards", required=True, help="PREFIX of the folders of shards: PREFIX-0, …")
@click.option("--within", type=click.Choice(LABELS), help="Only the films with this label.")
@click.option("--folds", default=5, show_default=True)
def compare(first: str, second: str, shards: str, within: str | None, folds: int) -> None:
    """Print AUROCs of the runs FIRST-0, … and SECOND-0, …, and their paired differences."""
    pooled = [pool_folds(shards, prefix, folds) for prefix in (first, second)]
    if list(pooled[0].index) != list(pooled[1].index):
        raise click.ClickException(f"{first} and {second} scored different films")
    kept = pooled[0].index if within is None else pooled[0].index[pooled[0][within] == 1]
    one, other = (areas_of(films.loc[kept]) for films in pooled)
    target = pooled[0].loc[kept]
    counts = {label: ((target[label] == 1).sum(), (target[label] == 0).sum()) for label in LABELS}
    enough = [label for label, of_class in counts.items() if min(of_class) >= FEWEST]
    print(f"{len(kept)} films of {target['patient'].nunique()} patients: {first}, then {second}")
    for label in enough:
        positives, negatives = counts[label]
        print(describe(label, one, other, weigh_labels(LABELS, [label])), f"  {positives} / {negatives}")
    print(describe("mean", one, other, weigh_labels(LABELS, enough)))


if __name__ == "__main__":
    main()
