"Every key of params.yaml has a doc line over it."

import pytest
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode


def undocumented(text):
    "The keys in block style that have no comment on the line above."
    lines, bad = text.splitlines(), []

    def walk(node, path):
        if not isinstance(node, MappingNode) or node.flow_style:
            return
        for key, value in node.value:
            name = f"{path}{key.value}"
            above = lines[key.start_mark.line - 1].strip() if key.start_mark.line else ""
            if not above.startswith("#") or not above.strip("# -"):
                bad.append(name)
            walk(value, f"{name}.")

    walk(YAML().compose(text), "")
    return bad


@pytest.mark.parametrize("name", ["params.yaml", "examples/banking77/params.yaml"])
def test_every_key_has_a_doc_line(root, name):
    assert undocumented((root / name).read_text(encoding="utf-8")) == []


def test_a_bare_key_is_found():
    text = "# the seed\nseed: 1\n# how it learns\nfinetune:\n  # learning rate\n  lr: 1.0e-3\n  rank: 8\n"
    assert undocumented(text) == ["finetune.rank"]
