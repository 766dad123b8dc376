"""Runners carry out decisions: loop.py and batch.py decide what a record does; kafka/, embedded/ and faust.py make it happen; activities/ runs the calls it hands out."""
