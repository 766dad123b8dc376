"""`make bench`: each figure beside a bare loop measured in the same run; a table and bench-results.json."""
