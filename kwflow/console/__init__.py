"""A web console: pages, rendered on the server, that show which workflows wait, where and why, and let you act on them (docs/CONSOLE.md).

It has no state and no part in what an engine does: it reads as `kwflow list`, `show` and `dead-letters` do, and acts as the commands do.
`site.py` has what pages share, `reading.py` and `sources.py` gather what they show, `pages.py` and `acting.py` are the routes, and `gate.py` admits
requests.  The package needs `kwflow[console]`.
"""
