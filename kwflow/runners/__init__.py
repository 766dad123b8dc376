"""What performs decisions: loop.py says what a record does; kafka/, embedded/ and faust.py make it happen, activities/ runs what it hands out."""
