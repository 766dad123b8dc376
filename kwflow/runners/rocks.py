"""How kwflow opens RocksDB: one block cache and one write-buffer manager for every store of the process.

A cache per store would multiply by partitions: each brings 32 MB of cache and two memtables of 64 MB by RocksDB's
defaults.  Here memtables, index and filter blocks are all charged to one cache, so `rocksdb_bytes_max` holds for the
process however many partitions it owns.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from rocksdict import BlockBasedIndexType, BlockBasedOptions, Cache, DbClosedError, Options, Rdict, ReadOptions, WriteBufferManager

from kwflow.errors import TransportError

__all__ = ["Memory", "Place", "entries", "failing", "memory", "opened"]

_BLOOM_BITS = 10  # one read in a hundred for a key that is not there goes to disk
_MEMTABLE_BYTES_MAX = 16 * 1024 * 1024
_ARENA_BYTES = 32 * 1024  # a memtable takes its memory in pieces of this; of the 1 MB that RocksDB chooses, two for each of 200 stores would be more than the cache


class Memory:
    """What the stores of a process share; `usage` is what they use of it now, in bytes."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.cache = Cache(bytes_max)
        self.buffers = WriteBufferManager.new_write_buffer_manager_with_cache(bytes_max // 2, False, self.cache)

    def usage(self) -> int:
        return self.cache.get_usage()


def entries(db: Rdict, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Keys with this prefix, which does not end in 0xff, and their values, in order, from `start` on.  Raises whatever says that the database is damaged."""
    # 1. a hundred thousand workflows have ended, and lie deleted in the store until it is compacted
    # 2. somebody looks for the first of what lies before them, and nothing is there
    # 3. without a bound RocksDB passes all of them, to find the next key that is
    within = ReadOptions()
    within.set_iterate_upper_bound(prefix[:-1] + bytes([prefix[-1] + 1]))
    found = db.iter(within)
    found.seek(max(prefix, start))
    while found.valid():
        yield cast(bytes, found.key()), cast(bytes, found.value())
        found.next()
    # 1. a timer lies in a block that the disk has damaged
    # 2. RocksDB's iterator ends before it, as it does at the end of the database
    # 3. the timer would never fire, and nobody would know
    found.status()


class Place:
    """Where a database is open.

    1. an operator removes, moves or replaces its directory
    2. the engine has the files open, and goes on: an embedded one takes records that nobody finds at its next start
    3. RocksDB makes further files by name, the last ones when it is closed: in the place of those of whoever has begun there meanwhile
    """

    def __init__(self, directory: Path) -> None:
        self._lock = (directory / "LOCK").absolute()  # RocksDB's own
        self._opened = os.stat(self._lock)

    def is_left(self) -> bool:
        """Whether what is there now is something else, or nothing: then write no more."""
        try:
            return not os.path.samestat(os.stat(self._lock), self._opened)
        except OSError:
            return True

    def close(self, db: Rdict) -> None:
        """In a place that is left, never, and not when Python forgets it or ends, which would close it as well."""
        if self.is_left():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))
        else:
            db.close()


@functools.cache
def memory(bytes_max: int) -> Memory:
    """The one Memory of this process for this limit."""
    return Memory(bytes_max)


def opened(directory: Path, bytes_max: int) -> Rdict:
    """A store with raw keys and values, made if it is missing.  Raises what rocksdict raises."""
    shared = memory(bytes_max)
    table = BlockBasedOptions()
    table.set_block_cache(shared.cache)
    table.set_bloom_filter(_BLOOM_BITS, False)
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    # 1. a table of a million timers is one file, its filter one block of 2 MB
    # 2. the cache is divided into 64 parts of 2 MB, none of which keeps such a block
    # 3. each look for a key reads all of it again: 0.3 ms; of a filter in parts it reads one of 4 KB, which stays
    table.set_index_type(BlockBasedIndexType.two_level_index_search())
    table.set_partition_filters(True)
    table.set_pin_top_level_index_and_filter(True)
    made = Options(raw_mode=True)
    made.create_if_missing(True)
    made.set_block_based_table_factory(table)
    made.set_write_buffer_manager(shared.buffers)
    made.set_write_buffer_size(min(_MEMTABLE_BYTES_MAX, max(64 * 1024, bytes_max // 4)))
    made.set_arena_block_size(_ARENA_BYTES)
    made.set_keep_log_file_num(2)
    return Rdict(str(directory), made, {"default": made})  # named, as a store that is there already would get none of them: a cache of its own, and no bloom filter


@contextlib.contextmanager
def failing(directory: Path) -> Iterator[None]:
    """What the disk and rocksdict, which has no class of its own for it, raise here as TransportError."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, (OSError, DbClosedError)):
            raise
        raise TransportError(f"{directory} cannot be used any more: {error}") from None
