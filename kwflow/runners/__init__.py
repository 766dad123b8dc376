"""Runners carry out decisions: loop.py decides what a record does; kafka/, embedded/ and faust.py make it happen; activities/ runs the calls it hands out."""
