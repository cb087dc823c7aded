"""How N networks compute one operation in one call."""
