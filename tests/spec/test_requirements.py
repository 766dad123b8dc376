"""Requirements of the reference that no other file covers: topics, interleaving, leaks, identity, long chains, T-KW-7, 10, 11."""

import re
from typing import Any

import pytest

from kwflow import durable
from kwflow.config import Config
from kwflow.core.contract import Context, Limits, Topics, Workflows
from kwflow.core.murmur2 import partition_of
from kwflow.core.step import step
from kwflow.core.wire import Record
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore, WorkflowTester

HEAD = "import kwflow as kw\nkw.declare_topics('out', 'schedule', 'output')\ndef say(x):\n    kw.output(str(x), 'out')\n"
_count = [0]


def load(body: str) -> Any:
    _count[0] += 1
    return durable.load_source(f"requirement_{_count[0]}", HEAD + body, f"requirement_{_count[0]}.py")


def run(body: str, options: Any = None) -> WorkflowTester:
    tester = WorkflowTester(load(body).main)
    tester.start("w", options)
    return tester


@pytest.mark.parametrize(
    ("value", "delivered"),
    [(b'{"ref":"r","value":1}', ["value", 1]), (b'{"ref":"r"}', ["value", None]), (b'{"ref":"r","error":null}', ["error", None]), (b'{"ref":"r","value":1,"error":{"a":2}}', ["error", {"a": 2}])],
)
def test_a_resume_delivers_value_or_error_of_any_json_type_and_error_wins(value: bytes, delivered: list[Any]) -> None:
    """KW-2, KW-3."""
    w = run("def main(o):\n    try:\n        return ['value', (yield kw.suspend('r'))]\n    except kw.WorkflowError as e:\n        return ['error', e.payload]")
    w.send("w", value)
    assert w.result("w") == delivered


@pytest.mark.parametrize("value", [b'{"ref":"nope"}', b'{"noref":1}', b'{"ref":5}', b'{"ref":null}'])
def test_a_resume_of_no_known_ref_changes_nothing(value: bytes) -> None:
    """KW-5."""
    w = run("def main(o):\n    yield kw.suspend('r')")
    before = dict(w.state.entries)
    w.send("w", value)
    assert (w.state.entries, w.counts[-1]) == (before, "unknown-ref")


def test_a_workflow_starts_and_resumes_others_over_the_resume_topic() -> None:
    """KW-11: that topic is always declared."""
    w = run("""
def main(o):
    if o == 'child':
        return (yield kw.suspend('r'))
    kw.output('new:"child"', 'workflow-resume', key='other')
    kw.output('new:"child"', 'workflow-resume', key='named', headers={'kwflow-workflow': 'main', 'kwflow-start-id': 'mine', 'a': b'1', 'b': None})
    kw.output_json({'ref': 'r', 'value': 7}, 'workflow-resume', 'other')
    return 'parent'
    yield
""")
    assert (w.result("w"), w.result("other")) == ("parent", 7)
    assert (w.header("named") or {})["start_id"] == "mine"
    assert [o.headers for o in w.outputs if o.key == b"named"] == [(("kwflow-workflow", b"main"), ("kwflow-start-id", b"mine"), ("a", b"1"), ("b", None))]


def test_an_empty_result_or_error_topic_turns_that_record_off() -> None:
    """KW-12."""
    main = load("def main(o):\n    return 1\n    yield").main
    processor = WorkflowProcessor(Config(result_topic="", error_topic=""), Workflows({"main": main}, "main"), frozenset())
    [made] = processor.decide(Overlay(MemoryStore()), [Record("workflow-resume", 0, 0, 1, b"w", b"new:1")], 1)
    assert made.outputs == ()


def test_several_instances_take_turns_and_share_nothing() -> None:
    """KW-16."""
    w = run("def main(o):\n    for n in range(3):\n        say(f\"{o} {n} {(yield kw.suspend('r'))}\")", "a")
    w.start("v", "b")
    for id, value in (("w", 1), ("v", 2), ("v", 3), ("w", 4), ("w", 5), ("v", 6)):
        w.resume(id, "r", value)
    assert w.outputs_to("out") == ["a 0 1", "b 0 2", "b 1 3", "a 1 4", "a 2 5", "b 2 6"]


def test_workflow_id_and_step_id_are_those_of_the_record() -> None:
    """KW-22."""
    w = run("def main(o):\n    say([kw.workflow_id(), kw.step_id()])\n    yield kw.suspend('r')\n    say([kw.workflow_id(), kw.step_id()])")
    w.send("x", b"{bad")
    w.resume("w", "r")
    assert w.outputs_to("out") == ["['w', '0']", "['w', '2']"]


def test_no_result_is_json_null_and_the_state_is_gone() -> None:
    """KW-23."""
    w = run("def main(o):\n    yield 1")
    assert (w.outputs_to("workflow-result"), w.ids()) == (["null"], [])


