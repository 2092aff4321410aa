"""How does a run become report.html, a page to share?"""

from base64 import b64encode
from html import escape
from pathlib import Path
from string import Template

from engine.audit import summary
from engine.console import printable
from engine.files import atomic_write
from engine.results import comparison_table, explanations, headline

CAPTIONS = {  # how a model's plots are read, by the end of their names
    "": "The dot is the best epoch. The dotted line is the saved model, which may include ridge regression, fitted "
    "without epochs.",
    "_confusion": "Blue: right. Orange: images of the class on the left that were taken for the class below.",
    "_reliability": "On the diagonal, the model is right as often as its probability says. Larger dots: more images.",
    "_mistakes": "The most confident mistakes, of every class in turn. Some are errors of the label.",
    "_data": "The clearest near-duplicates and label errors.",
}
PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 70rem; margin: auto; padding: 1rem; color: #222; background: #fff }
h2 { margin: 2.5rem 0 0.5rem; border-bottom: 1px solid #ddd }
p { max-width: 46rem }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
@media (max-width: 40rem) { table { font-size: 0.8rem } th, td { padding: 0.3rem } }
section { columns: 24rem; column-gap: 2rem }
figure { margin: 0 0 1.5rem; break-inside: avoid }
figure.alone { column-span: all; max-width: 46rem }
img { max-width: 100% }
figcaption, li, dd { color: #555; font-size: 0.9rem; overflow-wrap: anywhere }
dt { font-weight: 600 }
dd { margin: 0 0 0.5rem }
</style>
<h1>$title</h1>
<p>$headline</p>
<div class="wide"><table><thead><tr>$header</tr></thead><tbody>$rows</tbody></table></div>
<p>$explanation</p>
$sections
<h2>How it was made</h2>
<dl>$facts</dl>
""")
LISTED_FINDINGS = 50  # near-duplicates and label errors on the page


def write_page(rows: dict[str, dict], run: dict, report: dict | None, folder: Path) -> None:
    """Writes report.html, which needs no other file: the models' `rows`, the plots, and the audit of the data.

    `run` is the row whose settings the page shows.
    """
    models = [row for row in rows.values() if row["backbone"] != "ensemble"]
    header, *table = comparison_table(list(rows.values()))
    caption = "Bars on the left are 95% intervals. Times are those of training."
    sections = f"<h2>Comparison</h2><section>{_figure(folder / 'comparison.png', caption, 'alone')}</section>"
    if report:
        plot = _figure(folder / f"{rows[report['model']]['plot']}_data.png", CAPTIONS["_data"], "alone")
        sections += f"<h2>The data</h2><p>{escape(summary(report))}.</p><section>{plot}</section>{_listed(report)}"
    for row in models:
        plots = [_figure(folder / f"{row['plot']}{kind}.png", CAPTIONS[kind]) for kind in CAPTIONS if kind != "_data"]
        sections += f"<h2>{escape(row['label'])}</h2><section>{''.join(plots)}</section>"
    facts = {name: str(run[name]) for name in ("command", "date", "commit", "device", "data") if run[name]}
    facts["weights"] = "; ".join(f"{row['label']}: {row['weights']}" for row in models)
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    source = "/".join(Path(run["data"]).parts[-2:])
    page = PAGE.substitute(
        title=escape(f"Transfer learning on {'CIFAR-10' if source == 'cifar10' else source}"),
        headline=escape(headline(list(rows.values()))),
        header="".join(f"<th>{escape(cell)}</th>" for cell in header),
        explanation=escape(" ".join(explanations(list(rows.values())))),
        rows="".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>" for cells in table),
        sections=sections,
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items()),
    )
    with atomic_write(folder / "report.html") as file:
        file.write(page.encode(errors="backslashreplace"))


def _figure(file: Path, caption: str, kind: str = "") -> str:
    """A plot with a line on how to read it, "" if there is no such plot."""
    if not file.exists():
        return ""
    image = f'<img alt="{escape(file.stem)}" src="data:image/png;base64,{b64encode(file.read_bytes()).decode()}">'
    return f'<figure class="{kind}">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def _listed(report: dict) -> str:
    """The images of an audit."""

    def name(image: dict) -> str:
        return f"{image['path']} ({image['part']}, {image['label']})"

    pairs = [" and ".join(map(name, pair["images"])) for pair in report["near_duplicates"] or ()]
    errors = [f"{name(e)}: more likely {e['suggested']}, {e['probability']:.0%}" for e in report["label_errors"]]
    text = ""
    for title, lines in (("near-duplicates", pairs), ("label errors", errors)):
        if len(lines) > LISTED_FINDINGS:
            lines = [*lines[:LISTED_FINDINGS], f"and {len(lines) - LISTED_FINDINGS:,} more in data.json"]
        items = "".join(f"<li>{escape(printable(line))}</li>" for line in lines)
        text += f"<details><summary>All {title}</summary><ul>{items}</ul></details>" if lines else ""
    return text
