"""Targets and covariates of a label table → which non-disease factors predict each label, worst first.

An acquisition covariate, such as the patient's number or the gray level of the border, describes how the image was
acquired; a content covariate, such as its sharpness, may show the disease itself. Both get the AUROC A with which they
predict a label, and a test of H0: max(A, 1 - A) <= .6. Both directions count, so the p-value is two-sided:

    p = 2 (1 - Φ((max(A, 1 - A) - .6) / √(design · V(.6))))      (V and design: `delong`; V(θ) = V(1 - θ))

which is at most α exactly if the two-sided limits of A at level 1 - α lie above .6 or below .4. All covariates together
are tested one-sided: a model below .5 on unseen patients predicts nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy

from pipeline.labels import LABELS, name_ages
from pipeline.measure.delong import measure_areas, score_limits, score_variance
from pipeline.measure.metrics import NOTHING, Bools, Facts, Floats, Ints, Named, count_classes, student_quantile

THRESHOLD = 0.6  # an AUROC that no covariate of a sound data set should exceed
LEVEL = 0.05
PATIENT, TOGETHER = "patient number", "all together"
DEVICES = "Support Devices"
FOLDS = 5
MOST_PATIENTS = 20_000  # for the model of all covariates together
# Columns of numbers, and what to call them.
NUMBERS = {
    "study": "study number",
    "age": "age",
    "width": "original width",
    "height": "original height",
    "bits": "bit depth",
    "jpeg_quality": "JPEG quality",
}
# Columns of names, and the two values to compare; the covariate is named by the second, and is 1 for it.
PAIRS = {"view": ("frontal", "lateral"), "projection": ("PA", "AP"), "sex": ("Female", "Male")}


@dataclass(frozen=True)
class Clue:
    """How well a covariate predicts a label: AUROC with 95 % limits, below .5 if it is lower in positives.

    `kind` is acquisition, content or together. `strength` is max(AUROC, 1 - AUROC), `adjusted` its lower limit after
    Holm, and `exceeds` whether that is above the threshold. `design` is the effect of patients as clusters.
    """

    label: str
    covariate: str
    kind: str
    auroc: float
    low: float
    high: float
    design: float
    positives: int
    negatives: int
    strength: float
    adjusted: float = 0.0
    exceeds: bool = False

    def variance(self, theta: float) -> float:
        """The variance of an AUROC of θ, of this many cells."""
        return self.design * score_variance(theta, self.positives, self.negatives)

    @property
    def alarm(self) -> bool:
        """Whether the label may be a shortcut's; image content may be the disease itself."""
        return self.exceeds and self.kind != "content"

    @property
    def limits(self) -> str:
        """The 95 % limits of the strength."""
        low, high = (self.low, self.high) if self.strength == self.auroc else (1 - self.high, 1 - self.low)
        return f"{shorten(low)}–{shorten(high)}"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """All clues, by `adjusted` from the highest down.

    `left_out` gives why a covariate is missing; `few` are annotated labels with fewer than 10 patients in a class.
    """

    images: int
    patients: int
    threshold: float = THRESHOLD
    level: float = LEVEL
    left_out: dict[str, str]
    few: list[str]
    clues: list[Clue]

    @property
    def alarms(self) -> dict[str, list[Clue]]:
        """The clues that raise an alarm, by label, worst first."""
        labels = dict.fromkeys(clue.label for clue in self.clues if clue.alarm)
        return {label: [clue for clue in self.clues if clue.alarm and clue.label == label] for label in labels}

    @property
    def size(self) -> str:
        """How much was audited."""
        return f"{self.images:,} images of {self.patients:,} patient{'' if self.patients == 1 else 's'}"

    @property
    def notes(self) -> list[str]:
        """What could not be tested, in words."""
        left_out = ", ".join(f"{name} ({reason})" for name, reason in self.left_out.items())
        notes = {"Not tested": left_out, "Fewer than 10 patients in a class": ", ".join(self.few)}
        return [f"{text}: {names}." for text, names in notes.items() if names]

    def describe_alarms(self) -> list[str]:
        """A sentence for each label with alarms, worst first."""
        texts = []
        for label, clues in self.alarms.items():
            first, *others = sorted(clues, key=lambda clue: clue.kind == "together")
            alone = f"{first.covariate} alone predicts"
            predictor = "all covariates together predict" if first.kind == "together" else alone
            rest = ", ".join(f"{clue.covariate} {shorten(clue.strength)}" for clue in others)
            text = f"{label}: {predictor} it with AUROC {shorten(first.strength)} ({first.limits})"
            texts.append(f"{text}; {rest}" if rest else text)
        return texts


