"""Figures → tables in a terminal."""

from pipeline.base.errors import printable
from pipeline.base.tabular import Table
from pipeline.measure.audit import Audit, Clue, describe_alarms, describe_told, find_alarms, shorten
from pipeline.measure.counts import LabelStatistics


def print_report(report: LabelStatistics) -> None:
    """Print the counts per label, and a table for each requested section."""
    totals = ", ".join(f"{report[unit]:,} {unit}" for unit in ("images", "studies", "patients"))
    headings = ["positive", "uncertain", "negative", "blank"]
    if any("not_annotated" in counts for counts in report["labels"].values()):
        headings.append("not annotated")
    headings.append("positive %")
    rows = {}
    for label, counts in report["labels"].items():
        *states, share = counts.values()
        rows[label] = [*(f"{count:,}" for count in states), _percent(share)]
    _print(totals, headings, rows)
    if "by" in report:
        groups = report["by"]["groups"]
        headings = [f"{name} (n = {group['images']:,})" for name, group in groups.items()]
        shares = {
            label: [_percent(group["labels"][label]["share_positive"]) for group in groups.values()]
            for label in report["labels"]
        }
        _print(f"positive % by {report['by']['variable']}", headings, shares)
    if "cooccurrence" in report:
        numbered = enumerate(report["cooccurrence"].items(), 1)
        together = {f"{number:2} {label}": (label, row) for number, (label, row) in numbered}
        headings = [str(number) for number in range(1, len(together) + 1)]
        cells = {name: [str(count) for count in row.values()] for name, (_, row) in together.items()}
        _print("images positive for the row and the column", headings, cells)
        cells = {
            name: [f"{100 * count / row[label]:.0f}" if row[label] else "–" for count in row.values()]
            for name, (label, row) in together.items()
        }
        _print("P(column | row), %: of the images positive for the row", headings, cells)
    if "policy" in report:
        headings = ["uncertain", "positives", "negatives", "open", "masked", "mean target", "pos. weight"]
        cells = {
            label: [
                row["policy"],
                *(f"{row[name]:,}" for name in ("positives", "negatives", "open", "masked")),
                *("–" if row[name] is None else f"{row[name]:.3f}" for name in ("mean_target", "pos_weight")),
            ]
            for label, row in report["policy"]["labels"].items()
        }
        _print(f"under the policies below, and {report['policy']['blank']} for blank", headings, cells)
    if "against" in report:
        other = report["against"]
        headings = ["here %", "there %", "difference", "standardized"]
        cells = {
            label: [
                _percent(row["share_positive"]),
                _percent(row["other_share_positive"]),
                "–" if row["difference"] is None else f"{100 * row['difference']:+.1f}",
                "–" if row["standardized_difference"] is None else f"{row['standardized_difference']:+.3f}",
            ]
            for label, row in other["labels"].items()
        }
        title = (
            f"positive against {other['images']:,} images of {other['patients']:,} patients, "
            f"{other['shared_patients']:,} of them in both\n"
            "standardized: (p1 - p2) / sqrt((p1 (1 - p1) + p2 (1 - p2)) / 2), notable above 0.1"
        )
        _print(title, headings, cells)


def print_audit(audit: Audit) -> None:
    """Print the alarms in words, and what tells each label best, worst first."""
    for text in describe_alarms(audit):
        print(printable(f"{text}."))
    headings, rows = tabulate_audit(audit)
    totals = f"{audit['images']:,} images of {audit['patients']:,} patients"
    alarms = sum(map(len, find_alarms(audit).values()))
    title = (
        f"{totals}; alarms (!): {alarms}\nof {len(audit['clues'])} tests, those whose lower limit, adjusted by "
        f"Holm's method at level {audit['level']}, is above {audit['threshold']}"
    )
    if rows:
        _print(title, headings, rows)
    else:
        print(f"{totals}: nothing to test.")
    if audit["left_out"]:
        reasons = (f"{name} ({reason})" for name, reason in audit["left_out"].items())
        print(f"Not tested: {', '.join(reasons)}.")
    if audit["few"]:
        print(f"Fewer than 10 patients in a class: {', '.join(audit['few'])}.")


def tabulate_audit(audit: Audit) -> tuple[list[str], dict[str, list[str]]]:
    """Headings, and what tells each label best, worst first; ! marks an alarm."""
    best: dict[str, dict[str, Clue]] = {}
    for clue in sorted(audit["clues"], key=lambda clue: clue["kind"] == "content"):
        best.setdefault(clue["label"], {}).setdefault(clue["kind"], clue)
    headings = ["tells it", "95 %", "acquisition", "adjusted", "all together"]
    if any("content" in kinds for kinds in best.values()):
        headings += ["tells it", "content: maybe the disease"]
    rows = {}
    for label, kinds in best.items():
        cells = ["–"] * len(headings)
        if alone := kinds.get("acquisition"):
            limits, adjusted = describe_told(alone), shorten(alone["adjusted"])
            cells[:4] = _mark(alone), limits, alone["covariate"], adjusted
        if joint := kinds.get("together"):
            cells[4] = _mark(joint)
        if content := kinds.get("content"):
            cells[5:] = shorten(content["told"]), content["covariate"]
        rows[label] = cells
    return headings, rows


def _mark(clue: Clue) -> str:
    return f"{'! ' if clue['exceeds'] else ''}{shorten(clue['told'])}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _print(title: str, headings: list[str], rows: dict[str, list[str]]) -> None:
    Table(title, ["label", *headings], [[label, *cells] for label, cells in rows.items()]).print()
