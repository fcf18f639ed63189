"""An evaluation → its tables, for a terminal, a page and a card; each is a query of the rows."""

from collections.abc import Iterator, Sequence

from pipeline.base.tabular import Heading, Table
from pipeline.measure.compare import ALTERED, MEMBERS
from pipeline.measure.evaluate import AREAS, GIVEN, KEPT
from pipeline.measure.evaluation import COMMON, MEANS, OWN, UNITS, Evaluation, Row

TITLES = {
    "youden": "Youden's J",
    "max_f1": "highest F1",
    "sensitivity": "sensitivity",
    GIVEN: "a given score",
}
WIDENED = (
    "The run's own macro is over other labels, so the limits of this mean on its valid are the means of its labels' "
    "limits: too wide rather than too narrow."
)
RATES = ("sensitivity", "specificity", "ppv", "npv", "f1")
MARKS = {  # of verdicts
    "shown": "Shortcut shown",
    "partly": "Partly a shortcut",
    "unclear": "Cannot tell whether a shortcut explains",
    "none": "No shortcut found for",
}


def name_row(evaluation: Evaluation, label: str, level: str | None = None) -> str:
    """What a finding or a mean is called in tables, marked if it has few patients of a class."""
    few = evaluation.get("auroc", label, level).few
    return f"{MEANS.get(label, label)}{' (few)' if few else ''}"


def show(value: float | None) -> str:
    """Three places; an undefined figure as a dash."""
    return "–" if value is None else f"{value:.3f}"


def count(value: float | None) -> str:
    """A count with commas."""
    return "–" if value is None else f"{value:,.0f}"


def tabulate_auroc(evaluations: Sequence[Evaluation]) -> Table:
    """AUROC of one or more splits, with positives and negatives; limits as far as 80 columns have room for them."""
    alone = len(evaluations) == 1
    columns: list[Heading] = ["label"]
    for one in evaluations:
        columns += [(one.split, "AUROC [95 %]" if alone else "AUROC"), (one.split, "pos / neg")]
    rows = []
    for label in (*evaluations[0].labels, *MEANS):
        cells = [MEANS.get(label, label)]
        for one in evaluations:
            row = one.get("auroc", label)
            counts = f"{'few ' if row.few else ''}{count(row.positives)} / {count(row.negatives)}"
            if label in one.head.get("not_annotated", ()):
                counts = "not annotated"
            elif label in MEANS:
                counts = "" if alone or row.low is None else f"{row.low:.3f}-{row.high:.3f}"
            cells += [row.shown if alone else show(row.value), counts]
        rows.append(cells)
    return Table("AUROC", columns, rows, means=len(MEANS))


def tabulate_metrics(evaluation: Evaluation, level: str, title: str) -> Table:
    """AUROC and AUPRC with limits, counts, Brier score and calibration error."""
    raw = [
        metric
        for metric in ("brier", "brier_calibrated", "ece", "ece_calibrated")
        if _has(evaluation, metric)
    ]
    names = {
        "brier": "Brier",
        "brier_calibrated": "Brier, calibrated",
        "ece": "ECE",
        "ece_calibrated": "ECE, calibrated",
    }
    columns = [
        "label",
        "AUROC [95 %]",
        "AUPRC [95 %]",
        "positives",
        "negatives",
        *(names[metric] for metric in raw),
    ]
    rows = []
    for label in (*evaluation.labels, *MEANS):
        auroc = evaluation.get("auroc", label, level)
        counts = ["", ""] if label in MEANS else [count(auroc.positives), count(auroc.negatives)]
        figures = [evaluation.get(metric, label, level).shown for metric in AREAS]
        rest = [show(evaluation.get(metric, label, level).value) for metric in raw]
        rows.append([name_row(evaluation, label, level), *figures, *counts, *rest])
    return Table(title, columns, rows, means=len(MEANS), kind="metrics")


def tabulate_rates(evaluation: Evaluation, level: str, rule: str, brief: bool = False) -> Table:
    """Rates at the thresholds of a rule; in brief, sensitivity and specificity alone."""
    rates = RATES[:2] if brief else RATES
    short = dict(zip(RATES, ("sensitivity", "specificity", "PPV", "NPV", "F1"), strict=True))
    at_least = evaluation.head["sensitivity"]
    more = f" ≥ {at_least:g} on dev" if rule == "sensitivity" else "" if rule == GIVEN else " on dev"
    rows = []
    for label in evaluation.labels:
        threshold = evaluation.get("threshold", label, level, rule).value
        cells = [evaluation.get(rate, label, level, rule).shown for rate in rates]
        rows.append([name_row(evaluation, label, level), show(threshold), *cells])
    title = f"At the threshold of {TITLES[rule]}{more}, per {level}"
    return Table(title, ["label", "score ≥", *(short[rate] for rate in rates)], rows, kind="rates")


