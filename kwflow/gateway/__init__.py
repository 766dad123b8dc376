"""HTTP for programs in any language: starts, messages, outcomes and callbacks over one `Client` (docs/HTTP.md).

A gateway has no state: everything that a caller waits for is in the log, so several gateways can run side by side, and any
other one replaces one that was killed.  `problems.py` maps errors to statuses, `service.py` waits, and `gate.py` admits requests;
each topic has its routes in a module of its own.  The package needs `kwflow[gateway]`, and must not know a driver.
"""