def audit_labels(
    table: pa.Table, target: Floats, mask: Bools, edge: Named = NOTHING, content: Named = NOTHING, together: bool = True
) -> Audit:
    """What predicts the labels of a table, whose targets [N, 14] are in {0, 1} on the cells of mask [N, 14].

    Covariates [N], besides the table's, are NaN if unknown. Those of the image's `edge` are acquisition covariates, but
    content for Support Devices, whose wires cross it. Without `together`, no model of all of them is fitted.
    """
    # In the order of their names, so that folds do not depend on the order of rows.
    patient = np.unique(table["patient"].to_numpy(), return_inverse=True)[1]
    acquisition, left_out = find_covariates(table)
    covariates = {**acquisition, **edge, **content}
    values = np.column_stack([np.empty((len(patient), 0)), *covariates.values()])
    clues: list[Clue] = []
    few: list[str] = []
    for column, label in enumerate(LABELS):
        truth, used = target[:, column] == 1, mask[:, column]
        if count_classes(truth[used], patient[used])["few"]:
            few += [label] if used.any() else []
            continue
        inside = len(acquisition) + (0 if label == DEVICES else len(edge))
        kinds = {name: "acquisition" if at < inside else "content" for at, name in enumerate(covariates)}
        scores = values
        if together and inside:
            kinds[TOGETHER] = "together"
            scores = np.column_stack([values, predict(values[:, :inside], truth, used, patient)])
        known = ~np.isnan(scores) & used[:, None]
        targets = np.broadcast_to(truth[:, None].astype(float), known.shape)
        areas = measure_areas(np.nan_to_num(scores), targets, known, patient)
        for place, (name, kind) in enumerate(kinds.items()):
            if not areas.few[place]:
                auroc, low, high, _, design = (float(part[place]) for part in areas[:5])
                sizes = int(areas.positives[place]), int(areas.negatives[place])
                strength = auroc if kind == "together" else max(auroc, 1 - auroc)
                clues.append(Clue(label, name, kind, auroc, low, high, design, *sizes, strength))
    clues = sorted(_adjust(clues), key=lambda clue: -clue.adjusted)
    return Audit(images=len(patient), patients=int(patient.max()) + 1, left_out=left_out, few=few, clues=clues)


