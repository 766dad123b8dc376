"""An agent: a model decides, tools act, a person answers when it asks; a thousand turns cost what the first ones did."""

import dataclasses
from collections import deque
from datetime import timedelta

import kwflow as kw

REMEMBERED = 20  # messages; older ones are in the model's own summary


@dataclasses.dataclass
class Move:
    """What the model wants: a tool with its argument, a question for a person, or to be done with an answer."""

    tool: str | None = None
    argument: str = ""
    question: str | None = None
    answer: str | None = None
    summary: str = ""


@kw.activity(timeout=120, retry=kw.Retry(max_attempts=10, first=2, max=120))
async def ask_model(goal: str, turn: int, summary: str, memory: list[str]) -> Move:
    """Put your model's client here; this one counts, asks a person now and then, and is done after 30 turns."""
    if turn == 30:
        return Move(answer=f"{goal}: {summary}")
    if turn % 10 == 9:
        return Move(question=f"go on after {turn + 1} turns?", summary=summary)
    return Move(tool="add", argument=f"{turn} 1", summary=f"{turn + 1} turns")


@kw.activity(timeout=60)
def add(text: str) -> str:
    return str(sum(map(int, text.split())))


@kw.activity(timeout=60)
def look_up(text: str) -> str:
    return f"nothing is known of {text}"


TOOLS = {"add": add, "look_up": look_up}


def use(move):
    """The tool's result; an error is something the model can learn from."""
    tool = TOOLS.get(move.tool)
    if tool is None:
        return f"there is no tool {move.tool!r}; there are {', '.join(TOOLS)}"
    try:
        return (yield tool(move.argument))
    except (kw.ActivityError, kw.BusinessError) as error:
        return f"{move.tool} failed: {error}"


def answer_of_person(question):
    """Signal `answer`; nobody there for a day is an answer, too."""
    kw.set_status({"question": question})
    try:
        return (yield kw.timeout(kw.wait_signal("answer"), timedelta(days=1)))
    except TimeoutError:
        return "nobody answered"


def main(opts):
    """`opts`: {"goal", "turns_max"}.  Returns {"answer", "turns"}."""
    memory, summary = deque(maxlen=REMEMBERED), ""
    for turn in range(opts.get("turns_max", 1000)):
        move = yield ask_model(opts["goal"], turn, summary, list(memory))
        if move.answer is not None:
            return {"answer": move.answer, "turns": turn}
        summary = move.summary
        if move.question is not None:
            answer = yield answer_of_person(move.question)
            memory.append(f"{move.question} {answer}")
        else:
            result = yield use(move)
            memory.append(f"{move.tool}({move.argument}) = {result}")
    raise kw.BusinessError("no-answer", f"none after {opts.get('turns_max', 1000)} turns")
