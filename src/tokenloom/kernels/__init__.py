"""Compute backends behind one interface."""
