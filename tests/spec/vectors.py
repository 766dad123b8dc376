"""The combinator vectors V1-V39 of the reference, as data: a program, events, and what each event writes.

`a=1` resumes ref a with 1, `a!e` with the error "e".  Expected lines are values of topic `o`; `result` and `error` lines
are the records on those topics, `gone` says that nothing is stored any more.  Where the reference has a defect, the
expectation is the fixed behaviour and `differs` says so (docs/DEVIATIONS.md).
"""

from typing import NamedTuple

HELPERS = '''
import kwflow as kw
kw.declare_topics("o", "T")

def out(text):
    kw.output(text, "o")

def called(error):
    if isinstance(error, kw.Cancelled):
        return "CT"
    return error.payload if isinstance(error, kw.WorkflowError) else str(error)

def w(id):
    try:
        value = yield kw.suspend(id)
        out(f"{id} resumed {value}")
        return value
    except BaseException as error:
        out(f"{id} caught {called(error)}")
        raise

def swallow(id):
    try:
        return (yield kw.suspend(id))
    except BaseException as error:
        out(f"{id} swallowed {called(error)}")
        return f"{id}-swallowed"

def more(id):
    try:
        value = yield kw.suspend(id)
        out(f"{id} resumed {value}")
        return value
    except BaseException as error:
        out(f"{id} caught {called(error)}")
        try:
            out(f"{id} cleanup done {(yield kw.suspend(f'{id}.cleanup'))}")
        except BaseException as error:
            out(f"{id} cleanup interrupted {called(error)}")
            raise
        return f"{id}-cleaned"

def more_r(id):
    try:
        return (yield kw.suspend(id))
    except BaseException as error:
        out(f"{id} caught {called(error)}")
        out(f"{id} cleanup done {(yield kw.suspend(f'{id}.cleanup'))}")
        raise

def thr(id):
    try:
        return (yield kw.suspend(id))
    except BaseException as error:
        out(f"{id} caught {called(error)}")
        raise ValueError(f"err-in-cancel-{id}")

def parent(x, n):
    try:
        value = yield x
        out(f"{n} got {value}")
        return value
    except BaseException as error:
        out(f"{n} caught {called(error)}")
        raise

def got(x, n):
    try:
        out(f"{n} {(yield x)}")
    except BaseException as error:
        out(f"{n} rejected {called(error)}")

def every(*xs):
    return kw.all(xs, cancel_rest=False)

def first(*xs):
    return kw.race(xs, cancel_rest=False)
'''


class Vector(NamedTuple):
    """One program and what it does."""

    id: str
    body: str
    events: list[tuple[str, list[str]]]
    started: list[str] = []
    differs: str = ""


_D = '\nyield kw.suspend("d")\nreturn "end"'
_GO = '\nyield kw.suspend("go")\n'

