"""Images on their way into a language model: the vision tower, its features, the tokens that stand for them."""
