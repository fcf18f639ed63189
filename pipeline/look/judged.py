"""An evaluation → its tables, for a terminal, a page and a card; each is a query of the rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from pipeline.base.pages import Heading, Table, show_count, show_figure
from pipeline.measure.evaluate import ALTERED, AREAS, GIVEN, KEPT, MEMBERS
from pipeline.measure.evaluation import COMMON, MEANS, OWN, UNITS, Evaluation, Row
from pipeline.measure.metrics import FEW

TITLES = {"youden": "Youden's J", "max_f1": "highest F1", "sensitivity": "sensitivity", GIVEN: "a given score"}
WIDENED = (
    "The run's own macro is over other labels, so the limits of this mean on its valid are the means of its labels' "
    "limits: too wide rather than too narrow."
)
RATES = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV", "f1": "F1"}
SCORES = {"brier": "Brier", "brier_calibrated": "Brier, calibrated", "ece": "ECE", "ece_calibrated": "ECE, calibrated"}
SIGNS = {"shown": " ✗", "partly": " !", "unclear": " ?"}  # of verdicts
SIDES = ("positives", "negatives")
SHOWN, CHANGE = attrgetter("shown"), attrgetter("change")


def show(row: Row) -> str:
    """The figure to three places, without limits."""
    return show_figure(row.value)


def count(side: str) -> Callable[[Row], str]:
    """How the positives or negatives of a finding are shown; a mean has none."""
    return lambda row: "" if row.label in (*MEANS, COMMON) else show_count(getattr(row, side))


class Query(NamedTuple):
    """A column of a table with a line per label: which row of the evaluation each cell shows, and how."""

    heading: Heading
    metric: str
    show: Callable[[Row], str] = SHOWN
    group: str | None = None
    scorer: str | None = None


def tabulate(
    evaluation: Evaluation, title: str, names: Mapping[str, str], columns: Sequence[Query], level: str = "", **more: Any
) -> Table:
    """A table with a line per label, the keys of `names`, at a level or the unit's; `more` are fields of the Table."""

    def show_cell(label: str, column: Query) -> str:
        return column.show(evaluation.get(column.metric, label, level, column.group, column.scorer))

    rows = [[name, *(show_cell(label, column) for column in columns)] for label, name in names.items()]
    means = sum(label in (*MEANS, COMMON) for label in names)
    return Table(title, ["label", *(column.heading for column in columns)], rows, means=means, **more)


def name_rows(evaluation: Evaluation, labels: Iterable[str], level: str = "") -> dict[str, str]:
    """The names of findings and means in tables, marked if they have few patients of a class."""
    return {label: mark_few(MEANS.get(label, label), evaluation.get("auroc", label, level)) for label in labels}


def mark_few(name: str, row: Row) -> str:
    """A name, marked if the row has few patients of a class."""
    return f"{name} (few)" if row.few else name


def tabulate_auroc(evaluations: Sequence[Evaluation]) -> Table:
    """AUROC of one or more splits, with positives and negatives; limits if 80 columns have room for them."""
    alone = len(evaluations) == 1
    columns: list[Heading] = ["label"]
    for evaluation in evaluations:
        columns += [(evaluation.split, "AUROC [95 %]" if alone else "AUROC"), (evaluation.split, "pos / neg")]
    rows = []
    for label in (*evaluations[0].labels, *MEANS):
        cells = [MEANS.get(label, label)]
        for evaluation in evaluations:
            row = evaluation.get("auroc", label)
            counts = f"{'few ' if row.few else ''}{show_count(row.positives)} / {show_count(row.negatives)}"
            if label in evaluation.head.get("not_annotated", ()):
                counts = "not annotated"
            elif label in MEANS:
                counts = "" if alone or row.low is None else f"{row.low:.3f}-{row.high:.3f}"
            cells += [row.shown if alone else show(row), counts]
        rows.append(cells)
    return Table("AUROC", columns, rows, means=len(MEANS))


def tabulate_metrics(evaluation: Evaluation, level: str, title: str) -> Table:
    """AUROC and AUPRC with limits, counts, Brier score and calibration error."""
    columns = [Query(f"{metric.upper()} [95 %]", metric) for metric in AREAS]
    columns += [*(Query(side, "auroc", count(side)) for side in SIDES)]
    columns += [Query(name, metric, show) for metric, name in SCORES.items() if any(evaluation.select(metric=metric))]
    names = name_rows(evaluation, [*evaluation.labels, *MEANS], level)
    return tabulate(evaluation, title, names, columns, level, kind="metrics")


