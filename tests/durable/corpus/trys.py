"""try statements: a yield in each clause, and every way out of each clause."""

LOG = []


def log(x):
    LOG.append(repr(x))
    return x



def g_body():
    try:
        a = yield 1
        log(a)
        yield 2
    except ValueError as e:
        log(("caught", e))
        return "handled"
    return "clean"


def g_else():
    try:
        yield "body"
    except ValueError:
        yield "handler"
    else:
        yield "else1"
        yield "else2"
    return "end"


def g_else_error_is_not_caught():
    try:
        try:
            log("body")
        except ValueError:
            yield "wrong handler"
        else:
            yield "else"
    except ValueError as e:
        yield ("outer", str(e))


def g_handler():
    try:
        raise KeyError("k")
    except KeyError as e:
        a = yield ("h1", e.args)
        log(e)
        b = yield "h2"
    try:
        e
    except UnboundLocalError:
        log("e is unbound")
    return (a, b)


def g_handler_bare_raise():
    try:
        try:
            raise ValueError("v")
        except ValueError:
            yield "h"
            raise
    except ValueError as e:
        yield ("again", e.args)
        return e.__context__ is None


def g_handler_raises_with_context():
    try:
        raise ValueError("first")
    except ValueError:
        yield "h"
        raise KeyError("second")


def g_handler_raise_from():
    try:
        raise ValueError("first")
    except ValueError as e:
        yield "h"
        raise KeyError("second") from e


def g_handler_raise_from_none():
    try:
        raise ValueError("first")
    except ValueError:
        yield "h"
        raise KeyError("second") from None


def g_exc_info_in_handler():
    import sys
    try:
        raise ValueError("v")
    except ValueError:
        yield "h"
        log(sys.exc_info()[1])
        yield "h2"
        log(sys.exc_info()[1])
    log(sys.exc_info()[1])
    yield "after"
    return sys.exc_info()[1]


def g_several_handlers():
    try:
        yield "body"
    except (ValueError, TypeError) as e:
        yield ("vt", type(e).__name__)
    except LookupError:
        yield "lookup"
        raise
    except Exception as e:
        yield "exc"
        raise RuntimeError("wrapped") from e
    return "end"


def classes(x):
    log(x)
    return ValueError


def g_clause_types_evaluated_once():
    try:
        raise ValueError("v")
    except log(KeyError):
        yield "no"
    except classes("second"):
        yield "yes1"
        yield "yes2"
    except classes("third"):
        yield "no"
    return "end"


def g_handler_rebinds_name():
    try:
        raise ValueError("v")
    except ValueError as e:
        yield 1
        e = "mine"
        yield e
        log(e)
    try:
        e
    except UnboundLocalError:
        yield "unbound"


def g_handler_deletes_name():
    try:
        raise ValueError("v")
    except ValueError as e:
        del e
        yield "deleted"
        log("fine")
    return "end"


def g_nested_handlers():
    try:
        raise ValueError("outer")
    except ValueError as a:
        try:
            yield "h1"
            raise KeyError("inner")
        except KeyError as b:
            yield "h2"
            log((a, b, b.__context__))
        yield "h1 again"
        log(a.__context__)
        raise


def g_try_in_loop_in_handler():
    try:
        raise ValueError("v")
    except ValueError:
        for n in range(2):
            try:
                yield n
                raise KeyError(n)
            except KeyError as k:
                log((k, k.__context__))
                yield "inner"
        raise


def g_finally_normal():
    try:
        yield "body"
    finally:
        log("f")
        yield "f1"
        yield "f2"
    return "end"


def g_finally_after_exception():
    try:
        raise ValueError("v")
    finally:
        yield "f1"
        yield "f2"


def g_finally_after_return():
    n = 1
    try:
        return log(n)
    finally:
        n = yield "f1"
        yield n


def g_return_value_before_finally():
    try:
        return (yield "value")
    finally:
        log((yield "f"))


def g_finally_swallows_by_return():
    try:
        yield "body"
        raise ValueError("v")
    finally:
        if (yield "f") is not False:
            return "swallowed"


def g_finally_break_continue():
    r = []
    for i in range(4):
        try:
            if i == 1:
                continue
            if i == 3:
                break
            r.append((yield i))
        finally:
            r.append((yield ("f", i)))
        log(("tail", i))
    else:
        log("no")
    return r


def g_while_break_through_finally():
    while True:
        try:
            try:
                yield "in"
                break
            finally:
                yield "f1"
        finally:
            yield "f2"
    return "out"


def g_break_in_finally_swallows():
    for i in range(3):
        try:
            yield i
            raise ValueError(i)
        finally:
            log(("f", i))
            if (yield "f") is not False:
                break
    return i


def g_continue_in_finally_swallows():
    for i in range(3):
        try:
            yield i
            raise ValueError(i)
        finally:
            yield "f"
            continue
    return "end"


def g_return_through_two_finallys():
    try:
        try:
            return "r"
        finally:
            yield "f1"
            log("f1 end")
    finally:
        yield "f2"
        log("f2 end")


