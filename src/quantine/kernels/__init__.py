"""Kernels: the computations that take the time.

Each has a folder: ``reference.py`` says in plain PyTorch, on any device, what is computed;
``cpu.py`` computes the same in C++; the functions in ``__init__.py`` choose between the two.
"""
