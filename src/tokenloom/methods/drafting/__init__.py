"""Who guesses the next tokens: drafting methods, and the specs that combine them."""

from tokenloom.methods.drafting import draft_model, ngram, ppd, token_recycling
from tokenloom.methods.drafting.combination import Combination, draft_method

__all__ = ["Combination", "draft_method", "draft_model", "ngram", "ppd", "token_recycling"]
