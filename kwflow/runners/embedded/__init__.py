"""The engine with no server: `engine.py` holds a RocksDB directory, `socket.py` lets other processes in."""
