"""`stretto report`: what stored races, studies, qualities and runs showed, as a page, a table, numbers or figures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from stretto.measure.sources import Part

Format = Literal["html", "md", "csv", "json", "png", "pdf"]


@dataclass(frozen=True)
class Report:
    """Write the report of stored races, studies, qualities or runs; nothing is trained."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="[RUNS | RACE | STUDY | QUALITY ...]")] = ()
    """Runs folders, each reported by its newest race, study or quality, or by its runs where it has none; a
    workload's folder in one, reported by its runs; ids of races, studies and qualities.
    Default: the folder of --out."""
    format: Format | None = None
    """What to write. Default: by the ending of --to, else html."""
    to: Path | None = None
    """The file. Default: html, png and pdf lie in the runs folder, md, csv and json are printed."""
    out: Path = Path("runs")
    """Folder in which ids are looked up."""

    def run(self) -> int:
        """Write the report; with a page, print its table. Exit code 2 where something could not be reported."""
        from stretto.measure import export, report, sources

        chosen = self._format()
        parts, failures = sources.find(self.runs, self.out)
        target = self.to or parts[0].place.with_name(f"{parts[0].place.name}.{chosen}")
        if chosen == "html":
            _print(parts)
            print(f"report: {report.write_text(report.page(parts), target)}")
        elif chosen in ("png", "pdf"):
            print(f"report: {report.sheet(parts, target)}")
        else:
            make = {"md": export.as_markdown, "csv": export.as_csv, "json": export.as_json}[chosen]
            if self.to:
                print(f"report: {report.write_text(make(parts), self.to)}")
            else:
                print(make(parts), end="")
        for failure in failures:
            print(f"stretto: {failure}", file=sys.stderr)
        return 2 if failures else 0

    def _format(self) -> Format:
        known: tuple[Format, ...] = get_args(Format)
        if self.format or self.to is None:
            return self.format or "html"
        ending = self.to.suffix.lstrip(".")
        if found := next((one for one in known if one == ending), None):
            return found
        raise ValueError(f"--to {self.to} ends in none of {', '.join(known)}; say which with --format")


def _print(parts: list[Part]) -> None:
    """The answers and tables: drawn on a terminal, else in Markdown."""
    from rich.console import Console

    from stretto.measure import suite, summary

    console = Console()
    for part in parts:
        if part.table:
            print(f"{part.table}\n")
        if console.is_terminal:
            console.print(summary.table(part.summary))
        else:
            print(summary.plain(part.summary))
        for sentence in part.sentences:
            print(sentence)
        for note in (*part.notes, *part.summary.warnings):
            print(f"note: {note}")
    for name, found in suite.suites([part.summary for part in parts]).items():
        print(suite.told(name, found))
