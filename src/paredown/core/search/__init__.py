"""Choosing over whole models: budgets over layers, levels, states that are scored, and a search among them."""
