"""Any nn.Module as a function of stacked parameters: N networks in one pass."""
