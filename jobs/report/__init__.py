"""A run as one self-contained HTML page, and many runs of an output as another; both open offline."""

from .material import Material
from .page import page_of, render_html, write_end
from .runs_page import render_runs

__all__ = ["Material", "page_of", "render_html", "render_runs", "write_end"]
