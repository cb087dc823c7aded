"""A path over the processes of a mesh: which of them holds what, and what they tell each other."""
