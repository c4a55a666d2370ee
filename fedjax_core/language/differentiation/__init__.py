"""Transforms of programs: a program becomes a JAX function of one member, and comes back.

bridge      broadcast and sum as linear primitives; a program as a function of one member
pruning     equations that no result needs, left out
flow        where each value of a traced function lives, and after how many round trips
assembly    the pieces of a program, one for each stage and placement
staging     a function as a program again
transforms  gradients and vectorisation
"""
