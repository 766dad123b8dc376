"""Statements: targets, branches, loops and match, each with its hot form and with the guard for when a label is to be reached."""

from __future__ import annotations

import ast
from typing import Any

from kwflow.durable.lower.asyncs import Asyncs
from kwflow.durable.lower.emit import BROKE, CONTINUED, LOOP, RETURNED, Block, Finally, assign, call, constant, is_bound, load, store
from kwflow.durable.lower.expressions import MAPPING, PLAIN
from kwflow.durable.lower.nodes import has_yield

__all__ = ["Statements"]

_WAITS = (ast.Yield, ast.YieldFrom, ast.Await)


class Statements(Asyncs):
    """The passes over statements; `statement` is the entry."""

    def statement(self, node: ast.stmt) -> None:
        """Lower one statement.  One without yields stays as it is, unless it leaves the body of a `finally` that has to be told."""
        if not has_yield(node) and not (any(isinstance(exit_, Finally) for exit_ in self.exits) and self.escapes([node])):
            self.emit(node)
            return
        method = getattr(self, f"statement_{type(node).__name__}", None)
        if method is None:
            raise self.refuse(node, f"a yield inside {type(node).__name__}")
        method(node)

    def block_with(self, statements: list[ast.stmt], name: str, loop: bool = False) -> Block:
        if loop:
            self.exits.append(LOOP)
        block = self.block(statements, name)
        if loop:
            self.exits.pop()
        return block

    # -- simple statements -----------------------------------------------------------------------------------------
    def statement_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, _WAITS):
            wait = self.suspension(node.value)
            self.emit_labelled(ast.copy_location(ast.Expr(wait), node), len(self.labels))
            return
        value = self.value(node.value)
        if not isinstance(value, ast.Name):
            self.emit(ast.copy_location(ast.Expr(value), node))

    def statement_Return(self, node: ast.Return) -> None:
        pending = [exit_ for exit_ in self.exits if isinstance(exit_, Finally)]
        if not pending:
            value = node.value
            if isinstance(value, _WAITS):
                wait = self.suspension(value)
                self.emit_labelled(ast.copy_location(ast.Return(wait), node), len(self.labels))
            else:
                self.emit(ast.copy_location(ast.Return(self.value(value) if value is not None else None), node))
            return
        first, *rest = [exit_.value for exit_ in pending]
        self.assign_into(first, node.value or constant(None))
        self.emit(*(assign(name, load(first)) for name in rest))
        self.emit(*(assign(exit_.completion, constant(RETURNED)) for exit_ in pending))
        self.emit(ast.copy_location(ast.Return(load(first)), node))

    def statement_Break(self, node: ast.Break) -> None:
        self.emit(*self.leaving_loop(BROKE))
        self.emit(node)

    def statement_Continue(self, node: ast.Continue) -> None:
        self.emit(*self.leaving_loop(CONTINUED))
        self.emit(node)

    def statement_Assign(self, node: ast.Assign) -> None:
        if not any(map(has_yield, node.targets)):
            if isinstance(node.value, _WAITS):
                wait = self.suspension(node.value)
                self.emit_labelled(ast.copy_location(ast.Assign(node.targets, wait), node), len(self.labels))
            else:
                self.emit(ast.copy_location(ast.Assign(node.targets, self.value(node.value)), node))
            return
        value = self.spill(self.value(node.value), len(self.live))
        for target in node.targets:
            self.assign_to(target, value)

    def statement_AnnAssign(self, node: ast.AnnAssign) -> None:
        if has_yield(node.annotation):
            raise self.refuse(node, "a yield inside an annotation")
        if node.value is not None:
            self.statement_Assign(ast.copy_location(ast.Assign([node.target], node.value), node))
        else:
            self._places(node.target)

    def _places(self, target: ast.expr) -> list[ast.expr]:
        """Return the expressions inside an attribute or subscript target, lowered."""
        if isinstance(target, ast.Attribute):
            return [self.value(target.value)]
        if isinstance(target, ast.Subscript):
            parts = [(PLAIN, target.value), (PLAIN, self.index(target.slice))]
            return self.sequence(parts) if any(has_yield(part) for _, part in parts) else [part for _, part in parts]
        return []

    @staticmethod
    def _at(target: ast.expr, places: list[ast.expr], context: ast.expr_context) -> ast.expr:
        if isinstance(target, ast.Attribute):
            return ast.copy_location(ast.Attribute(places[0], target.attr, context), target)
        if isinstance(target, ast.Subscript):
            return ast.copy_location(ast.Subscript(places[0], places[1], context), target)
        return ast.copy_location(ast.Name(target.id, context), target)  # type: ignore[attr-defined]

    def assign_to(self, target: ast.expr, value: ast.expr) -> None:
        """Assign an evaluated value; the expressions inside the target are evaluated now."""
        mark = len(self.live)
        if not has_yield(target):
            self.emit(ast.copy_location(ast.Assign([target], value), target))
        elif isinstance(target, (ast.Tuple, ast.List)):
            names = [self.temporary("unpack") for _ in target.elts]
            parts: list[ast.expr] = [ast.Starred(store(n), ast.Store()) if isinstance(e, ast.Starred) else store(n) for n, e in zip(names, target.elts, strict=True)]
            self.emit(ast.copy_location(ast.Assign([ast.Tuple(parts, ast.Store())], value), target))
            for number, (name, element) in enumerate(zip(names, target.elts, strict=True)):
                self.live[mark:] = names[number + 1 :]
                self.live.append(name)
                self.assign_to(element.value if isinstance(element, ast.Starred) else element, load(name))
        else:
            self.emit(ast.copy_location(ast.Assign([self._at(target, self._places(target), ast.Store())], value), target))
        del self.live[mark:]

    def statement_AugAssign(self, node: ast.AugAssign) -> None:
        """Lower `x += v`: x is read before v is evaluated, and stored afterwards; in-place operators and their error messages stay the same."""
        places = []
        for part in self._places(node.target):
            places.append(part if isinstance(part, ast.Constant) else self.spill(part, len(self.live)))
        old, value = self.temporary("augment"), self._at(node.target, places, ast.Load())
        if self.cold and isinstance(value, ast.Name) and value.id in self.scope.cells:
            value = ast.copy_location(ast.IfExp(is_bound(self.scope, value.id), value, call("unbound", constant(value.id))), node.target)
        self.emit(assign(old, value))
        self.live.append(old)
        self.emit(ast.copy_location(ast.AugAssign(store(old), node.op, self.value(node.value)), node))
        self.emit(ast.copy_location(ast.Assign([self._at(node.target, places, ast.Store())], load(old)), node))

    def statement_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            mark = len(self.live)
            if isinstance(target, (ast.Tuple, ast.List)):
                self.statement_Delete(ast.copy_location(ast.Delete(target.elts), node))
            else:
                self.emit(ast.copy_location(ast.Delete([self._at(target, self._places(target), ast.Del())]), node))
            del self.live[mark:]

    def statement_Assert(self, node: ast.Assert) -> None:
        mark = len(self.live)
        test = self.value(node.test)
        if not has_yield(node.msg):
            self.emit(ast.copy_location(ast.Assert(test, node.msg), node))
            return
        del self.live[mark:]
        with self.collect() as failed:
            message = self.value(node.msg)  # type: ignore[arg-type]
            self.emit(ast.copy_location(ast.Assert(constant(False), message), node))
        self.emit_block(self.branch(ast.UnaryOp(ast.Not(), test), failed))

    def statement_Raise(self, node: ast.Raise) -> None:
        parts, holding = [part for part in (node.exc, node.cause) if part is not None], len(self.holding)
        *error, last = self.sequence([(PLAIN, part) for part in parts])
        let_go: list[ast.expr] = [ast.NamedExpr(store(name), constant(None)) for name in self.held(holding)]
        if let_go:  # the traceback of the error holds this frame, so a temporary that holds the error would make a cycle
            last = ast.Subscript(ast.Tuple([last, *let_go], ast.Load()), constant(0), ast.Load())
        self.emit(ast.copy_location(ast.Raise(error[0], last) if error else ast.Raise(last), node))

    def statement_FunctionDef(self, node: ast.FunctionDef) -> None:
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]:
            if argument is not None and has_yield(argument.annotation):
                raise self.refuse(node, "a yield inside an annotation")
        if has_yield(node.returns):
            raise self.refuse(node, "a yield inside an annotation")
        defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
        values = self.sequence([(PLAIN, part) for part in [*node.decorator_list, *defaults]])
        decorators, rest = values[: len(node.decorator_list)], iter(values[len(node.decorator_list) :])
        args = node.args
        positional = [next(rest) for _ in args.defaults]
        named = [None if default is None else next(rest) for default in args.kw_defaults]
        replaced = ast.arguments(args.posonlyargs, args.args, args.vararg, args.kwonlyargs, named, args.kwarg, positional)
        self.emit(_like(node, args=replaced, decorator_list=decorators))

    def statement_ClassDef(self, node: ast.ClassDef) -> None:
        keywords = [(PLAIN if keyword.arg is not None else MAPPING, keyword.value) for keyword in node.keywords]
        bases = [self.element(base) for base in node.bases]
        values = self.sequence([*((PLAIN, decorator) for decorator in node.decorator_list), *bases, *keywords])
        first, second = len(node.decorator_list), len(node.decorator_list) + len(bases)
        named = [ast.copy_location(ast.keyword(old.arg, value), old) for old, value in zip(node.keywords, values[second:], strict=True)]
        self.emit(_like(node, decorator_list=values[:first], bases=values[first:second], keywords=named))

    # -- branches and loops ------------------------------------------------------------------------------------------
    def statement_If(self, node: ast.If) -> None:
        mark, holding = len(self.live), len(self.holding)
        test = self.value(node.test)
        del self.live[mark:]
        names = self.held(holding)
        body = self.after_release(names, node.body, "body")
        orelse = self.after_release(names, node.orelse, "else") if node.orelse or names else None
        self.emit_block(self.branch(test, body, orelse))

    def after_release(self, names: list[str], statements: list[ast.stmt], name: str) -> Block:
        """Return a block that first releases the temporaries of the expression that led into it."""
        with self.collect() as block:
            self.release(names, statements[0] if statements else None)
            if statements:
                self.emit_block(self.block(statements, name))
        return block

    def statement_While(self, node: ast.While) -> None:
        first = len(self.labels) + 1
        if not has_yield(node.test):
            test = node.test
            body = self.block_with(node.body, "body", loop=True)
            statements = body.body
            self.store_before_loop(node, statements, first)
            orelse = self.block(node.orelse, "else").body if node.orelse else []
            if self.cold and len(self.labels) >= first:
                test = self.unless_entering(test, self.up_to(body.last) if body.labelled else constant(False))
        else:
            going, holding = self.temporary("while"), len(self.holding)
            self.emit(assign(going, constant(True)))
            self.live.append(going)
            with self.collect() as whole:
                self.assign_into(going, ast.IfExp(node.test, constant(True), constant(False)))
                self.release(self.held(holding))
                self.emit_block(self.branch(load(going), self.block_with(node.body, "body", loop=True)))
            test, statements = load(going), whole.body
            self.store_before_loop(node, statements, first)
            if self.cold:
                test = self.unless_entering(test, self.up_to(whole.last))
            self.live.pop()
            orelse = self.block(node.orelse, "else").body if node.orelse else []
        loop = ast.copy_location(ast.While(test, statements, orelse), node)
        self.emit_compound(loop, first)

    def statement_For(self, node: ast.For) -> None:
        mark, holding = len(self.live), len(self.holding)
        source = self.value(node.iter)
        if not has_yield(node.target) and not any(map(has_yield, node.body)):
            self._for_without_waits(node, source, self.held(holding))
            return
        iterator = self.temporary("for-iterator")
        self.emit(assign(iterator, ast.Call(load("__@iter__"), [source], [])))
        strange = ast.Compare(ast.Call(load("__@type__"), [load(iterator)], []), [ast.NotIn()], [load("__@iterators__")])
        self.emit(ast.If(strange, [assign(iterator, call("iterator", load(iterator)))], []))
        self.release(self.held(holding))
        del self.live[mark:]
        first = len(self.labels) + 1
        self.live.append(iterator)
        moved = self.cold or has_yield(node.target)
        value = self.temporary("for-value")
        in_target = 0
        with self.collect() as body:
            if moved:
                self.live.append(value)
                self.assign_to(node.target, load(value))
                self.emit(assign(value, constant(None)))
                self.live.pop()
                in_target = len(self.labels)
            self.emit_block(self.block_with(node.body, "body", loop=True))
        self.live.pop()
        self.store_before_loop(node, body.body, first)
        over: ast.expr = load(iterator)
        if self.cold:
            current: ast.expr = constant(None)  # the loop is entered with the value that it had, which a target that waits still needs
            if in_target >= first:
                current = ast.IfExp(self.up_to(in_target), load(value), current)
            entering = ast.IfExp(self.up_to(body.last), call("chain", ast.Tuple([current], ast.Load()), load(iterator)), constant(()))
            over = self.unless_entering(over, entering)
        orelse = self.block(node.orelse, "else").body if node.orelse else []
        target = store(value) if moved else node.target
        self.emit_compound(ast.copy_location(ast.For(target, over, body.body, orelse), node), first)
        self.emit(assign(iterator, constant(None)))

    def _for_without_waits(self, node: ast.For, source: ast.expr, names: list[str]) -> None:
        if names:
            iterator = self.temporary("for-iterator")
            self.emit(assign(iterator, call("iter", source)))
            self.release(names)
            source = load(iterator)
        first = len(self.labels) + 1
        body = self.block_with(node.body, "body", loop=True).body
        orelse = self.block(node.orelse, "else").body if node.orelse else []
        if self.cold and len(self.labels) >= first:
            source = self.unless_entering(source, constant(()))
        self.emit_compound(ast.copy_location(ast.For(node.target, source, body, orelse), node), first)
        if names:
            self.emit(assign(iterator, constant(None)))

    # -- match ---------------------------------------------------------------------------------------------------------
    def statement_Match(self, node: ast.Match) -> None:
        """Lower a match.  In the hot twin, bodies stay in place; the cold twin notes which case matched, and enters bodies by their labels.

        Patterns bind in place and are never run again.  A guard that waits splits the match in two: the cases after it are tried only if it fails.
        """
        mark, holding = len(self.live), len(self.holding)
        subject = self.value(node.subject)
        waiting_guards = any(has_yield(case.guard) for case in node.cases)
        if not self.cold and not waiting_guards:
            names = self.held(holding)
            cases = [ast.match_case(case.pattern, case.guard, self.after_release(names, case.body, f"case{n}-").body) for n, case in enumerate(node.cases)]
            self.emit(ast.copy_location(ast.Match(subject, cases), node))  # the hot twin has no guards for labels, so this statement needs no range
            self.release(names)
            return
        chosen = self.temporary("case")
        if waiting_guards:
            subject = self.spill(subject, mark)
            self.live.append(chosen)
            self.emit(assign(chosen, constant(0)))
            self._choose(node, subject, chosen, 0)
        else:
            self.emit(assign(chosen, constant(0)), self._chooser(node, subject, chosen, range(len(node.cases))))
        del self.live[mark:]
        self.release(self.held(holding))
        self._dispatch(node, chosen)

    def _chooser(self, node: ast.Match, subject: ast.expr, chosen: str, numbers: range) -> ast.stmt:
        """Return a native match whose bodies only note the number of the case: n + 1, or -(n + 1) if its guard is still to be evaluated."""
        cases = []
        for number in numbers:
            case = node.cases[number]
            waits = has_yield(case.guard)
            note = assign(chosen, constant(-(number + 1) if waits else number + 1))
            cases.append(ast.match_case(case.pattern, None if waits else case.guard, [ast.copy_location(note, case.body[0])]))
        return ast.copy_location(ast.Match(subject, cases), node)

    def _choose(self, node: ast.Match, subject: ast.expr, chosen: str, start: int) -> None:
        cut = next((n for n in range(start, len(node.cases)) if has_yield(node.cases[n].guard)), None)
        stop = len(node.cases) if cut is None else cut + 1
        if start < stop:
            self.emit(self._chooser(node, subject, chosen, range(start, stop)))
        if cut is None:
            return
        with self.collect() as asking:
            guard = node.cases[cut].guard
            self.assign_into(chosen, ast.IfExp(guard, constant(cut + 1), constant(0)))  # type: ignore[arg-type]
        self.emit_block(self.branch(ast.Compare(load(chosen), [ast.Eq()], [constant(-(cut + 1))]), asking))
        with self.collect() as rest:
            self._choose(node, subject, chosen, cut + 1)
        if cut + 1 < len(node.cases):
            self.emit_block(self.branch(ast.UnaryOp(ast.Not(), load(chosen)), rest))

    def _dispatch(self, node: ast.Match, chosen: str) -> None:
        """Emit an elif chain over the cases, so that no further test runs after a body that was entered by its label: `chosen` is not set then."""
        bodies = [self.block(case.body, f"case{number}-") for number, case in enumerate(node.cases)]
        chain: Block | None = None
        for number in reversed(range(len(bodies))):
            test = ast.Compare(load(chosen), [ast.Eq()], [constant(number + 1)])
            chain = self.branch(test, bodies[number], chain)
            for statement in chain.body:
                self.place(statement)
        if chain is not None:
            self.emit_block(chain)


def _like(node: ast.stmt, **changed: object) -> ast.stmt:
    """Return a copy of the node with some fields replaced; the given tree is never changed."""
    fields: dict[str, Any] = {name: changed.get(name, getattr(node, name, None)) for name in node._fields if name in changed or hasattr(node, name)}
    return ast.copy_location(type(node)(**fields), node)
