"""Ways to run a program: reference interpreter, stacked and streamed lowerings."""
