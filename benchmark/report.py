"""Rewrite the README's tables of results from the CSVs in results/, and nothing else in it.

    python -m benchmark.report            rewrite them
    python -m benchmark.report --check    change nothing; exit with one line if one of them is out of date

In the README a table stands between <!-- table NAME --> and <!-- end -->. Its text is in benchmark/tables.md,
where every number that a run measured is a field. {entry.key} is results/entry.csv's column eval/key as
mean +- half a 95 % interval, over seeds (Student's t), or over held-out tasks where there is one seed;
{entry.key:.2f} the mean alone, {entry.key[1]:.2f} the second seed's. {entry.runs}: seeds, and minutes a run.
{compare_TASK}: a whole comparison. {speed.figure:,.0f}: a figure of results/throughput.csv.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

from benchmark import compare, plot
from benchmark.reproduce import RESULTS, ROOT

README, TEMPLATES = ROOT / "README.md", Path(__file__).parent / "tables.md"
TABLE = re.compile(r"<!-- table (\w+) -->\n\n(.*?)\n\n<!-- end -->", re.DOTALL)


def plain(text):
    """A number as the README writes it: .5 for 0.5."""
    return re.sub(r"^(-?)0\.", r"\1.", text)


class Measured:
    """The values of one column, a seed each, and the interval of their mean."""

    def __init__(self, values, errors):
        (self.mean,), (self.half,) = plot.mean_and_error([[v] for v in values], [[e] for e in errors])
        self.values = values

    def __getitem__(self, number):
        return Measured([self.values[number]], [0.0])

    def __format__(self, spec):
        """'': mean +- half, the half with two figures where it begins with 1, 2 or 3 and else with one."""
        if spec:
            return plain(format(self.mean, spec))
        if not self.half > 0:
            return plain(f"{self.mean:.2f}")
        power = int(f"{self.half:.1e}"[-3:])
        digits = max(0, (1 if f"{self.half:.1e}"[0] in "123" else 0) - power)
        return f"{plain(f'{self.mean:.{digits}f}')} +- {plain(f'{self.half:.{digits}f}')}"


class Entry:
    """results/NAME.csv, by attribute: a column, or runs."""

    def __init__(self, name):
        with open(RESULTS / f"{name}.csv") as file:
            self.rows = list(csv.DictReader(file))

    @property
    def runs(self):
        minutes = sum(float(row["minutes"]) for row in self.rows) / len(self.rows)
        time = f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.1f}"
        return f"{len(self.rows)}, {time} min" if minutes < 120 else f"{len(self.rows)}, {minutes / 60:.1f} h"

    def __getattr__(self, key):
        error = key.replace("return_", "return_se_", 1) if key.startswith("return_ep") else f"{key}_se"
        try:
            values = [float(row[f"eval/{key}"]) for row in self.rows]
        except KeyError:
            raise AttributeError(f"no column eval/{key}") from None
        return Measured(values, [float(row.get(f"eval/{error}", 0)) for row in self.rows])


class Speed:
    """results/throughput.csv, by attribute."""

    def __init__(self):
        with open(RESULTS / "throughput.csv") as file:
            self.values = {row["figure"]: float(row["value"]) for row in csv.DictReader(file)}

    def __getattr__(self, figure):
        return Measured([self.values[figure]], [0.0])


class Entries(dict):
    """Field names -> what they stand for, read when first asked for."""

    def __missing__(self, name):
        if name.startswith("compare_"):
            self[name] = comparison(name.removeprefix("compare_"))
        else:
            self[name] = Speed() if name == "speed" else Entry(name)
        return self[name]


def comparison(task):
    """A comparison as a table: interquartile mean [its bootstrap interval] (mean)."""
    stages = range(compare.STAGES)
    head = [compare.ENV_IDS[task], *(str(stage + 1) for stage in stages)]
    head = [*head[:-1], f"{head[-1]}th episode", "steps on the task before it", "trained on, seeds"]
    rows = [head, ["-"] * len(head)]
    for method, found in compare.read(task).items():
        cells = [summary(found[stage][2]) if stage in found else "" for stage in stages]
        steps, trained, returns = found[max(found)]
        training = f"{trained.mean() / 1e6:.1f} M" if trained.any() else "not trained"
        rows.append([method, *cells, f"{steps.mean():,.0f}", f"{training}, {len(returns)}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(returns):
    """A cell of a comparison. returns: [seeds, tasks]."""
    middle, (low, high) = compare.interquartile_mean(returns), compare.bootstrap(returns)
    digits = 0 if abs(middle) >= 100 else 1 if abs(middle) >= 10 else 2
    texts = (plain(f"{value:.{digits}f}") for value in (middle, low, high, returns.mean()))
    return "{} [{}, {}] ({})".format(*texts)


def rewrite(text, templates=None):
    """The README's text with its tables as the CSVs have them."""
    tables, entries = dict(TABLE.findall(templates or TEMPLATES.read_text())), Entries()

    def table(match):
        if match[1] not in tables:
            sys.exit(f"error: {TEMPLATES.name} has no table {match[1]}, which README.md has")
        return f"<!-- table {match[1]} -->\n\n{tables[match[1]].format_map(entries)}\n\n<!-- end -->"

    return TABLE.sub(table, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a table is out of date")
    options = parser.parse_args()
    before = README.read_text()
    after = rewrite(before)
    if options.check and before != after:
        sys.exit("error: the README's tables are not those of benchmark/results: python -m benchmark.report")
    README.write_text(after)


if __name__ == "__main__":
    main()
