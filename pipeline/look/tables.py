"""Counts and audits → tables, for a terminal and for pages."""

from pipeline.base.errors import printable
from pipeline.base.pages import show_figure
from pipeline.base.tabular import Table
from pipeline.labels import LABELS
from pipeline.measure.audit import Audit, Clue, shorten
from pipeline.measure.counts import Statistics


def tabulate_counts(report: Statistics) -> Table:
    """The four states of each label."""
    columns = ["label", "positive", "uncertain", "negative", "blank"]
    columns += ["not annotated"] if any("not_annotated" in row for row in report["labels"].values()) else []
    rows = []
    for label, counts in report["labels"].items():
        *states, share = counts.values()
        rows.append([label, *(f"{count:,}" for count in states), _percent(share)])
    totals = ", ".join(f"{report[unit]:,} {unit}" for unit in ("images", "studies", "patients"))
    return Table(totals, [*columns, "positive %"], rows, kind="counts")


def tabulate_shares(groups: Statistics) -> Table:
    """The share of positives in each group."""
    columns = ["label", *(f"{name} (n = {group['images']:,})" for name, group in groups["groups"].items())]
    rows = [
        [label, *(_percent(group["labels"][label]["share_positive"]) for group in groups["groups"].values())]
        for label in LABELS
    ]
    return Table(f"positive % by {groups['variable']}", columns, rows, kind="groups")


def tabulate_policy(policies: Statistics) -> Table:
    """The targets of each label under policies."""
    columns = ["label", "uncertain", "positives", "negatives", "open", "masked", "mean target", "pos. weight"]
    rows = [
        [
            label,
            row["policy"],
            *(f"{count:,}" for count in (row["positives"], row["negatives"], row["open"], row["masked"])),
            *(show_figure(figure) for figure in (row["mean_target"], row["pos_weight"])),
        ]
        for label, row in policies["labels"].items()
    ]
    return Table(f"under the policies below, and {policies['blank']} for blank", columns, rows, kind="policy")


def print_report(report: Statistics) -> None:
    """Print the counts per label, and a table for each requested section."""
    tabulate_counts(report).print()
    if "by" in report:
        tabulate_shares(report["by"]).print()
    if "policy" in report:
        tabulate_policy(report["policy"]).print()


def print_audit(audit: Audit) -> None:
    """Print the alarms in words, and what predicts each label best, worst first."""
    for text in audit.describe_alarms():
        print(printable(f"{text}."))
    tabulate_audit(audit).print()
    if not audit.clues:
        print(f"{audit.images:,} images of {audit.patients:,} patients: nothing to test.")
    if audit.left_out:
        print(f"Not tested: {', '.join(f'{name} ({reason})' for name, reason in audit.left_out.items())}.")
    if audit.few:
        print(f"Fewer than 10 patients in a class: {', '.join(audit.few)}.")


def tabulate_audit(audit: Audit) -> Table:
    """What predicts each label best, worst first; ! marks an alarm."""
    best: dict[str, dict[str, Clue]] = {}
    for clue in sorted(audit.clues, key=lambda clue: clue.kind == "content"):
        best.setdefault(clue.label, {}).setdefault(clue.kind, clue)
    columns = ["label", "AUROC", "95 %", "acquisition", "adjusted", "all together"]
    if any("content" in kinds for kinds in best.values()):
        columns += ["AUROC", "content (may be the disease)"]
    rows = []
    for label, kinds in best.items():
        cells = ["–"] * (len(columns) - 1)
        if alone := kinds.get("acquisition"):
            cells[:4] = _mark(alone), alone.limits, alone.covariate, shorten(alone.adjusted)
        if joint := kinds.get("together"):
            cells[4] = _mark(joint)
        if content := kinds.get("content"):
            cells[5:] = shorten(content.strength), content.covariate
        rows.append([label, *cells])
    alarms = sum(clue.alarm for clue in audit.clues)
    totals = f"{audit.images:,} images of {audit.patients:,} patients; alarms (!): {alarms}"
    title = (
        f"{totals}\nof {len(audit.clues)} tests, those whose lower limit, adjusted by Holm's method at level "
        f"{audit.level}, is above {audit.threshold}"
    )
    return Table(title, columns, rows, kind="audit", folded=True)


def _mark(clue: Clue) -> str:
    return f"{'! ' if clue.alarm else ''}{shorten(clue.strength)}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
