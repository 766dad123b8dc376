"""Activities in a process: what waits (`backlog.py`), what runs and when (`dispatch.py`), how (`runs.py`), what answers (`answers.py`); and calls that are lent to others (`lent.py`)."""
