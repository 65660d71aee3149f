"""Looking without changing: the residual stream walked block by block, effects of skips, readouts, expansions."""