def list_rules(evaluation: Evaluation) -> list[str]:
    """The rules of the thresholds that the scores were decided by."""
    return list(dict.fromkeys(row.group for row in evaluation.select(metric="threshold") if row.group))


def tabulate_groups(evaluation: Evaluation, variable: str) -> Table:
    """AUROC and TPR of each group of a variable, and the gap of TPR."""
    sizes = {
        row.group: row
        for row in evaluation.select(metric="images", label=None)
        if row.group and row.group.startswith(f"{variable}=")
    }
    groups = {group: row for group, row in sizes.items() if not row.note}
    short = {group: group.partition("=")[2] for group in sizes}
    columns: list[Heading] = [variable]
    columns += [
        (f"{short[group]} (n = {count(row.value)})", name)
        for group, row in groups.items()
        for name in ("AUROC", "TPR")
    ]
    rows = []
    for label in evaluation.labels:
        cells = []
        for group in groups:
            auroc, tpr = (evaluation.get(metric, label, group=group) for metric in ("auroc", "tpr"))
            few = f"{count(auroc.positives)} positives, {count(auroc.negatives)} negatives (few)"
            cells += [few if auroc.few else auroc.shown, tpr.shown if (auroc.positives or 0) >= 10 else "–"]
        rows.append([label, *cells, evaluation.get("tpr_gap", label, group=variable).shown])
    macros = [evaluation.get("auroc", "macro", group=group) for group in groups]
    over = len(macros[0].note.split(", ")) if macros[0].note else 0
    rows.append([f"macro over {over} labels", *(cell for row in macros for cell in (row.shown, "")), ""])
    less = {group: evaluation.get("auroc_less_first", "macro", group=group) for group in groups}
    differences = [f"{short[group]} {row.change}" for group, row in less.items() if row.value is not None]
    others = [f"{short[group]} {count(row.value)}" for group, row in sizes.items() if row.note]
    notes = [
        f"{text}: {', '.join(parts)}."
        for text, parts in (
            ("Macro AUROC minus that of the first group", differences),
            ("In no group", others),
        )
        if parts
    ]
    return Table("", [*columns, "TPR gap"], rows, notes, means=1, kind="groups")


def list_variables(evaluation: Evaluation) -> list[str]:
    """What the groups are of: sex, age, projection, and facts."""
    return list(dict.fromkeys(row.group for row in evaluation.select(metric="tpr_gap") if row.group))


def list_open_gaps(evaluation: Evaluation) -> list[str]:
    """The gaps of TPR whose limits, which hold for all together, are above 0, widest first."""
    rows = [row for row in evaluation.select(metric="tpr_gap") if row.low is not None and row.low > 0]
    rows.sort(key=lambda row: -(row.value or 0))
    return [f"{row.label}: sensitivity differs by {row.shown} between groups of {row.group}." for row in rows]


def tabulate_verdicts(evaluation: Evaluation) -> Table:
    """What each AUROC rests on, a sentence each."""
    rows = [[row.note] for row in evaluation.select(metric="verdict")]
    return Table(f"Does the model rely on shortcuts? AUROC on {evaluation.split}", [""], rows)


def tabulate_belief(evaluation: Evaluation) -> Table:
    """AUROC among images of equal covariates."""
    verdicts = {str(row.label): row for row in evaluation.select(metric="verdict")}
    within = [row for row in evaluation.select(metric="auroc_within") if row.group and "=" not in row.group]
    variables = list(dict.fromkeys(str(row.group) for row in within if row.group not in evaluation.labels))
    signs = {"shown": " ✗", "partly": " !", "unclear": " ?"}
    rows = []
    for label, verdict in verdicts.items():
        cells = [evaluation.get("auroc_within", label, group=name) for name in variables]
        other = [
            f"{row.group}: {row.shown}" for row in within if row.label == label and row.group not in variables
        ]
        rows.append(
            [f"{label}{signs.get(str(verdict.group), '')}", evaluation.get("auroc", label).shown]
            + ["" if cell.value is None else cell.shown for cell in cells]
            + [evaluation.get("auroc_balanced", label).shown, ", ".join(other)]
        )
    columns = [
        "label",
        "AUROC [95 %]",
        *(f"within {name}" for name in variables),
        "balanced",
        "within another label",
    ]
    return Table("AUROC among images of equal covariates", columns, rows, kind="belief")