def test_an_error_before_the_first_wait_leaves_no_state() -> None:
    """KW-25."""
    w = run("def main(o):\n    raise TypeError('at once')\n    yield")
    assert (w.values("workflow-error"), w.ids()) == (["TypeError: at once"], [])


def test_the_test_kit_says_where_a_workflow_without_a_result_has_failed() -> None:
    """KW-25: a test has no `kwflow show`."""
    w = run("def pay(o):\n    yield 1\n    return o['price']\ndef main(o):\n    return (yield from pay(o))", {})
    with pytest.raises(AssertionError, match=r"(?s)w has no result; errors: \[\"KeyError: 'price'\"\].*\n  \S+:\d+ main\n  \S+:\d+ pay$"):
        w.result("w")


@pytest.mark.parametrize("parameters", ["", "a, b", "*, a", "o"])
def test_a_workflow_that_does_not_take_one_argument_is_told_what_it_is_called_with(parameters: str) -> None:
    """KW-25, KW-31. A TypeError of its own is left as it is."""
    [said] = run(f"def main({parameters}):\n    len(5)\n    yield").values("workflow-error")
    if parameters == "o":
        assert said == "TypeError: object of type 'int' has no len()"
    else:
        assert said.startswith("UsageError: workflow 'main' is called with one argument, the JSON given at the start, as in `def main(opts)`: main() "), said


def test_the_header_of_the_start_chooses_among_several_workflows_and_an_unknown_one_is_named() -> None:
    """KW-31, KW-34."""
    module = load("def main(o):\n    return 'main'\n    yield\ndef other(o):\n    return 'other'\n    yield")
    w = WorkflowTester(module.main, other=module.other)
    w.start("a")
    w.start("b", workflow="other")
    w.start("c", workflow="nope")
    assert (w.result("a"), w.result("b")) == ("main", "other")
    letter = next(output for output in w.outputs if output.topic.endswith("dead-letter"))
    said = dict(letter.headers)["kwflow-error-message"]
    assert said is not None
    assert b"'nope'" in said
    assert {b"main", b"other"} <= set(re.split(rb"[^\w-]+", said)), "other tests of this process may have registered more"


def test_a_plain_function_is_a_workflow_whose_value_is_its_result() -> None:
    """KW-32."""
    assert run("def main(o):\n    return o * 2", 21).result("w") == 42


def test_identity_cycles_and_classes_survive_a_step() -> None:
    """KW-37."""
    w = run("""
class Own(Exception):
    pass
def main(o):
    a = [1]
    a.append(a)
    b = {'a': a, 'own': Own('x'), 'token': kw.Cancelled()}
    yield kw.suspend('r')
    return [b['a'] is a, a[1] is a, isinstance(b['own'], Own), isinstance(b['token'], kw.CancelToken)]
""")
    w.resume("w", "r")
    assert w.result("w") == [True] * 4


def test_5000_settled_waits_and_1000_nested_tasks_need_no_stack() -> None:
    """KW-38. The nested ones are also saved and loaded."""
    w = run("""
def deep(n):
    if n:
        return (yield deep(n - 1)) + 1
    return (yield kw.suspend('r'))
def main(o):
    s = kw.suspend('s')
    kw.cancel(s)
    for _ in range(5000):
        yield 1
    return (yield deep(1000))
""")
    w.resume("w", "r", 1)
    assert w.result("w") == 1001


def test_a_failed_step_leaks_nothing_into_the_steps_of_others() -> None:
    """KW-36, KW-39: neither its outputs nor its waits."""
    w = run("""
def main(o):
    say('mine')
    held = kw.suspend('leak') if o == 'bad' else None
    lock = __import__('threading').Lock() if o == 'bad' else None
    yield kw.suspend('r')
    say('end')
""", "bad")
    assert (w.header("w") or {})["status"] == "parked"
    assert w.outputs_to("out") == []
    w.start("v", "good")
    assert w.waits("v") == ["r"]
    w.resume("v", "leak", 1)
    w.resume("v", "r")
    assert w.outputs_to("out") == ["mine", "end"]


def test_a_stale_resume_leaks_no_waits_into_the_next_start() -> None:
    """KW-40."""
    w = run("def main(o):\n    say([kw.workflow_id(), (yield kw.suspend(o))])", "one")
    w.resume("w", "unknown", 1)
    w.start("v", "two")
    w.resume("v", "one", "stolen")
    assert w.outputs_to("out") == []
    w.resume("w", "one", "mine")
    w.resume("v", "two", "mine too")
    assert w.outputs_to("out") == ["['w', 'mine']", "['v', 'mine too']"]


