"""try and with.  They are really entered again, so that a bare `raise`, sys.exc_info() and `__context__` are the real ones.

To reach a label in a handler, the saved exception is raised in the `try` again.  To reach one in a `finally`, the completion
that led there (`Finally`) is repeated.  Where a GeneratorExit may arrive because a generator is forgotten, the author's
cleanup is skipped (G8).  Everything about exceptions lives here.
"""

from __future__ import annotations

import ast

from kwflow.durable.lower.emit import BROKE, CONTINUED, RAISED, RETURNED, Block, Finally, assign, call, constant, helper, load, store
from kwflow.durable.lower.expressions import Expressions
from kwflow.durable.lower.nodes import child_nodes, has_yield

__all__ = ["Protected"]


def _type_of(name: str) -> ast.expr:
    return ast.Call(load("__@type__"), [load(name)], [])


def _kept() -> ast.expr:
    """Return the test whether a `finally` runs: always if no exception is pending, and then without asking the runtime."""
    error = ast.Subscript(ast.Call(load("__@exc_info__"), [], []), constant(1), ast.Load())
    return ast.BoolOp(ast.Or(), [ast.Compare(error, [ast.Is()], [constant(None)]), call("kept")])


class Protected(Expressions):
    """The passes over try and with."""

    def assign_to(self, target: ast.expr, value: ast.expr) -> None:
        raise NotImplementedError

    def after_release(self, names: list[str], statements: list[ast.stmt], name: str) -> Block:
        raise NotImplementedError

    def escapes(self, statements: list[ast.stmt]) -> bool:
        """Whether a return, break or continue can leave these statements (a break or continue of a loop among them does not)."""
        return any(_escapes(statement, False) for statement in statements)

    # -- try -----------------------------------------------------------------------------------------------------
    def statement_Try(self, node: ast.Try) -> None:
        if node.finalbody and node.handlers:
            inner = ast.copy_location(ast.Try(node.body, node.handlers, node.orelse, []), node)
            node = ast.copy_location(ast.Try([inner], [], [], node.finalbody), node)
        if not node.finalbody:
            self._try_except(node)
        elif any(map(has_yield, node.finalbody)):
            self._try_finally_that_waits(node)
        else:
            first, began = len(self.labels) + 1, self.mark_held()
            body = self.block(node.body, "try")
            final = self.after_release(self.held_in(began), node.finalbody, "finally").body
            if body.labelled:
                final = [ast.copy_location(ast.If(_kept(), final, []), final[0])]
            self.emit_compound(ast.copy_location(ast.Try(body.body, [], [], final), node), first)

    def _try_except(self, node: ast.Try) -> None:
        first, began = len(self.labels) + 1, self.mark_held()
        handled = self.temporary("handled")
        body = self.block(node.body, "try")
        names = self.held_in(began)
        blocks = [self._handler(handler, handled, number, names) for number, handler in enumerate(node.handlers)]
        orelse = self.block(node.orelse, "else") if node.orelse else Block([], 1, 0)
        entered = [block for block in blocks if block.labelled]
        statements = body.body
        if self.cold and orelse.labelled:
            statements = [ast.copy_location(ast.If(self.up_to(body.last if body.labelled else first - 1), statements, []), statements[0])]
        if self.cold and entered:
            again = [assign(self._links(handled), call("links", load(handled))), ast.Raise(load(handled))]
            statements = [ast.copy_location(ast.If(self.within(entered[0].first, entered[-1].last), again, []), node), *statements]
        clauses = [self._clause(handler, block, handled, bool(entered)) for handler, block in zip(node.handlers, blocks, strict=True)]
        if body.labelled:
            abandoned: ast.expr = call("abandoned")
            if self.cold and entered:
                abandoned = self.unless_entering(abandoned, constant(()))
            clauses.insert(0, ast.copy_location(ast.ExceptHandler(abandoned, None, [ast.Raise()]), node.handlers[0]))
        self.emit_compound(ast.copy_location(ast.Try(statements, clauses, orelse.body, []), node), first)

    @staticmethod
    def _links(handled: str) -> str:
        """Name the variable that keeps `__context__` and the traceback, which raising again changes; the handler restores them."""
        return handled.replace("@handled", "@links")

    def _handler(self, handler: ast.ExceptHandler, handled: str, number: int, names: list[str]) -> Block:
        """Return the body of a handler.  One that waits keeps its exception in `handled`, and the author's name is bound as CPython does it."""
        if has_yield(handler.type):
            raise self.refuse(handler, "a yield in the type of an except clause")
        if not any(map(has_yield, handler.body)):
            return self.after_release(names, handler.body, f"except{number}-")
        self.live.append(handled)
        with self.collect() as block:
            self.release(names, handler.body[0])
            if handler.name is None:
                self.emit_block(self.block(handler.body, f"except{number}-"))
            else:
                self.emit(ast.copy_location(assign(handler.name, load(handled)), handler))
                body = self.block(handler.body, f"except{number}-")
                unbind: list[ast.stmt] = [assign(handler.name, constant(None)), ast.Delete([ast.Name(handler.name, ast.Del())])]
                if handler.name in self.scope.captured:  # others may use the cell, so forgetting a generator must not empty it
                    unbind = [ast.If(_kept(), unbind, [])]
                self.emit_block(Block([ast.copy_location(ast.Try(body.body, [], [], unbind), handler)], body.first, body.last))
        self.live.remove(handled)
        if self.cold:
            put_back = assign(self._links(handled), call("relink", load(handled), load(self._links(handled))))
            block.body = [ast.copy_location(ast.If(load("@r"), [put_back], []), handler), *block.body]
        return block

    def _clause(self, handler: ast.ExceptHandler, block: Block, handled: str, entering: bool) -> ast.ExceptHandler:
        type_ = handler.type
        if self.cold and entering:
            reached: ast.expr = constant(())
            if block.labelled:
                reached = ast.IfExp(self.within(block.first, block.last), helper("BaseException"), constant(()))
            type_ = self.unless_entering(type_ or helper("BaseException"), reached)
        if block.labelled:
            return ast.copy_location(ast.ExceptHandler(type_ or helper("BaseException"), handled, block.body), handler)
        return ast.copy_location(ast.ExceptHandler(type_, handler.name, block.body), handler)

    def _try_finally_that_waits(self, node: ast.Try) -> None:
        first, began = len(self.labels) + 1, self.mark_held()
        pending = Finally(self.temporary("completion"), self.temporary("completion-value"))
        self.exits.append(pending)
        body = self.block(node.body, "try")
        self.exits.pop()
        done = [assign(pending.completion, constant(0)), assign(pending.value, constant(None))]
        body.body += [ast.copy_location(statement, node.body[-1]) for statement in done]
        dropped = self.held_in(began)
        self.live += [pending.completion, pending.value]
        final = self.block(node.finalbody, "finally")
        del self.live[-2:]
        statements, prologue = body.body, []
        links = self.temporary("links")
        if self.cold:
            again = self._happen_again(pending, links)
            statements = [ast.copy_location(ast.If(self.within(final.first, final.last), again, statements), node)]
            raised = ast.BoolOp(ast.And(), [load("@r"), self._is(pending, RAISED)])
            prologue = [ast.If(raised, [assign(links, call("relink", load(pending.value), load(links)))], [])]
        raised_as = links.replace("@links", "@raised")
        noted = [assign(pending.completion, constant(RAISED)), assign(pending.value, load(raised_as)), ast.Raise()]
        handler = ast.copy_location(ast.ExceptHandler(helper("BaseException"), raised_as, noted), node.finalbody[0])
        inner = ast.copy_location(ast.Try(statements, [handler], [], []), node)
        kept = ast.copy_location(ast.If(_kept(), [*self.dropping(dropped), *prologue, *final.body], []), node.finalbody[0])
        kept_then_released = ast.copy_location(ast.Try([kept], [], [], [assign(pending.value, constant(None))]), node.finalbody[0])
        self.emit_compound(ast.copy_location(ast.Try([inner], [], [], [kept_then_released]), node), first)

    @staticmethod
    def _is(pending: Finally, how: int) -> ast.expr:
        return ast.Compare(load(pending.completion), [ast.Eq()], [constant(how)])

    def _happen_again(self, pending: Finally, links: str) -> list[ast.stmt]:
        """Return statements that repeat what led into the `finally`; outer `finally`s are told again, as on the first way out."""
        outer = [exit_ for exit_ in self.exits if isinstance(exit_, Finally)]
        returned = [assign(exit_.value, load(pending.value)) for exit_ in outer] + [assign(exit_.completion, constant(RETURNED)) for exit_ in outer]
        raising: list[ast.stmt] = [assign(links, call("links", load(pending.value))), ast.Raise(load(pending.value))]
        again: list[ast.stmt] = [ast.If(self._is(pending, RAISED), raising, [])]
        again.append(ast.If(self._is(pending, RETURNED), [*returned, ast.Return(load(pending.value))], []))
        for how, used, leave in ((BROKE, pending.breaks, ast.Break()), (CONTINUED, pending.continues, ast.Continue())):
            if used:
                again.append(ast.If(self._is(pending, how), [*self.leaving_loop(how), leave], []))
        return again

    def leaving_loop(self, how: int) -> list[ast.stmt]:
        """Return what a break or continue tells the `finally`s between it and its loop."""
        told: list[ast.stmt] = []
        for exit_ in reversed(self.exits):
            if not isinstance(exit_, Finally):
                break
            exit_.breaks |= how == BROKE
            exit_.continues |= how == CONTINUED
            told += [assign(exit_.completion, constant(how)), assign(exit_.value, constant(None))]  # and drop the value of an earlier round
        return told

    def statement_TryStar(self, node: ast.stmt) -> None:
        """Lower `except*`.  The groups that it splits are on the interpreter's stack, where nothing can save them, so its handlers must not wait."""
        if any(has_yield(handler) for handler in node.handlers):  # type: ignore[attr-defined]
            raise self.refuse(node, "a yield in a handler of except*")
        if node.finalbody:  # type: ignore[attr-defined]
            inner = ast.copy_location(ast.TryStar(node.body, node.handlers, node.orelse, []), node)  # type: ignore[attr-defined]
            self.statement_Try(ast.copy_location(ast.Try([inner], [], [], node.finalbody), node))  # type: ignore[attr-defined]
            return
        first = len(self.labels) + 1
        body = self.block(node.body, "try")  # type: ignore[attr-defined]
        orelse = self.block(node.orelse, "else") if node.orelse else Block([], 1, 0)  # type: ignore[attr-defined]
        statements = body.body
        if self.cold and orelse.labelled:
            statements = [ast.copy_location(ast.If(self.up_to(body.last if body.labelled else first - 1), statements, []), statements[0])]
        handlers = []
        for number, handler in enumerate(node.handlers):  # type: ignore[attr-defined]
            type_ = ast.IfExp(call("kept"), handler.type, constant(())) if body.labelled else handler.type
            block = self.block(handler.body, f"except{number}-")
            handlers.append(ast.copy_location(ast.ExceptHandler(type_, handler.name, block.body), handler))
        self.emit_compound(ast.copy_location(ast.TryStar(statements, handlers, orelse.body, []), node), first)

    # -- with ----------------------------------------------------------------------------------------------------
    def statement_With(self, node: ast.With) -> None:
        item, *rest = node.items
        body = node.body
        if rest:
            body = [ast.copy_location(ast.With(rest, node.body), node)]
        if not any(map(has_yield, body)) and not has_yield(item.optional_vars):
            holding = len(self.holding)
            value = self.value(item.context_expr)
            inside = self.after_release(self.held(holding), body, "with").body
            self.emit(ast.copy_location(ast.With([ast.withitem(value, item.optional_vars)], inside), node))
            return
        self._with_that_waits(node, item, body)

    def _with_that_waits(self, node: ast.With, item: ast.withitem, body: list[ast.stmt]) -> None:
        manager, entered, open_ = self.temporary("manager"), self.temporary("entered"), self.temporary("open")
        mark, holding = len(self.live), len(self.holding)
        self.emit(assign(manager, self.value(item.context_expr)))
        self.release(self.held(holding))
        del self.live[mark:]
        enter = self._enter(manager)
        self.emit(assign(entered, enter) if item.optional_vars is not None else ast.Expr(enter))
        leaves = self.escapes(body)
        self.live.append(manager)
        if leaves:
            self.emit(assign(open_, constant(True)))
            self.live.append(open_)
        first, began = len(self.labels) + 1, self.mark_held()
        with self.collect() as block:
            if item.optional_vars is not None:
                self.live.append(entered)
                self.assign_to(item.optional_vars, load(entered))
                self.emit(assign(entered, constant(None)))
                self.live.pop()
            self.emit_block(self.block(body, "with"))
        del self.live[mark:]
        forgotten: ast.stmt = assign(manager, constant(None))
        dropped = self.dropping(self.held_in(began))
        failed: list[ast.stmt] = [*dropped, ast.If(self._goes_on(manager), [forgotten, ast.Raise()], [])]
        done: list[ast.stmt] = [ast.Expr(self._exit(manager, *[constant(None)] * 3))]
        if leaves:
            failed.insert(0, assign(open_, constant(False)))
            done = [ast.If(load(open_), [*dropped, *done], []), forgotten]
        for statement in (*failed, *done):
            ast.copy_location(statement, item.context_expr)
        handler = ast.copy_location(ast.ExceptHandler(None, None, failed), item.context_expr)
        guarded = ast.Try(block.body, [handler], [], done) if leaves else ast.Try(block.body, [handler], done, [])
        self.emit_compound(ast.copy_location(guarded, node), first)
        if not leaves:
            self.emit(assign(manager, constant(None)))


    @staticmethod
    def dropping(names: list[str]) -> list[ast.stmt]:
        """Return statements that clear the temporaries that an exception or a return has left; natively, their values would have been on the stack."""
        return [ast.Assign([store(name) for name in names], constant(None))] if names else []

    @staticmethod
    def _enter(manager: str) -> ast.expr:
        """Return a call of `__enter__`.  Types that are not known to be safe get the checks of the with statement, and the driver is told."""
        known = ast.Compare(_type_of(manager), [ast.In()], [load("__@managers__")])
        quick = ast.Call(ast.Attribute(_type_of(manager), "__enter__", ast.Load()), [load(manager)], [])
        return ast.IfExp(known, quick, call("entered", load(manager), ast.Call(call("entry", load(manager)), [load(manager)], [])))

    @staticmethod
    def _exit(manager: str, *error: ast.expr) -> ast.expr:
        return ast.Call(ast.Attribute(_type_of(manager), "__exit__", ast.Load()), [load(manager), *error], [])

    def _goes_on(self, manager: str) -> ast.expr:
        """Return the test whether the exception propagates; `__exit__` is not called if the generator is merely forgotten (G8)."""
        forgotten = ast.UnaryOp(ast.Not(), call("kept"))
        return ast.BoolOp(ast.Or(), [forgotten, ast.UnaryOp(ast.Not(), self._exit(manager, ast.Starred(ast.Call(load("__@exc_info__"), [], []), ast.Load())))])


def _escapes(node: ast.AST, in_loop: bool) -> bool:
    if isinstance(node, ast.Return):
        return True
    if isinstance(node, (ast.Break, ast.Continue)):
        return not in_loop
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
        return False
    if isinstance(node, (ast.For, ast.While)):
        return any(_escapes(child, True) for child in node.body) or any(_escapes(child, in_loop) for child in node.orelse)
    return any(_escapes(child, in_loop) for child in child_nodes(node))

