"""How fast a step is beside what people set up instead, and where its time goes."""
