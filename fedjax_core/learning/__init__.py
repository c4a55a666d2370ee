"""Models, client work, metrics and the training loop. Import its modules by name."""
