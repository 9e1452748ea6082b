"""The shell of a report: escaping, the page's style sheet and its few lines of script.

Every string that goes into a page passes `tag`, which escapes it unless it is `Markup` already; so what a user or a
data set names can't become HTML. The page forbids itself the network (a content security policy), carries its style,
figures and script inline, follows the reader's light or dark scheme, and shows everything without the script too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fl.report.style import SERIES, SERIES_DARK, Picture, escape


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


EMPTY = {"meta", "link", "br", "input"}


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """One element; children are escaped unless they are `Markup`, None is left out, lists are flattened.

    Attribute names drop a trailing underscore (``class_``) and write the others as dashes (``data_view``).
    """
    shown = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        shown.append(f" {key}" if value is True else f' {key}="{escape(value)}"')
    head = f"<{name}{''.join(shown)}>"
    return Markup(head if name in EMPTY else f"{head}{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Markup:
    """Children one after the other, escaped unless they are `Markup`."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(str(child))
        elif isinstance(child, list | tuple):
            parts.append(join(child))
        else:
            parts.append(escape(child))
    return Markup("".join(parts))


def card(title: str, *children: Any, note: str = "", class_: str = "card") -> Markup:
    """A titled section with an optional line of explanation."""
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else None, *children, class_=class_)


def figure(picture: Picture, caption: str = "") -> Markup:
    """One inline figure; a wide one takes the whole row and scrolls on a phone."""
    return tag(
        "figure",
        tag("div", Markup(picture.svg), class_="plot"),
        tag("figcaption", caption) if caption else None,
        class_="wide" if picture.wide else None,
    )


def tabs(label: str, views: Iterable[tuple[str, str, Any]]) -> Markup:
    """Views (key, name, content): one at a time with script, one below the other under its name without."""
    views = list(views)
    buttons = [tag("button", name, type="button", data_view=key) for key, name, _ in views]
    parts = [tag("div", tag("h3", name), content, class_="view", data_view=key) for key, name, content in views]
    return tag("div", tag("div", *buttons, class_="tabs", role="group", aria_label=label), *parts, class_="tabbed")


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], class_: str = "", right_from: int = 1) -> Markup:
    """A table whose cells from column ``right_from`` on are numbers; it scrolls sideways inside its own box."""
    columns = [tag("th", cell, scope="col", class_="n" if i >= right_from else None) for i, cell in enumerate(head)]
    lines = []
    for row in rows:
        cells = [
            tag(
                "th" if i == 0 else "td", cell, class_="n" if i >= right_from else None, scope="row" if i == 0 else None
            )
            for i, cell in enumerate(row)
        ]
        lines.append(tag("tr", *cells))
    thead = tag("thead", tag("tr", *columns)) if columns else None
    return tag("div", tag("table", thead, tag("tbody", *lines), class_=class_ or None), class_="scroll")


def page(title: str, *body: Any) -> str:
    """The whole document."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    script = tag("script", Markup(_SCRIPT))
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", *body), script), lang="en") + "\n"


def _series(colors: Iterable[str]) -> str:
    return "".join(f"--c{i}:{color};" for i, color in enumerate(colors))


_STYLE = (
    ":root{--page:#f4f6f8;--card:#ffffff;--ink:#1b2430;--muted:#5a6675;--line:#e4e8ed;--accent:#00628f;"
    "--good:#0a6b45;--good-bg:#e2f4ec;--bad:#b3261e;--bad-bg:#fdecea;--warn:#7a4d00;--warn-bg:#fdf1d8;"
    '--font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;'
    + _series(SERIES)
    + "}\n@media (prefers-color-scheme:dark){:root{--page:#10151b;--card:#182028;--ink:#e6ebf0;--muted:#9ba8b5;"
    "--line:#2b3641;--accent:#6cc0ea;--good:#6fd6a9;--good-bg:#143427;--bad:#ff9d94;--bad-bg:#3d1a18;--warn:#f3c56b;"
    "--warn-bg:#38290c;" + _series(SERIES_DARK) + "}}\n"
    """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 var(--font)}
main{max-width:1160px;margin:0 auto;padding:28px 20px 48px}
a{color:var(--accent)}
header.top{margin:4px 0 22px}
.kicker{margin:0 0 2px;color:var(--muted);font-size:13px;letter-spacing:.02em}
h1{margin:0;font-size:30px;line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere;display:flex;flex-wrap:wrap;
  align-items:center;gap:4px 14px}
.facts{margin:8px 0 0;padding:0;list-style:none;display:flex;flex-wrap:wrap;gap:2px 20px;color:var(--muted)}
.facts b{color:var(--ink);font-weight:600}
.status{font-size:13px;font-weight:600;letter-spacing:0;padding:2px 11px;border-radius:99px;background:var(--warn-bg);
  color:var(--warn)}
