"""A page that shows what came of a run: its results and its manifest in numbers and charts."""