def tabulate_rates(evaluation: Evaluation, level: str, rule: str, brief: bool = False) -> Table:
    """Rates at the thresholds of a rule; in brief, sensitivity and specificity alone."""
    at_least = f" ≥ {evaluation.head['sensitivity']:g}" if rule == "sensitivity" else ""
    title = f"At the threshold of {TITLES[rule]}{at_least}{'' if rule == GIVEN else ' on dev'}, per {level}"
    rates = [Query(name, rate, SHOWN, rule) for rate, name in RATES.items()]
    columns = [Query("score ≥", "threshold", show, rule), *rates[: 2 if brief else None]]
    names = name_rows(evaluation, evaluation.labels, level)
    return tabulate(evaluation, title, names, columns, level, kind="rates", folded=not brief)


def list_rules(evaluation: Evaluation) -> list[str]:
    """The rules by which the thresholds were chosen."""
    return list(dict.fromkeys(row.group for row in evaluation.select(metric="threshold") if row.group))


def tabulate_groups(evaluation: Evaluation, variable: str) -> Table:
    """AUROC and TPR of each group of a variable, and the gap of TPR."""

    def show_area(row: Row) -> str:
        few = f"{show_count(row.positives)} positives, {show_count(row.negatives)} negatives (few)"
        return few if row.few else row.shown

    def show_tpr(row: Row) -> str:
        return "" if row.label in MEANS else row.shown if (row.positives or 0) >= 10 else "–"

    columns, differences, others, over = list[Query](), list[str](), list[str](), 0
    for row in evaluation.select(metric="images", label=None):
        owner, _, name = str(row.group).partition("=")
        if owner != variable:
            continue
        if row.note:
            others.append(f"{name} {show_count(row.value)}")
            continue
        heading = f"{name} (n = {show_count(row.value)})"
        columns += [Query((heading, "AUROC"), "auroc", show_area, row.group)]
        columns += [Query((heading, "TPR"), "tpr", show_tpr, row.group)]
        macro, less = (evaluation.get(metric, "macro", group=row.group) for metric in ("auroc", "auroc_less_first"))
        over = len(macro.note.split(", ")) if macro.note else 0
        differences += [] if less.value is None else [f"{name} {less.change}"]
    columns.append(Query("TPR gap", "tpr_gap", lambda row: "" if row.label in MEANS else row.shown, variable))
    texts = {"Macro AUROC minus that of the first group": differences, "In no group": others}
    notes = [f"{text}: {', '.join(parts)}." for text, parts in texts.items() if parts]
    names = name_rows(evaluation, evaluation.labels) | {"macro": f"macro over {over} labels"}
    return tabulate(evaluation, f"By {variable}", names, columns, notes=notes, kind="groups")


def list_groups(evaluation: Evaluation) -> list[Table]:
    """The groups of each variable (sex, age, projection, and facts) that have figures."""
    variables = dict.fromkeys(row.group for row in evaluation.select(metric="tpr_gap") if row.group)
    return [table for variable in variables if (table := tabulate_groups(evaluation, variable)).filled]


def list_verdicts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The mark and the sentence of each verdict."""
    return [(str(row.group), row.note) for row in evaluation.select(metric="verdict")]


def list_open_gaps(evaluation: Evaluation) -> list[str]:
    """The TPR gaps whose limits, which hold jointly, are above 0, widest first."""
    rows = [row for row in evaluation.select(metric="tpr_gap") if row.low is not None and row.low > 0]
    rows.sort(key=lambda row: -row.number)
    return [f"{row.label}: sensitivity differs by {row.shown} between groups of {row.group}." for row in rows]


def tabulate_verdicts(evaluation: Evaluation) -> Table:
    """The shortcut verdict on each AUROC, as a sentence."""
    rows = [[text] for _, text in list_verdicts(evaluation)]
    return Table(f"Does the model rely on shortcuts? AUROC on {evaluation.split}", [""], rows)


def tabulate_belief(evaluation: Evaluation) -> Table:
    """AUROC among images of equal covariates."""
    verdicts = {str(row.label): str(row.group) for row in evaluation.select(metric="verdict")}
    names = {label: f"{label}{SIGNS.get(mark, '')}" for label, mark in verdicts.items()}
    within = [row for row in evaluation.select(metric="auroc_within") if row.group and "=" not in row.group]
    variables = dict.fromkeys(row.group for row in within if row.group not in evaluation.labels)

    def show_others(row: Row) -> str:
        others = [other for other in within if other.label == row.label and other.group in evaluation.labels]
        return ", ".join(f"{other.group}: {other.shown}" for other in others)

    def show_known(row: Row) -> str:
        return "" if row.value is None else row.shown

    columns = [Query("AUROC [95 %]", "auroc")]
    columns += [Query(f"within {name}", "auroc_within", show_known, name) for name in variables]
    columns += [Query("balanced", "auroc_balanced"), Query("within another label", "verdict", show_others)]
    return tabulate(evaluation, "AUROC among images of equal covariates", names, columns, kind="belief")


def tabulate_differences(evaluation: Evaluation, scorer: str, level: str) -> Table:
    """Our AUROC and AUPRC minus another scorer's on the same rows."""
    differences = evaluation.select(metric="auroc_difference", scorer=scorer, level=level, group=None)
    labels = [str(row.label) for row in differences]

    def show_ours(row: Row) -> str:
        """Our AUROC, on labels with scores of both."""
        other = evaluation.get("auroc", row.label, level, scorer=scorer)
        return show_figure(None if row.value is None or other.value is None else other.value + row.value)

    def show_sure(row: Row) -> str:
        known = row.value is not None or evaluation.get("auroc", row.label, level).value is not None
        return "yes" if row.excludes_zero else "no" if known else "–"

    columns = [
        Query("AUROC", "auroc_difference", show_ours, None, scorer),
        Query("the other's [95 %]", "auroc", SHOWN, None, scorer),
        Query("difference [95 %]", "auroc_difference", CHANGE, None, scorer),
        Query("excludes 0", "auroc_difference", show_sure, None, scorer),
        Query("AUPRC difference [95 %]", "auprc_difference", CHANGE, None, scorer),
    ]
    common = len(labels) - len(MEANS)
    notes = [f"over the {common} labels that both have scores of"] if common < len(evaluation.labels) else []
    size = evaluation.get(UNITS[evaluation.unit], scorer=scorer).value
    notes += [f"over the {show_count(size)} {UNITS[evaluation.unit]} that both have scored"] if size else []
    title, names = f"Compared with {scorer}, per {level}", name_rows(evaluation, labels, level)
    return tabulate(evaluation, title, names, columns, level, notes=notes, kind="against")


