"""fxwidth: the width compiler for PyTorch."""
