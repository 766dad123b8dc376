"""A web console: pages, made on the server, on which one sees what sleeps, where and why, and can act on it (docs/CONSOLE.md).

It has no state and no part in what an engine does: it reads as `kwflow list`, `show` and `dead-letters` do, and acts as the commands do.
`site.py` is what pages share, `reading.py` and `sources.py` gather what they tell, `pages.py` and `acting.py` are the routes, `gate.py` lets in.
It needs `kwflow[console]`.
"""
