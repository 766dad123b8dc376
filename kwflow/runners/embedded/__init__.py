"""The engine without a server: `engine.py` holds a RocksDB directory, `socket.py` gives other processes access to it."""
