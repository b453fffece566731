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

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "img{max-width:100%}.v{font-size:1.15rem;border-left:4px solid #c0392b;padding-left:1rem}"
    ".t{border-collapse:collapse;font-size:.9rem}.t td,.t th{padding:.25rem .8rem;text-align:right;"
    "border-bottom:1px solid #e4e4e4}.t td:first-child,.t th:first-child{text-align:left}"
)


def picture(title: str, figure: plots.Figure) -> str:
    """A figure, which is closed, under its title."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plots.plt.close(figure)
    code = base64.b64encode(drawn.getvalue()).decode()
    return f'<h2>{html.escape(title)}</h2><img alt="{title}" src="data:image/png;base64,{code}">'


def table(title: str, frame: pd.DataFrame, index: bool = False) -> str:
    """A table under its title, its cells escaped."""
    return f"<h2>{title}</h2>" + frame.to_html(index=index, border=0, classes="t")


def write(path: Path, title: str, body: Sequence[str]) -> Path:
    """The page of these parts, written whole or not at all."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    with replacing(path := Path(path)) as part:
        part.write_text(f"{head}<style>{_STYLE}</style>" + "\n".join(body) + "</html>\n", encoding="utf-8")
    return path
