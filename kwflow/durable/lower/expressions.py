"""Hoisting: a yield anywhere in an expression becomes a statement, and the values that were evaluated before it are kept.

`value(e)` emits what has to happen first, and returns an expression without yields.  CPython's order of evaluation is
preserved, because everything to the left of the last yield goes into temporaries, in order.  Every rule about the order of
evaluation inside an expression lives here.
"""

from __future__ import annotations

import ast
from typing import Any

from kwflow.durable.lower.emit import Emitter, assign, call, constant, helper, load
from kwflow.durable.lower.nodes import has_yield
from kwflow.durable.registry import RUNTIME

__all__ = ["Expressions"]

PLAIN, STAR, STAR_LATE, MAPPING, PIECE = "plain", "star", "star-late", "mapping", "piece"
Part = tuple[str, ast.expr]


def _fixed(node: ast.expr) -> bool:
    """Whether it makes no difference if the node is evaluated later, or twice."""
    if isinstance(node, ast.Call):  # one of ours: `@kw.mark("path")`
        return _fixed(node.func) and all(map(_fixed, node.args))
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == RUNTIME)


def is_temporary(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id.startswith("@")


class Expressions(Emitter):
    """The passes over expressions."""

    def value(self, node: ast.expr) -> ast.expr:
        """Emit the yields of the node, and return it without them."""
        if not has_yield(node):
            return node
        method = getattr(self, f"value_{type(node).__name__}", None)
        if method is None:
            raise self.refuse(node, f"a yield inside {type(node).__name__}")
        result: ast.expr = method(node)
        return ast.copy_location(result, node) if not hasattr(result, "lineno") else result

    def spill(self, value: ast.expr, mark: int) -> ast.expr:
        """Evaluate a value into a temporary now; what was live only for this value no longer is."""
        if is_temporary(value):
            del self.live[mark:]
            self.live.append(value.id)  # type: ignore[attr-defined]
            return value
        name = self.temporary("spill")
        self.emit(ast.copy_location(assign(name, value), value) if hasattr(value, "lineno") else assign(name, value))
        del self.live[mark:]
        self.live.append(name)
        return load(name)

    def assign_into(self, name: str, node: ast.expr) -> None:
        mark = len(self.live)
        self.emit(assign(name, self.value(node)))
        del self.live[mark:]

    def sequence(self, parts: list[Part]) -> list[ast.expr]:
        """Evaluate parts from left to right; return each in the form that it has in its parent."""
        last = max(number for number, (_, node) in enumerate(parts) if has_yield(node))
        results = []
        for number, (kind, node) in enumerate(parts):
            if number > last or (number < last and _fixed(node)):
                results.append(node)
                continue
            mark = len(self.live)
            value = self.value(node)
            results.append(self._kept(kind, value, mark) if number < last else value)
        return [ast.Starred(value, ast.Load()) if kind in (STAR, STAR_LATE) else value for (kind, _), value in zip(parts, results, strict=True)]

    def _kept(self, kind: str, value: ast.expr, mark: int) -> ast.expr:
        if kind == STAR:
            return self.spill(ast.List([ast.Starred(value, ast.Load())], ast.Load()), mark)
        if kind == MAPPING:
            return self.spill(ast.Dict([None], [value]), mark)
        if kind == PIECE:
            return ast.FormattedValue(self.spill(ast.JoinedStr([value]), mark), -1, None)
        return self.spill(value, mark)

    @staticmethod
    def element(node: ast.expr) -> Part:
        return (STAR, node.value) if isinstance(node, ast.Starred) else (PLAIN, node)

    # -- suspending ------------------------------------------------------------------------------------------------
    def suspension(self, node: ast.Yield | ast.YieldFrom | ast.Await) -> ast.expr:
        """Emit everything up to the wait, and return the yield itself; the caller emits its statement with the newest label."""
        mark = len(self.live)
        if isinstance(node, (ast.YieldFrom, ast.Await)):
            delegate = self.temporary("delegate")
            begin = "delegate" if isinstance(node, ast.YieldFrom) else "awaited"
            self.emit(assign(delegate, call(begin, self.value(node.value))))
            del self.live[mark:]
            self.live.append(delegate)
            self.label(node)
            self.live.pop()
            source: ast.expr = load(delegate)
            if self.cold:
                source = self.unless_entering(source, call("Resume", load(delegate), self._reached()))
            return ast.copy_location(ast.YieldFrom(source), node)
        value = self.value(node.value) if node.value is not None else None
        del self.live[mark:]
        self.label(node)
        if self.cold:
            value = self.unless_entering(value or constant(None), self._reached())
        return ast.copy_location(ast.Yield(value), node)

    @staticmethod
    def _reached() -> ast.NamedExpr:
        return ast.NamedExpr(ast.Name("@r", ast.Store()), constant(0))

    def value_Yield(self, node: ast.Yield | ast.YieldFrom | ast.Await) -> ast.expr:
        mark = len(self.live)
        wait = self.suspension(node)
        name = self.temporary("spill")
        self.emit_labelled(ast.copy_location(assign(name, wait), node), len(self.labels))
        del self.live[mark:]
        self.live.append(name)
        return load(name)

    value_YieldFrom = value_Await = value_Yield

    # -- operators -------------------------------------------------------------------------------------------------
    def value_BinOp(self, node: ast.BinOp) -> ast.expr:
        left, right = self.sequence([(PLAIN, node.left), (PLAIN, node.right)])
        return ast.BinOp(left, node.op, right)

    def value_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        return ast.UnaryOp(node.op, self.value(node.operand))

    def value_Compare(self, node: ast.Compare) -> ast.expr:
        if len(node.ops) == 1:
            left, right = self.sequence([(PLAIN, node.left), (PLAIN, node.comparators[0])])
            return ast.Compare(left, node.ops, [right])
        mark = len(self.live)
        result = self.temporary("compare")
        self._chain(result, self.spill(self.value(node.left), mark), node.ops, node.comparators)
        del self.live[mark:]
        self.live.append(result)
        return load(result)

    def _chain(self, result: str, left: ast.expr, ops: list[ast.cmpop], comparators: list[ast.expr]) -> None:
        """Evaluate the next operand only if the comparison holds so far; the value is that of the last comparison made."""
        mark = len(self.live)
        right = self.value(comparators[0])
        if len(ops) > 1:
            right = self.spill(right, mark)
        self.emit(assign(result, ast.Compare(left, ops[:1], [right])))
        if len(ops) > 1:
            with self.collect() as rest:
                self._chain(result, right, ops[1:], comparators[1:])
            self.emit_block(self.branch(load(result), rest))
        del self.live[mark:]

    def value_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        mark = len(self.live)
        result = self.temporary("bool")
        self._operands(result, node.op, node.values)
        del self.live[mark:]
        self.live.append(result)
        return load(result)

    def _operands(self, result: str, op: ast.boolop, values: list[ast.expr]) -> None:
        if not any(map(has_yield, values)):
            self.emit(assign(result, ast.BoolOp(op, values) if len(values) > 1 else values[0]))
            return
        self.assign_into(result, values[0])
        if len(values) > 1:
            with self.collect() as rest:
                self._operands(result, op, values[1:])
            test: ast.expr = load(result)
            self.emit_block(self.branch(test if isinstance(op, ast.And) else ast.UnaryOp(ast.Not(), test), rest))

    def value_IfExp(self, node: ast.IfExp) -> ast.expr:
        mark = len(self.live)
        result = self.temporary("if")
        test = self.value(node.test)
        del self.live[mark:]
        with self.collect() as body:
            self.assign_into(result, node.body)
        with self.collect() as orelse:
            self.assign_into(result, node.orelse)
        self.emit_block(self.branch(test, body, orelse))
        self.live.append(result)
        return load(result)

    def value_NamedExpr(self, node: ast.NamedExpr) -> ast.expr:
        mark = len(self.live)
        value = self.spill(self.value(node.value), mark)
        self.emit(ast.Assign([node.target], value))
        return value

    # -- calls, attributes, subscripts -----------------------------------------------------------------------------
    def value_Call(self, node: ast.Call) -> ast.expr:
        arguments = [self.element(argument) for argument in node.args]
        if len(arguments) == 1 and arguments[0][0] == STAR:  # f(*a, k=v): a is iterated at the call, not before v
            arguments = [(STAR_LATE, arguments[0][1])]
        keywords = [(PLAIN if keyword.arg is not None else MAPPING, keyword.value) for keyword in node.keywords]
        function, *rest = self.sequence([(PLAIN, node.func), *arguments, *keywords])
        values = rest[len(arguments) :]
        named = [ast.copy_location(ast.keyword(old.arg, value), old) for old, value in zip(node.keywords, values, strict=True)]
        return ast.Call(function, rest[: len(arguments)], named)

    def value_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Attribute(self.value(node.value), node.attr, ast.Load())

    def value_Subscript(self, node: ast.Subscript) -> ast.expr:
        value, index = self.sequence([(PLAIN, node.value), (PLAIN, self.index(node.slice))])
        return ast.Subscript(value, index, ast.Load())

    def index(self, node: ast.expr) -> ast.expr:
        """Return an index with its slices as calls, so that it is an ordinary expression."""
        if isinstance(node, ast.Slice):
            return ast.copy_location(call("slice", *(part or constant(None) for part in (node.lower, node.upper, node.step))), node)
        if isinstance(node, ast.Tuple) and any(isinstance(element, ast.Slice) for element in node.elts):
            return ast.copy_location(ast.Tuple([self.index(element) for element in node.elts], ast.Load()), node)
        return node

    # -- displays --------------------------------------------------------------------------------------------------
    def value_Tuple(self, node: ast.Tuple | ast.List) -> ast.expr:
        return type(node)(self.sequence([self.element(element) for element in node.elts]), ast.Load())

    value_List = value_Tuple

    def value_Starred(self, node: ast.Starred) -> ast.expr:
        return ast.Starred(self.value(node.value), ast.Load())

    def value_Set(self, node: ast.Set) -> ast.expr:
        """Lower a set.  Its elements are hashed at the end, except that at each `*x` the elements so far are hashed first."""
        stars = [number for number, element in enumerate(node.elts) if isinstance(element, ast.Starred)]
        cuts = [number for number in stars if any(map(has_yield, node.elts[number + 1 :]))]
        if not cuts:
            return ast.Set(self.sequence([self.element(element) for element in node.elts]))
        mark = len(self.live)
        head = self.spill(self.value(ast.Set(node.elts[: cuts[-1] + 1])), mark)
        return self._joined(ast.Starred(head, ast.Load()), node.elts[cuts[-1] + 1 :])

    def _joined(self, head: ast.expr, rest: list[ast.expr]) -> ast.expr:
        return ast.Set([head, *self.sequence([self.element(element) for element in rest])])

    def value_Dict(self, node: ast.Dict) -> ast.expr:
        """Lower a dict.  Its keys are hashed at the end, except that at each `**m` the dict so far is built first."""
        pairs = list(zip(node.keys, node.values, strict=True))
        cuts = [n for n, (key, _) in enumerate(pairs) if key is None and any(has_yield(k) or has_yield(v) for k, v in pairs[n + 1 :])]
        head: list[ast.expr] = []
        if cuts:
            mark = len(self.live)
            front = pairs[: cuts[-1] + 1]
            head = [self.spill(self.value(ast.Dict([k for k, _ in front], [v for _, v in front])), mark)]
            pairs = pairs[cuts[-1] + 1 :]
        parts = [(PLAIN, part) for pair in pairs for part in pair if part is not None]
        values = iter(self.sequence(parts))
        keys: list[ast.expr | None] = [None] * len(head)
        for key, _ in pairs:
            keys.append(None if key is None else next(values))
            head.append(next(values))
        return ast.Dict(keys, head)

    # -- strings ---------------------------------------------------------------------------------------------------
    def value_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        return ast.JoinedStr(self.sequence([(PIECE if isinstance(piece, ast.FormattedValue) else PLAIN, piece) for piece in node.values]))

    def value_TemplateStr(self, node: Any) -> ast.expr:
        """Lower a template string (3.14).  Values are evaluated in order and not formatted; format specs are formatted, each after its value."""
        parts: list[Part] = []
        for piece in node.values:
            if not isinstance(piece, ast.Constant):
                parts += [(PLAIN, piece.value), *([(PLAIN, piece.format_spec)] if piece.format_spec is not None else [])]
        values = iter(self.sequence(parts))
        pieces = []
        for piece in node.values:
            if isinstance(piece, ast.Constant):
                pieces.append(piece)
                continue
            value, spec = next(values), next(values) if piece.format_spec is not None else None
            if spec is not None and not isinstance(spec, ast.JoinedStr):
                spec = ast.JoinedStr([ast.FormattedValue(spec, -1, None)])
            pieces.append(ast.copy_location(type(piece)(value, piece.str, piece.conversion, spec), piece))
        return type(node)(pieces)  # type: ignore[no-any-return]

    def value_FormattedValue(self, node: ast.FormattedValue) -> ast.expr:
        if node.format_spec is None or not has_yield(node.format_spec):
            return ast.FormattedValue(self.value(node.value), node.conversion, node.format_spec)
        mark = len(self.live)
        value = self.value(node.value)
        if node.conversion != -1:
            value = ast.JoinedStr([ast.FormattedValue(value, node.conversion, None)])
        value = self.spill(value, mark)
        return ast.FormattedValue(value, -1, self.value(node.format_spec))

    # -- functions and comprehensions --------------------------------------------------------------------------------
    def value_Lambda(self, node: ast.Lambda) -> ast.expr:
        return ast.Lambda(self.defaults(node.args), node.body)

    def defaults(self, args: ast.arguments) -> ast.arguments:
        """Return the arguments with their default values lowered."""
        parts = [(PLAIN, default) for default in [*args.defaults, *(d for d in args.kw_defaults if d is not None)]]
        values = iter(self.sequence(parts) if any(has_yield(node) for _, node in parts) else [node for _, node in parts])
        positional = [next(values) for _ in args.defaults]
        named = [None if default is None else next(values) for default in args.kw_defaults]
        return ast.arguments(args.posonlyargs, args.args, args.vararg, args.kwonlyargs, named, args.kwarg, positional)

    def _first_iterable(self, generators: list[ast.comprehension]) -> list[ast.comprehension]:
        first = generators[0]
        return [ast.comprehension(first.target, self.value(first.iter), first.ifs, first.is_async), *generators[1:]]

    def value_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> ast.expr:
        return type(node)(node.elt, self._first_iterable(node.generators))

    value_SetComp = value_GeneratorExp = value_ListComp

    def value_DictComp(self, node: ast.DictComp) -> ast.expr:
        return ast.DictComp(node.key, node.value, self._first_iterable(node.generators))


__all__ += ["MAPPING", "PLAIN", "STAR", "helper"]