def tabulate_differences(evaluation: Evaluation, scorer: str, level: str) -> Table:
    """Our AUROC and AUPRC less another's of the same rows."""
    rows = []
    for row in evaluation.select(metric="auroc_difference", scorer=scorer, level=level, group=None):
        label = str(row.label)
        ours = row if row.value is None else evaluation.get("auroc", label, level)
        auprc = evaluation.get("auprc_difference", label, level, scorer=scorer)
        theirs = evaluation.get("auroc", label, level, scorer=scorer)
        mine = None if row.value is None or theirs.value is None else theirs.value + row.value
        sure = "yes" if row.excludes_zero else "no" if ours.value is not None else "–"
        rows.append(
            [name_row(evaluation, label, level), show(mine), theirs.shown, row.change, sure, auprc.change]
        )
    columns = [
        "label",
        "AUROC",
        "the other's [95 %]",
        "difference [95 %]",
        "excludes 0",
        "AUPRC difference [95 %]",
    ]
    common = len(rows) - len(MEANS)
    notes = [f"over the {common} labels that both have scores of"] if common < len(evaluation.labels) else []
    return Table(f"Less {scorer}, per {level}", columns, rows, notes, _means(rows), kind="against")


def tabulate_methods(evaluation: Evaluation) -> Iterator[Table]:
    """For each group of studies, the AUROCs of all ways to score them, and ours less each other's."""
    for size in evaluation.select(metric="studies", level="study", scorer=None):
        group = str(size.group)
        if size.group is None:  # of the split
            continue
        place = {"level": "study", "group": group}
        first = evaluation.get("auroc", "macro10", **place)
        mean = "macro" if first.value is None else "macro10"
        differences = evaluation.select(metric="auroc_difference", **place)
        scorers = list(dict.fromkeys(str(row.scorer) for row in differences))
        title = f"{group.partition('=')[2]}: {count(size.value)} studies that all have scored"
        for first_shown in range(0, len(scorers), 3):  # side by side on a page
            shown = scorers[first_shown : first_shown + 3]
            columns: list[Heading] = ["label", "AUROC"]
            columns += [(scorer, part) for scorer in shown for part in ("AUROC", "ours less this [95 %]")]
            rows = []
            for label in (*evaluation.labels, mean):
                cells = [MEANS.get(label, label), show(evaluation.get("auroc", label, **place).value)]
                for scorer in shown:
                    cells.append(show(evaluation.get("auroc", label, **place, scorer=scorer).value))
                    cells.append(evaluation.get("auroc_difference", label, **place, scorer=scorer).change)
                rows.append(cells)
            yield Table(title, columns, rows, means=1, kind="methods")


def tabulate_gain(evaluation: Evaluation) -> Table:
    """An ensemble beside its members, and what it gains over the mean of theirs."""
    members, rows = evaluation.head.get("members", ()), []
    for gain in evaluation.select(metric="auroc_difference", scorer=MEMBERS):
        label = str(gain.label)
        if gain.value is not None:
            scorers = (None, *members, MEMBERS)
            figures = [show(evaluation.get("auroc", label, scorer=scorer).value) for scorer in scorers]
            rows.append([name_row(evaluation, label), *figures, gain.change])
    columns = ["AUROC", "ensemble", *members, "mean member", "gain [95 %]"]
    title = f"The ensemble less the mean of its members, per {evaluation.unit}"
    return Table(title, columns, rows, means=_means(rows), kind="gain")


def tabulate_altered(evaluation: Evaluation) -> Table:
    """AUROC of altered images: a label that is still recognized with the center covered does not need the lungs."""
    names = evaluation.head.get("altered", ())
    rows = []
    for label in (*evaluation.labels, evaluation.best_mean()):
        plain = evaluation.get("auroc", label)
        if plain.value is None:
            continue
        cells = [name_row(evaluation, label), show(plain.value)]
        for name in names:
            figure = evaluation.get("auroc", label, scorer=f"{ALTERED}{name}")
            cells += [
                figure.shown,
                "recognized" if label not in MEANS and is_kept(evaluation, label, name) else "",
            ]
        rows.append(cells)
    columns: list[Heading] = ["label", "as they are"]
    columns += [(name, part) for name in names for part in ("AUROC [95 %]", "")]
    note = f"Recognized: the AUROC stays above {KEPT}, by its lower limit."
    return Table("Sanity: the same images, altered", columns, rows, [note], means=1, kind="sanity")


