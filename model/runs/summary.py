"""Evaluations → tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from model.runs.config import MEANS
from pipeline.base.pages import show_figure, show_limits
from pipeline.console import say

if TYPE_CHECKING:
    from model.runs.sweep import Trial


def print_evaluations(reports: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of AUROC for one or more splits: per label with its positives and negatives, means with intervals."""
    table = Table(title="AUROC", title_justify="left")
    table.add_column("label")
    for split in reports:
        table.add_column(split, justify="right")
        table.add_column("pos / neg", justify="right")
    for name in next(iter(reports.values()))["labels"]:
        labels = [report["labels"][name] for report in reports.values()]
        cells = [
            (
                show_figure(label["auroc"]),
                "not annotated"
                if name in report.get("not_annotated", ())
                else f"{'few ' if label['few'] else ''}{label['positives']} / {label['negatives']}",
            )
            for report, label in zip(reports.values(), labels, strict=True)
        ]
        table.add_row(name, *(text for cell in cells for text in cell))
    table.add_section()
    for name, title in MEANS.items():
        limits = [report["intervals"]["auroc"][name] for report in reports.values()]
        cells = [
            (
                show_figure(report[f"{name}_auroc"]),
                f"{show_figure(of['low'])}-{show_figure(of['high'])}" if of["low"] is not None else "",
            )
            for report, of in zip(reports.values(), limits, strict=True)
        ]
        table.add_row(title, *(text for cell in cells for text in cell))
    Console().print(table)


def print_evaluation(split: str, evaluation: Mapping[str, Any]) -> None:
    """All tables of the evaluation of a split."""
    print_evaluations({split: evaluation})
    print_gain(evaluation)
    print_verdicts({split: evaluation})
    for show in (print_elsewhere, print_comparison, print_sanity, print_readers):
        show(evaluation)


def print_gain(evaluation: Mapping[str, Any]) -> None:
    """A table of what an ensemble gains over the mean of its members, by label and in the mean."""
    if "gain" not in evaluation:
        return
    table = Table(title="The ensemble less the mean of its members", title_justify="left")
    table.add_column("AUROC")
    for title in ("ensemble", "mean member", "gain [95 %]"):
        table.add_column(title, justify="right")
    for name, found in evaluation["gain"].items():
        if found["auroc"] is not None:
            figures = (show_figure(found[side]) for side in ("auroc", "mean_member"))
            few = " (few)" if name in evaluation["labels"] and evaluation["labels"][name]["few"] else ""
            table.add_row(f"{MEANS.get(name, name)}{few}", *figures, show_difference(found))
    Console().print(table)


def print_comparison(evaluation: Mapping[str, Any]) -> None:
    """A table of what --against asked for: a run by images beside another, or the methods that score studies."""
    compared = evaluation.get("against", {})
    theirs = f" with {compared['run']}" if compared else ""
    table = Table(title=f"Compared{theirs} on the same patients", title_justify="left")
    table.add_column("")
    for title in ("AUROC", *(["the other's"] if compared else []), "difference [95 %]"):
        table.add_column(title, justify="right")
    if compared:
        if len(compared["labels"]) < len(evaluation["labels"]):
            table.caption = f"over the {len(compared['labels'])} labels that both runs have learned"
        enough = [name for name in compared["labels"] if not evaluation["labels"][name]["few"]]
        most = sorted(enough, key=lambda name: -abs(compared["auroc"][name]["difference"]))[:3]
        ours = compared["ours"] | {name: evaluation["labels"][name]["auroc"] for name in most}
        for name in (*MEANS, *most):
            one = compared["auroc"][name]
            other = None if one["difference"] is None else ours[name] - one["difference"]
            table.add_row(
                MEANS.get(name, name), show_figure(ours[name]), show_figure(other), show_difference(one)
            )
        if most:
            parts = [*([table.caption] if table.caption else []), "below, the labels that differ most"]
            table.caption = "; ".join(map(str, parts))
    for group, found in evaluation.get("methods", {}).items():
        ours, *others = found["methods"].items()
        if ours[1]["auroc"] is not None:
            table.add_section()
            table.add_row(f"{group}: {found['studies']:,} studies")
            table.add_row(ours[0], show_figure(ours[1]["auroc"]))
            for name, method in others:
                less = show_difference(method["first_less_this"]["mean"])
                table.add_row(name, show_figure(method["auroc"]), less)
    if table.row_count:
        Console().print(table)


