"""How the documentation site is built: `sphinx-build -W --keep-going -n -b html docs OUT`.

Sphinx reads Markdown through MyST and docstrings through autodoc; furo draws the pages. The build
needs no network and writes nothing into docs/: the reference is made from the package as it is
imported (`reference_pages`), and the pictures of strategies are drawn from resolved specs
(`site_pictures`).
"""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "meshwright"
project_copyright = "the authors of meshwright, Apache-2.0"
version = release = version_of("meshwright")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "reference_pages",
    "site_pictures",
]
exclude_patterns = ["_build"]
templates_path: list[str] = []
default_role = "literal"  # single backticks that `reference_pages` cannot link are code

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autoclass_content = "class"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"meshwright {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

nitpicky = True
nitpick_ignore_regex = [
    # Other projects' names are not links: resolving them would need the network (intersphinx).
    # Annotations are shown as the source writes them, so these are bare names and jax's.
    ("py:(class|exc)", r"\w+|(collections|contextlib|flax|jax|nnx|np|numpy|optax)\.[\w.]+"),
    # Types that properties have but that no package exports.
    ("py:class", r"meshwright\.(sharding|models|train)\.\w+\.\w+"),
]