def tabulate_gain(evaluation: Evaluation) -> Table:
    """An ensemble and its members, and its gain over the mean of their AUROCs."""
    gains = evaluation.select(metric="auroc_difference", scorer=MEMBERS)
    labels = [str(row.label) for row in gains if row.value is not None]
    members = {name: name for name in evaluation.head.get("members", ())}
    scorers = {None: "ensemble", **members, MEMBERS: "mean member"}
    columns = [Query(name, "auroc", show, None, scorer) for scorer, name in scorers.items()]
    columns.append(Query("gain [95 %]", "auroc_difference", CHANGE, None, MEMBERS))
    title = f"AUROC of the ensemble minus the mean of its members', per {evaluation.unit}"
    return tabulate(evaluation, title, name_rows(evaluation, labels), columns, kind="gain")


def tabulate_altered(evaluation: Evaluation) -> Table:
    """AUROC of altered images: a label that is still recognized with the center covered does not need the lungs."""

    def show_kept(row: Row) -> str:
        return "recognized" if is_kept(evaluation, row) else ""

    columns = [Query("as they are", "auroc", show)]
    for name in evaluation.head.get("altered", ()):
        columns.append(Query((name, "AUROC [95 %]"), "auroc", scorer=f"{ALTERED}{name}"))
        columns.append(Query((name, ""), "auroc", show_kept, scorer=f"{ALTERED}{name}"))
    labels = (*evaluation.labels, evaluation.best_mean())
    names = name_rows(evaluation, [label for label in labels if evaluation.get("auroc", label).value is not None])
    notes = [f"Recognized: the AUROC stays above {KEPT}, by its lower limit."]
    return tabulate(evaluation, "Sanity: the same images, altered", names, columns, notes=notes, kind="sanity")


def is_kept(evaluation: Evaluation, row: Row) -> bool:
    """Whether a finding with enough patients is still recognized after the alteration of a row."""
    known = row.label in evaluation.labels and not evaluation.get("auroc", row.label).few
    return known and row.low is not None and row.low > KEPT


def tabulate_readers(evaluation: Evaluation) -> Table:
    """Each reader's rates, beside the sensitivity of the network's ROC curve at the reader's specificity."""
    columns = [Query("below the curve", "below", lambda row: count_below(evaluation, str(row.label)))]
    for reader in evaluation.head.get("readers", ()):
        name = f"{reader} (n = {show_count(evaluation.get('studies', None, 'study', scorer=reader).value)})"
        columns += [
            *(Query((name, side), "sensitivity", count(side), None, reader) for side in SIDES),
            *(Query((name, rate), rate, SHOWN, None, reader) for rate in ("sensitivity", "specificity")),
            Query((name, "network's sensitivity"), "network", show, None, reader),
        ]
    places = [row.value for row in evaluation.select(metric="below") if row.value is not None]
    notes = [f"below the curve: {sum(places):.0f} of {len(places)}, readers times labels"]
    title, names = "Readers beside the ROC curve, per study", {label: label for label in evaluation.labels}
    return tabulate(evaluation, title, names, columns, "study", notes=notes, kind="readers")


