"""Which permutations of its channels leave the function of a network as it is."""