def is_kept(evaluation: Evaluation, label: str, alteration: str) -> bool:
    """Whether a label with enough patients is recognized in spite of an alteration."""
    figure = evaluation.get("auroc", label, scorer=f"{ALTERED}{alteration}")
    return figure.low is not None and figure.low > KEPT and not evaluation.get("auroc", label).few


def tabulate_readers(evaluation: Evaluation) -> Table:
    """Each reader's rates, beside the sensitivity of the network's ROC curve at the reader's specificity."""
    readers = evaluation.head.get("readers", ())
    sizes = {reader: evaluation.get("studies", None, "study", scorer=reader).value for reader in readers}
    columns: list[Heading] = ["label", "below the curve"]
    parts = ("positives", "negatives", "sensitivity", "specificity", "network's sensitivity")
    columns += [(f"{reader} (n = {count(size)})", part) for reader, size in sizes.items() for part in parts]
    rows, places = [], [row.value for row in evaluation.select(metric="below") if row.value is not None]
    for label in evaluation.labels:
        cells = [label, count_below(evaluation, label)]
        for reader in readers:
            rates = [
                evaluation.get(rate, label, "study", scorer=reader) for rate in ("sensitivity", "specificity")
            ]
            network = evaluation.get("network", label, "study", scorer=reader)
            cells += [
                count(rates[0].positives),
                count(rates[0].negatives),
                *(row.shown for row in rates),
                show(network.value),
            ]
        rows.append(cells)
    note = f"below the curve: {sum(places):.0f} of {len(places)}, readers times labels"
    return Table("Readers beside the ROC curve, per study", columns, rows, [note], kind="readers")


def count_below(evaluation: Evaluation, label: str) -> str:
    """How many of the readers of a label are below the ROC curve, of those that can be placed."""
    rows = [row for row in evaluation.select(metric="below", label=label) if row.value is not None]
    few = "few " if any(row.few for row in rows) else ""
    return f"{few}{sum(row.value or 0 for row in rows):.0f} of {len(rows)}" if rows else "–"


def tabulate_own(evaluation: Evaluation) -> Table:
    """On shards that a run did not learn from: AUROCs beside those on its own valid."""
    rows = []
    for less in evaluation.select(metric="auroc_difference", group=OWN):
        label = str(less.label)
        here, own = evaluation.get("auroc", label), evaluation.get("auroc", label, group=OWN)
        name = f"{label}{' (few)' if less.few else ''}"
        if label == COMMON:
            name = f"mean of these {len(here.note.split(', '))}, ≥ 10 patients in both"
        counts = [count(row.positives) if label != COMMON else "" for row in (here, own)]
        rows.append([name, counts[0], here.shown, counts[1], own.shown, less.change])
    means = int(evaluation.get("auroc_difference", COMMON, group=OWN).value is not None)
    parts = [
        (name, part)
        for name in ("these images", "the run's own valid")
        for part in ("positives", "AUROC [95 %]")
    ]
    notes = [str(evaluation.head["own"])] if evaluation.head.get("own") else []
    if evaluation.get("auroc_difference", COMMON, group=OWN).note:
        notes.append(WIDENED)
    return Table(
        "AUROC on these images and on the run's own valid",
        ["label", *parts, "difference [95 %]"],
        rows,
        notes,
        means,
        kind="elsewhere",
    )


def tabulate_recalibration(evaluation: Evaluation) -> Table:
    """What a calibration on half of the patients would give on the other half."""
    rows = []
    for fitted in evaluation.select(metric="cells", group="fitted"):
        label, after = str(fitted.label), evaluation.get("ece", fitted.label, group="after")
        measured = evaluation.get("cells", label, group="measured")
        counts = [count(value) for row in (fitted, measured) for value in (row.positives, row.negatives)]
        figures = [
            show(evaluation.get(metric, label, group=side).value)
            for metric in ("ece", "brier")
            for side in ("before", "after")
        ]
        rows.append([f"{label}{' (few)' if measured.few else ''}", *counts, *figures, after.note])
    sides = [count(evaluation.get("patients", None, group=side).value) for side in ("fitted", "measured")]
    note = (
        f"Fitted on {sides[0]} of its patients, drawn by a hash of their names, measured on the other {sides[1]}; the "
        "other figures keep the run's own calibration."
    )
    columns: list[Heading] = [
        "label",
        *((name, part) for name in ("fitted on", "measured on") for part in ("positives", "negatives")),
    ]
    columns += [(name, part) for name in ("ECE", "Brier") for part in ("before", "after")]
    return Table(
        "What recalibration on these images would give", [*columns, ""], rows, [note], kind="recalibration"
    )


