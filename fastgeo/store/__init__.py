"""Files that are whole or not there, and states to go on from."""
