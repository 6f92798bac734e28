"""The verbs of the command line, a file for each or for those that belong together."""
