"""docs/LOWERING.md shows what the compiler makes today. KWFLOW_REWRITE=1 rewrites it; look at the difference before you keep it."""

import os
import pathlib
import sys

import pytest
from typer.testing import CliRunner

from kwflow.cli import app
from kwflow.durable.lower.show import functions_of, lowered_text
from kwflow.errors import UsageError

FILE = pathlib.Path(__file__).parents[2] / "docs/LOWERING.md"
Case = tuple[str, str, str, bool]  # title, what to know about it, source, whether the cold twin is shown
CASES: list[Case] = [
    ("A call with a wait among its arguments", "What was evaluated before the wait is kept, in CPython's order; what comes after stays in place.", "def f(a):\n    x = g(a.b, (yield 1), a.c)\n", True),
    ("Chained comparison", "The next operand is evaluated only if the comparison so far holds.", "def f(a, c):\n    return a < (yield) < c\n", False),
    ("and, or, conditional", "The test of the left side comes before the right side is evaluated.", "def f(a):\n    return a and (yield 1) or ((yield 2) if a else 3)\n", False),
    ("A constant compared by identity", "`same` is also true for an equal text or number: a restored one is another object than the module's.", "LOW = 'low'\ndef f(a):\n    if (yield) is LOW:\n        return a is not LOW\n", False),
    ("f-string", "A piece before a wait is formatted before it.", 'def f(a):\n    return f"{a:>3} {(yield)}"\n', False),
    ("Display with a star", "The iterable is unpacked before the wait.", "def f(a):\n    return [*a, (yield)]\n", False),
    ("Augmented assignment", "The target is read before the wait; in-place operators stay.", "def f(o):\n    o.total[0] += yield\n", False),
    ("Targets", "The value is unpacked first; then the parts of each target are evaluated when its turn comes.", "def f(a, v):\n    a[(yield)], *rest = v\n", False),
    ("if and elif", "When it is entered again, the label alone chooses the branch; no condition is evaluated twice.", "def f(a):\n    if a:\n        yield 1\n    elif a is None:\n        yield 2\n", True),
    ("while with a wait in its condition", "", "def f():\n    while (yield 1):\n        yield 2\n    else:\n        yield 3\n", True),
    ("for", "The iterator has a name, so that it can be saved. When it is entered again, the loop first makes one dummy round, then goes on with the same iterator.", "def f(xs):\n    for x in xs:\n        yield x\n    else:\n        yield 'none left'\n", True),
    ("yield from", "`delegate` gives what is iterated; when it is entered again, `Resume` swallows the first `next`.", "def f(xs):\n    return (yield from xs)\n", True),
    ("try, a wait in the body", "The first clause asks whether the generator is only being forgotten; if so, none of the author's code runs.", "def f():\n    try:\n        yield 1\n    except ValueError:\n        return 2\n    finally:\n        g()\n", True),
    ("try, a wait in a handler", "The saved exception is raised again into the `try`, so that the handler is entered natively: bare `raise`, `sys.exc_info()` and `__context__` are right.", "def f():\n    try:\n        g()\n    except ValueError as error:\n        yield error\n", True),
    ("finally that waits", "It notes why it was entered; when it is entered again, that happens again.", "def f():\n    try:\n        return g()\n    finally:\n        yield 1\n", True),
    ("with", "`__enter__` and `__exit__` are called on the type, as CPython does.", "def f(m):\n    with m as x:\n        yield x\n", True),
    ("match", "Patterns bind in place and are never tried twice: the cold twin notes which case it was.", "def f(v):\n    match v:\n        case [x]:\n            yield x\n        case _:\n            yield 2\n", True),
    ("Closures", "`cells_` are the frame's cells, so that a restored generator and its closures share them again.", "def f():\n    total = 0\n    def add(n):\n        nonlocal total\n        total += n\n    yield add\n    return total\n", True),
    ("Generator expression", "It stays a generator expression. Iterators of inner loops get names; `for name in [value]` is an assignment.", "def f(xs, k):\n    return (x * k for x in xs if x for y in x)\n", False),
    ("Lambda that waits", "It is made from code that is compiled alone, around the cells and defaults of a lambda in its place.", "def f(n):\n    return lambda x=1: (n, (yield x))\n", False),
    ("await", "A fresh call runs inline; anything else is waited for.", "async def f(x):\n    return await x + 1\n", True),
    ("async for", "", "async def f(xs):\n    async for x in xs:\n        g(x)\n", False),
    ("async with", "", "async def f(m):\n    async with m as x:\n        g(x)\n", False),
    ("Comprehension that awaits", "It is a function of its own on every minor version of Python.", "async def f(xs):\n    return [await x for x in xs]\n", False),
    ("Async generator", "What it yields is an Item; what it waits for is not.", "async def f(x):\n    yield await x\n", False),
]
HEAD = """# Lowering: what the compiler makes of a generator

This page shows, for each construct of Python, the code that runs in place of yours. You need it to read lowered code, or to change the compiler.

A durable module is compiled from a rewritten tree ([kwflow/durable/lower](../kwflow/durable/lower/__init__.py) reads in the order of its docstring). Each
generator has two forms:

- The **hot** twin replaces the author's function. Every wait is a statement of its own, with its label stored
  before it (in a loop that has only one label: before the loop). What the interpreter would keep on its stack has a name.
- The **cold** twin is compiled when a saved generator is restored. It is the same
  code with guards, entered at the label (`reach_`) where the generator waited.

`kwflow code lowered MODULE:FUNCTION [--cold]` prints both for your own code.

Line numbers are the author's: tracebacks, `pdb`, coverage and `inspect.getsource` show what was written. Names below end in `_` where the real ones are not
identifiers (`@spill 0` is `spill_0_`), so that none can clash with a name of yours. `tests/docs/test_lowering.py` writes this page from what the compiler does.

| construct | hot form | kept for a restore | pass |
|---|---|---|---|
| wait in an expression | hoisted to a statement of its own | what was evaluated before it | expressions.py |
| `and` `or` `if else` `a < b < c` | if statements on a result | the result | expressions.py |
| targets, `del`, `+=` | one place after the other | value, places | statements.py |
| `if` `elif` `else` | as written | nothing | statements.py |
| `while` | as written, or a flag | the flag | statements.py |
| `for` | over a named iterator | the iterator | statements.py |
| `match` | as written | nothing; the subject, if a guard waits | statements.py |
| `yield from` | over a named delegate | the delegate | expressions.py |
| `try` `except` `else` | one clause in front | the exception, in a handler | protected.py |
| `finally` | skipped if the generator is only being forgotten | why it was entered, if it waits | protected.py |
| `with` | `try` and calls on the type | the manager | protected.py |
| `await` | `yield from` over what is awaited | that | expressions.py |
| `async for` `async with` | `while` and `try` with awaits | iterator, manager | asyncs.py |
| nested `def`, `class`, `lambda` | marked, so that its code is known | cells | functions.py |
| generator expression, lambda or comprehension that waits | see below | its frame | inner.py |

Some code is refused when the module is loaded, with file and line: waits in handlers of `except*` (the groups it splits live where nothing can save them), in the type of an
`except` clause and in annotations; and code that, once lowered, is nested more deeply than the interpreter accepts.

Each cold twin begins as follows, which is left out below:

```py
def f(saved_):
    if 'x' in saved_:            # each variable, each temporary; what was unbound stays so
        x = saved_['x']
    cells_ = saved_['@c']
    label_ = reach_ = saved_['@l']
```
"""


