"""What methods on depth share: blocks taken out, gated, run side by side, shared, rebuilt, led around."""
