"Sphinx's settings for the site. `make docs` runs tools/website, which writes the pages that Sphinx reads."

from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError

HERE = Path(__file__).parent

project = "llmkit"
html_title = "llmkit"
copyright = "the llmkit authors, Apache-2.0"
extensions = ["myst_nb"]
exclude_patterns = ["_extra"]

# Notebooks come with their outputs: a build runs nothing.
nb_execution_mode = "off"
# tables in outputs are tables
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Source"
nb_code_prompt_hide = "Source"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "attrs_block", "attrs_inline", "tasklist"]
myst_heading_anchors = 3
myst_links_external_new_tab = True
add_module_names = False
python_maximum_signature_line_length = 72
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"
# the card in a record has anchors of its own; headings may skip a level; two modules may each have a class of one name, and its annotations then link nowhere
suppress_warnings = [
    "myst.xref_missing",
    "myst.header",
    "mystnb.unknown_mime_type",
    "ref.python",
]

html_theme = "furo"
html_static_path = [str(HERE / "_static")]
html_css_files = ["llmkit.css"]
html_extra_path = [str(HERE.parent / "build/docs/_extra")]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5fa5", "color-brand-content": "#0b5fa5"},
    "dark_css_variables": {"color-brand-primary": "#7db8ec", "color-brand-content": "#7db8ec"},
}


def formula(block):
    "A visitor that writes a formula as MathML, which browsers draw by themselves: no script, no font, no network."

    def visit(writer, node):
        try:
            writer.body.append(tex2mathml(node.astext(), as_block=block))
        except MathError as e:
            raise ExtensionError(f"{node.source}:{node.line}: cannot write {node.astext()!r} as MathML: {e}") from e
        raise nodes.SkipNode

    return visit


def setup(app):
    "Make MathML the way in which formulas are written."
    app.add_html_math_renderer("mathml", (formula(block=False), None), (formula(block=True), None))


html_math_renderer = "mathml"
