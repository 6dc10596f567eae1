"""Drafting methods, measured."""
