"""`python -m tests.simulation 0-200` plays these seeds, as `make sim SEEDS=0-200` does; a failure says how to play it again."""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from kwflow import durable  # noqa: E402
from tests.simulation.checks import check  # noqa: E402
from tests.simulation.world import World  # noqa: E402


def digest(world: World) -> str:
    """The hash of everything that was logged and written, in order."""
    written = "".join(f"{place}{entry.offset}{entry.timestamp_ms}{entry.key!r}{entry.value!r}{entry.headers}" for place, entry in world.broker.journal)
    return hashlib.sha256(("\n".join(world.log).replace(str(world.directory), "") + written).encode()).hexdigest()


class Queued(World):
    queue_share = 1.0


class Fed(World):
    feed_share = 1.0


class QueuedAndFed(Queued, Fed):
    pass


KINDS = {"": World, "--queues": Queued, "--feeds": Fed, "--queues --feeds": QueuedAndFed}


def play(seed: int, options: str, lines: int, digests: bool, happened: "collections.Counter[str]") -> bool:
    """Run and check one seed; print what went wrong.  False if it failed."""
    world = KINDS[options](seed)
    begun = time.perf_counter()
    try:
        world.run()
        check(world)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and type(error) is KeyboardInterrupt:
            raise
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        print(world.story(lines))
        traceback.print_exception(error)
        again = f"'{seed} {options}'" if options else seed
        print(f"FAILED seed {seed} at commit {commit}; again: make sim SEEDS={again}", flush=True)
        return False
    if digests:
        print(f"digest of seed {seed}: {digest(world)}")
    happened.update(world.happened)
    print({**world.summary(), "s": round(time.perf_counter() - begun, 2)}, flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+", help="42, or 0-200 (the last one not included)")
    parser.add_argument("--every", default="0/1", help="1/2: the second half of the seeds, for two processes")
    parser.add_argument("--queues", action="store_true", help="workers in every seed, not only in a fifth of them")
    parser.add_argument("--feeds", action="store_true", help="a topic of others in every seed, likewise")
    parser.add_argument("--lines", type=int, default=60, help="of the log before a failure")
    parser.add_argument("--keep-going", action="store_true", help="after a failure")
    parser.add_argument("--digest", action="store_true", help="of each run, to compare two")
    given = parser.parse_args()
    durable.set_abandoning(True, everywhere=True)  # for good: this process runs nothing but the simulation
    part, parts = map(int, given.every.split("/"))
    seeds = [seed for text in given.seeds for seed in (range(*map(int, text.split("-"))) if "-" in text else [int(text)])]
    options = " ".join(option for option, wanted in (("--queues", given.queues), ("--feeds", given.feeds)) if wanted)
    failed = []
    happened: collections.Counter[str] = collections.Counter()
    for seed in seeds[part::parts]:
        if not play(seed, options, given.lines, given.digest, happened):
            failed.append(seed)
            if not given.keep_going:
                break
    print(f"happened: {json.dumps(dict(sorted(happened.items())))}")
    print(f"{len(seeds[part::parts])} seeds, failed: {failed or 'none'}", flush=True)
    os._exit(1 if failed else 0)  # no instance's cleanup runs


if __name__ == "__main__":
    main()