def test_one_explicit_id_is_used_in_one_suspension_after_the_other() -> None:
    """T-KW-7, with one argument."""
    w = run("""
def main(o):
    for _ in range(2):
        kw.output(f'msg1:{o["name"]}', 'schedule', key='w|testRef')
        kw.output((yield kw.suspend('testRef')), 'output')
    return 'suspendResumeTestRet'
""", {"name": "arg"})
    w.resume("w", "testRef", "first")
    w.resume("w", "testRef", "second")
    assert w.outputs_to("schedule") == ["msg1:arg"] * 2
    assert w.outputs_to("output") == ["first", "second"]
    assert (w.result("w"), w.ids()) == ("suspendResumeTestRet", [])


@pytest.mark.parametrize(("combine", "expected"), [("kw.all([c('a'), c('b')])", ["a CT", "b CT"]), ("kw.race([c('a'), c('b')])", "a CT")])
def test_children_that_catch_their_cancel_give_the_combinator_its_value(combine: str, expected: Any) -> None:
    """T-KW-10."""
    w = run(f"""
def c(n):
    try:
        yield kw.suspend(n)
    except kw.CancelToken:
        return n + ' CT'
def main(o):
    x = {combine}
    yield kw.suspend('go')
    kw.cancel(x)
    return (yield x)
""")
    w.resume("w", "go")
    assert w.result("w") == expected


def test_all_and_race_settle_in_time_order() -> None:
    """T-KW-11."""
    body = "def after(s, v, fail=False):\n    yield kw.sleep(s)\n    if fail:\n        raise kw.WorkflowError(v)\n    return v\n"
    w = run(body + "def main(o):\n    return (yield kw.all([0, after(0.1, 1), after(0.3, 2), after(0.5, 3)]))")
    w.advance(0.499)
    assert w.values("workflow-result") == []
    w.advance(0.001)
    assert w.result("w") == [0, 1, 2, 3]
    w = run(body + "def main(o):\n    return (yield kw.all([after(0.1, 1), after(0.3, 2, True), after(0.5, 3)]))")
    w.advance(0.3)
    assert w.values("workflow-error") == [2]
    w = run(body + "def main(o):\n    return (yield kw.race([after(0.1, 1), after(1, 2), after(0.5, 3), kw.suspend('never')]))")
    w.advance(0.1)
    assert w.result("w") == 1


def test_the_same_record_on_the_same_bytes_gives_the_same_outputs() -> None:
    """Architecture §1: a step is a function of its arguments."""
    module = load("def main(o):\n    yield kw.all([kw.sleep(1), kw.suspend(), kw.suspend('x')])")
    context = Context(5, "i", Topics(), workflows=Workflows({"main": module.main}, "main"))
    record = Record("workflow-resume", 0, 3, 5, b"w", b"new:{}")
    assert step(None, record, context).outputs == step(None, record, context).outputs


def test_an_answer_that_comes_before_its_suspension_exists_is_ignored_by_rule() -> None:
    """KW-19: a ref is known from `kw.suspend` on. For messages that may come at any time there are signals."""
    w = run("def main(o):\n    yield kw.suspend('gate')\n    return (yield kw.suspend('late'))")
    w.resume("w", "late", "too early")
    assert w.counts[-1] == "unknown-ref"
    w.resume("w", "gate")
    assert w.waits("w") == ["late"]


def test_the_defaults_are_those_of_the_reference() -> None:
    """KW-14."""
    config = Config()
    assert Limits() == Limits(**{name: getattr(config, name) for name in Limits.__struct_fields__})
    assert (config.application_id, config.bootstrap_servers) == ("workflow-engine", "localhost:9092")
    assert (config.resume_topic, config.result_topic, config.error_topic, config.scheduler_topic) == ("workflow-resume", "workflow-result", "workflow-error", "workflow-scheduler")


def test_the_test_kit_drives_a_workflow_by_hand_with_real_cancelling() -> None:
    """KW-35: start, resume, reject, the trace of outputs, and the pending waits. The reference's mock cannot cancel."""
    w = run("""
def child():
    try:
        yield kw.suspend('child')
    except kw.Cancelled:
        say('undone')
        raise
def main(o):
    yield kw.all([child(), kw.suspend('other')])
""")
    assert w.waits("w") == ["other", "child"]
    w.resume("w", "other", error="refused")
    assert (w.values("workflow-error"), w.outputs_to("out"), w.waits("w")) == (["refused"], ["undone"], [])


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        ("21", -973932308), ("foobar", -790332482), ("abc", 479470107), ("a-little-bit-long-string", -985981536), ("a-little-bit-longer-string", -1486304829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
    ],
)  # fmt: skip
def test_a_key_belongs_to_the_partition_that_javas_clients_choose(key: str, hashed: int) -> None:
    """K6: the values are those of Kafka's own test of its hash (UtilsTest.testMurmur2)."""
    assert partition_of(key.encode(), 1_000_003) == (hashed & 0x7FFFFFFF) % 1_000_003