def predict(values: Floats, goal: Bools | Floats, used: Bools, patient: Ints) -> Floats:
    """Predictions of a label or a number [N] from covariates [N, C], for patients that the model did not see.

    Boosted trees on five folds of at most 20,000 patients; NaN without a prediction. Predictions are ranks within their
    fold, as the models' levels differ by their training patients' share of positives.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor  # take a second
    from threadpoolctl import threadpool_limits

    trees = HistGradientBoostingClassifier if goal.dtype == bool else HistGradientBoostingRegressor
    order = np.random.default_rng(0).permutation(patient.max() + 1)[patient]
    fold = np.where(used & (order < MOST_PATIENTS), order % FOLDS, -1)
    score = np.full(len(goal), np.nan)
    # OpenMP's threads would spin while waiting for each other, which slows other processes.
    with threadpool_limits(1):
        for number in range(FOLDS):
            inside, outside = fold == number, (fold != number) & (fold >= 0)
            if not inside.any() or not outside.any() or np.ptp(goal[outside].astype(float)) == 0:
                continue
            model = trees(max_iter=20, learning_rate=0.2, max_leaf_nodes=8, early_stopping=False, random_state=0)
            model.fit(values[outside], goal[outside])
            rows = values[inside]
            predicted = model.predict_proba(rows)[:, 1] if goal.dtype == bool else model.predict(rows)
            score[inside] = (scipy.stats.rankdata(predicted) - 0.5) / len(predicted)
    return score


def shorten(figure: float) -> str:
    """Two decimals, without a leading zero."""
    return f"{figure:.2f}".removeprefix("0")


def _adjust(clues: Sequence[Clue]) -> Iterator[Clue]:
    """The clues with their adjusted limits, and which exceed the threshold; all tests together keep the level.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979: the k-th
    smallest of m p-values is compared with LEVEL / (m - k + 1), and after the first that is too large no H0 is
    rejected. The adjusted limit is that of the strength at the test's level: above the threshold if H0 is rejected.
    """

    def deviation(clue: Clue) -> float:  # of the strength from the threshold, in standard errors
        return float((clue.strength - THRESHOLD) / clue.variance(THRESHOLD) ** 0.5)

    rejected, quantile = True, 0.0
    for rank, clue in enumerate(sorted(clues, key=deviation, reverse=True)):
        if rejected:
            quantile = student_quantile(np.inf, LEVEL / (len(clues) - rank))
            rejected = deviation(clue) > quantile
        yield replace(clue, adjusted=score_limits(clue.strength, clue.variance, quantile)[0], exceeds=rejected)


def find_covariates(table: pa.Table) -> tuple[dict[str, Floats], dict[str, str]]:
    """Covariates [N] of a label table that differ between images, NaN if unknown; and why others are left out."""
    unknown = np.full(table.num_rows, np.nan)
    digits = pc.struct_field(pc.extract_regex(table["patient"], r"(?P<number>\d{1,15})$"), "number")
    covariates = {PATIENT: unknown if digits.null_count else digits.cast(pa.float64()).to_numpy()}
    for column, name in NUMBERS.items():
        known = column in table.column_names
        covariates[name] = pc.fill_null(table[column].cast(pa.float64()), np.nan).to_numpy() if known else unknown
    for column, pair in PAIRS.items():
        place = pc.index_in(table[column], value_set=pa.array(pair))
        covariates[pair[1]] = pc.fill_null(place.cast(pa.float64()), np.nan).to_numpy()
    sets = table["set"].unique().to_pylist() if "set" in table.column_names else []
    for value in sets if len(sets) > 1 else ():
        covariates[f"set {value}"] = pc.equal(table["set"], value).cast(pa.float64()).to_numpy()
    left_out = {}
    for name, value in covariates.items():
        if np.isnan(value).all():
            left_out[name] = "not every name ends in a number" if name == PATIENT else "unknown"
        elif np.nanmin(value) == np.nanmax(value):
            left_out[name] = "the same in all images"
    return {name: value for name, value in covariates.items() if name not in left_out}, left_out


def find_strata(table: pa.Table) -> Facts:
    """Names [N] by variable, empty if unknown: projection, sex, age band and, of several sets, the set."""
    lateral = pc.equal(table["view"], "lateral")
    known = pc.is_in(table["sex"], pa.array(["Female", "Male"]))
    ages = name_ages(pc.fill_null(table["age"], -1).to_numpy())
    strata = {
        "projection": pc.if_else(lateral, "lateral", pc.fill_null(table["projection"], "")).to_numpy(),
        "sex": pc.if_else(known, table["sex"], "").to_numpy(),
        "age": np.where(ages == "unknown", "", ages),
    }
    if "set" in table.column_names:
        strata["set"] = table["set"].to_numpy()
    return {variable: names for variable, names in strata.items() if len(set(names.tolist()) - {""}) > 1}
