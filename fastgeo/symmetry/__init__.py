"""Which permutations, and other linear maps, of its channels leave the function of a network."""
