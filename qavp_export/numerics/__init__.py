"""The arithmetic of the project as a NumPy reference; every graph, kernel and engine is tested against it."""