def g_return_in_inner_finally_overrides():
    try:
        try:
            return "first"
        finally:
            yield "f1"
            return "second"
    finally:
        log((yield "f2"))


def g_finally_raises():
    try:
        raise ValueError("v")
    finally:
        yield "f"
        raise KeyError("k")


def g_full():
    for n in range(3):
        try:
            got = yield ("body", n)
            if n == 1:
                raise ValueError(n)
        except ValueError as e:
            yield ("handler", e.args)
        else:
            yield ("else", got)
        finally:
            yield ("finally", n)
    return got


def g_handler_return_through_finally():
    try:
        raise ValueError("v")
    except ValueError as e:
        return (yield "h"), str(e)
    finally:
        yield "f"
        log("done")


def g_handler_continue():
    for n in range(3):
        try:
            raise ValueError(n)
        except ValueError:
            if (yield n) is False:
                break
            continue
        finally:
            log(("f", n))
    return n


def g_retry():
    tries = 0
    while True:
        tries += 1
        try:
            return (tries, (yield ("try", tries)))
        except ValueError as e:
            if tries == 3:
                raise
            log((tries, e))
            yield "backoff"


def g_catches_everything():
    try:
        yield 1
    except BaseException as e:
        log(type(e).__name__)
        yield "h"
        raise


def g_ignores_exit():
    while True:
        try:
            if (yield "again") is False:
                return "left"
            log("got")
        except GeneratorExit:
            log("exit")
            try:
                yield "ignored"
            except GeneratorExit:
                return "second exit"
            return "after"
        if len(LOG) > 12:
            return "enough"


def g_try_in_finally():
    try:
        raise ValueError("a")
    finally:
        try:
            yield "f"
            raise KeyError("b")
        except KeyError as k:
            yield "fh"
            log((k, k.__context__))
        log("f end")


def g_loop_in_finally():
    try:
        return (yield "b")
    finally:
        for i in range(3):
            if (yield ("f", i)) is False:
                break
        else:
            yield "felse"


def g_exceptions_in_locals():
    caught = []
    for cls in (ValueError, KeyError):
        try:
            try:
                raise cls("x")
            except cls as e:
                raise RuntimeError("wrapped") from e
        except RuntimeError as e:
            caught.append(e)
    yield len(caught)
    log([(e.args, e.__cause__, e.__context__ is e.__cause__, e.__suppress_context__) for e in caught])
    yield "raise"
    raise caught[1]


class OrderError(Exception):
    def __init__(self, order, reason):
        super().__init__(f"{order}: {reason}")
        self.order, self.reason = order, reason


def g_exception_with_own_init():
    held = None
    try:
        raise OrderError(7, "sold out")
    except OrderError as e:
        held = e
        yield "h"
        log((e.order, e.reason, str(e)))
    yield "held"
    return (held.order, str(held))


def g_exception_identity():
    e = ValueError("v")
    try:
        raise e
    except ValueError as f:
        yield e is f
        log(e is f)
        yield "again"
        return e is f


def g_stop_iteration_inside():
    yield 1
    raise StopIteration("leak")


def g_assert():
    assert (yield "test"), (yield "message")
    return "passed"


def g_raise_yields():
    raise (yield "exc") or ValueError("v") from (yield "cause") or KeyError("c")


def lines_of(error):
    import traceback
    return [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.name.startswith("g_")]


def g_traceback_in_handler():
    try:
        raise ValueError("v")
    except ValueError as e:
        one = len(lines_of(e))
        yield one
        two = len(lines_of(e))
        yield two
        try:
            raise
        except ValueError as again:
            return len(lines_of(again))


def g_traceback_in_finally():
    try:
        try:
            raise ValueError("v")
        finally:
            yield 1
            yield 2
    except ValueError as e:
        yield len(lines_of(e))
        return len(lines_of(e))


def g_cycle_of_contexts():
    a, b, c = ValueError("a"), ValueError("b"), ValueError("c")
    try:
        raise a
    except ValueError:
        try:
            raise b
        except ValueError:
            try:
                raise c
            except ValueError:
                a.__context__ = c
                yield 1
                yield a.__context__ is c, c.__context__ is b, b.__context__ is a
    return a.__context__ is c, c.__context__ is b, b.__context__ is a


def frames_of(error):
    import traceback
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


class Failing:
    def __init__(self, where):
        self.where = where

    def __enter__(self):
        if self.where == "enter":
            raise ValueError("enter")

    def __exit__(self, *error):
        raise KeyError("exit")


def g_tracebacks_hold_only_the_authors_frames():
    for where in ("enter", "body", "exit"):
        try:
            with Failing(where):
                yield where
                if where == "body":
                    raise TypeError("body")
        except Exception as error:
            log((frames_of(error), error.__context__ and frames_of(error.__context__)))
    return "end"


def decorated(function):
    log(function.__code__.co_firstlineno)
    return function


@decorated
@decorated
def g_lines_of_a_decorated_generator():
    try:
        yield 1
        raise ValueError
    except ValueError as error:
        return lines_of(error)
