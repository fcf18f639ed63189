"""An evaluation: a head, and one flat table with a row for each result, as in evaluation.json.

    evaluation.get("auroc", "Edema").value             # of the judged scores, per image
    evaluation.get("auroc", "macro10", "study").low
    evaluation.select(metric="verdict")

A row's `label` is a finding, a mean over findings (MEANS, COMMON), or null for all. `group` names the images or the
threshold: `sex=Female`, `youden`. `scorer` names the source of the scores, if not the judged ones: another run, a
reader, a member, an alteration of the images. Undefined figures are null and never part of a mean.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.base.errors import DataError
from pipeline.base.files import read_object

MEANS = {"macro": "macro", "macro10": "macro, ≥ 10 patients", "mean5": "mean of competition's 5"}
COMMON = "common"  # the mean over the findings on which two data sets can be compared
OWN = "own valid"  # the group of figures on a run's own valid
Text = str | None
UNITS = {"image": "images", "study": "studies"}  # of a level


@dataclass(frozen=True, slots=True)
class Row:
    """One figure with its 95 % limits, and the cells of each class that it rests on."""

    level: str  # image or study
    split: str
    label: str | None
    group: str | None
    metric: str
    scorer: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    positives: float | None = None
    negatives: float | None = None
    few: bool = False  # whether a class has fewer than 10 patients
    note: str = ""

    @property
    def number(self) -> float:
        """The figure; NaN if it is undefined."""
        return float("nan") if self.value is None else self.value

    @property
    def shown(self) -> str:
        """The figure and its limits, to three places."""
        return self._show("z.3f")

    @property
    def change(self) -> str:
        """The same of a difference, with its sign."""
        return self._show("+z.3f")

    def _show(self, form: str) -> str:
        figure = "–" if self.value is None else f"{self.value:{form}}"
        return figure if self.low is None else f"{figure} [{self.low:{form}}, {self.high:{form}}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether the limits are on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass
class Evaluation:
    """The results of scores on a split; `head` describes the evaluation, ready for JSON."""

    head: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Index the rows, and read the split, the unit (image or study) and the findings from the head."""
        self.split, self.unit = str(self.head["split"]), str(self.head["unit"])
        self.labels: list[str] = list(self.head["labels"])
        self.levels = ["image", "study"] if self.unit == "image" else ["study"]
        self._index = {(row.metric, row.label, row.level, row.group, row.scorer): row for row in self.rows}

    @property
    def distinct_levels(self) -> list[str]:
        """The levels, without studies if each has one image, so that both levels are the same."""
        alone = self.get("images", None, "image").value == self.get("studies", None, "study").value
        return self.levels[: 1 if alone else None]

    def add(
        self, level: str, label: Text, metric: str, value: float | None = None, group: Text = None, **fields: Any
    ) -> None:
        """Add a row; `fields` are its other fields: low, high, positives, negatives, few, scorer, note."""
        row = Row(level, self.split, label, group, metric, value=value, **fields)
        self.rows.append(row)
        self._index[metric, label, level, group, row.scorer] = row

    def get(self, metric: str, label: Text = None, level: Text = None, group: Text = None, scorer: Text = None) -> Row:
        """The row; an empty one if there is none. The level is by default the unit."""
        level = level or self.unit
        empty = Row(level, self.split, label, group, metric, scorer)
        return self._index.get((metric, label, level, group, scorer), empty)

    def select(self, **values: str | None) -> Iterator[Row]:
        """The rows with these values in their fields, in order."""
        for row in self.rows:
            if all(getattr(row, name) == value for name, value in values.items()):
                yield row

    def best_mean(self, level: str | None = None) -> str:
        """The mean to show first: over findings with 10 patients of each class, if there is any."""
        return "macro" if self.get("auroc", "macro10", level).value is None else "macro10"

    def to_json(self) -> bytes:
        """The document: the head, and a line for each row."""
        head = json.dumps(self.head, indent=1, allow_nan=False).removesuffix("\n}")
        lines = ",\n  ".join(json.dumps(asdict(row), allow_nan=False) for row in self.rows)
        return f'{head},\n "rows": [\n  {lines}\n ]\n}}\n'.encode()


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation as `to_json` writes it. Raises DataError for another file."""
    head = read_object(path)
    try:
        rows = [Row(**row) for row in head.pop("rows")]
        missing = {"split", "unit", "labels"} - head.keys()
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not an evaluation: {error}; write it again with evaluate") from error
    if missing:
        raise DataError(f"{path}: not an evaluation: no {min(missing)}; write it again with evaluate")
    return Evaluation(head, rows)
