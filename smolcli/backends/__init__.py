"""Whatever computes answers, behind one interface."""