def shown(text: str) -> str:
    return f"```py\n{text.rstrip()}\n```\n"


def cold_body(text: str) -> str:
    """The body without the part that is the same for all."""
    lines = text.splitlines()
    last = max(n for n, line in enumerate(lines) if line in ("    del saved_", "    label_ = reach_ = saved_['@l']"))
    return "\n".join([lines[0], *lines[last + 1 :]])


def document() -> str:
    parts = [HEAD]
    for title, words, source, cold in CASES:
        parts.append(f"\n## {title}\n\n" + (f"{words}\n\n" if words else "") + shown(source))
        parts += [shown(lowered_text(source, path)) for path in functions_of(source) if "<locals>" not in path]
        parts += [shown(lowered_text(source, path)) for path in functions_of(source) if path.endswith(("<lambda>", "<listcomp>"))]
        if cold:
            parts.append("Cold:\n\n" + shown(cold_body(lowered_text(source, "f", cold=True))))
    return "\n".join(part.strip("\n") + "\n" for part in parts)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="NOT TESTED: ast.unparse differs a little between minors; 3.11 is the one that is compared")
def test_lowering_md_shows_what_the_compiler_makes() -> None:
    if os.environ.get("KWFLOW_REWRITE"):
        FILE.write_text(document(), encoding="utf-8")
    assert FILE.read_text(encoding="utf-8") == document(), "the compiler makes something else now: KWFLOW_REWRITE=1 pytest tests/docs/test_lowering.py"


def test_every_pass_of_the_table_is_there() -> None:
    folder = FILE.parents[1] / "kwflow/durable/lower"
    named = {row.split("|")[-2].strip() for row in HEAD.splitlines() if row.startswith("| ") and "---" not in row} - {"pass"}
    assert all((folder / name).exists() for name in named)


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["code", "lowered", *arguments, "--app-dir", str(FILE.parents[1])], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_line_prints_lowered_code_hot_and_cold() -> None:
    sample = str(FILE.parents[1] / "workflows/trip_booking.py")
    assert "    label_ = 1\n    yield kw.sleep(ms / 1000)\n" in printed(f"{sample}:deadline")
    assert "if not reach_" in printed("workflows.trip_booking:deadline", "--cold")
    assert "main.<locals>.book" in printed(sample).split()
    with pytest.raises(UsageError, match="no function 'nothing'; there are: .*reserve, release"):
        printed(f"{sample}:nothing")
    with pytest.raises(UsageError, match="no cold twin"):
        printed(f"{sample}:main.<locals>.book.<locals>.<lambda>", "--cold")
