"""An agent: a model decides, tools act, and a person answers its questions; the thousandth turn costs no more than the first."""

import dataclasses
from collections import deque
from datetime import timedelta

import kwflow as kw

REMEMBERED = 20  # messages; the model's summary covers older ones


@dataclasses.dataclass
class Move:
    """What the model wants to do: use a tool, ask a person, or finish with an answer."""

    tool: str | None = None
    argument: str = ""
    question: str | None = None
    answer: str | None = None
    summary: str = ""


@kw.activity(timeout=120, retry=kw.Retry(max_attempts=10, first=2, max=120))
async def ask_model(goal: str, turn: int, summary: str, memory: list[str]) -> Move:
    """Put your model's client here; this stub counts, asks a person every 10 turns, and finishes after 30."""
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
    return f"nothing is known about {text}"


TOOLS = {"add": add, "look_up": look_up}


def use(move):
    """Return the tool's result; an error is returned, too, so that the model can learn from it."""
    tool = TOOLS.get(move.tool)
    if tool is None:
        return f"there is no tool {move.tool!r}; there are {', '.join(TOOLS)}"
    try:
        return (yield tool(move.argument))
    except (kw.ActivityError, kw.BusinessError) as error:
        return f"{move.tool} failed: {error}"


def answer_of_person(question):
    """Wait for the signal `answer`; if nobody answers for a day, that is an answer, too."""
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
