"""A transfer between two banks: each booking is made exactly once, since the key of the call is committed in the same transaction."""

import json
import os
import sqlite3

import kwflow as kw

TABLES = """
CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY, cents INTEGER NOT NULL CHECK (cents >= 0));
CREATE TABLE IF NOT EXISTS done (key TEXT PRIMARY KEY, result TEXT NOT NULL);
"""


def connect(bank):
    connection = sqlite3.connect(os.path.join(os.environ.get("BANKS", "."), f"{bank}.db"), timeout=30, isolation_level=None)
    connection.executescript(TABLES)
    return connection


def once(connection, work):
    """Do the work, and note its result in the same transaction.  If an attempt of this call has committed before, return what it noted."""
    key = kw.activity_info().idempotency_key
    connection.execute("BEGIN IMMEDIATE")  # two attempts may run at the same time: the second waits here, and then finds the note
    try:
        noted = connection.execute("SELECT result FROM done WHERE key = ?", (key,)).fetchone()
        if noted is None:
            noted = (json.dumps(work(connection)),)
            connection.execute("INSERT INTO done VALUES (?, ?)", (key, *noted))
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    return json.loads(noted[0])


@kw.activity(timeout=60)
def book(bank: str, account: str, cents: int) -> int:
    """Add to an account, or take from it; return its balance.  Raises BusinessError if there is not enough, or no such account."""

    def booked(connection):
        try:
            changed = connection.execute("UPDATE accounts SET cents = cents + ? WHERE name = ?", (cents, account))
        except sqlite3.IntegrityError:
            raise kw.BusinessError("not_enough", account) from None
        if changed.rowcount == 0:
            raise kw.BusinessError("no_account", account)
        return connection.execute("SELECT cents FROM accounts WHERE name = ?", (account,)).fetchone()[0]

    connection = connect(bank)
    try:
        return once(connection, booked)
    finally:
        connection.close()


def main(opts):
    """`opts`: {"from": [bank, account], "to": [bank, account], "cents"}.  Returns both balances; gives the money back if it cannot be paid in."""
    left = yield book(*opts["from"], -opts["cents"])
    try:
        return [left, (yield book(*opts["to"], opts["cents"]))]
    except (kw.BusinessError, kw.ActivityError):
        yield book(*opts["from"], opts["cents"])
        raise
