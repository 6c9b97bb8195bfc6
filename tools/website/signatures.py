"Signatures of what a cell exports, in the directives of Sphinx's Python domain."

import ast
import importlib
import inspect
import re

from fastcore.docments import docments


def parsed(source: str) -> list[ast.stmt]:
    "The statements of a cell; none when it holds a magic or a shell command."
    try:
        return ast.parse(source).body
    except SyntaxError:
        return []


def table(obj: object) -> str:
    "The commented parameters of a function, or of a class that says itself what it is made from, as a Markdown table."
    if isinstance(obj, type) and "__init__" not in vars(obj):
        return ""
    docs = {"returns" if k == "return" else k: v for k, v in docments(obj).items() if v}
    head = re.split(r'\n *"', inspect.getsource(obj))[0] if inspect.isfunction(obj) else ""
    for name, text in re.findall(r"^ +\*\*(\w+)\b[^#\n]*# *(.+)$", head, re.M):  # docments takes it for the result's
        docs = {k: v for k, v in docs.items() if v != text} | {f"**{name}": text}
    words = {k: re.sub(r"(# *)?\b(noqa(: *[A-Z]+\d+)?|fmt: skip)", "", v).strip() for k, v in docs.items()}
    rows = [f"| `{k}` | {' '.join(v.split()).replace('|', chr(92) + '|')} |" for k, v in words.items() if v]
    return "\n".join(["| name | meaning |", "|:--|:--|", *rows]) if rows else ""


def signature(node: ast.FunctionDef, method: bool) -> str:
    "A function's signature as it was written, `self` left off."
    args = ast.unparse(node.args)
    if method and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list):
        args = re.sub(r"^\w+(: [^,]*)?(, |$)", "", args)
    return f"{node.name}({args})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def fields(node: ast.ClassDef) -> str:
    "What a dataclass is made from, as the class's signature."
    marks = "".join(ast.unparse(d) for d in node.decorator_list)
    made = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n)]
    return f"{node.name}({', '.join(made)})" if "dataclass" in marks else node.name


def describe(node: ast.stmt, obj: object, module: str, depth: int = 0) -> str:
    "A definition as a directive of Sphinx's Python domain, with its public methods inside."
    marks = {d.id for d in node.decorator_list if isinstance(d, ast.Name)}
    is_class = isinstance(node, ast.ClassDef)
    kind = "class" if is_class else "property" if "property" in marks else "method" if depth else "function"
    head = fields(node) if is_class else node.name if kind == "property" else signature(node, method=depth > 0)
    body = [ast.get_docstring(node) or "", "" if kind == "property" else table(obj)]
    for n in node.body if is_class else ():
        if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"):
            body.append(describe(n, getattr(obj, n.name), module, depth + 1))
    fence, option = "`" * (5 - depth), "" if depth else f":module: {module}\n"
    return f"{fence}{{py:{kind}}} {head}\n{option}\n" + "\n\n".join(b for b in body if b) + f"\n{fence}\n"


def api(nodes: list[ast.stmt], module: str) -> str:
    "The public functions and classes among some statements, as directives."
    mod = importlib.import_module(module)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [n for n in nodes if isinstance(n, kinds) and not n.name.startswith("_") and hasattr(mod, n.name)]
    return "\n".join(describe(n, getattr(mod, n.name), module) for n in found)


def symbols() -> dict[str, str]:
    "Public name → dotted path, for the names that mean one thing in the whole library."
    from llmkit._modidx import d

    paths: dict[str, list[str]] = {}
    for module, syms in d["syms"].items():
        for s in syms:
            name = s.removeprefix(module + ".")
            if not any(part.startswith("_") for part in name.split(".")):
                paths.setdefault(name, []).append(s)
    return {k: v[0] for k, v in paths.items() if len(v) == 1}
