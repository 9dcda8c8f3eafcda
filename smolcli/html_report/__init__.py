"""`smol report`: an HTML page with the numbers and charts of a run."""