def print_elsewhere(evaluation: Mapping[str, Any]) -> None:
    """For shards other than the run's own: AUROCs beside those on its own valid, and recalibration there."""
    if "elsewhere" not in evaluation:
        return
    found = evaluation["elsewhere"]
    own, tried = found["less_own"], found["recalibration"]
    if own is None:
        say(found["note"])
    else:
        table = Table(title="AUROC there and on the run's own valid", title_justify="left")
        for heading in ("label", "there", "own valid", "there less own [95 %]"):
            table.add_column(heading, justify="left" if heading == "label" else "right")
        rows = {f"{name}{' (few)' if row['few'] else ''}": row for name, row in own["labels"].items()}
        if own["macro"] is not None:
            rows[f"mean of these {len(own['macro_labels'])}, ≥ 10 patients in both"] = own["macro"]
        for name, row in rows.items():
            figures = (show_figure(side["auroc"]) for side in (row, row["own"]))
            table.add_row(name, *figures, show_difference(row["less_own"]))
        Console().print(table)
    table = Table(title="What recalibration there would give", title_justify="left")
    patients = tried["patients"]
    table.caption = (
        f"fitted on {patients['fitted']:,} of its patients, measured on the other {patients['measured']:,}; "
        "the figures above keep the run's own calibration"
    )
    for heading in ("label", "ECE", "Brier", "pos / neg measured"):
        table.add_column(heading, justify="left" if heading == "label" else "right")
    for name, row in tried["labels"].items():
        pairs = [
            f"{show_figure(row['before'][metric])} → {show_figure(row['after'][metric]) if row['after'] else 'no fit'}"
            for metric in ("ece", "brier")
        ]
        counts = row["measured"]
        few = "few " if counts["few"] else ""
        table.add_row(name, *pairs, f"{few}{counts['positives']} / {counts['negatives']}")
    Console().print(table)


def print_verdicts(reports: Mapping[str, Mapping[str, Any]]) -> None:
    """What the AUROCs of the last of some splits rest on: a sentence for each label with 10 of both classes."""
    split, report = list(reports.items())[-1]
    verdicts = [found["verdict"] for found in report.get("belief", {}).values()]
    if verdicts:
        table = Table(
            title=f"Does the model rely on shortcuts? AUROC on {split}",
            title_justify="left",
            show_header=False,
        )
        for verdict in verdicts:
            table.add_row(verdict)
        Console().print(table)


def print_trials(trials: "Sequence[Trial]") -> None:
    """A table of the five best of a sweep's ranked trials, with the parameters that vary."""
    table = Table(title=f"The best of {len(trials):,}, by AUROC on dev", title_justify="left")
    for title in ("trial", *trials[0].parameters, "dev", "train", "valid"):
        table.add_column(title.replace("_", " "), justify="right")
    for trial in trials[:5]:
        if trial.dev is not None:
            figures = (show_figure(value) for value in (trial.dev, trial.train, trial.valid))
            table.add_row(str(trial.number), *map(str, trial.parameters.values()), *figures)
    Console().print(table)


def print_cross(found: Mapping[str, Any]) -> None:
    """The matrix of runs and sets: a mean AUROC and its interval, of the same labels everywhere."""
    table = Table(title=f"AUROC, mean of {', '.join(found['labels'])}", title_justify="left")
    table.add_column("trained on")
    for name, of in found["sets"].items():
        table.add_column(f"on {name}, {of['split']}", justify="right")
    for run in found["runs"]:
        cells = [found["cells"][name][run]["macro"] for name in found["sets"]]
        table.add_row(run, *(f"{show_figure(cell['auroc'])} {show_limits(cell)}" for cell in cells))
    Console().print(table)


def print_sanity(evaluation: Mapping[str, Any]) -> None:
    """A table of what --sanity asked for: the mean AUROC of altered images, and the labels that are still told."""
    if "sanity" not in evaluation:
        return
    table = Table(title="Sanity: the same images, altered", title_justify="left")
    table.add_column("images")
    for title in ("macro AUROC", "difference [95 %]"):
        table.add_column(title, justify="right")
    table.add_column("labels still told")
    for name, found in evaluation["sanity"].items():
        macro = found["labels"]["macro"]
        table.add_row(
            name, show_figure(macro["auroc"]), show_difference(macro["less"]), ", ".join(found["kept"]) or "–"
        )
    Console().print(table)


def print_readers(evaluation: Mapping[str, Any]) -> None:
    """A table of what --readers asked for: readers below the ROC curve, and each one's sensitivity and specificity."""
    if "readers" not in evaluation:
        return
    from pipeline.measure.readers import count_below

    found = evaluation["readers"]
    table = Table(
        title="Readers beside the ROC curve, per study: sensitivity, specificity", title_justify="left"
    )
    table.add_column("label")
    for title in ("below the curve", *(f"{name} (n = {n:,})" for name, n in found["readers"].items())):
        table.add_column(title, justify="right")
    for label, of in found["labels"].items():
        cells = [
            f"{show_figure(of[name]['sensitivity'])}, {show_figure(of[name]['specificity'])}"
            if name in of
            else "–"
            for name in found["readers"]
        ]
        table.add_row(label, count_below(of), *cells)
    table.caption = f"below the curve: {found['below']} of {found['of']}, readers times labels"
    Console().print(table)


def show_difference(less: Mapping[str, Any]) -> str:
    """The first one's figure less this one's, with its interval."""
    if less["difference"] is None:
        return "–"
    limits = "" if less["low"] is None else f" [{less['low']:+.3f}, {less['high']:+.3f}]"
    return f"{less['difference']:+.3f}{limits}"