def count_below(evaluation: Evaluation, label: str) -> str:
    """How many of a label's readers are below the ROC curve, of those that have a position."""
    rows = [row for row in evaluation.select(metric="below", label=label) if row.value is not None]
    few = "few " if any(row.few for row in rows) else ""
    return f"{few}{sum(row.number for row in rows):.0f} of {len(rows)}" if rows else "–"


def tabulate_own(evaluation: Evaluation) -> Table:
    """For shards that the run did not train on: AUROCs next to those on its own valid."""
    differences = {str(row.label): row for row in evaluation.select(metric="auroc_difference", group=OWN)}
    names = {label: mark_few(label, row) for label, row in differences.items()}
    over = len(evaluation.get("auroc", COMMON).note.split(", "))
    names |= {COMMON: f"mean of these {over}, ≥ 10 patients in both"} if COMMON in names else {}
    columns = []
    for name, group in {"these images": None, "the run's own valid": OWN}.items():
        columns.append(Query((name, "positives"), "auroc", count("positives"), group))
        columns.append(Query((name, "AUROC [95 %]"), "auroc", group=group))
    columns.append(Query("difference [95 %]", "auroc_difference", CHANGE, OWN))
    notes = [str(evaluation.head["own"])] if evaluation.head.get("own") else []
    notes += [WIDENED] if COMMON in names and differences[COMMON].note else []
    title = "AUROC on these images and on the run's own valid"
    return tabulate(evaluation, title, names, columns, notes=notes, kind="elsewhere")


def print_evaluation(evaluation: Evaluation) -> None:
    """All tables for a terminal."""
    rates = [tabulate_rates(evaluation, evaluation.unit, rule, brief=True) for rule in list_rules(evaluation)[:1]]
    for table in (tabulate_auroc([evaluation]), *rates, *list_beside(evaluation), tabulate_verdicts(evaluation)):
        table.print()


def list_beside(evaluation: Evaluation) -> Iterator[Table]:
    """The tables of comparisons with other scores."""
    yield tabulate_own(evaluation)
    yield tabulate_gain(evaluation)
    for scorer in evaluation.head.get("against", ()):
        for level in evaluation.distinct_levels:
            yield tabulate_differences(evaluation, scorer, level)
    if evaluation.head.get("altered"):
        yield tabulate_altered(evaluation)
    if evaluation.head.get("readers"):
        yield tabulate_readers(evaluation)


def summarize(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What to trust and what not, each as a mark and a sentence; verdicts without a shortcut share one."""
    chosen_by = ("partly", "Optimistic: used to select the checkpoint and thresholds.")
    lines = [chosen_by] if evaluation.split == "dev" else []
    for mark in ("shown", "partly", "unclear"):
        lines += [line for line in list_verdicts(evaluation) if line[0] == mark]
    altered = [row for row in evaluation.select(metric="auroc") if str(row.scorer).startswith(ALTERED)]
    kept = {row.label for row in altered if is_kept(evaluation, row)}
    few = {label for label in evaluation.labels if evaluation.get("auroc", label).few}
    clear = {row.label for row in evaluation.select(metric="verdict", group="none")}
    for mark, text, chosen in (
        ("partly", "Recognized without the lungs", kept),
        ("unclear", "Too few patients of a class to tell", few),
        ("none", "No shortcut found for", clear),
    ):
        labels = [label for label in evaluation.labels if label in chosen]
        lines += [(mark, f"{text}: {', '.join(labels)}.")] if labels else []
    return lines


def describe_gaps(evaluation: Evaluation) -> list[str]:
    """A line for each result that is undefined or left out, with the reason."""
    unannotated, lines = evaluation.head.get("not_annotated", ()), list(evaluation.head.get("left_out", ()))
    unlearned = [name for name in unannotated if name not in evaluation.labels]
    lines += [f"{name}: not annotated by this data set, so not learned, and without scores." for name in unlearned]
    for level in evaluation.distinct_levels:
        for label in (*evaluation.labels, *MEANS):
            row, text = evaluation.get("auroc", label, level), ""
            if row.few and row.value is not None:
                text = f"fewer than {FEW} patients of a class, too few to tell; marked few."
            elif row.value is None and label in MEANS:
                text = "undefined, for lack of labels."
            elif row.value is None and label in unannotated:
                text = "not annotated by this data set, so no figures, and in no mean."
            elif row.value is None:
                lacking = " and ".join(side for side in SIDES if not getattr(row, side))
                text = f"no {lacking}, so no AUROC, no AUPRC, and in no mean."
            lines += [f"{MEANS.get(label, label)}, {UNITS[level]}: {text}"] if text else []
        for row in evaluation.select(metric="bias", level=level):
            lines += [f"{row.label}, {UNITS[level]} of dev: {row.note}."] if row.note else []
    many = evaluation.head["many_groups"].items()
    return lines + [f"{name}: {number:,} values, too many to compare as groups." for name, number in many]