def print_evaluation(evaluation: Evaluation) -> None:
    """All tables for a terminal."""
    tabulate_auroc([evaluation]).print()
    for rule in list_rules(evaluation)[:1]:
        tabulate_rates(evaluation, evaluation.unit, rule, brief=True).print()
    for table in list_beside(evaluation):
        table.print()
    tabulate_verdicts(evaluation).print()


def list_beside(evaluation: Evaluation) -> Iterator[Table]:
    """The tables of what the scores are compared with."""
    yield tabulate_own(evaluation)
    yield tabulate_recalibration(evaluation)
    yield tabulate_gain(evaluation)
    for scorer in evaluation.head.get("against", ()):
        for level in evaluation.distinct_levels:
            yield tabulate_differences(evaluation, scorer, level)
    yield from tabulate_methods(evaluation)
    if evaluation.head.get("altered"):
        yield tabulate_altered(evaluation)
    if evaluation.head.get("readers"):
        yield tabulate_readers(evaluation)


def summarize(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What to believe and what not, a mark and a sentence each; verdicts that need no attention share one."""
    verdicts = list(evaluation.select(metric="verdict"))
    lines = (
        [("partly", "Used to select the checkpoint and thresholds, so its figures are optimistic.")]
        if evaluation.split == "dev"
        else []
    )
    lines += [
        (mark, row.note) for mark in ("shown", "partly", "unclear") for row in verdicts if row.group == mark
    ]
    kept = [
        label
        for label in evaluation.labels
        if any(is_kept(evaluation, label, name) for name in evaluation.head.get("altered", ()))
    ]
    few = [label for label in evaluation.labels if evaluation.get("auroc", label).few]
    clear = [str(row.label) for row in verdicts if row.group == "none"]
    for mark, text, labels in (
        ("partly", "Recognized without the lungs", kept),
        ("unclear", "Too few patients of a class to tell", few),
        ("none", MARKS["none"], clear),
    ):
        lines += [(mark, f"{text}: {', '.join(labels)}.")] if labels else []
    return lines


def describe_gaps(evaluation: Evaluation) -> list[str]:
    """A line for everything that is undefined or rests on fewer resamples, and why."""
    unannotated = evaluation.head.get("not_annotated", ())
    lines = list(evaluation.head.get("left_out", ()))
    lines += [
        f"{name}: not annotated by this data set, so not learned, and without scores."
        for name in unannotated
        if name not in evaluation.labels
    ]
    for level in evaluation.distinct_levels:
        units = UNITS[level]
        for label in evaluation.labels:
            row = evaluation.get("auroc", label, level)
            lines += _describe_gap(row, f"{label}, {units}", label in unannotated)
        for mean, shown in MEANS.items():
            if evaluation.get("auroc", mean, level).value is None:
                lines.append(f"{shown}, {units}: undefined, for lack of labels.")
        resamples = evaluation.head["resamples"]
        for row in evaluation.select(metric="auprc_resamples", level=level):
            lost = resamples - (row.value or 0)
            if 0 < lost < resamples:
                what = f"{lost:,.0f} of {resamples:,} resamples have one class and are left out"
                lines.append(f"{MEANS.get(str(row.label), row.label)}, {units}: {what} of AUPRC's interval.")
        lines += [
            f"{row.label}, {units} of dev: {row.note}."
            for row in evaluation.select(metric="bias", level=level)
            if row.note
        ]
    for name, number in evaluation.head["many_groups"].items():
        lines.append(f"{name}: {number:,} values, too many to compare as groups.")
    return lines


def _describe_gap(row: Row, where: str, unannotated: bool) -> list[str]:
    """Why a finding has no AUROC, or one that is marked few."""
    counts = {"positives": row.positives or 0, "negatives": row.negatives or 0}
    if row.value is None and unannotated:
        return [f"{where}: not annotated by this data set, so no figures, and in no mean."]
    if row.value is None:
        lacking = " and ".join(side for side, number in counts.items() if not number)
        return [f"{where}: no {lacking}, so no AUROC, no AUPRC, and in no mean."]
    return [f"{where}: {min(counts.values())} of one class, too few to tell; marked few."] if row.few else []


def _has(evaluation: Evaluation, metric: str) -> bool:
    return next(evaluation.select(metric=metric), None) is not None


def _means(rows: Sequence[Sequence[str]]) -> int:
    """How many of the rows are means."""
    return sum(row[0] in MEANS.values() for row in rows)
