"""A module's own forward, called on other tensors: what stacking and symmetry share."""
