"""What methods on experts share: routing, clusters of experts, experts cut out of dense MLPs, serving them."""
