"""async for and async with, composed of `try` and `while`, with an `await` where the interpreter has one."""

from __future__ import annotations

import ast

from kwflow.durable.lower.emit import LOOP, assign, call, constant, helper, load
from kwflow.durable.lower.nodes import has_yield
from kwflow.durable.lower.protected import Protected
from kwflow.durable.lower.scopes import ITERATOR

__all__ = ["Asyncs"]


class Asyncs(Protected):
    """The passes over async statements."""

    def _await(self, name: str, *arguments: ast.expr) -> ast.Await:
        return ast.Await(call(name, *arguments))

    def statement_AsyncFor(self, node: ast.AsyncFor) -> None:
        """`while going: try: value = await anext(it); except StopAsyncIteration: going = False; else: TARGET = value; BODY`."""
        mark = len(self.live)
        begun = isinstance(node.iter, ast.Name) and node.iter.id == ITERATOR
        source = self.value(node.iter)
        iterator, going, value = self.temporary("async-iterator"), self.temporary("while"), self.temporary("for-value")
        self.emit(assign(iterator, source if begun else call("aiter", source)), assign(going, constant(True)))
        del self.live[mark:]
        self.live += [iterator, going]
        first = len(self.labels) + 1
        fetch: list[ast.stmt] = [assign(value, self._await("anext", load(iterator)))]
        ended = ast.ExceptHandler(helper("StopAsyncIteration"), None, [assign(going, constant(False))])
        bound = ast.copy_location(ast.Assign([node.target], load(value)), node.target)
        whole = ast.Try(fetch, [ended], [bound, *node.body], [])
        for statement in (*fetch, *ended.body, ended, whole):
            ast.copy_location(statement, node)
        self.exits.append(LOOP)
        body = self.block([whole], "body")
        self.exits.pop()
        test: ast.expr = load(going)
        if self.cold:
            test = self.unless_entering(test, self.up_to(body.last))
        del self.live[mark:]
        orelse = self.block(node.orelse, "else").body if node.orelse else []
        self.emit_compound(ast.copy_location(ast.While(test, body.body, orelse), node), first)
        self.emit(assign(iterator, constant(None)))

    def statement_AsyncWith(self, node: ast.AsyncWith) -> None:
        """Lower it like `with`, one item after the other; both ways out await."""
        item, *rest = node.items
        body: list[ast.stmt] = [ast.copy_location(ast.AsyncWith(rest, node.body), node)] if rest else node.body
        manager, entered, open_ = self.temporary("manager"), self.temporary("entered"), self.temporary("open")
        mark = len(self.live)
        self.emit(assign(manager, self.value(item.context_expr)))
        del self.live[mark:]
        self.live.append(manager)
        at = item.context_expr
        entering = ast.copy_location(assign(entered, self._await("aenter", load(manager))), at)
        self.statement(entering)
        if item.optional_vars is not None:
            body = [ast.copy_location(ast.Assign([item.optional_vars], load(entered)), item.optional_vars), *body]
            if has_yield(item.optional_vars):
                self.live.append(entered)
        leave = ast.If(ast.UnaryOp(ast.Not(), self._await("aleave", load(manager))), [ast.Raise()], [])
        done: list[ast.stmt] = [ast.Expr(self._await("aexit", load(manager)))]
        if self.escapes(body):
            self.emit(assign(open_, constant(True)))
            self.live.append(open_)
            inner = ast.Try(body, [ast.ExceptHandler(None, None, [assign(open_, constant(False)), leave])], [], [])
            guarded = ast.Try([inner], [], [], [ast.If(load(open_), done, [])])
        else:
            guarded = ast.Try(body, [ast.ExceptHandler(None, None, [leave])], done, [])
        for part in ast.walk(guarded):
            if isinstance(part, (ast.stmt, ast.ExceptHandler)) and not hasattr(part, "lineno"):
                ast.copy_location(part, at)
        self.statement(guarded)
        del self.live[mark:]
        self.emit(assign(manager, constant(None)))
        if item.optional_vars is not None:
            self.emit(assign(entered, constant(None)))


