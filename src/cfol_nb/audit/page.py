"""A page of HTML that needs nothing else and can be sent to somebody."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cfol_nb import plots
from cfol_nb.files import replacing

MANY = 60  # classes, for a picture with a row for each

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;"
    "overflow-wrap:anywhere}h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.15rem;margin-top:2rem}"
    "img{max-width:100%;height:auto}.v{font-size:1.1rem;border-left:4px solid #c0392b;padding-left:1rem}"
    ".w{overflow-x:auto}.t{border-collapse:collapse;font-size:.9rem;overflow-wrap:normal}.t td,.t th{"
    "padding:.25rem .7rem;text-align:right;border-bottom:1px solid #e4e4e4}.t td:first-child,.t th:first-child"
    "{text-align:left}@media(max-width:40rem){body{margin:1rem auto}.t{font-size:.78rem}.t td,.t th{padding:.2rem "
    ".4rem}}@media print{body{max-width:none;margin:0;font-size:11pt}h2{break-after:avoid}img,tr{break-inside:avoid}"
    ".w{overflow:visible}.t{font-size:8pt}.t td,.t th{padding:.1rem .3rem}}"
)


def picture(title: str, figure: plots.Figure) -> str:
    """A figure, which is closed, under its title."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plots.plt.close(figure)
    code = base64.b64encode(drawn.getvalue()).decode()
    return f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{code}">'


def table(title: str, frame: pd.DataFrame, index: bool = False) -> str:
    """A table under its title, its cells escaped."""
    with pd.option_context("display.max_colwidth", None):  # no cell is cut
        return f"<h2>{title}</h2><div class=w>{frame.to_html(index=index, border=0, classes='t')}</div>"


def write(path: Path, title: str, body: Sequence[str]) -> Path:
    """The page of these parts, written whole or not at all."""
    head = '<!doctype html><html lang="en"><meta charset="utf-8">'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
    with replacing(path := Path(path)) as part:
        part.write_text(f"{head}<style>{_STYLE}</style>" + "\n".join(body) + "</html>\n", encoding="utf-8")
    return path
