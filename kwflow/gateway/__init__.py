"""HTTP for programs in any language: starts, messages, outcomes and callbacks over one `Client` (docs/HTTP.md).

A gateway has no state: what a caller waits for lies in the log, so that several run side by side and one that was
killed is replaced by any other.  `problems.py` says which error is which status, `service.py` waits, `gate.py` lets in;
each topic has its routes in a module of its own.  It needs `kwflow[gateway]`, and must not know a driver.
"""
