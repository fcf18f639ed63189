"""Counts and audits → tables, for a terminal and for pages."""

from collections.abc import Mapping

from pipeline.base.errors import printable
from pipeline.base.pages import show_figure
from pipeline.base.tabular import Table
from pipeline.labels import LABELS
from pipeline.measure.audit import Audit, Clue, describe_alarms, describe_told, find_alarms, shorten
from pipeline.measure.counts import Comparison, Groups, LabelStatistics, Policies

NOTABLE = 0.1  # of the standardized difference, by the convention in `compare_tables`


def tabulate_counts(report: LabelStatistics) -> Table:
    """The four states of each label."""
    columns = ["label", "positive", "uncertain", "negative", "blank"]
    columns += ["not annotated"] if any("not_annotated" in row for row in report["labels"].values()) else []
    rows = []
    for label, counts in report["labels"].items():
        *states, share = counts.values()
        rows.append([label, *(f"{count:,}" for count in states), _percent(share)])
    totals = ", ".join(f"{report[unit]:,} {unit}" for unit in ("images", "studies", "patients"))
    return Table(totals, [*columns, "positive %"], rows, kind="counts")


def tabulate_shares(groups: Groups) -> Table:
    """The share of positives in each group."""
    columns = ["label", *(f"{name} (n = {group['images']:,})" for name, group in groups["groups"].items())]
    rows = [
        [label, *(_percent(group["labels"][label]["share_positive"]) for group in groups["groups"].values())]
        for label in LABELS
    ]
    return Table(f"positive % by {groups['variable']}", columns, rows, kind="groups")


def tabulate_together(cooccurrence: Mapping[str, Mapping[str, int]], *, shares: bool = False) -> Table:
    """How often two labels are positive together, as numbers or as shares of the row's."""
    rows = []
    for number, (label, row) in enumerate(cooccurrence.items(), 1):
        parts = [f"{100 * count / row[label]:.0f}" if row[label] else "–" for count in row.values()]
        rows.append([f"{number:2} {label}", *(parts if shares else map(str, row.values()))])
    whole = "images positive for the row and the column"
    title = "P(column | row), %: of the images positive for the row" if shares else whole
    return Table(title, ["label", *map(str, range(1, len(rows) + 1))], rows, kind="cooccurrence")


def tabulate_policy(policies: Policies) -> Table:
    """What policies make of each label."""
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


def tabulate_drift(other: Comparison) -> Table:
    """The share of positives in two sources; notable differences stand out."""
    rows: list[list[str]] = []
    marked: list[int] = []
    for label, row in other["labels"].items():
        shares = [_percent(row["share_positive"]), _percent(row["other_share_positive"])]
        less, standardized = row["difference"], row["standardized_difference"]
        marked += [len(rows)] if abs(standardized or 0) > NOTABLE else []
        signed = [
            "–" if less is None else f"{100 * less:+.1f}",
            "–" if standardized is None else f"{standardized:+.3f}",
        ]
        rows.append([label, *shares, *signed])
    title = (
        f"positive against {other['images']:,} images, {other['studies']:,} studies, {other['patients']:,} patients, "
        f"{other['shared_patients']:,} of them in both\n"
        f"standardized: (p1 - p2) / sqrt((p1 (1 - p1) + p2 (1 - p2)) / 2), notable above {NOTABLE} (Austin, 2009)"
    )
    columns = ["label", "here %", "there %", "difference", "standardized"]
    return Table(title, columns, rows, marked=marked, kind="drift")


def print_report(report: LabelStatistics) -> None:
    """Print the counts per label, and a table for each requested section."""
    tabulate_counts(report).print()
    if "by" in report:
        tabulate_shares(report["by"]).print()
    if "cooccurrence" in report:
        for shares in (False, True):
            tabulate_together(report["cooccurrence"], shares=shares).print()
    if "policy" in report:
        tabulate_policy(report["policy"]).print()
    if "against" in report:
        tabulate_drift(report["against"]).print()


def print_audit(audit: Audit) -> None:
    """Print the alarms in words, and what tells each label best, worst first."""
    for text in describe_alarms(audit):
        print(printable(f"{text}."))
    tabulate_audit(audit).print()
    if not audit["clues"]:
        print(f"{audit['images']:,} images of {audit['patients']:,} patients: nothing to test.")
    if audit["left_out"]:
        reasons = (f"{name} ({reason})" for name, reason in audit["left_out"].items())
        print(f"Not tested: {', '.join(reasons)}.")
    if audit["few"]:
        print(f"Fewer than 10 patients in a class: {', '.join(audit['few'])}.")


def tabulate_audit(audit: Audit) -> Table:
    """What predicts each label best, worst first; ! marks an alarm."""
    best: dict[str, dict[str, Clue]] = {}
    for clue in sorted(audit["clues"], key=lambda clue: clue["kind"] == "content"):
        best.setdefault(clue["label"], {}).setdefault(clue["kind"], clue)
    columns = ["label", "AUROC", "95 %", "acquisition", "adjusted", "all together"]
    if any("content" in kinds for kinds in best.values()):
        columns += ["AUROC", "content: maybe the disease"]
    rows = []
    for label, kinds in best.items():
        cells = ["–"] * (len(columns) - 1)
        if alone := kinds.get("acquisition"):
            cells[:4] = _mark(alone), describe_told(alone), alone["covariate"], shorten(alone["adjusted"])
        if joint := kinds.get("together"):
            cells[4] = _mark(joint)
        if content := kinds.get("content"):
            cells[5:] = shorten(content["told"]), content["covariate"]
        rows.append([label, *cells])
    alarms = sum(map(len, find_alarms(audit).values()))
    totals = f"{audit['images']:,} images of {audit['patients']:,} patients; alarms (!): {alarms}"
    title = (
        f"{totals}\nof {len(audit['clues'])} tests, those whose lower limit, adjusted by Holm's method at level "
        f"{audit['level']}, is above {audit['threshold']}"
    )
    return Table(title, columns, rows, kind="audit")


def _mark(clue: Clue) -> str:
    return f"{'! ' if clue['exceeds'] else ''}{shorten(clue['told'])}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
