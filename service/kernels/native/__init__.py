"""Compiled CPU kernels: C sources, the library built from them and the functions over it. Optional: torch stands in where it is absent."""
