"""Sphinx configuration. `make docs` calls docs/pages.py first, which writes the sources to docs/_build/source."""

from lra import __version__

project = "Long Range Arena"
author = copyright = "The Long Range Arena suite maintainers"
version = release = __version__

extensions = ["myst_parser"]
myst_heading_anchors = 3
nitpicky = True
# operators are drawn with words such as `y_t = a * y_(t-1)`: no language to highlight
highlight_language = "text"

html_theme = "furo"
html_title = f"Long Range Arena {version}"
html_show_sphinx = False
html_copy_source = False
