"""A campaign of damaged inputs: each must be refused by name, or load and run.

``python -m fuzz`` in the folder ``tests`` runs it; ``make fuzz`` with 10,000 mutants.
"""