VECTORS = [
    Vector("V1", 'r = yield every(w("a"), w("b"), w("c"))\nout(f"all {r}")\nreturn r', [
        ("c=3", ["c resumed 3"]), ("a=1", ["a resumed 1"]), ("b=2", ["b resumed 2", "all [1, 2, 3]", "result [1,2,3]", "gone"]),
    ]),
    Vector("V2", 'x = every(w("a"), w("b"), w("c"))\nyield got(x, "all")\nyield kw.suspend("d")\nyield got(x, "again")\nreturn "end"', [
        ("b!e1", ["b caught e1", "all rejected e1"]), ("a=1", ["a resumed 1"]), ("c!e2", ["c caught e2"]), ("d=1", ["again rejected e1", 'result "end"', "gone"]),
    ], differs="the first rejection sticks"),
    Vector("V3", 'x = kw.all([w("a"), w("b"), w("c")])\nyield got(x, "all")\nyield kw.suspend("d")\nyield got(x, "again")\nreturn "end"', [
        ("b!e1", ["b caught e1", "all rejected e1", "a caught CT", "c caught CT"]), ("a=1", []), ("d=1", ["again rejected e1", 'result "end"', "gone"]),
    ], differs="the first rejection sticks"),
    Vector("V4", 'yield got(kw.all([w("a"), swallow("b"), swallow("c")]), "all")' + _D, [
        ("a!e1", ["a caught e1", "all rejected e1", "b swallowed CT", "c swallowed CT"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V5", 'yield got(kw.all([w("a"), more("b"), w("c")]), "all")' + _D, [
        ("a!e1", ["a caught e1", "all rejected e1", "b caught CT", "c caught CT"]), ("b.cleanup=x", ["b cleanup done x"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V6", 'try:\n    yield kw.all([w("a"), more("b")])\nexcept Exception as error:\n    out(f"all rejected {called(error)}")\nreturn "end"', [
        ("a!e1", ["a caught e1", "all rejected e1", 'result "end"', "b caught CT"]), ("b.cleanup=x", ["b cleanup done x", "gone"]),
    ], differs="order across topics"),
    Vector("V7", 'yield got(kw.all([w("a"), thr("b"), thr("c")]), "all")' + _D, [
        ("a!e1", ["a caught e1", "all rejected e1", "b caught CT", "c caught CT"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V8", 'yield got(kw.all([w("a"), more_r("b"), more_r("c")]), "all")' + _D, [
        ("a!e1", ["a caught e1", "all rejected e1", "b caught CT", "c caught CT"]), ("b.cleanup=1", ["b cleanup done 1"]), ("c.cleanup=2", ["c cleanup done 2"]), ("d=1", ['result "end"', "gone"]),
    ], differs="a combinator cancels each child once"),
    Vector("V9", 'yield got(first(w("a"), w("b"), w("c")), "any")' + _D, [
        ("b=2", ["b resumed 2", "any 2"]), ("a=1", ["a resumed 1"]), ("c!e", ["c caught e"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V10", 'yield got(first(w("a"), w("b"), w("c")), "any")' + _D, [
        ("b!e", ["b caught e", "any rejected e"]), ("a=1", ["a resumed 1"]), ("c=3", ["c resumed 3"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V11", 'yield got(kw.race([w("a"), w("b"), w("c")]), "any")' + _D, [
        ("b=2", ["b resumed 2", "any 2", "a caught CT", "c caught CT"]), ("a=1", []), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V12", 'yield got(kw.race([w("a"), w("b"), w("c")]), "any")' + _D, [
        ("b!e", ["b caught e", "any rejected e", "a caught CT", "c caught CT"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V13", 'yield got(kw.race([w("a"), more("b"), more("c")]), "any")' + _D, [
        ("a=1", ["a resumed 1", "any 1", "b caught CT", "c caught CT"]), ("c.cleanup=z", ["c cleanup done z"]), ("b.cleanup=y", ["b cleanup done y"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V14", 'yield got(kw.race([w("a"), more("b"), more("c")]), "any")' + _D, [
        ("a=1", ["a resumed 1", "any 1", "b caught CT", "c caught CT"]), ("d=1", ['result "end"']), ("b.cleanup=y", ["b cleanup done y"]), ("c.cleanup=z", ["c cleanup done z", "gone"]),
    ], differs="KW-26: cleanups that run already are waited for"),
    Vector("V15", 'r = yield kw.race([w("a"), more("b")])\nout(f"any {r}")\nreturn "end"', [
        ("a=1", ["a resumed 1", "any 1", 'result "end"', "b caught CT"]), ("b.cleanup=y", ["b cleanup done y", "gone"]),
    ]),
    Vector("V16", 'x = kw.race([w("a"), thr("b")])\nyield got(x, "any")\nyield kw.suspend("d")\nyield got(x, "again")\nreturn "end"', [
        ("a=1", ["a resumed 1", "any 1", "b caught CT"]), ("d=1", ["again 1", 'result "end"', "gone"]),
    ]),
    Vector("V17", 'p = kw.spawn(parent(every(w("a"), w("b")), "p"))' + _GO + 'kw.cancel(p)\nout("after cancel")' + _D, [
        ("go=1", ["after cancel", "a caught CT", "b caught CT", "p caught CT"]), ("a=1", []), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V18", 'p = kw.spawn(parent(every(swallow("a"), swallow("b")), "p"))' + _GO + 'kw.cancel(p)\nout("after cancel")' + _D, [
        ("go=1", ["after cancel", "a swallowed CT", "b swallowed CT", "p got ['a-swallowed', 'b-swallowed']"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V19", 'p = kw.spawn(parent(every(swallow("a"), thr("b"), w("c")), "p"))' + _GO + "kw.cancel(p)" + _D, [
        ("go=1", ["a swallowed CT", "b caught CT", "c caught CT", "p caught err-in-cancel-b"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V20", 'p = kw.spawn(parent(first(swallow("a"), w("b")), "p"))' + _GO + "kw.cancel(p)" + _D, [
        ("go=1", ["a swallowed CT", "b caught CT", "p got a-swallowed"]), ("d=1", ['result "end"', "gone"]),
    ], differs="order within a step: handlers are queued before the waiter"),
    Vector("V21", 'p = kw.spawn(parent(first(w("a"), swallow("b")), "p"))' + _GO + "kw.cancel(p)" + _D, [
        ("go=1", ["a caught CT", "b swallowed CT", "p caught CT"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V22", 'p = kw.spawn(parent(more("a"), "p"))' + _GO + 'kw.cancel(p)\nkw.cancel(p)\nout("after 2 cancels")\nyield kw.suspend("go2")\nkw.cancel(p)\nout("after 3rd cancel")' + _D, [
        ("go=1", ["after 2 cancels", "a caught CT"]), ("go2=1", ["after 3rd cancel", "a cleanup interrupted CT", "p caught CT"]), ("a.cleanup=1", []), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V23", 'p = kw.spawn(parent(more("a"), "p"))' + _GO + 'kw.cancel(p)\nkw.cancel(p)\nyield kw.suspend("go2")\nkw.cancel(p)\nout("after 3rd cancel")' + _D, [
        ("go=1", ["a caught CT"]), ("a.cleanup=4", ["a cleanup done 4", "p got a-cleaned"]), ("go2=1", ["after 3rd cancel"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V24", 'p = kw.spawn(parent(kw.race([every(w("a"), first(w("b"), more("c"))), w("t")]), "p"))' + _GO + "kw.cancel(p)" + _D, [
        ("go=1", ["a caught CT", "b caught CT", "c caught CT", "t caught CT", "p caught CT"]), ("c.cleanup=1", ["c cleanup done 1"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V25a", 'p = kw.spawn(parent(kw.race([kw.all([w("a"), w("b")]), w("t")]), "p"))' + _D, [
        ("t=9", ["t resumed 9", "p got 9", "a caught CT", "b caught CT"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V25b", 'p = kw.spawn(parent(kw.race([kw.all([w("a"), w("b")]), w("t")]), "p"))' + _D, [
        ("a!ea", ["a caught ea", "p caught ea", "b caught CT", "t caught CT"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V25c", 'p = kw.spawn(parent(kw.race([kw.all([w("a"), w("b")]), w("t")]), "p"))' + _D, [
        ("a=1", ["a resumed 1"]), ("b=2", ["b resumed 2", "p got [1, 2]", "t caught CT"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V26", 'b = kw.spawn(w("b"))\ndef chain():\n    try:\n        yield w("a")\n    except BaseException:\n        kw.cancel(b)\n        out("a after cancel(other)")\na = kw.spawn(chain())' + _GO + "kw.cancel(a)" + _D, [
        ("go=1", ["a caught CT", "a after cancel(other)", "b caught CT"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V27", 'a = kw.spawn(w("a"))' + _GO + 'kw.cancel(a)\nout(f"a is {(yield a)}")' + _D, [
        ("a=1", ["a resumed 1"]), ("go=1", ["a is 1"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V28", 'a = kw.spawn(w("a"))\np1 = kw.spawn(parent(a, "p1"))\np2 = kw.spawn(parent(a, "p2"))' + _GO + "kw.cancel(p1)" + _D, [
        ("go=1", ["a caught CT", "p1 caught CT", "p2 caught CT"]), ("d=1", ['result "end"', "gone"]),
    ], differs="FIFO"),
    Vector("V29", 'a = kw.suspend("a")\nfor n in (1, 2, 3):\n    kw.spawn(parent(a, f"p{n}"))' + _D, [
        ("a=7", ["p1 got 7", "p2 got 7", "p3 got 7"]), ("d=1", ['result "end"', "gone"]),
    ], differs="FIFO"),
    Vector("V30", 'kw.spawn(parent(kw.suspend("x"), "p1"))\ntry:\n    kw.suspend("x")\nexcept kw.UsageError:\n    out("refused")' + _D, [
        ("x=1", ["p1 got 1"]), ("x=2", []), ("d=1", ['result "end"', "gone"]),
    ], ["refused"], differs="a duplicate pending id is a UsageError"),
    Vector("V31", 'def a():\n    try:\n        yield kw.suspend("a")\n    finally:\n        out("a finally start")\n        out(f"a finally end {(yield kw.suspend(\'a.f\'))}")\np = kw.spawn(parent(a(), "p"))' + _GO + "kw.cancel(p)" + _D, [
        ("go=1", ["a finally start"]), ("a.f=1", ["a finally end 1", "p caught CT"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V32", 'def both():\n    out(f"p got {(yield swallow(\'a\'))}")\n    out(f"p next {(yield kw.suspend(\'p.next\'))}")\np = kw.spawn(both())' + _GO + "kw.cancel(p)" + _D, [
        ("go=1", ["a swallowed CT", "p got a-swallowed"]), ("p.next=5", ["p next 5"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V33", 'x = kw.suspend("x")\nyield kw.suspend("go")\nout(f"x= {(yield x)}")\nout(f"x again= {(yield x)}")' + _D, [
        ("x=42", []), ("x=43", []), ("go=1", ["x= 42", "x again= 42"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V34", 'yield kw.suspend("go")\nx = kw.suspend("x")\nout(f"x= {(yield x)}")' + _D, [
        ("x=42", []), ("go=1", []), ("x=43", ["x= 43"]), ("d=1", ['result "end"', "gone"]),
    ]),
    Vector("V35", 's = kw.suspend("s")\nkw.cancel(s)\nyield got(s, "s")' + _D, [("s=1", []), ("d=1", ['result "end"', "gone"])], ["s rejected CT"]),
    Vector("V36a", _TIMEOUT := 'def t():\n    try:\n        yield kw.suspend("t")\n    except kw.Cancelled:\n        out("t caught CT")\n        return\n    raise kw.WorkflowError("timeout")\nreturn (yield kw.race([w("a"), t()]))', [
        ("a=5", ["a resumed 5", "result 5", "t caught CT", "gone"]),
    ]),
    Vector("V36b", _TIMEOUT, [("t=1", ['error "timeout"', "a caught CT", "gone"])]),
    Vector("V37", 'for i in range(3):\n    try:\n        r = yield kw.race([w(f"r{i}"), w(f"t{i}")])\n        out(f"ok {r}")\n        return r\n    except Exception as error:\n        out(f"failed {called(error)}")', [
        ("r0!e0", ["r0 caught e0", "failed e0", "t0 caught CT"]), ("t1!e1", ["t1 caught e1", "failed e1", "r1 caught CT"]), ("r2=7", ["r2 resumed 7", "ok 7", "result 7", "t2 caught CT", "gone"]),
    ]),
    Vector("V38", 'r = yield kw.race([kw.all([w("a"), kw.race([w("b"), w("c")])]), w("t")])\nout(f"r {r}")' + _D, [
        ("b=1", ["b resumed 1", "c caught CT"]), ("a=2", ["a resumed 2", "r [2, 1]", "t caught CT"]), ("d=1", ['result "end"', "gone"]),
    ]),
]  # fmt: skip
