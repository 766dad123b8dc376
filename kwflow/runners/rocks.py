"""How kwflow opens RocksDB: one block cache and one write-buffer manager for all stores of the process.

With a cache per store, memory would grow with the number of partitions: by RocksDB's defaults each has 32 MB of cache and
two memtables of 64 MB.  Here memtables, index blocks and filter blocks are all charged to one cache, so `rocksdb_bytes_max`
holds for the process, however many partitions it owns.
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

_BLOOM_BITS = 10  # one in a hundred reads of a missing key goes to disk
_MEMTABLE_BYTES_MAX = 16 * 1024 * 1024
_ARENA_BYTES = 32 * 1024  # a memtable allocates memory in blocks of this size; with RocksDB's 1 MB, two blocks for each of 200 stores would exceed the cache


class Memory:
    """The memory that the stores of a process share; `usage` returns how much of it they use now, in bytes."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.cache = Cache(bytes_max)
        self.buffers = WriteBufferManager.new_write_buffer_manager_with_cache(bytes_max // 2, False, self.cache)

    def usage(self) -> int:
        return self.cache.get_usage()


def entries(db: Rdict, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries with this key prefix, in order, from `start` on; it must not end in 0xff.  Raises what RocksDB raises for a damaged database."""
    # 1. A hundred thousand workflows have ended; until the store is compacted it keeps a tombstone for each.
    # 2. A scan looks for the first key of a prefix that sorts before them, and there is none.
    # 3. Without an upper bound RocksDB passes all the tombstones to find the next key that exists.
    within = ReadOptions()
    within.set_iterate_upper_bound(prefix[:-1] + bytes([prefix[-1] + 1]))
    found = db.iter(within)
    found.seek(max(prefix, start))
    while found.valid():
        yield cast(bytes, found.key()), cast(bytes, found.value())
        found.next()
    # 1. A timer is stored in a block that the disk has damaged.
    # 2. RocksDB's iterator stops before it, as it does at the end of the database.
    # 3. Without this check the timer would never fire, and nobody would know.
    found.status()


class Place:
    """The directory of an open database, which may be replaced under it:

    1. An operator removes, moves or replaces the directory.
    2. The engine has the files open and goes on: an embedded one accepts records that nobody finds at its next start.
    3. RocksDB creates further files by name, the last ones on close: over the files of a process that has started in the new directory meanwhile.
    """

    def __init__(self, directory: Path) -> None:
        self._lock = (directory / "LOCK").absolute()  # RocksDB's own
        self._opened = os.stat(self._lock)

    def is_left(self) -> bool:
        """Whether the directory is gone or is another one now; then nothing more may be written."""
        try:
            return not os.path.samestat(os.stat(self._lock), self._opened)
        except OSError:
            return True

    def close(self, db: Rdict) -> None:
        """Close the database, unless its directory was replaced: then it is leaked on purpose, as Python would also close it when it frees it or exits."""
        if self.is_left():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))
        else:
            db.close()


@functools.cache
def memory(bytes_max: int) -> Memory:
    """Return the one Memory of this process for this limit."""
    return Memory(bytes_max)


def opened(directory: Path, bytes_max: int) -> Rdict:
    """Open a store with raw keys and values, and create it if it is missing.  Raises what rocksdict raises."""
    shared = memory(bytes_max)
    table = BlockBasedOptions()
    table.set_block_cache(shared.cache)
    table.set_bloom_filter(_BLOOM_BITS, False)
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    # 1. A table of a million timers is one file, whose filter is one block of 2 MB.
    # 2. The cache is divided into 64 shards of 2 MB, none of which keeps such a block.
    # 3. Each lookup of a key reads the whole block again, in 0.3 ms.  Of a partitioned filter it reads one part of 4 KB, which stays cached.
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
    return Rdict(str(directory), made, {"default": made})  # passed by name too, or an existing store would not get these options, but a cache of its own and no bloom filter


@contextlib.contextmanager
def failing(directory: Path) -> Iterator[None]:
    """Turn errors of the disk and of rocksdict, which raises plain Exception, into TransportError."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, (OSError, DbClosedError)):
            raise
        raise TransportError(f"{directory} cannot be used: {error}") from None
