"""Data sets that tasks load or download, and what makes that safe. A module for each; `load` gives the data."""
