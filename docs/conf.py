"""Settings of the documentation site, built by `make docs`. Nothing is fetched, neither to build it nor to read it."""

import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS / "_ext"), str(ROOT)]

project = "rlhf_jax"
copyright = "the authors of rlhf_jax, Apache-2.0"
exclude_patterns = ["_ext", "_build"]

# Sphinx reads below docs/ only: notebooks/ is the source, this is a copy.
(DOCS / "notebooks").mkdir(exist_ok=True)
for notebook in (ROOT / "notebooks").glob("*.ipynb"):
    shutil.copyfile(notebook, DOCS / "notebooks" / notebook.name)

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "mathml",
    "command_line",
    "docstrings",
]

# Markdown and notebooks. Outputs are those stored in the notebook; the tests run the notebooks.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
# A link without a page of that name is an error, not a text.
nitpicky = True
# Types of fields: those of libraries, whose inventories would have to be downloaded, and one that has no page.
nitpick_ignore_regex = [
    ("py:class", r"(collections|jax|numpy)\..*"),
    ("py:class", r"rlhf_jax\.pretrained\.config_fields\..*"),
]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # types are in the source, one click away; shapes and units are in the text
autodoc_preserve_defaults = True
default_role = "code"
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]
add_module_names = False
toc_object_entries_show_parents = "hide"
highlight_language = "none"  # blocks without a language are commands and lists of files
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "rlhf_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = False  # excerpts are fetched, which a browser refuses for files


# Of each folder of source code.
SIDEBARS: dict[str, str] = {}


def share_sidebars(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Pages of source code have one sidebar a folder. The theme makes it anew for each of 110, a fifth of the build."""
    tree, (folder, _, _) = context.get("toctree"), page.rpartition("/")

    def sidebar(**how: Any) -> str:
        if folder not in SIDEBARS:
            SIDEBARS[folder] = tree(**how)
        return SIDEBARS[folder]

    if folder.startswith("_modules"):
        context["toctree"] = sidebar


def setup(app: Any) -> None:
    app.connect("html-page-context", share_sidebars, priority=400)  # before the theme's own, which has 500
