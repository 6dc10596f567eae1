"""Structured output: answers that fit a JSON schema, a regular expression, a list of choices or a grammar."""

from tokenloom.structured.grammar import Grammar, Grammars, grammars_of
from tokenloom.structured.spec import Source, Structured

__all__ = ["Grammar", "Grammars", "Source", "Structured", "grammars_of"]
