"""The module's size and style in figures, held against their limits.

    python tests/style.py            llm_inference.py: prints the figures; exit 1 and the offenders where one is over
    python tests/style.py --tests    the width of the test files

Counted by the syntax tree: a function's lines include its signature and docstring; density is comprehensions,
conditional expressions and walruses per 100 lines of code (neither blank nor comment). A Chinese character takes two
columns.
"""

import ast
import io
import re
import sys
import tokenize
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, FUNCTION_LONGEST = 120, 60
# Where the module stands against its aims: no change may make these larger, and each that becomes smaller moves down.
LINES, BYTES, FUNCTION_MEDIAN, FUNCTION_P90, CLASS_LONGEST = 11_665, 580_340, 7, 19, 200
AIMS = {"lines": 5500, "bytes": 250_000, "function: median": 5, "function: 90th percentile": 18, "class: longest": 200}
DENSITY = 5.0
#: words that were a private vocabulary; in names, comments, docstrings and messages
BANNED = re.compile(r"(?<![a-z])(?:mend(?:s|ed|able)?|told|whole|said|gives? back|gave back)(?![a-z])", re.IGNORECASE)
#: the same in names only, where the word itself is ordinary English
BANNED_IN_NAMES = re.compile(r"(?<![a-z])(?:instead)(?![a-z])", re.IGNORECASE)
SHOWN = 25  # offenders listed for one figure, at most

Function = ast.FunctionDef | ast.AsyncFunctionDef
DENSE = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.NamedExpr)


@dataclass(frozen=True)
class Figure:
    """One line of the report. `offenders` are the places to look at when `value` is over `limit`."""

    name: str
    value: float
    limit: float
    offenders: list[str]

    @property
    def over(self) -> bool:
        return self.value > self.limit


def columns(line: str) -> int:
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in line)
    return len(line) + wide


def size(node: ast.AST) -> int:
    """Lines from the signature to the end; decorators do not count."""
    assert isinstance(node, Function | ast.ClassDef) and node.end_lineno
    return node.end_lineno - node.lineno + 1


def quantile(sizes: list[int], part: float) -> int:
    return sorted(sizes)[min(len(sizes) - 1, int(len(sizes) * part))] if sizes else 0


def longest(nodes: list[ast.AST], limit: int) -> list[str]:
    """The ones over the limit, or the longest ten, largest first."""
    ordered = sorted(nodes, key=size, reverse=True)
    over = [node for node in ordered if size(node) > limit] or ordered[:10]
    return [f"{size(node):5} {node.name} (line {node.lineno})" for node in over]  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------- single figures


def wide_lines(path: Path) -> list[str]:
    found = []
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if (width := columns(line)) > COLUMNS:
            found.append(f"{path.relative_to(ROOT)}:{number} has {width} columns")
    return found


def dense_places(tree: ast.Module, functions: list[ast.AST]) -> tuple[int, list[str]]:
    """How many there are in all, and the functions with most of them."""
    total = sum(isinstance(node, DENSE) for node in ast.walk(tree))
    counts = []
    for function in functions:
        count = sum(isinstance(node, DENSE) for node in ast.walk(function))
        counts.append((count, f"{count:5} in {function.name} (line {function.lineno})"))  # type: ignore[attr-defined]
    counts.sort(key=lambda pair: pair[0], reverse=True)
    return total, [text for _, text in counts[:10]]


def banned_words(source: str) -> list[str]:
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string
        if token.type == tokenize.NAME:
            words = [*BANNED.findall(text), *BANNED_IN_NAMES.findall(text)]
        elif token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            words = BANNED.findall(text)
        else:
            continue
        if words:
            found.append(f"line {token.start[0]}: {', '.join(words)}: {text.strip()[:70]!r}")
    return found


