"""Activities: waiting calls (`backlog.py`), when they run (`dispatch.py`) and how (`runs.py`), their answers (`answers.py`), calls lent to others (`lent.py`)."""
