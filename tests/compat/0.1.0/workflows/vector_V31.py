
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

def main(opts):
    def a():
        try:
            yield kw.suspend("a")
        finally:
            out("a finally start")
            out(f"a finally end {(yield kw.suspend('a.f'))}")
    p = kw.spawn(parent(a(), "p"))
    yield kw.suspend("go")
    kw.cancel(p)
    yield kw.suspend("d")
    return "end"