def public_functions(tree: ast.Module) -> Iterator[tuple[str, Function, ast.ClassDef | None]]:
    """Public functions of the module and public methods of its public classes, by their dotted names."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node, None
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, Function) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner, node


def is_marked(function: Function, *names: str) -> bool:
    """Whether a decorator has one of these names (`overload`, `typing.overload`, `name.setter`)."""
    for decorator in function.decorator_list:
        if ast.unparse(decorator).rpartition(".")[2] in names:
            return True
    return False


def documented_methods(tree: ast.Module) -> dict[str, set[str]]:
    """Per class: the methods with a docstring, its own and those of its base classes in this module."""
    found: dict[str, set[str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        own = {each.name for each in node.body if isinstance(each, Function) and ast.get_docstring(each)}
        for base in node.bases:
            own |= found.get(ast.unparse(base).partition("[")[0], set())
        found[node.name] = own
    return found


def undocumented(tree: ast.Module) -> list[str]:
    """Public classes, functions and methods without a docstring; a method may have its base class's."""
    inherited = documented_methods(tree)
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            found.append(f"class {node.name} (line {node.lineno})")
    for name, function, owner in public_functions(tree):
        if ast.get_docstring(function) or is_marked(function, "overload", "setter", "deleter"):
            continue
        if owner is None or function.name not in inherited[owner.name]:
            found.append(f"{name} (line {function.lineno})")
    return found


def untyped(tree: ast.Module) -> list[str]:
    """Public functions and methods with a parameter or result that has no annotation."""
    found = []
    for name, function, owner in public_functions(tree):
        positional = [*function.args.posonlyargs, *function.args.args]
        if owner is not None and not is_marked(function, "staticmethod"):
            positional = positional[1:]  # self, cls
        rest = [function.args.vararg, function.args.kwarg]
        arguments = [*positional, *function.args.kwonlyargs, *(each for each in rest if each)]
        missing = [argument.arg for argument in arguments if argument.annotation is None]
        if function.returns is None:
            missing.append("its result")
        if missing:
            found.append(f"{name} (line {function.lineno}): {', '.join(missing)}")
    return found


# ------------------------------------------------------------------------------------------------------ the report


def module_figures(path: Path) -> list[Figure]:
    source = path.read_text()
    tree, lines = ast.parse(source), source.split("\n")
    functions: list[ast.AST] = [node for node in ast.walk(tree) if isinstance(node, Function)]
    classes: list[ast.AST] = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    sizes = [size(node) for node in functions]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    dense, densest = dense_places(tree, functions)
    banned, bare, loose = banned_words(source), undocumented(tree), untyped(tree)
    return [
        Figure("lines", len(lines), LINES, []),
        Figure("bytes", len(source.encode()), BYTES, []),
        Figure("columns of the longest line", max(map(columns, lines)), COLUMNS, wide_lines(path)),
        Figure("function: median", quantile(sizes, 0.5), FUNCTION_MEDIAN, []),
        Figure("function: 90th percentile", quantile(sizes, 0.9), FUNCTION_P90, longest(functions, FUNCTION_P90)),
        Figure("function: longest", max(sizes), FUNCTION_LONGEST, longest(functions, FUNCTION_LONGEST)),
        Figure("class: longest", max(map(size, classes)), CLASS_LONGEST, longest(classes, CLASS_LONGEST)),
        Figure("density per 100 lines of code", round(dense * 100 / len(code), 1), DENSITY, densest),
        Figure("banned words", len(banned), 0, banned),
        Figure("public names without a docstring", len(bare), 0, bare),
        Figure("public functions not fully typed", len(loose), 0, loose),
    ]


def width_of_tests() -> list[Figure]:
    wide = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        wide += wide_lines(path)
    return [Figure("lines of tests over 120 columns", len(wide), 0, wide)]


def report(figures: list[Figure], show: Callable[[str], None] = print) -> int:
    for figure in figures:
        verdict = "OVER" if figure.over else "ok"
        aim = f", aim {AIMS[figure.name]}" if figure.value > AIMS.get(figure.name, figure.value) else ""
        show(f"{verdict:4}  {figure.name:34} {figure.value:>9g}   at most {figure.limit:g}{aim}")
    for figure in figures:
        if not figure.over or not figure.offenders:
            continue
        show(f"\n{figure.name}:")
        for offender in figure.offenders[:SHOWN]:
            show(f"  {offender}")
        if len(figure.offenders) > SHOWN:
            show(f"  … and {len(figure.offenders) - SHOWN} more")
    return int(any(figure.over for figure in figures))


def main() -> int:
    if sys.argv[1:] == ["--tests"]:
        return report(width_of_tests())
    if sys.argv[1:]:
        print(__doc__)
        return 2
    return report(module_figures(ROOT / "llm_inference.py"))


if __name__ == "__main__":
    sys.exit(main())
