"""The language: types, placed values, programs, and the operators that build them."""
