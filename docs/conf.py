"""Sphinx: `make docs` builds these pages into output/docs."""

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
    """Notes of measurements are outside of this folder: pages link to them, here as files to download."""
    app.connect("source-read", link_notes_as_files)


def link_notes_as_files(app, page, source):
    source[0] = source[0].replace("](../benchmarks/results/", "](path:../benchmarks/results/")
