"""Ways of keeping keys and values that several methods share; `core.cache` has the base and the window."""