.status.completed{background:var(--good-bg);color:var(--good)}
.status.failed{background:var(--bad-bg);color:var(--bad)}
.banner{margin:0 0 18px;padding:12px 16px;border-radius:10px;background:var(--warn-bg);color:var(--warn)}
.banner.failed{background:var(--bad-bg);color:var(--bad)}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 18px}
.tile{flex:1 1 136px;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:13px 16px 12px}
.tile dt{color:var(--muted);font-size:13px}
.tile dd{margin:1px 0 0;font-size:25px;font-weight:650;line-height:1.25;letter-spacing:-.015em;
  font-variant-numeric:tabular-nums}
.tile dd small{display:block;font-size:13px;font-weight:400;letter-spacing:0;color:var(--muted)}
.tile.main{border-color:var(--accent);box-shadow:inset 0 3px 0 var(--accent)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px 20px;margin:0 0 18px}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:0 26px;align-items:stretch}
h2{margin:0 0 4px;font-size:18px;letter-spacing:-.01em}
h3{margin:16px 0 4px;font-size:15px}
.note{margin:0 0 10px;color:var(--muted);font-size:14px;max-width:100ch}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:18px 26px;
  align-items:start;margin-top:12px}
ul.note{margin:14px 0 0;padding-left:20px}
table.variants th{white-space:nowrap}
figure{margin:0;min-width:0}
figure.wide{grid-column:1/-1}
figcaption{color:var(--muted);font-size:13px;margin-top:4px}
.plot{overflow-x:auto}
.plot svg{display:block;width:100%;max-width:560px;height:auto}
.wide .plot svg{max-width:none;min-width:640px}
.tip{fill:transparent}
.tip:hover{fill:var(--accent);fill-opacity:.25}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:6px 12px 6px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);font-weight:400}
th:last-child,td:last-child{padding-right:0}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-size:13px;white-space:nowrap;vertical-align:bottom}
td.n,th.n{text-align:right;white-space:nowrap}
td small{color:var(--muted);white-space:normal}
table.final{table-layout:fixed}table.final th{width:51%}
table.final td:nth-child(2){font-weight:600;white-space:nowrap;width:21%}
table.final td:nth-child(3){text-align:left;padding-left:6px;white-space:normal}
tr.best td.best,td.best{font-weight:700}
.swatch{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:8px;vertical-align:-1px}
code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
table.reasons th:last-child,table.reasons td:last-child{width:42%;vertical-align:middle}
.bar{display:block;height:8px;border-radius:4px;background:var(--bad);min-width:3px}
details{border-top:1px solid var(--line);padding:9px 0}
details:last-of-type{padding-bottom:0}
summary{cursor:pointer;font-weight:600}
summary span{color:var(--muted);font-weight:400}
.settings{columns:2 380px;column-gap:34px;margin-top:8px}
.settings section{break-inside:avoid;margin:0 0 12px}
.settings h3{margin:6px 0 0;font-size:13px;color:var(--muted);font-weight:600}
.settings dl,.facts-list{margin:0;display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:1px 14px}
.settings dt,.facts-list dt{color:var(--muted)}
.settings dd,.facts-list dd{margin:0;overflow-wrap:anywhere}
.set{background:var(--warn-bg);color:var(--warn);border-radius:4px;padding:0 5px}
.privacy{border-left:4px solid var(--accent)}
.privacy p{margin:4px 0 0;max-width:80ch}
.tabs{display:none}
.js .tabs{display:inline-flex;margin:6px 0 2px;border:1px solid var(--line);border-radius:9px;overflow:hidden}
.tabs button{font:inherit;font-size:14px;color:var(--muted);background:none;border:0;border-left:1px solid var(--line);
  padding:6px 15px;cursor:pointer}
.tabs button:first-child{border-left:0}
.tabs button[aria-pressed=true]{background:var(--accent);color:var(--card);font-weight:600}
.tabs button:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--accent);outline-offset:-2px}
.js .view>h3,.js .view{display:none}
.js .view.on{display:block}
footer{color:var(--muted);font-size:13px;margin-top:26px}
@media (max-width:560px){main{padding:18px 12px 32px}h1{font-size:24px}.card{padding:14px 14px 16px}
  .tiles{gap:8px}.tile{padding:10px 12px}.tile dd{font-size:20px}}
@media print{body{background:none}.card,.tile{break-inside:avoid}.js .tabs{display:none}
  .js .view,.js .view>h3{display:block}}
"""
)

_SCRIPT = """
document.documentElement.classList.add("js");
document.querySelectorAll(".tabbed").forEach(function (box) {
  var buttons = box.querySelectorAll("button"), views = box.querySelectorAll(".view");
  function show(key) {
    buttons.forEach(function (b) { b.setAttribute("aria-pressed", b.dataset.view === key); });
    views.forEach(function (v) { v.classList.toggle("on", v.dataset.view === key); });
  }
  buttons.forEach(function (b) { b.addEventListener("click", function () { show(b.dataset.view); }); });
  show(buttons[0].dataset.view);
});
"""
