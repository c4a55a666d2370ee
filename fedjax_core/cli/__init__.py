"""The command line ``fedjax-core``. Nothing in the library imports it."""
