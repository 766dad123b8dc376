"""`make bench`: each figure next to that of a bare loop, measured in the same run; the results are a table and bench-results.json."""
