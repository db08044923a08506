"""Sphinx: `make docs` builds these pages into output/docs."""

import re

from gs_d2 import __version__

project = "gs_d2"
copyright = "the gs_d2 authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"gs_d2 {__version__}"

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes and units
autodoc_inherit_docstrings = False  # nn.Module's own documentation is torch's
default_role = "literal"  # `name` in a docstring is code
napoleon_use_ivar = True


def setup(app):
    """Pages outside of this folder (READMEs, notes of measurements) become files to download."""
    app.connect("source-read", link_outer_pages_as_files)


def link_outer_pages_as_files(app, page, source):
    source[0] = re.sub(r"\]\((\.\./[\w./-]+\.md)\)", r"](path:\1)", source[0])
